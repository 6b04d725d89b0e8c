"""Which patches are artifacts: their norms, the patches that a setting selects, and the truth of a planted model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import adapt, block_index, block_inputs, patch_grid
from itae_utils.method.layers import Hook
from itae_utils.method.setting import ITAE, SOURCES


def patch_norms(x: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return the L2 norm of every patch's whole vector, all heads together: (B, T, D) -> (B, N), float32."""
    return x[:, num_prefix_tokens:].float().norm(dim=-1)


@torch.no_grad()
def token_norms(model: nn.Module, images: Tensor) -> Tensor:
    """Return the L2 norm of every patch token after each block, on the patch grid.

    The tokens are taken before the final norm, because normalised outputs hide artifacts. `[CLS]` and register tokens
    are left out. No gradients are recorded.

    Returns:
        (B, blocks, rows, columns), float32.
    """
    vit, norms = adapt(model), []
    grid = patch_grid(model, images)

    def measure(_module: nn.Module, _args: tuple[Tensor], tokens: Tensor) -> None:
        norms.append(patch_norms(tokens, vit.num_prefix_tokens))

    with ExitStack() as stack:
        for adapter in vit.blocks:
            stack.callback(adapter.block.register_forward_hook(measure).remove)
        vit.run(images)
    return torch.stack(norms, dim=1).unflatten(-1, grid)


@torch.no_grad()
def qkv_norms(model: nn.Module, images: Tensor, block: int = -1) -> dict[str, Tensor]:
    """Return the L2 norms of every patch's query, key and value in one block, on the patch grid.

    All heads count together. The norms are measured on the outputs of the qkv projection, biases included, before any
    q/k norm or rotation (paper, method section: ‖P_i‖₂). No gradients are recorded.

    Returns:
        {"query" | "key" | "value": (B, rows, columns)}, float32.
    """
    vit, index = adapt(model), block_index(model, block)
    grid = patch_grid(model, images)
    qkv = vit.blocks[index].qkv(block_inputs(model, images, [index])[index])
    return {source: patch_norms(qkv[source], vit.num_prefix_tokens).unflatten(1, grid) for source in SOURCES}


def select_artifacts(norms: Tensor, threshold: float | None, itae: ITAE, *, block: int,
                     image_numbers: range | tuple[int, ...], truth: Tensor | None = None) -> Tensor:
    """Return the patches that a setting edits in one block: (B, N) norms -> (B, N) bool.

    By default they are A = {i : ‖P_i‖₂ ≤ θ} (paper, method section). The controls select |A| random patches, or the
    true artifacts. Nothing is copied from the device.

    Args:
        norms: ‖P_i‖₂ of `itae.source`.
        threshold: θ of this block; None selects no patch.
        itae: the setting; only `select` and `seed` are read.
        block: index of the block, used by the random control.
        image_numbers: each image's number in its data set, used by the random control.
        truth: (B, N) bool, used by the oracle.

    Raises:
        ItaeError: the oracle has no truth, or one of another shape.
    """
    if itae.select == "oracle":
        if truth is None:
            raise ItaeError("select='oracle' needs the true artifacts, which only a planted backbone (demo) has")
        if truth.shape != norms.shape:
            raise ItaeError(f"truth has shape {tuple(truth.shape)}, but images and patches have {tuple(norms.shape)}")
        return truth
    artifacts = torch.zeros_like(norms, dtype=torch.bool) if threshold is None else norms <= threshold
    if itae.select == "random":
        ranks = patch_ranks(image_numbers, norms.shape[-1], itae.seed, block, norms.device)
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
