"""The directions in which a network writes whatever its input is, from its weights alone (SINDER, arXiv 2407.16826).

Every block is replaced by a linear map. Its attention attends to the token itself, its layer norms only subtract the
mean and scale, biases are left out, and its MLP is replaced by the linear map that fits it best for inputs x ~ N(0, I).
The left singular vectors of the product of these maps, up to a block, are the directions of the tokens that enter it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.linalg import eigh
from timm.layers import GluMlp, Mlp, RmsNorm, SwiGLU
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import adapt
from itae_utils.method.layers import BlockAdapter
from itae_utils.method.setting import ITAE

NODES = torch.linspace(-9, 9, 2049, dtype=torch.float64)  # of the integral over z ~ N(0, 1)
WEIGHTS = torch.exp(-NODES.square() / 2) / math.sqrt(2 * math.pi) * (NODES[1] - NODES[0])
UNITS = 512  # hidden units that are integrated at a time

Remembered = Callable[[Callable[[], Mapping[str, np.ndarray]]], Mapping[str, np.ndarray]]

_known: WeakKeyDictionary[nn.Module, dict[tuple[object, int], Tensor]] = WeakKeyDictionary()


def singular_directions(model: nn.Module, block: int, rank: int = 1) -> Tensor:
    """Return the leading left singular vectors of the blocks before `block`, (C, rank) float64 on the CPU.

    They are computed for all blocks when first asked for, and again if the weights have changed.

    Raises:
        ItaeError: as `check_directions`.
    """
    check_directions(model, block, rank)
    return all_directions(model, rank)[block - 1]


def directions_of(model: nn.Module, block: int, itae: ITAE) -> Tensor | None:
    """Return `singular_directions` for a setting that needs them, float32 on the model's device, or None."""
    if itae.source != "direction":
        return None
    return singular_directions(model, block, itae.rank).float().to(next(model.parameters()).device)


def all_directions(model: nn.Module, rank: int, remembered: Remembered = lambda compute: compute()) -> Tensor:
    """Return `singular_directions` of every block but the first, (blocks − 1, C, rank).

    `remembered` may return what an earlier process computed for the same weights.
    """
    known, key = _known.setdefault(model, {}), (_checksum(model), rank)
    if key not in known:
        found = remembered(lambda: {"directions": torch.stack(_compute(model, rank)).numpy()})
        known[key] = torch.from_numpy(found["directions"])
    return known[key]


def check_directions(model: nn.Module, block: int, rank: int = 1) -> None:
    """Check that `singular_directions` can be computed.

    Raises:
        ItaeError: block 0, which has none before it; a rank above the width of the tokens; or a block with parts that
            have no linear fit here.
    """
    blocks = adapt(model).blocks
    if block == 0:
        remedy = f"blocks={len(blocks) - 1} or fewer" if len(blocks) > 1 else "another source, such as token"
        raise ItaeError(f"source='direction' has no block before the first: use {remedy}")
    for index, each in enumerate(blocks[:block]):
        why = _reason_against(each)
        if why:
            raise ItaeError(f"source='direction' is not known for this model, block {index} has {why}: use another "
                            "source, such as token")
    width = blocks[0].output_projection.weight.shape[0]
    if rank > width:
        raise ItaeError(f"rank={rank} is above the width of the tokens: use at most {width}")


def has_directions(model: nn.Module, rank: int = 1) -> bool:
    """Return whether `singular_directions` can be computed, for every block but the first."""
    try:
        check_directions(model, len(adapt(model).blocks) - 1, rank)
    except ItaeError:
        return False
    return True


def _reason_against(adapter: BlockAdapter) -> str | None:
    """Return which part of a block has no linear fit here, or None."""
    mlp, attention = adapter.block.mlp, adapter.attention
    if getattr(attention, "gate", None) is not None:
        return "a gated attention"
    if not isinstance(getattr(attention, "norm", None), nn.Identity | None):
        return "a norm inside its attention"
    if not isinstance(getattr(mlp, "norm", None), nn.Identity | None):
        return "a norm inside its MLP"
    norms = [type(norm).__name__ for norm in (adapter.block.norm1, adapter.block.norm2)
             if not isinstance(norm, nn.LayerNorm | nn.RMSNorm | RmsNorm)]
    return norms[0] if norms else None if _mlp_parts(mlp) else f"an MLP of class {type(mlp).__name__}"


