"""Open image files, and turn images of any mode into RGB."""

from __future__ import annotations

import importlib
import io
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line

for plugin in ("pillow_heif.HeifImagePlugin", "pillow_jxl"):  # these add their formats to Pillow when imported
    with suppress(ImportError):
        importlib.import_module(plugin)

# Image generators write long texts into PNG files. Pillow refuses files for texts above 1 MB; the pixels may take more.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30

# EPS runs another program. The others hold videos, or numbers that Pillow can't draw, or share their ending with files
# that are no images (.pcd: point clouds).
NOT_READ = frozenset({"BUFR", "EPS", "FLI", "GBR", "GRIB", "HDF5", "IPTC", "MPEG", "PCD", "PDF", "WMF"})
NO_IMAGES = {  # the start of a file that Pillow can't identify: what it is, and the remedy
    re.compile(rb"\Z"): ("it is empty", "copy or download it again"),
    re.compile(rb"....ftyp(?:hei|hev|mif|msf)", re.DOTALL): ("it is in HEIC format", "install pillow-heif"),
    re.compile(rb"version https://git-lfs"): ("it is a Git LFS pointer", "run `git lfs pull`"),
    re.compile(rb"\s*<(?:!doctype html|html)", re.IGNORECASE): ("it is a web page", "download it again"),
}
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def formats() -> list[str]:
    """Return the names of the file formats that are read, in the order in which Pillow tries them."""
    Image.init()
    return [name for name in Image.ID if name in Image.OPEN and name not in NOT_READ]


def image_suffixes() -> frozenset[str]:
    """Return the endings of the files that are read, such as ".jpg": those of the installed Pillow and its plugins."""
    names = {*formats(), "MPO"}  # JPEG's reader opens these
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in names)


class EncodedImage(bytes):
    """The content of an image file, with a name for messages."""

    name = "without a name"


ImageSource = Path | EncodedImage


def open_image(source: ImageSource) -> Image.Image:
    """Open an image file as RGB, upright by its EXIF data; see `to_rgb` for the modes.

    Raises:
        ItaeError: the file cannot be decoded; the message names it.
    """
    try:
        with _opened(source) as image:
            image.load()
            with suppress(Exception):  # EXIF data that can't be parsed says nothing of the pixels
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise _unreadable(source, error) from error


def check_header(source: ImageSource) -> bool:
    """Return whether an image has an alpha channel, or something like it.

    Raises:
        ItaeError: the header shows that the image cannot be read; the message names the file.
    """
    try:
        with _opened(source) as image:
            has_alpha = image.has_transparency_data
            image.verify()
            return has_alpha
    except Exception as error:  # as in open_image
        raise _unreadable(source, error) from error


def _opened(source: ImageSource) -> Image.Image:
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats())


def _unreadable(source: ImageSource, error: Exception) -> ItaeError:
    reason, remedy = shown(in_one_line(error)), "repair or remove it"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        remedy = "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS in Python"
    elif isinstance(error, Image.UnidentifiedImageError):
        start = source[:64] if isinstance(source, bytes) else source.read_bytes()[:64]
        reason, remedy = next((words for pattern, words in NO_IMAGES.items() if pattern.match(start)),
                              ("Pillow does not know its format", remedy))
    return ItaeError(f"can't read the image {name_of(source)} ({reason}): {remedy}, or leave out unreadable files with "
                     "on_error='skip' (in a report: -p on_error skip)")


def name_of(source: ImageSource) -> str:
    """Return the path or name of an image, for messages."""
    return shown(source if isinstance(source, Path) else source.name)


def shown(name: str | Path) -> str:
    """Return a file name as it is, but for characters that can't be printed on a line, which are escaped."""
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], str(name))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the RGB picture of an image in any of Pillow's modes.

    What is transparent is composited on white. 16-bit grey is scaled to 8 bits. Modes I and F keep values from 0 to
    255, and 16-bit values in mode I are scaled.

    Raises:
        ItaeError: the values of mode I or F are outside these ranges, or the mode is unknown.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except (ValueError, OSError) as error:
        raise ItaeError(f"an image in mode {image.mode} can't become RGB ({in_one_line(error)}): convert it "
                        "first") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and (high > 255 or image.format == "PPM"))
    known = low >= 0 and high <= (65535 if sixteen else 255) and not (image.mode == "F" and 0 < high <= 1)
    if not known:
        raise ItaeError(f"values from {low:g} to {high:g} in mode {image.mode} have no known range: save the image "
                        "with 8 bits")
    grey = Image.fromarray((values.astype(np.int32) >> 8 if sixteen else values).astype(np.uint8))
    if "transparency" in image.info:  # one grey level
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey
