"""What one look at many images shows: norms in every block, and the attention of `[CLS]` before and after ITAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from itae_utils.artifacts import patch_norms
from itae_utils.attention import ITAE, attenuated_logits, check_blocks, scaled_logits, select_artifacts
from itae_utils.errors import ItaeError
from itae_utils.layers import SOURCES
from itae_utils.thresholds import sample_indices
from itae_utils.vit import anatomy, block_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from itae_utils.backbones import Backbone


@dataclass(frozen=True)
class Observation:
    """Per image and patch, for `indices` of a data set; N patches in reading order of `patch_grid`.

    Attributes:
        indices: (n,) numbers of the images in the data set.
        patch_grid: rows and columns.
        hidden_norms: (n, blocks, N), L2 norm of the patch token after each block, before the final norm.
        norms: "query", "key", "value" -> (n, N), L2 norm in the last block, all heads together.
        attention: (n, N), weight from `[CLS]` in the last block, mean over heads, in the model as it is.
        attention_after: the same under the setting that was given; equal to `attention` when none was.
        artifacts: (n, N) bool, what the setting acts on.
        truth: (n, N) bool, the true artifacts of a planted backbone; else None.
    """

    indices: np.ndarray
    patch_grid: tuple[int, int]
    hidden_norms: np.ndarray
    norms: dict[str, np.ndarray]
    attention: np.ndarray
    attention_after: np.ndarray
    artifacts: np.ndarray
    truth: np.ndarray | None


def observe(
    backbone: Backbone,
    dataset: Dataset,
    itae: ITAE | None = None,
    *,
    sample: int | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = 0,
) -> Observation:
    """Run the unmodified model once over the images and keep what tells artifacts.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        itae: setting of the last block, with a numeric threshold (or None in its place: nothing is attenuated).
        sample: look at this many images only, drawn by `seed`; None looks at all.
        seed: of the sample.
        batch_size: images at a time; "auto" as in `extract_features`.
        num_workers: processes that load images, or "auto", as in `model_batches`.
    """
    import torch

    from itae_utils.batches import model_batches

    if itae is not None:
        check_blocks(backbone.model, itae, backbone.truth)
        if itae.blocks > 1:
            raise ItaeError(f"blocks={itae.blocks}: what is observed is the last block, give a setting with blocks=1")
    indices = sample_indices(len(dataset), len(dataset) if sample is None else sample, seed)
    pieces: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode(), backbone.autocast():
        first = 0
        for images in model_batches(backbone, dataset, batch_size=batch_size, num_workers=num_workers, indices=indices):
            for name, values in _observe_batch(backbone, images, itae, first).items():
                pieces.setdefault(name, []).append(values.cpu().numpy())
            first += len(images)
    whole = {name: np.concatenate(values) for name, values in pieces.items()}
    return Observation(
        indices=indices,
        patch_grid=backbone.patch_grid,
        hidden_norms=whole["hidden"],
        norms={source: whole[source] for source in SOURCES},
        attention=whole["attention"],
        attention_after=whole["attention_after"],
        artifacts=whole["artifacts"],
        truth=whole.get("truth"),
    )


def _observe_batch(backbone: Backbone, images: Tensor, itae: ITAE | None, first_image: int) -> dict[str, Tensor]:
    import torch

    model, body = backbone.model, anatomy(backbone.model)
    prefix, last, doors = body.num_prefix_tokens, body.layers[-1], range(len(body.layers))
    seen: dict[str, Tensor] = {}
    if backbone.truth is None:
        entering = block_inputs(model, images, doors)
    else:
        with backbone.truth.watch(model) as watch:
            entering = block_inputs(model, images, doors)
        seen["truth"] = watch.mask
    after_each = [*[entering[door].tokens for door in doors[1:]], entering[doors[-1]].through(last.block)]
    seen["hidden"] = torch.stack([patch_norms(hidden, prefix) for hidden in after_each], dim=1)
    projected = last.project_input(entering[doors[-1]])
    seen |= {source: patch_norms(projected[source], prefix) for source in SOURCES}
    logits = scaled_logits(projected.heads("query")[:, :, :1], projected.heads("key"))
    shown = lambda row: row.softmax(dim=-1)[:, :, 0, prefix:].mean(dim=1)  # noqa: E731
    seen["attention"] = seen["attention_after"] = shown(logits)
    seen["artifacts"] = torch.zeros_like(seen["attention"], dtype=torch.bool)
    if itae is not None:
        threshold = None if itae.select == "oracle" else itae.thresholds[0]
        seen["artifacts"] = select_artifacts(seen[itae.source], threshold, itae, block=doors[-1],
                                             first_image=first_image, truth=seen.get("truth"))
        seen["attention_after"] = shown(attenuated_logits(logits, seen["artifacts"], itae))
    return seen
