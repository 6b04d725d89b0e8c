import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from itae_utils.errors import ItaeError
from itae_utils.models.preprocessing import (
    Decode,
    DevicePreprocessing,
    Pixels,
    make_transform,
    resize_like_pil,
    resized_shape,
    resolve_resize,
)

CPU = torch.device("cpu")
MEAN, STD = (0.48, 0.45, 0.4), (0.23, 0.22, 0.21)


def config(interpolation="bicubic") -> dict:
    return {"interpolation": interpolation, "mean": MEAN, "std": STD}


def as_image(values) -> Image.Image:
    return Image.fromarray(np.broadcast_to(np.asarray(values), (*np.shape(values)[:2], 3)).astype(np.uint8))


def photo_like(height: int, width: int) -> Image.Image:
    """Smooth shades with some grain, as a camera leaves them."""
    rng, (y, x) = np.random.default_rng(height * width), np.mgrid[:height, :width]
    shades = [127 + 90 * np.sin(x / width * 5 + phase) * np.cos(y / height * 4 - phase) for phase in (0, 1, 2)]
    return as_image(np.clip(np.stack(shades, axis=-1) + rng.normal(0, 6, (height, width, 3)), 0, 255))


def sharp(height: int, width: int) -> Image.Image:
    """Black and white at random: where resizing both axes before clipping is furthest off."""
    return as_image(np.random.default_rng(0).integers(0, 2, (height, width, 3)) * 255)


def checkerboard(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return as_image(((y // 3 + x // 3) % 2 * 255)[..., None])


def on_device(transform, images, image_size) -> torch.Tensor:
    decode = Decode(transform, image_size)
    return DevicePreprocessing(transform, CPU)(Pixels.joined([decode(image) for image in images]))


def in_levels(difference: torch.Tensor) -> torch.Tensor:
    return difference.abs() * torch.tensor(STD).view(3, 1, 1) * 255


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("preprocess", ["resize", "meta-eval"])
@pytest.mark.parametrize("image_size", [28, 84])
@pytest.mark.parametrize("draw", [photo_like, sharp, checkerboard])
def test_within_two_levels_of_pil(interpolation, preprocess, image_size, draw):
    transform = make_transform(image_size, preprocess, config(interpolation))
    shapes = [(20, 20), (50, 31), (20, 20), (31, 50), (90, 70), (150, 160), (8, 9), (96, 96), (20, 21)]  # up and down
    images = [draw(*shape) for shape in shapes]
    expected = torch.stack([transform(image) for image in images])
    levels = in_levels(on_device(transform, images, image_size) - expected)
    assert levels.max() < 2.01
    assert levels.mean() < 0.05


def test_both_axes_at_once_would_be_further_off():
    """The reason for going one axis after the other: torchvision's own way on CUDA is this."""
    image = v2.functional.pil_to_tensor(sharp(32, 32))
    expected = v2.functional.pil_to_tensor(v2.functional.resize(sharp(32, 32), [84, 84], v2.InterpolationMode.BICUBIC))
    at_once = torch.nn.functional.interpolate(image[None].float(), (84, 84), mode="bicubic", antialias=True)
    levels = lambda resized: (resized[0].int() - expected.int()).abs().max()  # noqa: E731
    assert levels(at_once.clamp(0, 255).round()) > 10
    assert levels(resize_like_pil(image[None], (84, 84), "bicubic")) <= 2


def test_axes_are_taken_in_pil_s_order():
    """Which Pillow decides by the shapes; the wrong order is far off at sharp edges."""
    rng = np.random.default_rng(1)
    for height, width, rows, columns in rng.integers(5, 80, (300, 4)).tolist():
        image = sharp(height, width)
        expected = v2.functional.pil_to_tensor(image.resize((columns, rows), Image.Resampling.BICUBIC))
        resized = resize_like_pil(v2.functional.pil_to_tensor(image)[None], (rows, columns), "bicubic")[0]
        assert (resized.int() - expected.int()).abs().max() <= 2, (height, width, rows, columns)


@pytest.mark.parametrize(("version", "differ"), [("12.3.0", True), ("13.0.0", False), ("13.1.0.dev0", False)])
def test_older_pillows_always_make_the_columns_first(monkeypatch, version, differ):
    tall = v2.functional.pil_to_tensor(sharp(60, 40))[None]
    rows_first = resize_like_pil(resize_like_pil(tall, (20, 40), "bicubic"), (20, 30), "bicubic")
    monkeypatch.setattr("PIL.__version__", version)
    assert torch.equal(resize_like_pil(tall, (20, 30), "bicubic"), rows_first) != differ


def test_images_of_the_right_size_are_the_same_to_the_bit():
    transform = make_transform(28, "resize", config())
    images = [sharp(28, 28), photo_like(28, 28)]
    assert torch.equal(on_device(transform, images, 28), torch.stack([transform(image) for image in images]))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (333, 500), (375, 499), (1, 7), (256, 341)])
@pytest.mark.parametrize("size", [(224, 224), 256, 32, 37])
def test_shape_after_resizing(shape, size):
    resize = v2.Resize(size)
    width, height = resize(Image.new("RGB", shape[::-1])).size
    assert resized_shape(*shape, resize.size) == (height, width)


@pytest.mark.parametrize("preprocess", ["resize", "meta-eval"])
@pytest.mark.parametrize("shape", [(57, 57), (10, 300), (41, 10)])
def test_large_and_long_images_are_resized_where_they_are_decoded(preprocess, shape):
    transform, image = make_transform(28, preprocess, config()), photo_like(*shape)
    decoded = Decode(transform, 28)(image)
    assert torch.equal(decoded, v2.functional.pil_to_tensor(transform.transforms[0](image)))
    assert torch.equal(on_device(transform, [image], 28)[0], transform(image))


def test_other_images_are_sent_as_they_are():
    transform, image = make_transform(28, "resize", config()), photo_like(56, 56)
    decoded = Decode(transform, 28)(image)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, v2.functional.pil_to_tensor(image))
    assert decoded.numel() <= 4 * transform(image).numel()


def test_pixels_hold_images_of_any_sizes():
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in [(4, 5), (1, 1), (5, 4), (4, 5)]]
    pixels = Pixels.joined(images)
    assert pixels.buffer.numel() == sum(image.numel() for image in images)
    for again in (pixels, pixels.to(CPU, non_blocking=True)):
        assert all(torch.equal(one, other) for one, other in zip(again.split(), images, strict=True))


def test_the_device_s_work_can_be_sent_to_workers():
    decode = Decode(make_transform(28, "resize", config()), 28)
    buffer = io.BytesIO()
    torch.save(decode, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(sharp(20, 20)), decode(sharp(20, 20)))


def test_where_to_resize():
    cuda = torch.device("cuda")
    assert resolve_resize("auto", CPU, config()) == "pil"
    assert resolve_resize("auto", cuda, config()) == "device"
    assert resolve_resize("pil", cuda, config()) == "pil"
    assert resolve_resize("device", CPU, config("bilinear")) == "device"
    assert resolve_resize("auto", cuda, config("lanczos")) == "pil"
    with pytest.raises(ItaeError, match=r"can't interpolate by lanczos.*resize='pil'"):
        resolve_resize("device", cuda, config("lanczos"))
    with pytest.raises(ItaeError, match="resize='gpu' is not known: use auto, pil or device"):
        resolve_resize("gpu", CPU, config())
