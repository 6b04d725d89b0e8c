"""Test-time registers: an extra token takes what register neurons would write into patches (arXiv 2506.08010).

Let a_n(t) be hidden unit n of a block's MLP at token t: an input of its last layer, after the nonlinearity and after a
gate or a norm inside the MLP. A zero token r stands behind the prefix tokens. For every register neuron n

    a_n(r) ← max_t a_n(t),    a_n(t) ← 0 for every t ≠ r

where the maximum is over all tokens of the image (algorithm 2). Everything else runs unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from weakref import WeakSet

import torch
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import adapt, block_inputs, without_compiled_code
from itae_utils.method.attention import substitute_token
from itae_utils.method.layers import Hook, TimmAdapter
from itae_utils.method.register_setting import TestTimeRegisters

_open: WeakSet[nn.Module] = WeakSet()


@contextmanager
def apply_registers(model: nn.Module, setting: TestTimeRegisters) -> Iterator[nn.Module]:
    """Apply test-time registers to every forward pass of a stock timm ViT until the context is left.

    The extra token is one more prefix token, in the model's output and in its `num_prefix_tokens`. `attenuate` may be
    opened inside or outside, and acts on the new tokens. `setting.then` is not applied.

    Raises:
        ItaeError: as `check_registers`, a setting that is not fitted, or such a context is open already.
    """
    check_registers(model, setting)
    if setting.neurons == "auto" or (setting.neurons and setting.form == "bias" and not setting.means):
        raise ItaeError("neurons or means are missing: use the setting that find_register_neurons(backbone, dataset, "
                        "setting) returns")
    if has_registers(model):
        raise ItaeError("test-time registers are already applied to this model: leave that context first")
    place, device = model.num_prefix_tokens, next(model.parameters()).device
    with ExitStack() as stack:
        if setting.neurons:
            stack.enter_context(without_compiled_code())
            _open.add(model)
            stack.callback(_open.discard, model)
        if setting.neurons and setting.form != "zero":
            stack.enter_context(_extra_token(model, setting.first_block))
        for block, units in setting.neurons:
            hook = Hook(_move, _on_device(units, device), place if setting.form == "token" else None)
            stack.callback(model.blocks[block].mlp.fc2.register_forward_pre_hook(hook).remove)
        # Keys and values are linear in normed tokens, so those of the mean token are the means k' and v'.
        for block, mean in zip(model.blocks if setting.form == "bias" else (), setting.means or (), strict=False):
            hook = Hook(_replace, substitute_token(mean, torch.float32, device), place)
            stack.callback(block.norm1.register_forward_hook(hook).remove)
        yield model


def has_registers(model: nn.Module) -> bool:
    """Return whether a context of `apply_registers` is open on this model."""
    return model in _open


def check_registers(model: nn.Module, setting: TestTimeRegisters) -> None:
    """Check that a model can run a setting, fitted or not.

    Raises:
        ItaeError: no timm model, numbers for another model, neurons that it does not have or whose register no block
            would read, an MLP of another kind, or "bias" with a norm of the keys, which are then not linear.
    """
    blocks = adapt(model).blocks
    if not isinstance(setting, TestTimeRegisters) or not isinstance(blocks[0], TimmAdapter):
        raise ItaeError(f"test-time registers need TestTimeRegisters(…) and a timm ViT, not {type(setting).__name__} "
                        f"and {type(model).__name__}")
    shape, last = (len(blocks), model.embed_dim), len(blocks) - 2
    if setting.shape not in (None, shape) or (setting.means and len(setting.means) != len(blocks)):
        raise ItaeError(f"the numbers are for another model ({setting.shape or len(setting.means)}) than this one, of "
                        f"depth and width {shape}: find its own, TestTimeRegisters()")
    if last < 0 or (setting.top_layer != "auto" and setting.top_layer > last):
        raise ItaeError(f"top_layer={setting.top_layer} with {len(blocks)} blocks: neurons must lie before the last "
                        f"block, use at most {last}" if last >= 0 else "test-time registers need two blocks or more")
    for block, units in ((block, ()) for block in range(last + 1)) if setting.neurons == "auto" else setting.neurons:
        if block > last:
            raise ItaeError(f"neurons in block {block}: no block after it reads the register, use 0 to {last}")
        layer = getattr(model.blocks[block].mlp, "fc2", None)
        if not isinstance(layer, nn.Linear):
            raise ItaeError(f"the MLP of block {block} is of class {type(model.blocks[block].mlp).__name__}, without a "
                            "Linear fc2: use a model with Mlp, GluMlp or SwiGLU")
        if max(units, default=0) >= layer.in_features:
            raise ItaeError(f"neuron {max(units)} of block {block}: the MLP has 0 to {layer.in_features - 1}")
    if setting.form == "bias" and not all(isinstance(block.attn.k_norm, nn.Identity) for block in model.blocks):
        raise ItaeError("form='bias' is not known for a model that norms its keys: use form='token'")


@contextmanager
def _extra_token(model: nn.Module, first: int) -> Iterator[None]:
    """Put a zero token behind the prefix tokens that enter block `first`, and count it as one of them."""
    prefix = model.num_prefix_tokens
    attentions = [block.attn for block in model.blocks[first:] if hasattr(block.attn, "num_prefix_tokens")]

    def count(number: int) -> None:
        model.num_prefix_tokens = number

    def insert(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> tuple[tuple[Tensor, ...], dict]:
        tokens, *others = args
        token = tokens.new_zeros(tokens.shape[-1])
        token = model.norm_pre(token).to(tokens) if first == 0 else token  # as if it had entered before that norm
        count(prefix + 1)
        token = token.expand(len(tokens), 1, -1)
        return (torch.cat([tokens[:, :prefix], token, tokens[:, prefix:]], dim=1), *others), kwargs

    # The position embedding is resized by the number of prefix tokens that it has. Other hooks see the new tokens.
    handles = [model.patch_embed.register_forward_pre_hook(Hook(lambda *_: count(prefix))),
               model.blocks[first].register_forward_pre_hook(Hook(insert), prepend=True, with_kwargs=True)]
    for module in (model, *attentions):
        module.num_prefix_tokens = prefix + 1
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in (model, *attentions):
            module.num_prefix_tokens = prefix


@lru_cache(maxsize=256)  # the copy to a device is made once
def _on_device(units: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(units, device=device)


def _move(units: Tensor, place: int | None, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Silence units (B, T, hidden), and give the token at `place`, if any, their largest activations."""
    chosen = args[0].index_select(-1, units)
    moved = torch.zeros_like(chosen)
    if place is not None:
        moved[:, place] = chosen.amax(dim=1)
    return (args[0].index_copy(-1, units, moved),)


