"""What a setting needs from a sample of images, without labels: θ, and the mean token that substitutes artifacts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from itae_utils.errors import ItaeError, whole_number
from itae_utils.extraction.batches import checked_inputs, chosen_batch_size, memory_errors, model_batches
from itae_utils.extraction.observation import sample_indices
from itae_utils.method.anatomy import adapt, block_inputs
from itae_utils.method.artifacts import capture_truth, select_artifacts
from itae_utils.method.attention import check_setting
from itae_utils.method.direction import all_directions, directions_of, has_directions
from itae_utils.method.layers import QKV
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import patch_statistic, patch_statistics
from itae_utils.method.thresholds import Thresholds
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import Place, setting_key

SAMPLE = 512  # images

Receive = Callable[[int, QKV, range, Tensor | None], None]  # block, its q, k, v, numbers of the images, true artifacts


def fit_thresholds(backbone: Backbone, dataset: Dataset, *, sample: int = SAMPLE, seed: int = 0, rank: int = 1,
                   batch_size: int | Literal["auto"] = "auto", num_workers: int | Literal["auto"] = 0,
                   store: str | Path | Store | None = "auto") -> Thresholds:
    """Fit θ for every block and source on a sample of images, without labels, on the unmodified model.

    The statistics are measured in one pass, stored and reused. Each fit is computed when it is first read.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        sample: number of images.
        seed: seed for drawing them.
        rank: number of singular directions, for the source "direction".
        batch_size: images per batch; "auto" as in `extract_features`.
        num_workers: processes that load images, or "auto", as in `model_batches`.
        store: as in `extract_features`.

    Returns:
        `fits[block, source]`, a `ThresholdFit` each. `fits[-1, "key"].threshold` is θ for the last block's keys, or
        None if their norms do not have two modes. Models without singular directions have no "direction", see
        `check_directions`; nor has the first block.
    """
    dataset = checked_inputs(backbone, dataset, num_workers)
    return fitted_thresholds(Place(open_store(store), backbone, dataset), sample=sample, seed=seed, rank=rank,
                             batch_size=batch_size, num_workers=num_workers)


def fit_setting(backbone: Backbone, dataset: Dataset, itae: ITAE, *, thresholds: Thresholds | None = None,
                sample: int = SAMPLE, seed: int = 0, batch_size: int | Literal["auto"] = "auto",
                num_workers: int | Literal["auto"] = 0, store: str | Path | Store | None = "auto") -> ITAE:
    """Return a setting with numbers for "auto", "share:2%" or "sd:3", and with the vectors of "substitute".

    `attenuate` and `attention_map` need such a setting; `extract_features` makes it by itself.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        itae: the setting.
        thresholds: from `fit_thresholds`, whose sample is used again; None fits them if the setting needs them.
        sample: number of images.
        seed: seed for drawing them.
        batch_size: images per batch; "auto" as in `extract_features`.
        num_workers: processes that load images, or "auto", as in `model_batches`.
        store: as in `extract_features`.

    Raises:
        ItaeError: a setting that the model can't run, or no artifact in the sample whose value "substitute" could use.
    """
    dataset = checked_inputs(backbone, dataset, num_workers)
    check_setting(backbone.model, itae, backbone.truth)
    place = Place(open_store(store), backbone, dataset)
    fitted, _ = fitted_settings(place, {"itae": itae}, thresholds, sample=sample, seed=seed, batch_size=batch_size,
                                num_workers=num_workers)
    return fitted["itae"]


def fitted_thresholds(place: Place, *, sample: int = SAMPLE, seed: int = 0, rank: int = 1,
                      batch_size: int | Literal["auto"] = "auto", num_workers: int | Literal["auto"] = 0) -> Thresholds:
    """Return the fits of `fit_thresholds` for the backbone and the data set of a place."""
    start, backbone = time.perf_counter(), place.backbone
    drawn = {"sample": whole_number("sample", sample, 1), "seed": whole_number("seed", seed, 0)}
    rank, batch_size = whole_number("rank", rank, 1), chosen_batch_size(batch_size, place)
    if has_directions(backbone.model, rank):
        all_directions(backbone.model, rank, partial(place.remembered_of_model, "directions", {"rank": rank}))

    def measure() -> dict[str, np.ndarray]:
        values = sampled_statistics(backbone, place.dataset, rank=rank, batch_size=batch_size, num_workers=num_workers,
                                    **drawn)
        return {f"{block} {source}": each for (block, source), each in values.items()}

    found = place.remembered("statistics", {"batch_size": batch_size, "rank": rank, **drawn}, measure)
    values = {(int(block), source): each for name, each in found.items() for block, source in [name.split()]}
    return Thresholds(values, time.perf_counter() - start, rank, drawn)


def fitted_settings(place: Place, settings: Mapping[str, ITAE], thresholds: Thresholds | None = None,
                    **options: object) -> tuple[dict[str, ITAE], float]:
    """Return settings as `fit_setting` does, by name, and the seconds that this took; `options` are its own."""
    start, fitted, fits = time.perf_counter(), dict(settings), {}
    for name, itae in settings.items():
        if itae.needs_threshold:
            rank = itae.rank if itae.source == "direction" else 1
            if thresholds is None and rank not in fits:
                fits[rank] = fitted_thresholds(place, rank=rank, **options)
            each = (thresholds or fits[rank]).of(itae)
            fitted[name] = replace(itae, threshold=tuple(fit.apply(itae.threshold) for fit in each))
    lacking = {name: itae for name, itae in fitted.items() if itae.needs_substitutes}
    if lacking:
        found = _mean_artifacts(place, lacking, **options | ({} if thresholds is None else thresholds.drawn))
        fitted |= {name: replace(itae, substitutes=found[name]) for name, itae in lacking.items()}
    return fitted, time.perf_counter() - start


def sampled_statistics(backbone: Backbone, dataset: Dataset, *, sample: int, seed: int, rank: int = 1,
                       batch_size: int | Literal["auto"], num_workers: int | Literal["auto"] = 0
                       ) -> dict[tuple[int, str], np.ndarray]:
    """Measure every statistic of every patch in every block, on a sample of images: {(block, source): (images, N)}."""
    values: dict[tuple[int, str], list[np.ndarray]] = {}
    num_patches, directions = math.prod(backbone.patch_grid), {}
    if has_directions(backbone.model, rank):
        directions = dict(enumerate(all_directions(backbone.model, rank), start=1))

    def receive(block: int, qkv: QKV, _numbers: range, _truth: Tensor | None) -> None:
        prefix = qkv.tokens.shape[1] - num_patches
        for source, each in patch_statistics(qkv, prefix, directions.get(block)).items():
            values.setdefault((block, source), []).append(each.cpu().numpy())

    _visit(backbone, dataset, receive, sample=sample, seed=seed, batch_size=batch_size, num_workers=num_workers)
    return {key: np.concatenate(each) for key, each in values.items()}


def _mean_artifacts(place: Place, settings: Mapping[str, ITAE], *, sample: int = SAMPLE, seed: int = 0,
                    batch_size: int | Literal["auto"] = "auto", num_workers: int | Literal["auto"] = 0,
                    ) -> dict[str, tuple[tuple[float, ...] | None, ...]]:
    """Return the mean of the artifacts' tokens after the first norm, for each setting and each of its blocks.

    Values are linear in these tokens, so this is the token whose value is the mean of the artifacts' values.
    """
    backbone, batch_size = place.backbone, chosen_batch_size(batch_size, place)
    depth, keys = len(adapt(backbone.model).blocks), [setting_key(itae, backbone.truth) for itae in settings.values()]

    def measure() -> dict[str, np.ndarray]:
        sums: dict[str, Tensor] = {}
        prefix = adapt(backbone.model).num_prefix_tokens
        directions = {(name, block): directions_of(backbone.model, block, itae) for name, itae in settings.items()
                      for block in range(depth - itae.blocks, depth)}

        def receive(block: int, qkv: QKV, numbers: range, truth: Tensor | None) -> None:
            x = qkv.block.block.norm1(qkv.tokens)
            for name, itae in settings.items():
                place = block - depth + itae.blocks
                if place < 0:
                    continue
                values = patch_statistic(itae.source, qkv, prefix, directions[name, block])
                artifacts = select_artifacts(values, itae.thresholds[place], itae, block=block, image_numbers=numbers,
                                             truth=truth)
                chosen = x[:, -artifacts.shape[1]:][artifacts].double()
                total = torch.cat([chosen.sum(dim=0), chosen.new_tensor([len(chosen)])]).cpu()
                sums[f"{place} {name}"] = sums.get(f"{place} {name}", 0) + total

        _visit(backbone, place.dataset, receive, sample=sample, seed=seed, batch_size=batch_size,
               num_workers=num_workers)
        return {key: total.numpy() for key, total in sums.items()}

    options = {"batch_size": batch_size, "sample": sample, "seed": seed, "settings": keys, "names": list(settings)}
    found = place.remembered("substitutes", options, measure)
    return {name: tuple(_mean(name, itae, found[f"{place} {name}"], theta)
                        for place, theta in enumerate(itae.thresholds)) for name, itae in settings.items()}


def _mean(name: str, itae: ITAE, total: np.ndarray, theta: float | None) -> tuple[float, ...] | None:
    if total[-1]:
        return tuple((total[:-1] / total[-1]).tolist())
    if theta is None and itae.select != "oracle":
        return None
    raise ItaeError(f"{name} has attenuation='substitute', but no patch of the sample is an artifact at θ = {theta}: "
                    "use another threshold")


def _visit(backbone: Backbone, dataset: Dataset, receive: Receive, *, sample: int, seed: int,
           batch_size: int | Literal["auto"], num_workers: int | Literal["auto"]) -> None:
    """Run the unmodified model over a sample, and call `receive` for every block of every batch."""
    vit, numbers = adapt(backbone.model), ()
    indices = sample_indices(len(dataset), sample, seed)
    *earlier, last = range(len(vit.blocks))
    with ExitStack() as stack:
        truth = stack.enter_context(capture_truth(backbone.truth, backbone.model))

        def each(block: int, qkv: QKV) -> None:
            receive(block, qkv, numbers, truth.mask)

        for block in earlier:
            stack.enter_context(vit.blocks[block].capture_qkv(partial(each, block)))
        for context in (memory_errors(batch_size, backbone.device), torch.inference_mode(), backbone.autocast()):
            stack.enter_context(context)
        done = 0
        for images in model_batches(backbone, dataset, batch_size=batch_size, num_workers=num_workers, indices=indices):
            numbers = tuple(indices[done:done + len(images)].tolist())
            inputs = block_inputs(backbone.model, images, [last])[last]
            each(last, vit.blocks[last].qkv(inputs))  # the pass stops before this block's own projection
            done += len(images)
