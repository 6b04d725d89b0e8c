"""Batches of preprocessed images in a fixed order, their size, and the processes that load them."""

from __future__ import annotations

import gc
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itae_utils.data.items import as_dataset, label_of, read_item
from itae_utils.errors import ItaeError, whole_number
from itae_utils.machine import available_cores, available_memory
from itae_utils.method.attention import is_attenuated
from itae_utils.method.registers import has_registers
from itae_utils.models.backbones import Backbone
from itae_utils.models.preprocessing import DevicePreprocessing, Pixels
from itae_utils.store.variants import Place

T = TypeVar("T")

LARGEST = {"cuda": 256}
LARGEST_ELSEWHERE = 64
# Messages of out-of-memory errors that have no class of their own: torch's on a CPU, cuBLAS's and cuDNN's.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory",
                 "ALLOC_FAILED")

MOST_WORKERS = 16
FEWEST_IMAGES = 256  # for which starting worker processes pays
PREFETCHED = 2       # batches that torch's DataLoader lets each worker hold ready
SHARED_MEMORY = Path("/dev/shm")


def checked_inputs(backbone: Backbone, dataset: Dataset, num_workers: int | Literal["auto"]) -> Dataset:
    """Check the inputs of an extraction, and return its data set as `as_dataset` does.

    Raises:
        ItaeError: the backbone is none or in use by `attenuate`, the data set is not map-style or empty, or num_workers
            is no number.
    """
    if not isinstance(backbone, Backbone):
        given = repr(backbone) if isinstance(backbone, str) else f"a {type(backbone).__name__}"
        raise ItaeError(f"backbone is {given}: pass a Backbone, such as load_backbone('demo')")
    if is_attenuated(backbone.model) or has_registers(backbone.model):
        raise ItaeError("the backbone's model is under attenuate(…) or apply_registers(…): call this after its with "
                        "block, and pass the setting itself")
    if num_workers != "auto":
        whole_number("num_workers", num_workers, 0)
    return as_dataset(dataset)


def resolve_batch_size(batch_size: int | Literal["auto"], backbone: Backbone) -> int:
    """Return the batch size as a number; "auto" is 64 on a CPU, and on a GPU the first of 256, 128 … that fits.

    Raises:
        ItaeError: the batch size is neither "auto" nor a whole number from 1.
    """
    if batch_size != "auto":
        return whole_number("batch_size", batch_size, 1)
    if backbone.device.type == "cpu":
        return LARGEST_ELSEWHERE
    side = backbone.image_size

    def run(size: int) -> None:
        with torch.inference_mode(), backbone.autocast():
            backbone.model.forward_features(torch.zeros(size, 3, side, side, device=backbone.device))

    return fitting_batch_size(run, backbone.device, LARGEST.get(backbone.device.type, LARGEST_ELSEWHERE))


def chosen_batch_size(batch_size: int | Literal["auto"], place: Place) -> int:
    """Return the batch size as a number, as `resolve_batch_size`, but choose "auto" on a GPU only once per store.

    The size that fits depends on the free memory of the GPU, and it can change the last bits of norms and features. So
    features, thresholds and observations all take the size that the store remembers.
    """
    if batch_size != "auto" or place.backbone.device.type == "cpu":
        return resolve_batch_size(batch_size, place.backbone)
    found = place.remembered("batch_size", {"batch_size": "auto"},
                             lambda: {"images": np.array(resolve_batch_size("auto", place.backbone))})
    return int(found["images"])


def fitting_batch_size(run: Callable[[int], object], device: torch.device, start: int) -> int:
    """Return the first of `start`, `start` / 2, `start` / 4 … 1 with which `run(size)` does not run out of memory.

    On a CPU this is no proof: an allocation may succeed, and the system may kill the process later.

    Raises:
        ItaeError: not even one image fits.
    """
    size = start
    while not _fits(run, size):
        gc.collect()  # hooks and their frames form reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise _not_one_fits(device)
        size //= 2
    return size


