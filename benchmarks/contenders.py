"""The contenders: ways to compute the `[CLS]` features of one batch of images."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import timm
import torch
from torch import Tensor, nn

from benchmarks.timing import Conditions
from itae_utils.method.anatomy import adapt, block_inputs
from itae_utils.method.attention import attenuate
from itae_utils.method.direction import singular_directions
from itae_utils.method.one_pass import OnePass
from itae_utils.method.register_setting import TestTimeRegisters, Variant
from itae_utils.method.registers import normed_registers
from itae_utils.method.setting import ATTENUATIONS, ITAE, SOURCES
from itae_utils.method.statistics import patch_statistic, qkv_norms
from itae_utils.models.backbones import reset_layer_scale

Contender = Callable[[Tensor], dict[str, Tensor]]  # images (B, 3, H, W) -> features (B, dim) by variant

SOURCE_ORDER = ("key", "query", "value")
EDITS = ("min", "mask", "mean", "scale")  # of the settings that the loop runs, too
SHARES = (0.05, 0.01, 0.02, 0.1, 0.2)  # θ is one of these quantiles of the norms, so every variant has artifacts
STRIDE = 7  # step through the grid of settings: the first few cover all sources, attenuations and shares
COUNTS = (0, 1, 8, 48)  # numbers of variants in the one pass
PLAIN = "plain forward_features"
PREFIX = "prefix alone"
TRANSFORMERS = "transformers Dinov2Model, SDPA"
CONTROLS = "ours, 48 variants, 16 of them random controls"
ALL_SOURCES = "ours, 48 variants of all sources and edits"
START, LATE, BIAS = REGISTERS = ("ours, registers from the start", "ours, registers from half of the depth",
                                 "ours, registers as a bias")  # each beside the baseline
UNITS = 8  # register neurons
EAGER = "eager attention with a hook, 1 variant"


def ours(count: int) -> str:
    """Return the name of the one pass with `count` variants and the baseline."""
    return f"ours, {count} variant{'s' * (count != 1)}"


def loop(count: int) -> str:
    """Return the name of the loop over `count` variants."""
    return f"loop, {count} variants"


@dataclass(frozen=True)
class Size:
    """A model and its workload.

    Attributes:
        timm_name: the model's name in timm.
        backbone: the model's name in `load_backbone`.
        batches: batch size by kind of device, "cpu" and "cuda".
        looped: number of variants in the loop.
        image_size: pixels per side.
        options: changed settings of the timm model.
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
    """A timm model with random weights and one batch of images.

    Attributes:
        size: key of `SIZES`.
        model: the timm model.
        images: (B, 3, H, W), on the model's device.
    """

    size: str
    model: nn.Module
    images: Tensor


def make_workload(size: str, conditions: Conditions) -> Workload:
    """Make a model of that size and a batch of random images, with a fixed seed."""
    entry = SIZES[size]
    torch.manual_seed(0)
    images = torch.randn(conditions.batch or entry.batches[conditions.kind], 3, entry.image_size, entry.image_size)
    return Workload(size, make_model(size).to(conditions.device), images.to(conditions.device))


def make_model(size: str) -> nn.Module:
    """Make a timm model with random weights whose features depend on its attention.

    LayerScale's initial factors of 1e-5 and nearly uniform attention would hide every edit, and contenders would agree
    for that reason alone. So LayerScale is set to 1 and the logits are scaled by 9, which does not change the time.
    """
    entry = SIZES[size]
    model = timm.create_model(entry.timm_name, img_size=entry.image_size, num_classes=0, global_pool="token",
                              dynamic_img_size=True, **dict(entry.options))
    reset_layer_scale(model)
    for block in model.blocks:
        block.attn.qkv.weight.data *= 3
    return model.eval().requires_grad_(False)


def make_transformers_model(model: nn.Module) -> nn.Module:
    """Make a `transformers` `Dinov2Model` of the same shape with random weights and SDPA attention."""
    from transformers import Dinov2Config, Dinov2Model

    patch = model.patch_embed.patch_size[0]
    config = Dinov2Config(hidden_size=model.embed_dim, num_hidden_layers=len(model.blocks), patch_size=patch,
                          num_attention_heads=model.blocks[0].attn.num_heads,
                          image_size=patch * model.patch_embed.grid_size[0], attn_implementation="sdpa")
    return Dinov2Model(config).eval().requires_grad_(False)


