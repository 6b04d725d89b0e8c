"""Adapters for transformer blocks: access to q, k and v, to the attention output, and to the steps after it.

There is one adapter per block class of timm and `transformers`. The method uses only their base, `BlockAdapter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from itae_utils.errors import ItaeError
from itae_utils.method.setting import PROJECTIONS


@dataclass(frozen=True)
class BlockInput:
    """The arguments that a model passes to one of its blocks."""

    tokens: Tensor | None      # (B, T, C); None if they were not kept
    kwargs: dict[str, object]  # such as a rotary embedding

    @property
    def rope(self) -> Tensor | None:
        """Return the rotary embedding of the patches, or None if the model has none."""
        return self.kwargs.get("rope")

    def run(self, block: nn.Module) -> Tensor:
        """Return the output tokens of `block`, (B, T, C)."""
        return block(self.tokens, **self.kwargs)


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values of one block, (B, T, H · d) each.

    They are the projections' outputs, biases included, before any q/k norm or rotation; norms are measured on them.

    Attributes:
        block: the block's adapter.
        by_name: the three by name.
        rope: the rotary embedding of the patches, if any.
        tokens: (B, T, C), as they enter the block.
    """

    block: BlockAdapter
    by_name: Mapping[str, Tensor]
    rope: Tensor | None = None
    tokens: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]

    def heads(self, name: str) -> Tensor:
        """Return one of the three as it enters the attention, after q/k norm and rotation: (B, H, T, d)."""
        return self.block.heads(name, self[name], self.rope)

    @cached_property
    def cls_logits(self) -> Tensor:
        """The scaled logits of the `[CLS]` query, (B, H, 1, T) float32."""
        return scaled_logits(self.heads("query")[:, :, :1], self.heads("key"))


