"""A transformer block opened up, whichever class it is: where q, k and v come from, and what follows the attention.

One adapter for each kind of block; the method itself (`itae_utils.attention`) sees only their common face, `Layer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from itae_utils.errors import ItaeError
from itae_utils.method.setting import SOURCES


@dataclass(frozen=True)
class BlockInput:
    """What a model passes to one of its blocks.

    Attributes:
        tokens: (B, T, C).
        options: everything passed by name, a rotary embedding among it.
    """

    tokens: Tensor
    options: dict[str, object]

    @property
    def rope(self) -> Tensor | None:
        """The rotary embedding of the patches, for models that have one."""
        return self.options.get("rope")

    def through(self, block: nn.Module) -> Tensor:
        """The tokens after the block."""
        return block(self.tokens, **self.options)


@dataclass(frozen=True)
class Projections:
    """Outputs of a block's projections, biases included, before any norm or rotation: what norms are measured on.

    Attributes:
        layer: whose they are.
        parts: (B, T, H · d) by source; only what was asked for.
        rope: the rotary embedding that queries and keys get.
    """

    layer: Layer
    parts: dict[str, Tensor]
    rope: Tensor | None = None

    def __getitem__(self, source: str) -> Tensor:
        return self.parts[source]

    def heads(self, source: str) -> Tensor:
        """(B, H, T, d) as they enter the attention: after q/k norm and rotation."""
        return self.layer.heads(source, self.parts[source], self.rope)


def split_heads(attention: nn.Module, projected: Tensor) -> Tensor:
    """The last dimension of `projected` (B, T, parts · H · d) cut into (parts, B, H, T, d)."""
    batch, tokens, _ = projected.shape
    return projected.view(batch, tokens, -1, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)


class Layer(ABC):
    """One block, and the two places where the method takes hold of it.

    Attributes:
        block: the module.
        attention: the module in it that attends.
        num_heads: H.
        head_dim: d.
        reads_heads: the module that is given the concatenated heads, (B, T, H · d).
        projections_of: the Linear modules that make q, k and v.
    """

    block: nn.Module
    attention: nn.Module
    num_heads: int
    head_dim: int
    reads_heads: nn.Module
    projections_of: list[nn.Module]

    @abstractmethod
    def project(self, normed: Tensor, rope: Tensor | None = None, sources: Sequence[str] = SOURCES) -> Projections:
        """Project tokens that went through the block's first norm; `sources` are neighbours in `SOURCES`."""

    @abstractmethod
    def _hook(self, receive: Callable[[Projections], None]) -> list[RemovableHandle]:
        """Hand the projections of every forward pass to `receive`, before the heads are read."""

    @contextmanager
    def watch(self, receive: Callable[[Projections], None]) -> Iterator[None]:
        """While open, every forward pass hands its projections to `receive`, before the heads are read."""
        handles = self._hook(receive)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def project_input(self, entering: BlockInput) -> Projections:
        """All projections of what enters the block."""
        return self.project(self.block.norm1(entering.tokens), entering.rope)

    def heads(self, source: str, part: Tensor, rope: Tensor | None) -> Tensor:
        """One projection (B, T, H · d) as it enters the attention, (B, H, T, d)."""
        return part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class VitLayer(Layer):
    """timm's Block with its Attention: q, k and v are thirds of one Linear."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.attention = block, block.attn
        self.num_heads, self.head_dim = self.attention.num_heads, self.attention.head_dim
        self.reads_heads = self.attention.norm  # an Identity in most models
        self.projections_of = [self.attention.qkv]

    def project(self, normed: Tensor, rope: Tensor | None = None, sources: Sequence[str] = SOURCES) -> Projections:
        """See `Layer`: one product for all of `sources`."""
        return self._thirds(linear(normed, *self._weight_and_bias(*sources)), sources)

    def _weight_and_bias(self, *sources: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.attention.qkv.weight, self.attention.qkv.bias
        width, first = self.num_heads * self.head_dim, SOURCES.index(sources[0])
        rows = slice(first * width, (first + len(sources)) * width)
        return weight[rows], None if bias is None else bias[rows]

    def value_sums(self, weights: Tensor, normed: Tensor) -> Tensor:
        """Σ_t w_t V_t for rows of weights that add up to 1: the tokens are averaged first and the averages projected.

        Values are linear in the tokens, so this is the same sum, without a projection of every token.

        Args:
            weights: (B, H, Q, T).
            normed: (B, T, C), after the block's first norm.

        Returns:
            (B, H, Q, d).
        """
        weight, bias = self._weight_and_bias("value")
        averages = (weights.flatten(1, 2) @ normed).unflatten(1, weights.shape[1:3])
        by_head = weight.unflatten(0, (self.num_heads, self.head_dim))
        sums = torch.einsum("bhqc,hdc->bhqd", averages, by_head)  # a matmul would copy the weights for every image
        return sums if bias is None else sums + bias.view(self.num_heads, 1, self.head_dim)

    def _thirds(self, projected: Tensor, sources: Sequence[str] = SOURCES) -> Projections:
        return Projections(self, dict(zip(sources, projected.chunk(len(sources), dim=-1), strict=True)))

    def _hook(self, receive: Callable[[Projections], None]) -> list[RemovableHandle]:
        return [self.attention.qkv.register_forward_hook(lambda _module, _args, out: receive(self._thirds(out)))]

    def heads(self, source: str, part: Tensor, rope: Tensor | None) -> Tensor:
        """See `Layer`: queries and keys are normed."""
        heads = super().heads(source, part, rope)
        norms = {"query": self.attention.q_norm, "key": self.attention.k_norm}
        return norms[source](heads) if source in norms else heads

    def finish(self, cls_token: Tensor, normed: Tensor, heads: Tensor) -> Tensor:
        """The block's output for `[CLS]` alone: everything after the value sum.

        Args:
            cls_token: (B, C), as it enters the block.
            normed: (B, C), after the first norm: a gate reads it.
            heads: (…, B, H · d), the concatenated heads.
        """
        block, attention = self.block, self.attention
        x = attention.norm(heads)
        if getattr(attention, "gate", None) is not None:
            x = x * attention.gate(normed).sigmoid()
        x = cls_token + block.drop_path1(self._scale(1, attention.proj_drop(attention.proj(x))))
        return x + block.drop_path2(self._scale(2, block.mlp(block.norm2(x))))

    def _scale(self, branch: int, x: Tensor) -> Tensor:
        return getattr(self.block, f"ls{branch}")(x)


class EvaLayer(VitLayer):
    """timm's EvaBlock with EvaAttention, as in EVA and DINOv3: split or fused, biases apart, patches rotated."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        attention = self.attention
        self.is_split = attention.qkv is None
        self.projections_of = ([attention.q_proj, attention.k_proj, attention.v_proj] if self.is_split
                               else [attention.qkv])

    def project(self, normed: Tensor, rope: Tensor | None = None, sources: Sequence[str] = SOURCES) -> Projections:
        """See `Layer`."""
        return Projections(self, {source: linear(normed, *self._weight_and_bias(source)) for source in sources}, rope)

    def _weight_and_bias(self, source: str) -> tuple[Tensor, Tensor | None]:
        place = SOURCES.index(source)
        if self.is_split:
            return self.projections_of[place].weight, self.projections_of[place].bias
        return self.attention.qkv.weight.chunk(3)[place], getattr(self.attention, f"{source[0]}_bias")

    def _hook(self, receive: Callable[[Projections], None]) -> list[RemovableHandle]:
        # No module's output is the projection: a fused one's weight is used without calling it, and its biases lie
        # outside. So the attention's input is projected once more, which costs a quarter of a block's products.
        def hook(_module, args, options):
            receive(self.project(args[0], options.get("rope")))

        return [self.attention.register_forward_pre_hook(hook, with_kwargs=True)]

    def heads(self, source: str, part: Tensor, rope: Tensor | None) -> Tensor:
        """See `Layer`: queries and keys are normed, then those of the patches rotated."""
        heads, prefix = super().heads(source, part, rope), self.attention.num_prefix_tokens
        if rope is None or source == "value" or heads.shape[2] <= prefix:
            return heads
        rotated = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=getattr(self.attention, "rotate_half", False))
        return torch.cat([heads[:, :, :prefix], rotated], dim=2)

    def _scale(self, branch: int, x: Tensor) -> Tensor:
        gamma = getattr(self.block, f"gamma_{branch}")
        return x if gamma is None else gamma * x


class Dinov2Layer(Layer):
    """The block of a `transformers` Dinov2Model, with or without registers: three Linear modules for q, k and v."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.attention = block, block.attention
        if not hasattr(self.attention, "q_proj"):
            raise ItaeError("this release of transformers has q, k and v elsewhere: install transformers>=5.18")
        self.num_heads, self.head_dim = self.attention.num_attention_heads, self.attention.head_dim
        self.reads_heads = self.attention.o_proj
        self.projections_of = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]

    def project(self, normed: Tensor, rope: Tensor | None = None, sources: Sequence[str] = SOURCES) -> Projections:
        """See `Layer`."""
        return Projections(self, {source: self.projections_of[SOURCES.index(source)](normed) for source in sources})

    def _hook(self, receive: Callable[[Projections], None]) -> list[RemovableHandle]:
        parts: dict[str, Tensor] = {}

        def keep(source: str):
            def hook(_module, _args, projected: Tensor) -> None:
                parts[source] = projected
                if len(parts) == len(SOURCES):
                    receive(Projections(self, dict(parts)))
                    parts.clear()

            return hook

        return [module.register_forward_hook(keep(source))
                for source, module in zip(SOURCES, self.projections_of, strict=True)]