def _replace(mean: Tensor, place: int, _module: nn.Module, _args: tuple[Tensor], normed: Tensor) -> Tensor:
    normed = normed.clone()
    normed[:, place] = mean.to(normed.dtype)
    return normed


def outlier_activations(model: nn.Module, images: Tensor, outliers: Tensor, top_layer: int) -> Tensor:
    """Return the mean of every hidden unit over each image's outliers, for the b of B images that have some.

    The mean over images is the score of a neuron (algorithm 1). It is signed.

    Args:
        model: a timm ViT.
        images: (B, 3, H, W), preprocessed.
        outliers: (B, N) bool, of the patches.
        top_layer: last block that is measured.

    Returns:
        (b, top_layer + 1, hidden), float32.
    """
    some, means = outliers.any(dim=1), []
    weights = outliers[some, :, None] / outliers[some].sum(dim=1)[:, None, None]

    def measure(_module: nn.Module, args: tuple[Tensor]) -> None:
        patches = args[0][some, -outliers.shape[1]:].float()
        means.append((patches * weights).sum(dim=1))  # autocast would round a product of matrices

    with ExitStack() as stack:
        for block in model.blocks[:top_layer + 1]:
            stack.callback(block.mlp.fc2.register_forward_pre_hook(measure).remove)
        block_inputs(model, images, [top_layer + 1])
    return torch.stack(means, dim=1)


def normed_registers(model: nn.Module, images: Tensor, setting: TestTimeRegisters) -> Tensor:
    """Return each image's extra token after the first norm of every block, (B, blocks, C)."""
    place, found = model.num_prefix_tokens, []
    with apply_registers(model, replace(setting, form="token")), ExitStack() as stack:
        for block in model.blocks:
            hook = block.norm1.register_forward_hook(lambda _module, _args, normed: found.append(normed[:, place]))
            stack.callback(hook.remove)
        adapt(model).run(images)
    return torch.stack(found, dim=1)
