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
from weakref import WeakSet

import torch
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import adapt, block_inputs, without_compiled_code
from itae_utils.method.attention import constant
from itae_utils.method.layers import Hook, TimmAdapter
from itae_utils.method.register_setting import TestTimeRegisters

_open: WeakSet[nn.Module] = WeakSet()


@contextmanager
def apply_registers(model: nn.Module, setting: TestTimeRegisters) -> Iterator[nn.Module]:
    """Apply test-time registers to every forward pass of a stock timm ViT until the context is left.

    The extra token ("bias": a placeholder) is one more prefix token, in the model's output and `num_prefix_tokens`.
    `attenuate` may be opened inside or outside, and acts on the new tokens. `setting.then` is not applied. A copy that
    is made of the model meanwhile would count a token that it does not get.

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
            hook = Hook(_move, constant(units, torch.long, device), place if setting.form == "token" else None)
            stack.callback(model.blocks[block].mlp.fc2.register_forward_pre_hook(hook).remove)
        if setting.neurons and setting.form == "bias":
            # Keys and values are linear in normed tokens, so those of the mean token are the means k' and v'.
            for block, mean in zip(model.blocks, setting.means, strict=True):
                hook = Hook(_replace, constant(mean, torch.float32, device), place)
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
                        f"depth and width {shape}: use TestTimeRegisters(), which finds its own")
    auto, top = setting.neurons == "auto", 0 if setting.top_layer == "auto" else setting.top_layer
    if top > last:
        raise ItaeError(f"top_layer={top} of {len(blocks)} blocks: only those before the last can have register "
                        "neurons, use a lower one or a deeper model")
    for block, units in dict.fromkeys(range(last + 1), ()).items() if auto else setting.neurons:
        mlp = model.blocks[min(block, last)].mlp
        layer = getattr(mlp, "fc2", None)
        if not isinstance(layer, nn.Linear):
            raise ItaeError(f"the MLP of block {block} is of class {type(mlp).__name__}, without a Linear fc2: use a "
                            "model with Mlp, GluMlp or SwiGLU")
        if block > last or max(units, default=0) >= layer.in_features:
            raise ItaeError(f"neuron {max(units)} of block {block}: register neurons are among 0 to "
                            f"{layer.in_features - 1} of blocks 0 to {last}")
    if setting.form == "bias" and not all(isinstance(block.attn.k_norm, nn.Identity) for block in model.blocks):
        raise ItaeError("form='bias' is not known for a model that norms its keys: use form='token'")


@contextmanager
def _extra_token(model: nn.Module, first: int) -> Iterator[None]:
    """Put a zero token behind the prefix tokens that enter block `first`, and count it as one of them."""
    prefix = model.num_prefix_tokens
    counting = [model, *(block.attn for block in model.blocks[first:] if hasattr(block.attn, "num_prefix_tokens"))]

    def count(number: int, modules: list[nn.Module]) -> None:
        for module in modules:
            module.num_prefix_tokens = number

    def insert(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> tuple[tuple[Tensor, ...], dict]:
        count(prefix + 1, [model])
        tokens, *others = args
        token = tokens.new_zeros(len(tokens), 1, tokens.shape[-1])
        token = model.norm_pre(token).to(tokens) if first == 0 else token  # as if it had entered before that norm
        return (torch.cat([tokens[:, :prefix], token, tokens[:, prefix:]], dim=1), *others), kwargs

    with ExitStack() as stack:
        stack.callback(count, prefix, counting)
        count(prefix + 1, counting)
        # Until it enters, it does not count: the position embedding is resized by the number of prefix tokens.
        hook = Hook(lambda *_: count(prefix, [model]))
        stack.callback(model.patch_embed.register_forward_pre_hook(hook).remove)
        stack.callback(model.blocks[first].register_forward_pre_hook(  # other hooks see the new tokens
            Hook(insert), prepend=True, with_kwargs=True).remove)
        yield


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
    """Return the signed mean of each hidden unit over an image's outliers: (B, 3, H, W), (B, N) -> (b, blocks, hidden).

    The b images are those with outliers, the blocks end with `top_layer`. A mean over images is a score (algorithm 1).
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