def scaled_logits(q: Tensor, k: Tensor) -> Tensor:
    """Return QKᵀ/√d in float32: (B, H, Q, d), (B, H, T, d) -> (B, H, Q, T)."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).float()


def _do_nothing(*_args: object, **_kwargs: object) -> None:
    """Leave the arguments or the output of a module as they are."""


class Hook(partial):
    """A forward hook that stays with its model: copies and pickles of the model get one that does nothing."""

    def __reduce__(self) -> tuple[type[Hook], tuple[Callable[..., None]]]:
        return Hook, (_do_nothing,)


class BlockAdapter(ABC):
    """Adapter for one transformer block: gives its q, k, v and lets its attention output be replaced."""

    block: nn.Module
    attention: nn.Module
    num_heads: int
    head_dim: int
    projections: list[nn.Module]  # the Linear modules that compute q, k and v
    after_heads: nn.Module        # the first module that is applied to the concatenated heads, (B, T, H · d)
    output_projection: nn.Linear  # from the concatenated heads to the tokens

    @property
    @abstractmethod
    def value_weight(self) -> Tensor:
        """The weight of the projection to the values, (H · d, C)."""

    @abstractmethod
    def scale(self, branch: int) -> Tensor:
        """Return the factors of LayerScale after the attention (1) or the MLP (2), (C,); ones if there is none."""

    @abstractmethod
    def project(self, x: Tensor, source: str) -> Tensor:
        """Return the queries, keys or values of normed tokens: (B, T, C) -> (B, T, H · d)."""

    def project_all(self, x: Tensor, rope: Tensor | None) -> QKV:
        """Return the queries, keys and values of normed tokens (B, T, C)."""
        return QKV(self, {source: self.project(x, source) for source in PROJECTIONS}, rope)

    def qkv(self, inputs: BlockInput) -> QKV:
        """Return the queries, keys and values of a block's input."""
        return replace(self.project_all(self.block.norm1(inputs.tokens), inputs.rope), tokens=inputs.tokens)

    def heads(self, source: str, projected: Tensor, rope: Tensor | None) -> Tensor:
        """Split a projection into heads as they enter the attention: (B, T, H · d) -> (B, H, T, d)."""
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    @abstractmethod
    def _register_hooks(self, receive: Callable[[QKV], None]) -> list[RemovableHandle]:
        """Make every forward pass call `receive` with its q, k and v, before the heads are computed."""

    @contextmanager
    def capture_qkv(self, receive: Callable[[QKV], None]) -> Iterator[None]:
        """While open, every forward pass calls `receive` with its q, k and v, and the tokens that enter the block."""
        entered: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Tensor], _kwargs: dict[str, object]) -> None:
            entered[:] = args[:1]  # not appended: a failed pass may have left its tokens

        handles = [self.block.register_forward_pre_hook(Hook(enter), with_kwargs=True),
                   *self._register_hooks(lambda qkv: receive(replace(qkv, tokens=entered.pop())))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def edit_heads(self, edit: Callable[[QKV, Tensor], Tensor]) -> Iterator[None]:
        """While open, every forward pass replaces its concatenated heads x (B, T, H · d) by `edit(qkv, x)`."""
        captured: list[QKV] = []

        def replace(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            qkv = captured.pop()
            captured.clear()  # a failed pass may have left its q, k and v
            return (edit(qkv, *args),)

        with self.capture_qkv(captured.append):
            handle = self.after_heads.register_forward_pre_hook(Hook(replace))
            try:
                yield
            finally:
                handle.remove()


class TimmAdapter(BlockAdapter):
    """Base class for timm's two kinds of block. It can also compute a block's output for `[CLS]` alone."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.attention = block, block.attn
        self.num_heads, self.head_dim = self.attention.num_heads, self.attention.head_dim
        self.projections = [self.attention.qkv]
        self.after_heads = self.attention.norm  # an Identity in most models
        self.output_projection = self.attention.proj

    @abstractmethod
    def _weight_and_bias(self, source: str) -> tuple[Tensor, Tensor | None]:
        """Return the weight (H · d, C) and bias (H · d,) of one projection."""

    @abstractmethod
    def _layer_scale(self, branch: int, x: Tensor) -> Tensor:
        """Apply LayerScale to the attention branch (1) or the MLP branch (2)."""

    @property
    def value_weight(self) -> Tensor:
        """The weight of the projection to the values, (H · d, C)."""
        return self._weight_and_bias("value")[0]

    def scale(self, branch: int) -> Tensor:
        """Return the factors of LayerScale."""
        weight = self.output_projection.weight
        return self._layer_scale(branch, weight.new_ones(len(weight)))

    def project(self, x: Tensor, source: str) -> Tensor:
        """Return one projection, computed with its own part of the weights."""
        return linear(x, *self._weight_and_bias(source))

    def heads(self, source: str, projected: Tensor, rope: Tensor | None) -> Tensor:
        """Split a projection into heads, and apply the q/k norm."""
        heads = super().heads(source, projected, rope)
        norms = {"query": self.attention.q_norm, "key": self.attention.k_norm}
        return norms[source](heads) if source in norms else heads

    def value_sums(self, weights: Tensor, x: Tensor, further: Tensor | None = None) -> Tensor:
        """Return Σ_t w_t V_t, (B, H, Q, d), for attention weights (B, H, Q, T) that add up to 1 and normed tokens x.

        Values are linear in the tokens. So the tokens (B, T, C) are averaged first and only the averages are projected,
        which gives the same sums without projecting every token. `further` (B, H, Q, C) are weighted sums of other
        normed tokens, whose weights are missing in `weights`.
        """
        weight, bias = self._weight_and_bias("value")
        averages = (weights.flatten(1, 2) @ x).unflatten(1, weights.shape[1:3])
        averages = averages if further is None else averages + further
        by_head = weight.unflatten(0, (self.num_heads, self.head_dim))
        sums = torch.einsum("bhqc,hdc->bhqd", averages, by_head)  # a matmul would copy the weights for every image
        return sums if bias is None else sums + bias.view(self.num_heads, 1, self.head_dim)

    def finish(self, cls_token: Tensor, x: Tensor, heads: Tensor) -> Tensor:
        """Return the block's output for `[CLS]`, given its concatenated heads: (…, B, H · d) -> (…, B, C).

        Args:
            cls_token: (B, C), as it enters the block.
            x: (B, C), the same after the block's first norm, which a gated attention reads.
            heads: (…, B, H · d).
        """
        block, attention = self.block, self.attention
        heads = attention.norm(heads)
        if getattr(attention, "gate", None) is not None:
            heads = heads * attention.gate(x).sigmoid()
        out = cls_token + block.drop_path1(self._layer_scale(1, attention.proj_drop(attention.proj(heads))))
        return out + block.drop_path2(self._layer_scale(2, block.mlp(block.norm2(out))))


class VitAdapter(TimmAdapter):
    """timm's Block with Attention: one Linear computes q, k and v."""

    def _weight_and_bias(self, source: str) -> tuple[Tensor, Tensor | None]:
        qkv, index = self.attention.qkv, PROJECTIONS.index(source)
        return qkv.weight.chunk(3)[index], None if qkv.bias is None else qkv.bias.chunk(3)[index]

    def project_all(self, x: Tensor, rope: Tensor | None) -> QKV:
        """Return the queries, keys and values from one product."""
        return self._split(linear(x, self.attention.qkv.weight, self.attention.qkv.bias))

    def _split(self, projected: Tensor) -> QKV:
        return QKV(self, dict(zip(PROJECTIONS, projected.chunk(3, dim=-1), strict=True)))

    def _register_hooks(self, receive: Callable[[QKV], None]) -> list[RemovableHandle]:
        hook = Hook(lambda _module, _args, projected: receive(self._split(projected)))
        return [self.attention.qkv.register_forward_hook(hook)]

    def _layer_scale(self, branch: int, x: Tensor) -> Tensor:
        return getattr(self.block, f"ls{branch}")(x)


class EvaAdapter(TimmAdapter):
    """timm's EvaBlock with EvaAttention (EVA, DINOv3): fused or split projections, separate biases, rotation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        if self.attention.qkv is None:
            self.projections = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]

    def _weight_and_bias(self, source: str) -> tuple[Tensor, Tensor | None]:
        index = PROJECTIONS.index(source)
        if self.attention.qkv is None:
            return self.projections[index].weight, self.projections[index].bias
        return self.attention.qkv.weight.chunk(3)[index], getattr(self.attention, f"{source[0]}_bias")

    def _register_hooks(self, receive: Callable[[QKV], None]) -> list[RemovableHandle]:
        # EvaAttention uses a fused weight without calling its module, and adds the biases itself. So no module outputs
        # q, k and v, and the attention's input is projected a second time, a quarter of the block's products.
        def hook(_module: nn.Module, args: tuple[Tensor], kwargs: dict[str, object]) -> None:
            receive(self.project_all(args[0], kwargs.get("rope")))

        return [self.attention.register_forward_pre_hook(Hook(hook), with_kwargs=True)]

    def heads(self, source: str, projected: Tensor, rope: Tensor | None) -> Tensor:
        """Split a projection into heads, apply the q/k norm, and rotate the queries and keys of the patches."""
        heads, prefix = super().heads(source, projected, rope), self.attention.num_prefix_tokens
        if rope is None or source == "value" or heads.shape[2] <= prefix:
            return heads
        rotated = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=getattr(self.attention, "rotate_half", False))
        return torch.cat([heads[:, :, :prefix], rotated], dim=2)

    def _layer_scale(self, branch: int, x: Tensor) -> Tensor:
        gamma = getattr(self.block, f"gamma_{branch}")
        return x if gamma is None else gamma * x


class Dinov2Adapter(BlockAdapter):
    """The block of a `transformers` Dinov2Model, with or without registers: one Linear each for q, k and v."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.attention = block, block.attention
        if not hasattr(self.attention, "q_proj"):
            raise ItaeError("this release of transformers has no Dinov2 attention with q_proj: "
                            "install transformers>=5.18")
        self.num_heads, self.head_dim = self.attention.num_attention_heads, self.attention.head_dim
        self.projections = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]
        self.after_heads = self.output_projection = self.attention.o_proj

    @property
    def value_weight(self) -> Tensor:
        """The weight of the projection to the values, (H · d, C)."""
        return self.projections[2].weight

    def scale(self, branch: int) -> Tensor:
        """Return the factors of LayerScale."""
        return getattr(self.block, f"layer_scale{branch}").lambda1

    def project(self, x: Tensor, source: str) -> Tensor:
        """Return the output of one of the three modules, without calling the hooks on it."""
        module = self.projections[PROJECTIONS.index(source)]
        return linear(x, module.weight, module.bias)

    def _register_hooks(self, receive: Callable[[QKV], None]) -> list[RemovableHandle]:
        captured: dict[str, Tensor] = {}

        def capture(source: str, _module: nn.Module, _args: tuple[Tensor], projected: Tensor) -> None:
            captured[source] = projected
            if len(captured) == len(PROJECTIONS):
                receive(QKV(self, dict(captured)))
                captured.clear()

        return [module.register_forward_hook(Hook(partial(capture, source)))
                for source, module in zip(PROJECTIONS, self.projections, strict=True)]