def make_variants(work: Workload, count: int, conditions: Conditions) -> dict[str, ITAE]:
    """Make `count` settings; the first is the paper's method with 5 % of the patches as artifacts by their keys.

    Each threshold lies midway between two measured norms, so that rounding moves no patch across it.
    """
    with conditions.running():
        norms = {source: values.double().flatten().sort().values
                 for source, values in qkv_norms(work.model, work.images).items()}
    grid = list(itertools.product(SHARES, EDITS, SOURCE_ORDER))
    chosen = {}
    for number in range(count):
        share, attenuation, source = grid[number * STRIDE % len(grid)]
        place = max(1, round(share * len(norms[source])))
        threshold = float(norms[source][place - 1:place + 1].mean())
        chosen[f"{source} {attenuation} {share:.0%}"] = ITAE(source, threshold, attenuation)
    return chosen


def make_all_sources(work: Workload, count: int, conditions: Conditions) -> dict[str, ITAE]:
    """Make `count` settings over all sources and all edits, with 1 to 20 % of the patches as artifacts."""
    model, last = work.model, len(work.model.blocks) - 1
    with conditions.running():
        block = adapt(model).blocks[-1]
        qkv = block.qkv(block_inputs(model, work.images, [last])[last])
        directions = singular_directions(model, last)
        values = {source: patch_statistic(source, qkv, model.num_prefix_tokens, directions) for source in SOURCES}
    substitutes = ((0.0,) * model.embed_dim,)
    chosen = {}
    for number, (source, edit) in zip(range(count), itertools.cycle(itertools.product(SOURCES, ATTENUATIONS))):
        share = SHARES[number % len(SHARES)]
        itae = ITAE(source, 0.0, edit, substitutes=substitutes if edit == "substitute" else None)
        threshold = float(values[source].quantile(share if itae.side == "low" else 1 - share))
        chosen[f"{source} {edit} {number}"] = replace(itae, threshold=threshold)
    return chosen


def make_registers(work: Workload, conditions: Conditions) -> dict[str, TestTimeRegisters]:
    """Make test-time registers by contender, of the first neurons of the block at half of the depth."""
    start = TestTimeRegisters({len(work.model.blocks) // 2: range(UNITS)})
    with conditions.running():
        means = normed_registers(work.model, work.images, start).double().mean(dim=0).tolist()
    return {START: start, LATE: replace(start, insert="late"),
            BIAS: replace(start, form="bias", means=tuple(map(tuple, means)))}


def contender_names(size: str) -> list[str]:
    """Return the names of the contenders at that size, in the order of `make_contenders`."""
    return [PLAIN, PREFIX, TRANSFORMERS, *map(ours, COUNTS), CONTROLS, ALL_SOURCES, *REGISTERS, EAGER,
            loop(SIZES[size].looped)]


def make_contenders(work: Workload, conditions: Conditions) -> dict[str, Contender]:
    """Return the contenders by name. Settings are made here, so that a call does the work of one batch only."""
    model, last = work.model, len(work.model.blocks) - 1
    variants = make_variants(work, max(COUNTS), conditions)
    transformers_model = functools.cache(lambda: make_transformers_model(model).to(work.images.device))  # on first use

    def first(count: int) -> dict[str, ITAE]:
        return dict(itertools.islice(variants.items(), count))

    def one_pass(chosen: dict[str, Variant]) -> Contender:
        extraction = OnePass(model, {"baseline": None, **chosen})
        return lambda images: {name: features for name, (features, _) in extraction(images, 0).items()}

    controls = {f"{name} {number}": replace(itae, select="random") if number % 3 == 2 else itae
                for number, (name, itae) in enumerate(variants.items())}
    looped, (paper, itae) = first(SIZES[work.size].looped), next(iter(variants.items()))
    return {
        PLAIN: lambda images: {"baseline": model.forward_features(images)[:, 0]},
        PREFIX: lambda images: {"prefix": block_inputs(model, images, [last])[last].tokens[:, 0]},
        TRANSFORMERS: lambda images: {"other weights": transformers_model()(images).last_hidden_state[:, 0]},
        **{ours(count): one_pass(first(count)) for count in COUNTS},
        CONTROLS: one_pass(controls),
        ALL_SOURCES: one_pass(make_all_sources(work, max(COUNTS), conditions)),
        **{name: one_pass({name: registers}) for name, registers in make_registers(work, conditions).items()},
        EAGER: lambda images: {paper: hooked_once(model, images, itae)},
        loop(len(looped)): lambda images: {name: looped_once(model, images, each) for name, each in looped.items()},
    }


def looped_once(model: nn.Module, images: Tensor, itae: ITAE) -> Tensor:
    """Return the features of one variant from one full forward pass."""
    with attenuate(model, itae):
        return model.forward_features(images)[:, 0].clone()  # a view would keep all tokens in memory


def hooked_once(model: nn.Module, images: Tensor, itae: ITAE) -> Tensor:
    """Return the features of one variant as most published code computes them: a hook edits the last attention map.

    Fused attention has no maps, so such code disables it in the whole model. Editing weights after the softmax equals
    the paper's edit of logits before it: the artifacts get the row's smallest weight, and the row is renormalised.
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
