"""The largest batch that fits a device's memory, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from itae_utils.errors import ItaeError

if TYPE_CHECKING:
    import torch

    from itae_utils.backbones import Backbone

STARTS = {"cuda": 256}
START_ELSEWHERE = 64
# What allocators say whose error has no class of its own: torch's on a CPU, cuBLAS's and cuDNN's workspaces.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory",
                 "ALLOC_FAILED")


def resolve_batch_size(batch_size: int | Literal["auto"], backbone: Backbone) -> int:
    """A number for "auto": 64 on a CPU; on a GPU the largest of 256, 128 … for which the model's own pass fits.

    Raises:
        ItaeError: not a number of images.
    """
    import torch

    if batch_size != "auto":
        if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
            raise ItaeError(f"batch_size={batch_size!r} is not a number of images: use 1 or more, or 'auto'")
        return int(batch_size)
    if backbone.device.type == "cpu":
        return START_ELSEWHERE
    side = backbone.image_size

    def run(size: int) -> None:
        with torch.inference_mode(), backbone.autocast():
            backbone.model.forward_features(torch.zeros(size, 3, side, side, device=backbone.device))

    return fitting_batch_size(run, backbone.device)


def fitting_batch_size(run: Callable[[int], object], device: torch.device, *, start: int | None = None) -> int:
    """The first of `start`, `start` / 2, `start` / 4 … 1 with which `run(size)` does not run out of memory.

    On a CPU an allocation may also succeed and the system end the process later: there it is the start that has to be
    modest.

    Args:
        run: does the work once with a batch of that size; what it returns is dropped.
        device: where it runs.
        start: the first size tried; None is 256 on CUDA, 64 elsewhere.

    Raises:
        ItaeError: a start below 1, or not even one image fits.
    """
    if start is None:
        start = STARTS.get(device.type, START_ELSEWHERE)
    if start < 1:
        raise ItaeError(f"batch_size={start} is too small: use 1 or more")
    size = start
    while not _fits(run, size):
        _give_back(device)
        if size == 1:
            raise ItaeError(f"not even one image fits the memory of {device}: use a smaller image_size, "
                            "precision='bf16', or another device")
        size //= 2
    return size


def _fits(run: Callable[[int], object], size: int) -> bool:
    """Whether the run went through; in a function of its own, so that the error lets go of what its frames held."""
    try:
        run(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or on CUDA."""
    import torch

    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _give_back(device: torch.device) -> None:
    import gc

    import torch

    gc.collect()  # hooks and their frames form circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