@contextmanager
def memory_errors(batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error into an `ItaeError` that names a smaller batch size."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if batch_size == 1:
            raise _not_one_fits(device) from error
        raise ItaeError(f"batch_size={batch_size} does not fit in the memory of {device}: use "
                        f"batch_size={batch_size // 2} or less") from error


def _not_one_fits(device: torch.device) -> ItaeError:
    return ItaeError(f"not even one image fits in the memory of {device}: use a smaller image_size, precision='bf16', "
                     "or another device")


def _fits(run: Callable[[int], object], size: int) -> bool:
    """Return whether `run(size)` succeeds. The error, which holds its frames' tensors, is freed on return."""
    try:
        run(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a CPU or on CUDA."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def image_batches(
    dataset: Dataset,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of transformed images, (B, 3, H, W) float, and their labels, (B,) int64, in the data set's order.

    Args:
        dataset: as for `extract_features`; its labels must be whole numbers, and those that are None or missing are -1.
        transform: PIL RGB image -> (3, H, W) float tensor; runs in the processes that load images.
        batch_size: images per batch; the last batch may have fewer.
        num_workers: number of processes that load images.
        indices: indices into the data set of the images to load, in this order; None loads all.

    Raises:
        ItaeError: an image can't be decoded, the transform returns tensors of different shapes, batch_size or
            num_workers is invalid, or a worker process died.
    """
    if not callable(transform):
        raise ItaeError(f"transform={transform!r} can't be called: pass backbone.transform, or another function of a "
                        "PIL image that returns a tensor")
    yield from _loaded(as_dataset(dataset), transform, _stacked, label_of, batch_size=batch_size,
                       num_workers=num_workers, indices=indices)


def model_batches(
    backbone: Backbone,
    dataset: Dataset,
    *,
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yield batches of images as the model takes them: (B, 3, S, S) float, on its device, in the data set's order.

    If `backbone.resize` is "device", worker processes only decode; resizing, cropping and normalising run on the
    device. On CUDA the next batch is copied and preprocessed on a stream of its own while the current one is in use.

    Args:
        backbone: from `load_backbone`.
        dataset: as for `extract_features`.
        batch_size: images per batch, or "auto" as in `resolve_batch_size`; the last batch may have fewer.
        num_workers: number of processes that load images, or "auto" as in `auto_workers`.
        indices: indices into the data set of the images to load, in this order; None loads all.

    Raises:
        ItaeError: as `image_batches`.
    """
    batch_size = resolve_batch_size(batch_size, backbone)
    count = len(dataset) if indices is None else len(indices)
    if num_workers == "auto":
        num_workers = auto_workers(backbone, dataset, count, batch_size)
    on_cuda = backbone.device.type == "cuda"
    if backbone.resize == "device":
        transform, join = backbone.preprocessing.decode, Pixels.joined
        finish = DevicePreprocessing(backbone.preprocessing, backbone.device)
    else:
        transform, join, finish = backbone.transform, _stacked, lambda images: images

    def issue(batch: Tensor | Pixels) -> Tensor:
        return finish(batch.to(backbone.device, non_blocking=on_cuda))

    images = (images for images, _ in _loaded(dataset, transform, join, _no_label, batch_size=batch_size,
                                              num_workers=num_workers, indices=indices, pinned=on_cuda))
    yield from _issued_ahead(images, issue, backbone.device) if on_cuda else map(issue, images)


def auto_workers(backbone: Backbone, dataset: Dataset, count: int, batch_size: int) -> int:
    """Return how many processes should load `count` images of a data set for a backbone.

    Return 0 for images in memory, for fewer than 256 images, and in a process that may not have children. For files,
    leave one core free if the model is on an accelerator; take a quarter of the cores if it is on the CPU, where the
    model itself uses all cores (measured on 2 cores: one worker slows a ViT-S at 224 px by up to 10 %, the demo by 10
    to 20 %). At most 16 processes load, and their batches fill at most half of the free shared memory, which is often
    small in containers.

    Threads need no setting: torch uses one thread per core for the model, and one in each worker process.
    """
    images = getattr(dataset, "images", None)
    are_files = isinstance(images, Sequence) and len(images) > 0 and isinstance(images[0], Path)
    if count < FEWEST_IMAGES or not are_files or multiprocessing.current_process().daemon:
        return 0
    cores = available_cores()
    workers = min(cores // 4 if backbone.device.type == "cpu" else cores - 1, MOST_WORKERS)
    if SHARED_MEMORY.is_dir():
        batch_bytes = batch_size * 3 * backbone.image_size**2 * 4
        free = min(shutil.disk_usage(SHARED_MEMORY).free, available_memory() or math.inf)
        workers = min(workers, int(free // 2 // (PREFETCHED * batch_bytes)))
    return workers


def _issued_ahead(batches: Iterator[T], issue: Callable[[T], Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield `issue(batch)` of each batch; it runs on a separate CUDA stream, one batch ahead."""
    side = torch.cuda.Stream(device)

    def issued(batch: T) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return issue(batch), side.record_event()

    for images, done in one_ahead(issued(batch) for batch in batches):
        current = torch.cuda.current_stream(device)
        current.wait_event(done)       # waits for this batch only, not for the next one
        images.record_stream(current)  # the side stream may not reuse this memory while the current stream reads it
        yield images


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, each after the next one has been made."""
    for item in items:
        for following in items:
            yield item
            item = following
        yield item


def _loaded(dataset: Dataset, transform: Callable[[Image.Image], Tensor], join: Callable[[Sequence[Tensor]], T],
            label: Callable[[object, int], int], *, batch_size: int, num_workers: int, indices: Sequence[int] | None,
            pinned: bool = False) -> Iterator[tuple[T, Tensor]]:
    """Yield batches of transformed images, combined by `join`, and their labels."""
    loader = DataLoader(
        _Prepared(dataset, transform, label),
        batch_size=whole_number("batch_size", batch_size, 1),
        sampler=None if indices is None else _checked(indices, len(dataset)),
        num_workers=whole_number("num_workers", num_workers, 0),
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
    """A data set with a transform. It returns an `ItaeError`: if raised, torch would add a traceback to the message."""

    dataset: Dataset
    transform: Callable[[Image.Image], Tensor]
    label: Callable[[object, int], int]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | ItaeError:
        try:
            picture, item = read_item(self.dataset, index)
            return self.transform(picture), self.label(item, index)
        except ItaeError as error:
            return error


def _no_label(_item: object, _index: int) -> int:
    return -1


def _checked(indices: Sequence[int], size: int) -> list[int]:
    chosen = np.asarray(indices)
    if chosen.size and (chosen.ndim != 1 or chosen.dtype.kind not in "iu"):
        raise ItaeError(f"indices={indices!r} are not numbers of images: give whole numbers, such as [0, 5]")
    if (wrong := chosen[(chosen < -size) | (chosen >= size)]).size:
        raise ItaeError(f"indices hold {wrong[0]}, but the data set has {size:,} images: use 0 to {size - 1}")
    return chosen.astype(int).tolist()


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
    if others := [type(image).__name__ for image in images if not isinstance(image, Tensor)]:
        raise ItaeError(f"the transform returns a {others[0]}: use one that returns a tensor")
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ItaeError(f"the transform returns the shapes {sorted(shapes)}: use one that makes them equal")
    return torch.stack(images)
