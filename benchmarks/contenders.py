"""What is measured against what: one batch of images brought to `[CLS]` features, the ways people would do it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from itae_utils.method.anatomy import block_inputs
from itae_utils.method.artifacts import qkv_norms
from itae_utils.method.attention import attenuate
from itae_utils.method.one_pass import OnePass
from itae_utils.method.setting import ATTENUATIONS, ITAE, SOURCES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.timing import Conditions
Contender = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # images (B, 3, H, W) -> features (B, dim) by variant

FROM = ("key", "query", "value")
SHARES = (0.05, 0.01, 0.02, 0.1, 0.2)  # θ at these quantiles of the norms: there are artifacts in every variant
STRIDE = 7  # through the grid of settings: any first few are spread over sources, attenuations and shares
COUNTS = (0, 1, 8, 48)  # variants of the one pass
PLAIN = "plain forward_features"
PREFIX = "prefix alone"
TRANSFORMERS = "transformers Dinov2Model, SDPA"
EAGER = "eager attention with a hook, 1 variant"


def ours(count: int) -> str:
    """The name of the one pass with so many variants beside the baseline."""
    return f"ours, {count} variant{'s' * (count != 1)}"


def loop(count: int) -> str:
    """The name of the loop over so many variants."""
    return f"loop, {count} variants"


@dataclass(frozen=True)
class Size:
    """A model to measure, and how much of it at a time.

    Attributes:
        timm_name: the model.
        backbone: its name to `load_backbone`.
        batches: images at a time by kind of device, "cpu" and "cuda".
        looped: variants that the loop runs.
        image_size: pixels a side.
        options: what is changed in the model.
    """

    timm_name: str
    backbone: str
    batches: dict[str, int]
    looped: int
    image_size: int = 224
    options: tuple[tuple[str, int], ...] = ()


SIZES = {
    "S": Size("vit_small_patch14_dinov2", "dinov2_vits14", {"cpu": 8, "cuda": 256}, 48),
    "B": Size("vit_base_patch14_dinov2", "dinov2_vitb14", {"cpu": 4, "cuda": 128}, 8),
    "L": Size("vit_large_patch14_dinov2", "dinov2_vitl14", {"cpu": 2, "cuda": 64}, 8),
    "tiny": Size("vit_small_patch14_dinov2", "demo", {"cpu": 4, "cuda": 4}, 8, 56,
                 (("embed_dim", 48), ("depth", 3), ("num_heads", 3))),  # for tests
}


@dataclass(frozen=True)
class Workload:
    """One model and one batch.

    Attributes:
        size: key of `SIZES`.
        model: the timm model, random weights.
        images: (B, 3, H, W), on the model's device.
    """

    size: str
    model: nn.Module
    images: Tensor


def make_workload(size: str, how: Conditions) -> Workload:
    """A model of that size and a batch of random images, the same every time."""
    entry = SIZES[size]
    torch.manual_seed(0)
    images = torch.randn(how.batch or entry.batches[how.kind], 3, entry.image_size, entry.image_size)
    return Workload(size, make_model(size).to(how.device), images.to(how.device))


def make_model(size: str) -> nn.Module:
    """The timm model with random weights.

    As they come, LayerScale's factors of 1e-5 and an even attention would hide every edit. So they are 1 here, and the
    logits 9 times as far apart: it takes the same time, and whether two ways agree means something.
    """
    import timm

    entry = SIZES[size]
    model = timm.create_model(entry.timm_name, img_size=entry.image_size, num_classes=0, global_pool="token",
                              dynamic_img_size=True, **dict(entry.options))
    for block in model.blocks:
        torch.nn.init.ones_(block.ls1.gamma)
        torch.nn.init.ones_(block.ls2.gamma)
        block.attn.qkv.weight.data *= 3
    return model.eval().requires_grad_(False)


def make_transformers_model(model: nn.Module) -> nn.Module:
    """A `Dinov2Model` of the same shape with random weights, and SDPA attention."""
    from transformers import Dinov2Config, Dinov2Model

    patch = model.patch_embed.patch_size[0]
    config = Dinov2Config(hidden_size=model.embed_dim, num_hidden_layers=len(model.blocks), patch_size=patch,
                          num_attention_heads=model.blocks[0].attn.num_heads,
                          image_size=patch * model.patch_embed.grid_size[0], attn_implementation="sdpa")
    return Dinov2Model(config).eval().requires_grad_(False)


def make_variants(work: Workload, count: int, how: Conditions) -> dict[str, ITAE]:
    """So many settings with thresholds from the model's own norms; the first is the paper's method at 5 % of the keys.

    Thresholds lie in the middle between two norms, so that rounding moves no patch across.
    """
    with how.running():
        norms = {source: values.double().flatten().sort().values
                 for source, values in qkv_norms(work.model, work.images).items()}
    grid = list(itertools.product(SHARES, ATTENUATIONS, FROM))
    chosen = {}
    for number in range(count):
        share, attenuation, source = grid[number * STRIDE % len(grid)]
        place = max(1, round(share * len(norms[source])))
        threshold = float(norms[source][place - 1:place + 1].mean())
        chosen[f"{source} {attenuation} {share:.0%}"] = ITAE(source, threshold, attenuation)
    return chosen


def contender_names(size: str) -> list[str]:
    """What is measured at that size."""
    return [PLAIN, PREFIX, TRANSFORMERS, *map(ours, COUNTS), EAGER, loop(SIZES[size].looped)]


def make_contenders(work: Workload, how: Conditions) -> dict[str, Contender]:
    """What is measured, by name. Settings are made here, so that a call is nothing but one batch's work."""
    model, last = work.model, len(work.model.blocks) - 1
    variants = make_variants(work, max(COUNTS), how)
    transformers_model = functools.cache(lambda: make_transformers_model(model).to(work.images.device))  # if it's used

    def first(count: int) -> dict[str, ITAE]:
        return dict(itertools.islice(variants.items(), count))

    def one_pass(count: int) -> Contender:
        extraction = OnePass(model, {"baseline": None, **first(count)})
        return lambda images: {name: features for name, (features, _) in extraction(images, 0).items()}

    looped, (paper, itae) = first(SIZES[work.size].looped), next(iter(variants.items()))
    return {
        PLAIN: lambda images: {"baseline": model.forward_features(images)[:, 0]},
        PREFIX: lambda images: {"prefix": block_inputs(model, images, [last])[last].tokens[:, 0]},
        TRANSFORMERS: lambda images: {"other weights": transformers_model()(images).last_hidden_state[:, 0]},
        **{ours(count): one_pass(count) for count in COUNTS},
        EAGER: lambda images: {paper: hooked_once(model, images, itae)},
        loop(len(looped)): lambda images: {name: looped_once(model, images, each) for name, each in looped.items()},
    }


