"""Batches of preprocessed images, in a fixed order, with or without worker processes; and ready on a model's device."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itae_utils.errors import ItaeError
from itae_utils.models.backbones import Backbone
from itae_utils.models.preprocessing import Decode, DevicePreprocessing, Pixels
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import entry_key

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


def chosen_batch_size(
    batch_size: int | Literal["auto"], backbone: Backbone, dataset: Dataset, store: str | Path | Store | None
) -> int:
    """Return a number for "auto": `resolve_batch_size`'s, and on a GPU always the first that was chosen for this store.

    What fits a GPU's memory changes with what else runs there, and the batch size can change the last bits of norms and
    features. So features, θ and observations all ask here, and the store remembers the answer.
    """
    place = open_store(store)
    if batch_size != "auto" or backbone.device.type == "cpu" or place is None:
        return resolve_batch_size(batch_size, backbone)
    key = entry_key(backbone, dataset, batch_size)
    if key is None:
        return resolve_batch_size(batch_size, backbone)
    found = place.remembered("batch_size", key, lambda: {"images": np.array(resolve_batch_size("auto", backbone))})
    return int(found["images"])


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
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _give_back(device: torch.device) -> None:
    gc.collect()  # hooks and their frames form circles
    if device.type == "cuda":
        torch.cuda.empty_cache()


T = TypeVar("T")

MOST_WORKERS = 16
SMALL = 256              # images; fewer are done before worker processes have paid for their start
PREFETCHED = 2           # batches that torch's DataLoader lets each worker have ready
SHARED_MEMORY = Path("/dev/shm")


def image_batches(
    dataset: Dataset,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in their order, or those at `indices` in that order: (B, 3, H, W) float, and labels (B,) int64.

    `transform` makes a (3, H, W) float tensor of a PIL image; it runs where the image is loaded, in the workers if any.

    Raises:
        ItaeError: an image can't be decoded, the transform leaves them at different sizes, a batch_size below 1, a bad
            num_workers, a worker that died.
    """
    yield from _loaded(dataset, transform, _stacked, batch_size=batch_size, num_workers=num_workers, indices=indices)


