"""From a decoded image to what a model takes: by PIL where the image is loaded, or in batches on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from itae_utils.errors import ItaeError
from itae_utils.models.registry import RESIZES

DEVICE_INTERPOLATIONS = ("bicubic", "bilinear")  # those torch has with antialiasing; timm's ViTs use no other
LONGEST = 4  # times the short side; longer ones would take too much memory before they are cropped


def make_transform(image_size: int, preprocess: str, config: dict) -> v2.Compose:
    """PIL image -> (3, image_size, image_size) float tensor; interpolation, mean and std are timm's `config`."""
    interpolation = v2.InterpolationMode(config["interpolation"])
    if preprocess == "resize":
        shape = [v2.Resize((image_size, image_size), interpolation, antialias=True)]
    else:
        shape = [v2.Resize(round(image_size * 256 / 224), interpolation, antialias=True), v2.CenterCrop(image_size)]
    return v2.Compose([
        *shape,
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config["mean"], config["std"]),
    ])


def resolve_resize(resize: str, device: torch.device, config: dict) -> str:
    """Where images are resized and normalised, "pil" or "device"; "auto" is "device" on CUDA.

    Raises:
        ItaeError: another word, or "device" for an interpolation that torch can't do.
    """
    if resize not in ("auto", *RESIZES):
        raise ItaeError(f"resize={resize!r} is not known: use auto, {' or '.join(RESIZES)}")
    possible = config["interpolation"] in DEVICE_INTERPOLATIONS
    if resize == "device" and not possible:
        raise ItaeError(f"resize='device' can't interpolate by {config['interpolation']}, as this model wants it: "
                        "use resize='pil'")
    if resize == "auto":
        return "device" if device.type == "cuda" and possible else "pil"
    return resize


@dataclass(frozen=True)
class Pixels:
    """Decoded images of any sizes, end to end in one buffer: one handle between processes, one copy to a device.

    Attributes:
        buffer: uint8, the images' values (3, H, W) one after another.
        shapes: (H, W) of each.
    """

    buffer: Tensor
    shapes: list[tuple[int, int]]

    @classmethod
    def joined(cls, images: Sequence[Tensor]) -> Pixels:
        """Of images (3, H, W) uint8."""
        return cls(torch.cat([image.flatten() for image in images]), [tuple(image.shape[1:]) for image in images])

    def split(self) -> list[Tensor]:
        """The images (3, H, W), as views."""
        sizes = [3 * height * width for height, width in self.shapes]
        return [part.view(3, *shape) for part, shape in zip(self.buffer.split(sizes), self.shapes, strict=True)]

    def pin_memory(self) -> Pixels:
        """The same in page-locked memory; torch's DataLoader calls this."""
        return Pixels(self.buffer.pin_memory(), self.shapes)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Pixels:
        """The same on a device."""
        return Pixels(self.buffer.to(device, non_blocking=non_blocking), self.shapes)


@dataclass(frozen=True)
class Decode:
    """PIL image -> (3, H, W) uint8, for `DevicePreprocessing` to go on with.

    An image of more bytes than the float tensor that comes of it is resized here, by PIL, and so is one longer than 4
    to 1: thus what crosses to the device is no larger than what "pil" sends, whatever the photos.
    """

    transform: v2.Compose
    image_size: int

    def __call__(self, image: Image) -> Tensor:
        """Of one image."""
        too_many = image.width * image.height > 4 * self.image_size**2  # a float has 4 bytes
        if too_many or max(image.size) > LONGEST * min(image.size):
            image = self.transform.transforms[0](image)
        return functional.pil_to_tensor(image)


class DevicePreprocessing:
    """What `transform` of `make_transform` does, on a device and in batches: `Pixels` there -> (B, 3, S, S) float.

    Resizing repeats PIL's steps: one axis after the other, rounded to whole levels and clipped after each. So it
    differs from `transform` by at most 2 of 255 levels, and by less than 0.05 on average over images of mixed sizes
    (measured on photos: bicubic 0.0001, bilinear 0.002). Both axes at once would be up to 31 levels off at sharp edges.

    Nothing here waits for the device.
    """

    def __init__(self, transform: v2.Compose, device: torch.device) -> None:
        self.resize, *self.crop, _, self.to_float, normalize = transform.transforms
        # Normalize itself brings these to the device for every batch, and waits for it each time.
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
                               for values in (normalize.mean, normalize.std))

    def __call__(self, pixels: Pixels) -> Tensor:
        """Of one batch; its images come back in their order."""
        images, prepared = pixels.split(), [None] * len(pixels.shapes)
        for shape in dict.fromkeys(pixels.shapes):
            members = [index for index, other in enumerate(pixels.shapes) if other == shape]
            for index, image in zip(members, self._resized(torch.stack([images[i] for i in members])), strict=True):
                prepared[index] = image
        return self.to_float(torch.stack(prepared)).sub_(self.mean).div_(self.std)

    def _resized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, S, S) uint8."""
        images = resize_like_pil(images, resized_shape(*images.shape[-2:], self.resize.size),
                                 self.resize.interpolation.value)
        for crop in self.crop:
            images = crop(images)
        return images


def resized_shape(height: int, width: int, size: Sequence[int]) -> tuple[int, int]:
    """The shape `v2.Resize(size)` gives an image: `size` is (H, W), or (short side,)."""
    if len(size) == 2:
        return tuple(size)
    short = size[0]
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def resize_like_pil(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Resize (B, 3, H, W) uint8 to `shape` (rows, columns) as PIL does: one axis, then the other, in whole levels."""
    before = tuple(images.shape[-2:])
    between = (shape[0], before[1]) if _rows_first(before, shape) else (before[0], shape[1])
    for step in (between, shape):
        if tuple(images.shape[-2:]) != step:
            exact = interpolate(images.float(), size=step, mode=mode, antialias=True, align_corners=False)
            images = exact.add_(0.5).clamp_(0, 255).byte()  # halves go up; byte() cuts the fraction off
    return images


def _rows_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether PIL makes the new rows before the new columns: since Pillow 13, where far more rows than columns go."""
    fewer_rows, fewer_columns = before[0] - after[0], before[1] - after[1]
    return int(PIL.__version__.partition(".")[0]) >= 13 and fewer_rows > max(0, 2 * fewer_columns)
