"""Preprocessing of images for a model: one by one with PIL, or in batches on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode, functional

from itae_utils.data.images import to_rgb
from itae_utils.errors import ItaeError
from itae_utils.models.registry import RESIZES

DEVICE_INTERPOLATIONS = ("bicubic", "bilinear")  # torch can antialias only these
LONGEST = 4  # long side over short side; a longer image would take too much of a device's memory before its crop
LONGEST_RESIZED = 64  # the same; of a longer image, the ends are cut off before the short side is resized


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise an image: PIL image -> (3, S, S) float tensor.

    The key of stored features contains `repr` of this object, which shows every field.

    Attributes:
        image_size: side S of the result, in pixels.
        short_side: None resizes the whole image to S × S. A number resizes the short side to that many pixels, and the
            centre of S × S pixels is cropped.
        interpolation: timm's name of the resampling filter, such as "bicubic".
        mean: subtracted from the channels, whose values lie in [0, 1].
        std: divides the channels after that.
    """

    image_size: int
    short_side: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image) -> Tensor:
        """Return the model's input for an image: (3, S, S) float."""
        image = self._narrowed(_rgb(image))
        return self.cropped(self.resized(image, self.resized_shape(image.height, image.width)))

    def resized(self, image: Image, shape: tuple[int, int]) -> Tensor:
        """Return the image at `shape` (height, width), uncropped and normalised: (3, height, width) float."""
        return self._normalized(self._resized(_rgb(image), shape))

    def undo(self, tensor: Tensor) -> np.ndarray:
        """Return a preprocessed image (3, H, W) as a picture (H, W, 3) in [0, 1]."""
        return np.clip(tensor.permute(1, 2, 0).numpy(force=True) * np.array(self.std) + np.array(self.mean), 0, 1)

    def decode(self, image: Image) -> Tensor:
        """Return the image as (3, H, W) uint8, the input of `DevicePreprocessing`.

        Images that take more bytes than the resulting float tensor, or are longer than 4:1, are resized here with PIL.
        This limits the copy to the device and the device's memory.
        """
        image = self._narrowed(_rgb(image))
        larger = image.width * image.height > 4 * self.image_size**2  # a float has 4 bytes
        if larger or max(image.size) > LONGEST * min(image.size):
            image = self._resized(image, self.resized_shape(image.height, image.width))
        return functional.pil_to_tensor(image)

    def resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the shape, before the crop, to which an image of `height` × `width` pixels is resized."""
        short = self.short_side
        if short is None:
            return self.image_size, self.image_size
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)

    def cropped(self, images: Tensor) -> Tensor:
        """Return the centre, S × S pixels, of preprocessed images; what is missing becomes 0, the mean colour."""
        return functional.center_crop(images, [self.image_size])

    def _narrowed(self, image: Image) -> Image:
        """Return the middle of an image that would become extremely long; it holds all that the crop will keep."""
        long, short = max(image.size), min(image.size)
        if self.short_side is None or long <= LONGEST_RESIZED * short:
            return image
        outside = (long - LONGEST_RESIZED * short) // 2  # from both ends, so that the centre stays
        ends = (0, outside, 0, outside) if image.height > image.width else (outside, 0, outside, 0)
        return image.crop((ends[0], ends[1], image.width - ends[2], image.height - ends[3]))

    def _resized(self, image: Image, shape: tuple[int, int]) -> Image:
        return functional.resize(image, list(shape), InterpolationMode(self.interpolation), antialias=True)

    def _normalized(self, image: Image) -> Tensor:
        levels = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
        return functional.normalize(levels, list(self.mean), list(self.std))


def _rgb(image: Image) -> Image:
    if not isinstance(image, Image):
        raise ItaeError(f"the transform of a backbone takes a PIL image, not a {type(image).__name__}: use "
                        "PIL.Image.fromarray for arrays (H, W, 3) of uint8")
    return image if image.mode == "RGB" else to_rgb(image)


class PaddedPreprocessing(Preprocessing):
    """Resize the long side of an image to S, pad the short one to S on both sides, and normalise it.

    The padding has the mean colour, which is 0 in the result. Patches that lie in it, wholly or in part, are patches
    like all others: they have norms, can be artifacts and receive attention.
    """

    def resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the shape, before the padding, to which an image of `height` × `width` pixels is resized."""
        side, longest = self.image_size, max(height, width)
        return max(1, round(side * height / longest)), max(1, round(side * width / longest))


