"""Register neurons of a backbone, found on a sample of images without labels (arXiv 2506.08010, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from itae_utils.extraction.batches import checked_inputs, chosen_batch_size
from itae_utils.extraction.fitting import SAMPLE, fitted_settings, fitted_thresholds
from itae_utils.extraction.observation import measured_batches, sample_indices
from itae_utils.method.anatomy import tokens_entering
from itae_utils.method.register_setting import TestTimeRegisters
from itae_utils.method.registers import apply_registers, check_registers, normed_registers, outlier_activations
from itae_utils.method.statistics import patch_norms
from itae_utils.method.thresholds import SHARE_RANGE
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import Place, setting_key

TOP_K = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800)
MOST_LEFT = 0.01  # share of the outliers


def find_register_neurons(backbone: Backbone, dataset: Dataset, setting: TestTimeRegisters | None = None, *,
                          sample: int = SAMPLE, seed: int = 0, batch_size: int | Literal["auto"] = "auto",
                          store: str | Path | Store | None = "auto") -> TestTimeRegisters:
    """Return a setting with numbers for "auto", and with the means of "bias"; its `reason` says what was found.

    If there are no outliers, or no `top_k` removes them, the setting has no neurons and does nothing. `top_k` is chosen
    on other images of the same number, as far as there are others. `extract_features` makes this setting by itself.
    The arguments are those of `fit_setting`; no setting stands for `TestTimeRegisters()`.

    Raises:
        ItaeError: a setting that the model can't run.
    """
    setting, dataset = setting or TestTimeRegisters(), checked_inputs(backbone, dataset, 0)
    check_registers(backbone.model, setting)
    return fitted_registers(Place(open_store(store), backbone, dataset), setting, sample, seed, batch_size)


def fitted_registers(place: Place, setting: TestTimeRegisters, sample: int = SAMPLE, seed: int = 0,
                     batch_size: int | Literal["auto"] = "auto") -> TestTimeRegisters:
    """Return what `find_register_neurons` does, for the backbone and the data set of a place."""
    drawn = {"sample": sample, "seed": seed, "batch_size": chosen_batch_size(batch_size, place)}
    if setting.neurons == "auto":
        setting = _found(place, setting, drawn)
    if setting.form == "bias" and setting.neurons and not setting.means:
        found = place.remembered("register_means", drawn | {"neurons": setting.neurons}, lambda: {
            "sum": _total(place, drawn, lambda images, _: normed_registers(place.backbone.model, images, setting))})
        means = found["sum"] / min(sample, len(place.dataset))
        setting = replace(setting, means=tuple(map(tuple, means.tolist())))
    if setting.then is not None:
        alone = replace(setting, then=None)
        under = place.under(setting_key(alone))
        with apply_registers(place.backbone.model, alone):
            fitted, _ = fitted_settings(under, {"then": setting.then}, **drawn)
        setting = replace(setting, then=fitted["then"])
    return setting


def _found(place: Place, setting: TestTimeRegisters, drawn: dict[str, int]) -> TestTimeRegisters:
    """Return the setting with neurons, and with the numbers by which they were found."""
    asked = {name: getattr(setting, name) for name in ("threshold", "top_layer", "top_k")}
    found = place.remembered("register_neurons", drawn | asked, lambda: _search(place, drawn, **asked))
    setting = replace(setting, neurons=_by_block(found["neurons"]), reason=str(found["reason"]))
    return replace(setting, threshold=float(found["threshold"]), top_layer=int(found["top_layer"]),
                   top_k=len(found["neurons"])) if setting.neurons else setting


def _search(place: Place, drawn: dict[str, int], threshold: float | Literal["auto"], top_layer: int | Literal["auto"],
            top_k: int | Literal["auto"]) -> dict[str, object]:
    """Return neurons as rows (block, unit), and the numbers by which they were found, in words, too."""
    fits = fitted_thresholds(place, **drawn)
    last, fit = fits.num_blocks - 2, fits[-1, "token"]  # the tokens that enter a block are the output of the one before
    nothing, threshold = np.empty((0, 2), dtype=int), fit.apply(threshold)
    outliers = fit.values > (np.inf if threshold is None else threshold)
    if not outliers.any():
        why = fit.reason if threshold is None else f"no norm is above τ = {threshold:.4g}"
        return {"neurons": nothing, "reason": f"no outliers before the last block: {why}"}
    if top_layer == "auto":
        shares = [(fits.measured(block + 1, "token") > threshold).mean() for block in range(last)]
        top_layer = next((block for block, share in enumerate(shares) if share >= SHARE_RANGE[0]), last)
    model, numbers = place.backbone.model, sample_indices(len(place.dataset), drawn["sample"], drawn["seed"])

    def activations(images: Tensor, chosen: tuple[int, ...]) -> Tensor:
        mask = torch.from_numpy(outliers[np.searchsorted(numbers, chosen)]).to(images.device)
        return outlier_activations(model, images, mask, top_layer)

    def are_outliers(images: Tensor, _chosen: tuple[int, ...]) -> Tensor:
        tokens = tokens_entering(model, images, [last + 1])[last + 1]
        return patch_norms(tokens, model.num_prefix_tokens) > threshold

    def left(neurons: np.ndarray) -> int:
        with apply_registers(model, TestTimeRegisters(_by_block(neurons))):
            return int(_total(place, drawn, are_outliers, second=True).sum())

    scores = _total(place, drawn, activations)  # dividing by the number of images would change no rank
    ranked = np.stack(np.unravel_index(np.argsort(-scores, axis=None, kind="stable"), scores.shape), axis=1)
    before = left(nothing)
    for number in TOP_K if top_k == "auto" else (top_k,):
        neurons, after = ranked[:number], left(ranked[:number])
        are_gone = after < max(1, MOST_LEFT * before)
        if are_gone or number >= len(ranked):
            break
    blocks = ", ".join(map(str, np.unique(neurons[:, 0])))
    reason = (f"{len(neurons)} neurons (of block {blocks}, counted from 0) leave {after} of {before} patches of a "
              f"second sample above τ = {threshold:.4g}")
    if top_k == "auto" and not are_gone:
        neurons, reason = nothing, f"no register neurons: even {reason}, give top_k"
    return {"neurons": neurons, "threshold": threshold, "top_layer": top_layer, "reason": reason}


def _total(place: Place, drawn: dict[str, int], measure: Callable[[Tensor, tuple[int, ...]], Tensor],
           second: bool = False) -> np.ndarray:
    """Return the sum over a sample of what `measure` returns for images and their numbers, (images, …)."""
    indices = sample_indices(len(place.dataset), drawn["sample"], drawn["seed"], second=second)
    sums = measured_batches(place, indices, lambda *batch: {
        "sum": measure(*batch).float().sum(dim=0, keepdim=True)}, drawn["batch_size"])
    return sums["sum"].sum(axis=0, dtype=np.float64)


def _by_block(neurons: np.ndarray) -> dict[int, list[int]]:
    return {block: neurons[neurons[:, 0] == block, 1].tolist() for block in np.unique(neurons[:, 0]).tolist()}
