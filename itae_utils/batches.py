"""Batches of preprocessed images, in a fixed order, with or without worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from itae_utils.errors import ItaeError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from torch.utils.data import Dataset


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
        ItaeError: an image can't be decoded, the transform leaves them at different sizes, a batch_size below 1.
    """
    from torch.utils.data import DataLoader

    if batch_size < 1:
        raise ItaeError(f"batch_size={batch_size} is too small: use 1 or more")
    loader = DataLoader(
        _Prepared(dataset, transform),
        batch_size=batch_size,
        sampler=None if indices is None else [int(index) for index in indices],
        num_workers=num_workers,
        collate_fn=_collate,
    )
    for batch in loader:
        if isinstance(batch, ItaeError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Prepared:
    """`dataset` with `transform` applied; errors are items: raised in a worker they would bring their traceback."""

    dataset: Dataset
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | ItaeError:
        try:
            image, label = self.dataset[index]
        except ItaeError as error:
            return error
        return self.transform(image), label


def _collate(items: list[tuple[Tensor, int] | ItaeError]) -> tuple[Tensor, Tensor] | ItaeError:
    import torch

    for item in items:
        if isinstance(item, ItaeError):
            return item
    images, labels = zip(*items, strict=True)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        return ItaeError(f"the transform leaves images of the shapes {sorted(shapes)}: use one that makes them equal")
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)
