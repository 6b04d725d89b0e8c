"""The explorer in JupyterLab: the same view with a kernel behind it, which computes what a page can't hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from IPython import display, get_ipython
from torch.utils.data import Dataset
from traitlets import Dict, HasTraits

from itae_utils.analysis.clustering import number_of_clusters, scorable
from itae_utils.analysis.feature_map import feature_map
from itae_utils.data.images import EncodedImage, open_image
from itae_utils.data.items import targets_of
from itae_utils.errors import ItaeError
from itae_utils.extraction.fitting import fit_setting, fit_thresholds
from itae_utils.extraction.observation import observe_rows, sample_indices
from itae_utils.figures.explorer import data as view
from itae_utils.figures.explorer.page import MODULE, STYLES, explorer_html
from itae_utils.figures.explorer.prepare import prepare
from itae_utils.files import in_one_line
from itae_utils.method.anatomy import adapt, block_index
from itae_utils.method.one_pass import OnePass
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import Backbone

try:
    from anywidget import AnyWidget
except ModuleNotFoundError:  # `explore` names the extra
    AnyWidget = None

MOST_IMAGES = 512
MOST_BYTES = 512 * 2**20  # of the tokens that the kernel keeps


def explore(backbone: Backbone, dataset: Dataset, itae: ITAE | None = None, **options: object
            ) -> Explorer | display.HTML:
    """Show the explorer in JupyterLab with this kernel behind it, so that features follow θ when it has come to rest.

    It holds a sample of at most 512 images, and fewer if the tokens that enter their last block exceed 512 MiB. Where a
    program runs the notebook, such as papermill, it returns the view of `prepare`, which needs no kernel.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        itae: the setting to start with, of one block; by default the keys, θ by "auto", and "min".
        options: clusters, seed, batch_size, num_workers and store, as for `prepare`.

    Raises:
        ItaeError: anywidget is not installed, or the setting is a control or edits several blocks.
    """
    if AnyWidget is None:
        raise ItaeError("explore needs anywidget, which is not installed: pip install 'itae-utils[lab]'")
    itae = ITAE() if itae is None else itae
    if (itae.blocks, itae.select) != (1, "threshold"):
        raise ItaeError(f"blocks={itae.blocks}, select={itae.select!r}: explore needs blocks=1 and select='threshold'")
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel and not kernel.get_parent().get("content", {}).get("allow_stdin", True):  # there is nobody to be asked
        return display.HTML(explorer_html(view.as_json(prepare(backbone, dataset, itae, **options).data)))
    return Explorer(backbone, dataset, itae, **options)


class Explorer(AnyWidget or HasTraits):
    """The view as a widget. It answers the view's messages, and survives those that are wrong."""

    _esm, _css = MODULE, STYLES
    data, answer = Dict().tag(sync=True), Dict().tag(sync=True)

    def __init__(self, backbone: Backbone, dataset: Dataset, itae: ITAE, *, clusters: int | None = None, seed: int = 0,
                 **reading: object) -> None:
        self.given, self.inputs = {"backbone": backbone, "dataset": dataset, **reading}, []
        self.fits = fit_thresholds(**self.given, seed=seed, rank=itae.rank)
        self.itae = fit_setting(**self.given, itae=itae, thresholds=self.fits)
        self.rule = itae.threshold if itae.needs_threshold else self.itae.thresholds[-1]
        size = 4 * backbone.dim * (adapt(backbone.model).num_prefix_tokens + int(np.prod(backbone.patch_grid)))
        numbers = sample_indices(len(dataset), max(1, min(MOST_IMAGES, MOST_BYTES // size)), seed)
        rows = observe_rows(**self.given, indices=numbers, rank=itae.rank, kept=self.inputs)
        self.last, self.rows = backbone.num_blocks - 1, {backbone.num_blocks - 1: rows}
        k = number_of_clusters(clusters, scorable(targets_of(dataset)), len(numbers))
        self.sample = {"k": k, "sample": len(numbers), "seed": seed, "kmeans_seed": seed}
        self.found = feature_map(self.features(self.itae), **self.sample, store=reading.get("store", "auto"))
        data = view.explorer_data(backbone, dataset, self.itae, self.fits.of_block(self.itae),
                                  replace(self.found, indices=numbers), rows=rows)
        live = {"blocks": backbone.num_blocks, "images": len(dataset), "most": MOST_IMAGES, "bytes": MOST_BYTES}
        super().__init__(data={**data, "live": live})
        self.on_msg(self._receive)

    def _receive(self, _widget: Explorer, content: dict[str, object], buffers: list[bytes]) -> None:
        try:
            found = self._compared(**content["setting"]) if "setting" in content else self._block(
                content["block"], *buffers)
        except Exception as error:  # of any kind: the reader sees it, and goes on
            found = {"problem": in_one_line(error if isinstance(error, ItaeError) else repr(error))}
        self.answer = {**found, "request": content["request"]}

    def features(self, setting: ITAE) -> dict[str, np.ndarray]:
        """Return the sample's features (m, dim) of the unmodified model and of a setting with a number for θ."""
        one_pass, batches = OnePass(self.given["backbone"].model, {"baseline": None, "itae": setting}), []
        with torch.inference_mode(), self.given["backbone"].autocast():
            for inputs in self.inputs:
                done = one_pass.after({self.last: inputs}, range(len(inputs.tokens)))
                batches.append({name: output.float().cpu().numpy() for name, (output, _) in done.items()})
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def _compared(self, source: str, theta: float | None, edit: str, alpha: float) -> dict[str, object]:
        setting = replace(self.itae, source=source, threshold=(theta,), attenuation=edit, alpha=alpha, substitutes=None,
                          tail=self.itae.tail if source == self.itae.source else None)
        setting = fit_setting(**self.given, itae=setting, thresholds=self.fits)  # for the vectors of "substitute"
        features = self.features(setting)
        return view.comparison_data(feature_map(features, **self.sample, points=self.found.points, store=None))

    def _block(self, block: int, upload: bytes | None = None) -> dict[str, object]:
        """Return what the view shows of a block, and of an uploaded file."""
        backbone, index = self.given["backbone"], block_index(self.given["backbone"].model, block)
        how, numbers, own = {"block": index, "rank": self.itae.rank}, self.rows[self.last].indices, None
        rows = self.rows[index] = self.rows.get(index) or observe_rows(**self.given, indices=numbers, **how)
        if upload is not None:
            picture = open_image(EncodedImage(upload))
            own = view.panel_data(observe_rows(backbone, [picture], np.zeros(1, int), **how, batch_size=1, store=None),
                                  [view.jpeg(backbone.picture(picture), view.LARGEST)])
        sources = [view.source_data(source, fit, replace(self.itae, threshold=(fit.apply(self.rule),)))
                   for source, fit in self.fits.of_block(self.itae, index).items()]
        return {"block": index, "sources": sources, "panel": view.panel_data(rows, []), "own": own}
