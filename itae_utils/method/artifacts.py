"""Which patches are artifacts: those that a setting selects, and the truth of a planted model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.layers import Hook
from itae_utils.method.setting import ITAE, beyond


def select_artifacts(values: Tensor, threshold: float | None, itae: ITAE, *, block: int,
                     image_numbers: range | tuple[int, ...], truth: Tensor | None = None) -> Tensor:
    """Return the patches that a setting edits in one block: a statistic (B, N) -> (B, N) bool.

    By default they are A = {i : P_i ≤ θ} (paper, method section) or, on the high side, {i : P_i ≥ θ}. The controls
    select |A| random patches, or the true artifacts. Nothing is copied from the device.

    Args:
        values: P_i, the statistic `itae.source`.
        threshold: θ of this block; None selects no patch.
        itae: the setting; only `select`, `seed` and its side are read.
        block: index of the block, used by the random control.
        image_numbers: each image's number in its data set, used by the random control.
        truth: (B, N) bool, used by the oracle.

    Raises:
        ItaeError: the oracle has no truth, or one of another shape.
    """
    if itae.select == "oracle":
        if truth is None:
            raise ItaeError("select='oracle' needs the true artifacts, which only a planted backbone (demo) has")
        if truth.shape != values.shape:
            raise ItaeError(f"truth has shape {tuple(truth.shape)}, but images and patches have {tuple(values.shape)}")
        return truth
    artifacts = beyond(values, threshold, itae.side)
    if itae.select == "random":
        ranks = patch_ranks(image_numbers, values.shape[-1], itae.seed, block, values.device)
        return ranks < artifacts.sum(dim=-1, keepdim=True)
    return artifacts


@lru_cache(maxsize=16)  # all random variants of a batch share one draw per seed and block
def patch_ranks(image_numbers: range | tuple[int, ...], num_patches: int, seed: int, block: int,
                device: torch.device) -> Tensor:
    """Rank the patches of each image in random order: (B, N) int32, each row a permutation of 0 to N − 1.

    The order depends on the seed, the block and the image's number, not on the batch. The draw runs on the CPU and its
    copy to the device is asynchronous, so neither waits for the device.
    """
    ranks = torch.empty(len(image_numbers), num_patches, dtype=torch.int32, pin_memory=device.type == "cuda")
    for row, number in zip(ranks.numpy(), image_numbers, strict=True):
        row[np.random.default_rng([seed, block, number]).permutation(num_patches)] = np.arange(num_patches)
    return ranks.to(device, non_blocking=True)


@dataclass
class CapturedTruth:
    """The true artifacts of the latest forward pass: `mask`, (B, N) bool, or None if they are not known."""

    mask: Tensor | None = None


@dataclass(frozen=True)
class FiringRule:
    """Ground truth of a model with planted artifacts: a patch is an artifact if any planted MLP neuron fires on it.

    Attributes:
        block: index of the block whose MLP holds the neurons.
        neurons: their indices in the MLP's hidden layer.
        above: activation above which a neuron fires.
    """

    block: int
    neurons: tuple[int, ...]
    above: float

    @contextmanager
    def capture(self, model: nn.Module) -> Iterator[CapturedTruth]:
        """While open, every forward pass of `model` writes its true artifacts to the `mask` of the yielded object."""
        captured = CapturedTruth()

        def hook(_module: nn.Module, _args: tuple[Tensor], activation: Tensor) -> None:
            captured.mask = (activation[:, model.num_prefix_tokens:, list(self.neurons)] > self.above).any(dim=-1)

        handle = model.blocks[self.block].mlp.act.register_forward_hook(Hook(hook))
        try:
            yield captured
        finally:
            handle.remove()


def capture_truth(truth: FiringRule | Tensor | None, model: nn.Module) -> AbstractContextManager[CapturedTruth]:
    """Return `truth.capture(model)` for a rule, and a context that yields `truth` itself for a mask or None."""
    return truth.capture(model) if isinstance(truth, FiringRule) else nullcontext(CapturedTruth(truth))


def precision_recall(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return precision and recall of `found` against `truth`, boolean arrays of one shape.

    Precision is NaN if nothing was found, and recall is NaN if there is nothing to find.

    Raises:
        ItaeError: the shapes differ, or the arrays are not boolean.
    """
    found, truth = (_mask(name, values) for name, values in [("found", found), ("truth", truth)])
    if found.shape != truth.shape:
        raise ItaeError(f"found has shape {found.shape}, truth {truth.shape}: they must be equal")
    hits, num_found, num_true = (np.count_nonzero(mask) for mask in (found & truth, found, truth))
    return hits / num_found if num_found else np.nan, hits / num_true if num_true else np.nan


def _mask(name: str, values: object) -> np.ndarray:
    mask = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    if mask.dtype != bool and not (mask.dtype.kind in "iu" and np.isin(mask, (0, 1)).all()):
        raise ItaeError(f"{name} holds {mask.dtype} values: give a boolean array, such as norms <= threshold")
    return mask.astype(bool)