def looped_once(model: nn.Module, images: Tensor, itae: ITAE) -> Tensor:
    """One variant, one full forward pass."""
    with attenuate(model, itae):
        return model.forward_features(images)[:, 0].clone()  # a view would hold all tokens of every variant


def hooked_once(model: nn.Module, images: Tensor, itae: ITAE) -> Tensor:
    """One variant as most published code does it: attention maps made in every block, the last one edited by a hook.

    Fused attention has no maps, so such code turns it off for the whole model. An edit of weights after the softmax is
    the paper's edit of logits before it: the artifacts' weights become the smallest, and the row is brought to 1.
    """
    last, prefix, seen = model.blocks[-1].attn, model.num_prefix_tokens, {}

    def keep_keys(_module, _args, qkv: Tensor) -> None:
        seen["keys"] = qkv.chunk(3, dim=-1)[SOURCES.index(itae.source)]

    def edit(_module, _args, weights: Tensor) -> Tensor:  # (B, H, T, T)
        artifacts = seen["keys"][:, prefix:].float().norm(dim=-1) <= itae.threshold
        patches = weights[:, :, 0, prefix:]
        patches = torch.where(artifacts[:, None], patches.amin(dim=-1, keepdim=True), patches)
        row = torch.cat([weights[:, :, 0, :prefix], patches], dim=-1)
        weights[:, :, 0] = row / row.sum(dim=-1, keepdim=True)
        return weights

    hooks = [last.qkv.register_forward_hook(keep_keys), last.attn_drop.register_forward_hook(edit)]
    fused = [block.attn.fused_attn for block in model.blocks]
    try:
        for block in model.blocks:
            block.attn.fused_attn = False
        return model.forward_features(images)[:, 0]
    finally:
        for block, was in zip(model.blocks, fused, strict=True):
            block.attn.fused_attn = was
        for hook in hooks:
            hook.remove()
