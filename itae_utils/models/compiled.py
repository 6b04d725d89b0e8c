"""torch.compile for the blocks of a model, compatible with forward hooks inside a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line


def compile_blocks(model: nn.Module) -> None:
    """Replace the forward of every block of a timm ViT by compiled code, in place; the first batch compiles it.

    Compiled code ignores hooks that are added or removed later, and the method relies on such hooks. Hooks on a block
    itself run outside its compiled code. A block with a hook on one of its submodules runs uncompiled.
    """
    # Blocks of one class share their code and its compilation.
    compiled = {kind: torch.compile(kind.forward, dynamic=True) for kind in {type(block) for block in model.blocks}}
    for block in model.blocks:
        # A copy's partial holds the copy; a closure would hold this block.
        block.forward = partial(_forward, block, compiled[type(block)])


def _forward(block: nn.Module, compiled: Callable, *args, **options):
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules() if module is not block):
        return type(block).forward(block, *args, **options)
    try:
        return compiled(block, *args, **options)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ItaeError(f"torch.compile fails on this machine ({in_one_line(error)}): use compile=False") from error