@torch.no_grad()
def _checksum(model: nn.Module) -> tuple[float, ...]:
    """Return sums over every parameter's rows and columns, weighted by their place, which change if the weights do."""
    def weighted(values: Tensor) -> Tensor:
        values = values.to("cpu", torch.float64)
        return values @ torch.arange(1, len(values) + 1, dtype=torch.float64)

    matrices = [weight.reshape(len(weight), -1) if weight.ndim else weight[None, None] for weight in model.parameters()]
    return tuple(float(weighted(each.sum(dim=dim))) for each in matrices for dim in (0, 1))


def _compute(model: nn.Module, rank: int) -> list[Tensor]:
    product, directions = None, []
    with torch.no_grad():
        for adapter in adapt(model).blocks[:-1]:
            linear = _linear_block(adapter)
            product = linear if product is None else linear @ product
            size = len(product)
            _, vectors = eigh((product @ product.T).numpy(), subset_by_index=(size - rank, size - 1))
            directions.append(torch.from_numpy(vectors[:, ::-1].copy()))
            product = product / product.norm()  # the vectors stay, and the numbers don't overflow
    return directions


def _linear_block(adapter: BlockAdapter) -> Tensor:
    """Return the linear map of one block, (C, C) float64 on the CPU."""
    block = adapter.block
    value, out = _double(adapter.value_weight), _double(adapter.output_projection.weight)
    identity = torch.eye(len(out), dtype=torch.float64)
    attend = identity + _double(adapter.scale(1))[:, None] * (out @ _after_norm(block.norm1, value))
    first, last = _linear_mlp(block.mlp)
    return (identity + _double(adapter.scale(2))[:, None] * (last @ _after_norm(block.norm2, first))) @ attend


def _after_norm(norm: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight (m, C) of a Linear together with the norm before it, whose division by σ is left out."""
    weight = weight if norm.weight is None else weight * _double(norm.weight)
    return weight - weight.mean(dim=1, keepdim=True) if isinstance(norm, nn.LayerNorm) else weight


def _linear_mlp(mlp: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the best linear fit of the hidden units, (hidden, C), and the weight of the last layer, (C, hidden).

    For x ~ N(0, I) the least-squares fit of g is E[∂g/∂x]. With u = w·x + b and a linear gate h(z) = E[gate | u], for
    the standardised z of u, integration by parts gives E[f'(u) h] = E[f(u) (z h − h')] / σ_u.
    """
    activated, gate, act, last = _mlp_parts(mlp)
    weight, bias = map(_double, activated)
    gate = None if gate is None else [*map(_double, gate)]
    fits = []
    for units in torch.arange(len(weight)).split(UNITS):
        w, sigma = weight[units], weight[units].norm(dim=1).clamp(min=1e-12)
        values = act(bias[units, None] + sigma[:, None] * NODES)
        if gate is None:
            fits.append((values * NODES @ WEIGHTS / sigma)[:, None] * w)
            continue
        other, level = gate[0][units], gate[1][units]
        slope = (w * other).sum(dim=1) / sigma
        inner = NODES * (level[:, None] + slope[:, None] * NODES) - slope[:, None]
        fits.append((values * inner @ WEIGHTS / sigma)[:, None] * w + (values @ WEIGHTS)[:, None] * other)
    return torch.cat(fits), _double(last)


def _mlp_parts(mlp: nn.Module) -> tuple | None:
    """Return (weight, bias) of the activated layer, those of its gate or None, the activation, and the last weight.

    The activation is called without the hooks on it. None stands for an MLP of another kind.
    """
    def layer(module: nn.Module) -> tuple[Tensor, Tensor]:
        return module.weight, module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias

    if isinstance(mlp, SwiGLU):
        return layer(mlp.fc1_g), layer(mlp.fc1_x), mlp.act.forward, mlp.fc2.weight
    if isinstance(mlp, GluMlp):
        halves = list(zip(*(values.chunk(2) for values in layer(mlp.fc1)), strict=True))
        activated, gate = reversed(halves) if mlp.gate_last else halves
        return activated, gate, mlp.act.forward, mlp.fc2.weight
    if isinstance(mlp, Mlp):
        return layer(mlp.fc1), None, mlp.act.forward, mlp.fc2.weight
    if hasattr(mlp, "gate_proj") and hasattr(mlp, "down_proj"):  # of transformers
        return layer(mlp.gate_proj), layer(mlp.up_proj), mlp.act_fn.forward, mlp.down_proj.weight
    if hasattr(mlp, "fc1") and hasattr(mlp, "activation_fn"):
        return layer(mlp.fc1), None, mlp.activation_fn.forward, mlp.fc2.weight
    return None


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
