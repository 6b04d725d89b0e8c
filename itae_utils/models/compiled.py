"""torch.compile for a model's blocks, right with any hooks: what is hooked runs as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import anatomy


def compile_blocks(model: nn.Module) -> None:
    """Let every block of a model run compiled, in place; compiling waits for the first batch.

    Compiled code does not see hooks that come and go, on which everything here relies. A block's own hooks run outside
    what is compiled; while anything inside a block is hooked, that block runs uncompiled.
    """
    compiled: dict[type, Callable] = {}  # blocks of one class share their code, and so its compilation
    for layer in anatomy(model).layers:
        kind = type(layer.block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=True)
        layer.block.forward = _Forward(layer.block, compiled[kind])


class _Forward:
    """A block's forward: compiled unless something inside the block is hooked."""

    def __init__(self, block: nn.Module, compiled: Callable) -> None:
        self.block, self.compiled = block, compiled

    def __call__(self, *args, **options):
        if any(module._forward_hooks or module._forward_pre_hooks
               for module in self.block.modules() if module is not self.block):
            return type(self.block).forward(self.block, *args, **options)
        try:
            return self.compiled(self.block, *args, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            raise ItaeError(f"torch.compile fails on this machine ({reason}): use compile=False") from error
