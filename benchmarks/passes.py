"""Time one batch's way to features for every contender, in turns, and check that equal ways agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.contenders import EAGER, PLAIN, SIZES, loop, make_contenders, make_workload, ours
from benchmarks.timing import Conditions, interleaved

AGREE = 1e-3  # in fp32, for features of size 1; in bf16, rounding sometimes moves a patch across θ
TURNS = 3  # per repeat, because passes of about a second are easily disturbed by other work
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}


def measure_passes(size: str, conditions: Conditions) -> dict[str, object]:
    """Time all contenders at one size; return seconds per repeat, their agreement and the device's matmul rate.

    Raises:
        RuntimeError: contenders that should give the same features do not.
    """
    work = make_workload(size, conditions)
    contenders = make_contenders(work, conditions)
    with conditions.running():
        conditions.log("running each contender once, to warm up and to compare their features")
        outputs = {name: run(work.images) for name, run in contenders.items()}
        agreement = check_agreement(size, outputs, conditions.precision)
        calls = {name: lambda run=run: run(work.images) for name, run in contenders.items()}
        seconds = interleaved(calls, conditions, turns=TURNS, once=[loop(SIZES[size].looped)])
    return {
        "model": SIZES[size].timm_name, "batch": len(work.images), "image_size": work.images.shape[-1],
        "seconds": seconds, "agreement": agreement, "flop_per_image": flop(work.model),
        "matmul_flop_per_second": matmul_rate(conditions),
    }


def check_agreement(size: str, outputs: Mapping[str, Mapping[str, Tensor]], precision: str) -> dict[str, float]:
    """Return the largest difference between equal ways, and the smallest effect of a variant for comparison.

    Raises:
        RuntimeError: equal ways differ by more than `AGREE` in fp32.
    """
    count = SIZES[size].looped
    pairs = [(outputs[PLAIN], outputs[ours(0)]), (outputs[EAGER], outputs[ours(1)]),
             (outputs[loop(count)], outputs[ours(count)])]
    difference = max(float((one[name] - other[name]).abs().max()) for one, other in pairs for name in one)
    baseline, looped = outputs[PLAIN]["baseline"], outputs[loop(count)]
    effect = min(float((features - baseline).abs().max()) for features in looped.values())
    if precision == "fp32" and not difference <= AGREE:  # also if NaN
        raise RuntimeError(f"contenders that should give the same features differ by {difference:.2g}")
    return {"largest_difference": difference, "smallest_effect": effect}


def flop(model: nn.Module) -> int:
    """Return the floating-point operations of a plain pass over one image: linear layers, patches and attention."""
    patches = model.patch_embed.num_patches
    tokens = patches + model.num_prefix_tokens
    linear = sum(module.weight.numel() for module in model.blocks.modules() if isinstance(module, torch.nn.Linear))
    attention = 2 * len(model.blocks) * tokens**2 * model.embed_dim  # QKᵀ, and the weights times V
    return 2 * (tokens * linear + attention + patches * model.patch_embed.proj.weight.numel())


def matmul_rate(conditions: Conditions, times: int = 10) -> float:
    """Return the device's floating-point operations per second in a large matrix product, the median of `times`."""
    side = MATMUL_SIDE[conditions.kind]
    dtype = torch.bfloat16 if conditions.precision == "bf16" else torch.float32
    matrix = torch.randn(side, side, device=conditions.device, dtype=dtype)
    conditions.seconds(lambda: matrix @ matrix)
    return 2 * side**3 / statistics.median(conditions.seconds(lambda: matrix @ matrix) for _ in range(times))
