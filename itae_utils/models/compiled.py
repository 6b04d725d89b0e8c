"""torch.compile for the blocks of a model, compatible with forward hooks inside a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line


def compile_blocks(model: nn.Module) -> None:
    """Replace the forward of every block of a timm ViT by compiled code, in place; the first batch compiles it.

    Compiled code ignores hooks that are added or removed later, and the method relies on such hooks. Hooks on a block
    itself run outside its compiled code. A block with a hook on one of its submodules runs uncompiled.
    """
    compiled: dict[type, Callable] = {}  # blocks of one class share their code and its compilation
    for block in model.blocks:
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=True)
        block.forward = _Forward(block, compiled[kind])


class _Forward:
    """The forward of a block: compiled, unless a submodule of the block has a hook."""

    def __init__(self, block: nn.Module, compiled: Callable) -> None:
        self.block, self.compiled = block, compiled

    def __call__(self, *args, **options):
        if any(module._forward_hooks or module._forward_pre_hooks
               for module in self.block.modules() if module is not self.block):
            return type(self.block).forward(self.block, *args, **options)
        try:
            return self.compiled(self.block, *args, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ItaeError(f"torch.compile fails on this machine ({in_one_line(error)}): use compile=False") from error
