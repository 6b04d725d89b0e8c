"""Which patches are artifacts: the norms of patch tokens, the random control, the ground truth of a planted model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import anatomy, block_index, block_inputs, check_images
from itae_utils.method.setting import SOURCES


def patch_norms(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """L2 norm of every patch's whole vector, all heads together: (B, T, D) -> (B, N) in float32."""
    return tokens[:, num_prefix_tokens:].float().norm(dim=-1)


def token_norms(model: nn.Module, images: Tensor) -> Tensor:
    """L2 norm of every patch token after each block, before the final norm, on the image grid.

    Normalised outputs hide the artifacts; these are the raw ones. `[CLS]` and register tokens are left out.

    Returns:
        (B, blocks, rows, columns), float32.
    """
    body, norms = anatomy(model), []
    grid = check_images(model, images)

    def measure(_module, _args, tokens: Tensor) -> None:
        norms.append(patch_norms(tokens, body.num_prefix_tokens))

    with ExitStack() as stack:
        for layer in body.layers:
            stack.callback(layer.block.register_forward_hook(measure).remove)
        body.run(images)
    return torch.stack(norms, dim=1).unflatten(-1, grid)


def qkv_norms(model: nn.Module, images: Tensor, block: int = -1) -> dict[str, Tensor]:
    """L2 norms of the query, key and value of every patch in one block, all heads together, on the image grid.

    Measured on the outputs of the qkv projection, biases included, before any q/k norm and any rotation (paper, method:
    ‖P_i‖₂).

    Returns:
        {"query" | "key" | "value": (B, rows, columns)}, float32.
    """
    body, index = anatomy(model), block_index(model, block)
    grid = check_images(model, images)
    projected = body.layers[index].project_input(block_inputs(model, images, [index])[index])
    return {source: patch_norms(projected[source], body.num_prefix_tokens).unflatten(1, grid) for source in SOURCES}


def random_patches(counts: Tensor, num_patches: int, seed: int, block: int, first_image: int) -> Tensor:
    """The control: as many patches as `counts` (B,) says, drawn at random; (B, N) bool.

    The draw depends on the seed, the block and the image's number in its data set, not on the batch it comes in.
    """
    chosen = np.zeros((len(counts), num_patches), dtype=bool)
    for offset, count in enumerate(counts.tolist()):
        order = np.random.default_rng([seed, block, first_image + offset]).permutation(num_patches)
        chosen[offset, order[:count]] = True
    return torch.from_numpy(chosen).to(counts.device)


@dataclass
class Watch:
    """What a `FiringRule` saw in the latest forward pass: `.mask`, (B, N) bool, True where a patch is an artifact."""

    mask: Tensor | None = None


@dataclass(frozen=True)
class FiringRule:
    """Ground truth of a model with planted artifacts: a patch is one where any of the planted MLP neurons fires.

    Attributes:
        block: the block whose MLP holds the neurons.
        neurons: their places in the MLP's hidden layer.
        above: activation above which a neuron counts as firing.
    """

    block: int
    neurons: tuple[int, ...]
    above: float

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Watch]:
        """While open, a forward pass through `model` leaves the true artifacts (B, N) in the yielded `.mask`."""
        watch = Watch()

        def hook(_module, _args, activation):
            fires = activation[:, model.num_prefix_tokens:, list(self.neurons)] > self.above
            watch.mask = fires.any(dim=-1)

        handle = model.blocks[self.block].mlp.act.register_forward_hook(hook)
        try:
            yield watch
        finally:
            handle.remove()


def precision_recall(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Precision and recall of `found` against `truth`, boolean arrays of one shape; NaN for a share of nothing."""
    if found.shape != truth.shape:
        raise ItaeError(f"found has shape {found.shape}, truth {truth.shape}: they must be equal")
    hits = np.count_nonzero(found & truth)
    share = lambda total: hits / total if total else float("nan")  # noqa: E731
    return share(np.count_nonzero(found)), share(np.count_nonzero(truth))