def model_batches(
    backbone: Backbone,
    dataset: Dataset,
    *,
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """The images in their order, or those at `indices` in that order, as the model takes them: (B, 3, S, S) float.

    They are on the backbone's device. Where `backbone.resize` is "device", images are only decoded where they are
    loaded; resizing, cropping and normalising run on the device. On CUDA the next batch's copy and preprocessing are
    issued, on a stream of their own, before the current batch is handed out.

    Args:
        backbone: from `load_backbone`.
        dataset: of (PIL image, label).
        batch_size: images at a time, "auto" as `resolve_batch_size` says; the last batch may have fewer.
        num_workers: processes that load images; "auto" as `auto_workers` says.
        indices: numbers of images in the data set.

    Raises:
        ItaeError: as `image_batches`.
    """
    batch_size = resolve_batch_size(batch_size, backbone)
    count = len(dataset) if indices is None else len(indices)
    if num_workers == "auto":
        num_workers = auto_workers(backbone, dataset, count, batch_size)
    on_cuda = backbone.device.type == "cuda"
    load = partial(_loaded, dataset, batch_size=batch_size, num_workers=num_workers, indices=indices, pinned=on_cuda)
    if backbone.resize == "device":
        loaded = load(Decode(backbone.transform, backbone.image_size), Pixels.joined)
        finish = DevicePreprocessing(backbone.transform, backbone.device)
    else:
        loaded, finish = load(backbone.transform, _stacked), lambda images: images

    def issue(batch: Tensor | Pixels) -> Tensor:
        return finish(batch.to(backbone.device, non_blocking=on_cuda))

    images = (images for images, _ in loaded)
    yield from _issued_ahead(images, issue, backbone.device) if on_cuda else map(issue, images)


def auto_workers(backbone: Backbone, dataset: Dataset, count: int, batch_size: int) -> int:
    """How many processes should load `count` images of a data set for a backbone.

    None for images in memory, for fewer than 256, and in a process that may not have children. For files: with a model
    on an accelerator, all cores but one; with a model on the CPU, one core in 4, for the model itself uses all of them
    (measured on 2 cores: a worker made a ViT-S at 224 px up to 10 % slower, the tiny demo 10 to 20 %). At most 16, and
    so many that their batches fill at most half of the free shared memory, which containers have little of.

    Threads need no setting: torch takes a thread a core for the model, and gives each worker process one.
    """
    images = getattr(dataset, "images", ())
    if count < SMALL or not isinstance(images[0] if len(images) else None, Path):
        return 0
    if multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores // 4 if backbone.device.type == "cpu" else cores - 1, MOST_WORKERS)
    if SHARED_MEMORY.is_dir():
        batch_bytes = batch_size * 3 * backbone.image_size**2 * 4
        workers = min(workers, shutil.disk_usage(SHARED_MEMORY).free // 2 // (PREFETCHED * batch_bytes))
    return workers


def _issued_ahead(batches: Iterator[T], issue: Callable[[T], Tensor], device: torch.device) -> Iterator[Tensor]:
    """`issue` of each batch, on a CUDA stream of its own, always one batch ahead of the one that is handed out."""
    side = torch.cuda.Stream(device)

    def issued(batch: T) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return issue(batch), side.record_event()

    for images, done in _one_ahead(issued(batch) for batch in batches):
        current = torch.cuda.current_stream(device)
        current.wait_event(done)       # this batch alone: the one issued after it may still be on its way
        images.record_stream(current)  # its memory is the side stream's: not to be used again before we have read it
        yield images


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each only after the one that follows it has been made."""
    items = iter(items)
    for item in items:
        for following in items:
            yield item
            item = following
        yield item


def _loaded(
    dataset: Dataset,
    transform: Callable[[Image.Image], Tensor],
    join: Callable[[Sequence[Tensor]], T],
    *,
    batch_size: int,
    num_workers: int,
    indices: Sequence[int] | None,
    pinned: bool = False,
) -> Iterator[tuple[T, Tensor]]:
    """Batches of transformed images, made one by `join`, and their labels."""
    if batch_size < 1:
        raise ItaeError(f"batch_size={batch_size} is too small: use 1 or more")
    if not isinstance(num_workers, int) or num_workers < 0:
        raise ItaeError(f"num_workers={num_workers!r} is not a number of processes: use 0 or more")
    loader = DataLoader(
        _Prepared(dataset, transform),
        batch_size=batch_size,
        sampler=None if indices is None else [int(index) for index in indices],
        num_workers=num_workers,
        collate_fn=partial(_collate, join),
        pin_memory=pinned,
    )
    try:
        for batch in loader:
            if isinstance(batch, ItaeError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ItaeError(f"one of num_workers={num_workers} processes that load images died: use 0, or give a container "
                        "more shared memory (docker run --shm-size)") from error


@dataclass(frozen=True)
class _Prepared:
    """`dataset` with `transform` applied; errors are items: raised in a worker they would bring their traceback."""

    dataset: Dataset
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | ItaeError:
        try:
            item = self.dataset[index]
        except ItaeError as error:
            return error
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Image.Image)):
            parts = item if isinstance(item, tuple) else (item,)
            kinds = ", ".join(type(part).__name__ for part in parts)
            return ItaeError(f"item {index} of the data set is ({kinds}): it must be (PIL image, label), the image as "
                             "it was before any transform")
        return self.transform(item[0]), item[1]


def _collate(join: Callable, items: list[tuple[Tensor, int] | ItaeError]) -> tuple[object, Tensor] | ItaeError:
    for item in items:
        if isinstance(item, ItaeError):
            return item
    images, labels = zip(*items, strict=True)
    try:
        return join(images), torch.tensor(labels, dtype=torch.int64)
    except ItaeError as error:
        return error


def _stacked(images: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ItaeError(f"the transform leaves images of the shapes {sorted(shapes)}: use one that makes them equal")
    return torch.stack(images)