def make_transform(image_size: int, preprocess: str, config: dict) -> Preprocessing:
    """Return the preprocessing of that name with the interpolation, mean and std of timm's `config`."""
    kind = PaddedPreprocessing if preprocess == "pad" else Preprocessing
    short_side = round(image_size * 256 / 224) if preprocess == "meta-eval" else None
    return kind(image_size, short_side, config["interpolation"], tuple(config["mean"]), tuple(config["std"]))


def resolve_resize(resize: str, device: torch.device, config: dict) -> str:
    """Return "pil" or "device"; "auto" is "device" on CUDA if torch supports the interpolation of timm's `config`."""
    if resize not in ("auto", *RESIZES):
        raise ItaeError(f"resize={resize!r} is not known: use auto, {' or '.join(RESIZES)}")
    possible = config["interpolation"] in DEVICE_INTERPOLATIONS
    if resize == "device" and not possible:
        raise ItaeError(f"resize='device' does not support this model's interpolation, {config['interpolation']}: "
                        "use resize='pil'")
    if resize == "auto":
        return "device" if device.type == "cuda" and possible else "pil"
    return resize


@dataclass(frozen=True)
class Pixels:
    """Decoded images of any sizes in one buffer: one handle between processes, one copy to a device.

    Attributes:
        buffer: uint8, the values of the images (3, H, W) one after another.
        shapes: (H, W) of each image.
    """

    buffer: Tensor
    shapes: list[tuple[int, int]]

    @classmethod
    def joined(cls, images: Sequence[Tensor]) -> Pixels:
        """Join images (3, H, W) uint8."""
        return cls(torch.cat([image.flatten() for image in images]), [tuple(image.shape[1:]) for image in images])

    def split(self) -> list[Tensor]:
        """Return the images (3, H, W) as views of the buffer."""
        sizes = [3 * height * width for height, width in self.shapes]
        return [part.view(3, *shape) for part, shape in zip(self.buffer.split(sizes), self.shapes, strict=True)]

    def pin_memory(self) -> Pixels:
        """Return a copy in page-locked memory; torch's DataLoader calls this."""
        return Pixels(self.buffer.pin_memory(), self.shapes)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Pixels:
        """Return a copy on a device."""
        return Pixels(self.buffer.to(device, non_blocking=non_blocking), self.shapes)


class DevicePreprocessing:
    """Apply a `Preprocessing` to batches on a device: `Pixels` there -> (B, 3, S, S) float.

    Resizing repeats PIL's steps: one axis after the other, rounded to whole levels and clipped after each. So the
    result differs from PIL's by at most 2 of 255 levels, and by less than 0.05 on average over images of mixed sizes
    (measured on photos: bicubic 0.0001, bilinear 0.002). Both axes at once would be up to 31 levels off at sharp edges.

    No step waits for the device.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self.preprocessing = preprocessing
        # torchvision's normalize would copy these to the device for every batch, and wait for the copy.
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
                               for values in (preprocessing.mean, preprocessing.std))

    def __call__(self, pixels: Pixels) -> Tensor:
        """Return the preprocessed images of one batch in their order."""
        images, prepared = pixels.split(), [None] * len(pixels.shapes)
        for shape in dict.fromkeys(pixels.shapes):
            members = [index for index, other in enumerate(pixels.shapes) if other == shape]
            batch = torch.stack([images[index] for index in members])
            resized = resize_like_pil(batch, self.preprocessing.resized_shape(*shape), self.preprocessing.interpolation)
            normal = functional.to_dtype(resized, torch.float32, scale=True).sub_(self.mean).div_(self.std)
            for index, image in zip(members, self.preprocessing.cropped(normal), strict=True):
                prepared[index] = image
        return torch.stack(prepared)


def resize_like_pil(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Resize (B, 3, H, W) uint8 to `shape` (rows, columns) as PIL does: one axis, then the other, in whole levels."""
    height, width = images.shape[-2:]
    fewer_rows, fewer_columns = height - shape[0], width - shape[1]
    # PIL resizes the columns first. Since Pillow 13, the rows come first if far more rows than columns are removed.
    rows_first = int(PIL.__version__.partition(".")[0]) >= 13 and fewer_rows > max(0, 2 * fewer_columns)
    between = (shape[0], width) if rows_first else (height, shape[1])
    for step in (between, shape):
        if tuple(images.shape[-2:]) != step:
            exact = interpolate(images.float(), size=step, mode=mode, antialias=True, align_corners=False)
            images = exact.add_(0.5).clamp_(0, 255).byte()  # rounds halves up: byte() drops the fraction
    return images
