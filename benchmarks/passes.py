"""One batch brought to features by every contender, in turns: their times, and whether they agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from benchmarks.contenders import EAGER, PLAIN, SIZES, loop, make_contenders, make_workload, ours
from benchmarks.timing import Conditions, interleaved

if TYPE_CHECKING:
    from torch import Tensor, nn

AGREE = 1e-3  # in fp32, where features are of size 1; in bf16 rounding moves a patch across θ now and then
TURNS = 3  # of a repeat: passes that take a second are at the mercy of whatever else a machine does
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}


def measure_passes(size: str, how: Conditions) -> dict[str, object]:
    """All contenders at one size: seconds of every repeat by name, how they agree, what the device can do.

    Raises:
        RuntimeError: two ways to the same features disagree, so there is nothing to compare.
    """
    work = make_workload(size, how)
    contenders = make_contenders(work, how)
    with how.running():
        how.say("each once, to warm up and to compare what they give")
        agreement = check_agreement(size, {name: run(work.images) for name, run in contenders.items()}, how.precision)
        calls = {name: lambda run=run: run(work.images) for name, run in contenders.items()}
        seconds = interleaved(calls, how, turns=TURNS, once=[loop(SIZES[size].looped)])
    return {
        "model": SIZES[size].timm_name, "batch": len(work.images), "image_size": work.images.shape[-1],
        "seconds": seconds, "agreement": agreement, "flop_per_image": flop(work.model),
        "matmul_flop_per_second": matmul_rate(how),
    }


def check_agreement(size: str, outputs: Mapping[str, Mapping[str, Tensor]], precision: str) -> dict[str, float]:
    """The largest difference between ways that should give the same, and the smallest effect of a variant beside it.

    Raises:
        RuntimeError: they differ by more than `AGREE` in fp32.
    """
    count = SIZES[size].looped
    pairs = [(outputs[PLAIN], outputs[ours(0)]), (outputs[EAGER], outputs[ours(1)]),
             (outputs[loop(count)], outputs[ours(count)])]
    difference = max(float((one[name] - other[name]).abs().max()) for one, other in pairs for name in one)
    baseline, looped = outputs[PLAIN]["baseline"], outputs[loop(count)]
    effect = min(float((features - baseline).abs().max()) for features in looped.values())
    if precision == "fp32" and not difference <= AGREE:  # NaN too
        raise RuntimeError(f"ways to the same features differ by {difference:.2g}: there is nothing to compare")
    return {"largest_difference": difference, "smallest_effect": effect}


def flop(model: nn.Module) -> int:
    """Floating-point operations of a plain pass over one image: products in Linear layers, patches and attention."""
    patches = model.patch_embed.num_patches
    tokens = patches + model.num_prefix_tokens
    linear = sum(module.weight.numel() for module in model.blocks.modules() if isinstance(module, torch.nn.Linear))
    attention = 2 * len(model.blocks) * tokens**2 * model.embed_dim  # QKᵀ, and the weights times V
    return 2 * (tokens * linear + attention + patches * model.patch_embed.proj.weight.numel())


def matmul_rate(how: Conditions, times: int = 10) -> float:
    """Floating-point operations a second of a large matrix product, the median of some: what the device can do."""
    side, dtype = MATMUL_SIDE[how.kind], torch.bfloat16 if how.precision == "bf16" else torch.float32
    matrix = torch.randn(side, side, device=how.device, dtype=dtype)
    how.seconds(lambda: matrix @ matrix)
    return 2 * side**3 / statistics.median(how.seconds(lambda: matrix @ matrix) for _ in range(times))
