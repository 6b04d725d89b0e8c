from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from itae_utils.data.images import to_rgb
from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.models.preprocessing import (
    DevicePreprocessing,
    Pixels,
    make_transform,
    resize_like_pil,
    resolve_resize,
)
from tests.conftest import array_dataset, as_backbone, tiny_vit

CPU = torch.device("cpu")
MEAN, STD = (0.48, 0.45, 0.4), (0.23, 0.22, 0.21)


def config(interpolation="bicubic") -> dict:
    return {"interpolation": interpolation, "mean": MEAN, "std": STD}


def as_image(values) -> Image.Image:
    return Image.fromarray(np.broadcast_to(np.asarray(values), (*np.shape(values)[:2], 3)).astype(np.uint8))


def photo_like(height: int, width: int) -> Image.Image:
    """Return smooth shades with some grain, like a camera's."""
    rng, (y, x) = np.random.default_rng(height * width), np.mgrid[:height, :width]
    shades = [127 + 90 * np.sin(x / width * 5 + phase) * np.cos(y / height * 4 - phase) for phase in (0, 1, 2)]
    return as_image(np.clip(np.stack(shades, axis=-1) + rng.normal(0, 6, (height, width, 3)), 0, 255))


def sharp(height: int, width: int) -> Image.Image:
    """Return random black and white pixels, for which resizing both axes before clipping is furthest off."""
    return as_image(np.random.default_rng(0).integers(0, 2, (height, width, 3)) * 255)


def compose(image_size: int, preprocess: str, interpolation: str = "bicubic") -> v2.Compose:
    """Return the same preprocessing, composed of torchvision's transforms."""
    interpolation = v2.InterpolationMode(interpolation)
    if preprocess == "resize":
        shape = [v2.Resize((image_size, image_size), interpolation)]
    else:
        shape = [v2.Resize(round(image_size * 8 / 7), interpolation), v2.CenterCrop(image_size)]
    return v2.Compose([*shape, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def on_device(transform, images) -> torch.Tensor:
    return DevicePreprocessing(transform, CPU)(Pixels.joined([transform.decode(image) for image in images]))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("preprocess", ["resize", "meta-eval"])
@pytest.mark.parametrize("image_size", [28, 37])
def test_equal_to_torchvision_to_the_bit(interpolation, preprocess, image_size):
    transform = make_transform(image_size, preprocess, config(interpolation))
    expected = compose(image_size, preprocess, interpolation)
    for shape in [(20, 20), (50, 31), (31, 50), (150, 161), (1, 7), (10, 300), (333, 125), (28, 28), (32, 32)]:
        assert torch.equal(transform(sharp(*shape)), expected(sharp(*shape))), shape


def test_an_image_in_its_own_shape():
    transform = make_transform(28, "meta-eval", config())
    expected = v2.Compose([v2.Resize((56, 28), v2.InterpolationMode.BICUBIC), *compose(28, "resize").transforms[1:]])
    assert torch.equal(transform.resized(sharp(61, 33), (56, 28)), expected(sharp(61, 33)))


def test_undo_gives_the_picture_back():
    image, transform = photo_like(28, 28), make_transform(28, "resize", config())
    np.testing.assert_allclose(transform.undo(transform(image)), np.asarray(image) / 255, atol=1e-6)


def test_repr_shows_every_field():
    """The key of the feature store contains it, so different preprocessings must not share features."""
    transform = make_transform(28, "resize", config())
    other = {"image_size": 32, "short_side": 64, "interpolation": "bilinear", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert set(other) == {field.name for field in fields(transform)}
    shown = {repr(transform), *(repr(replace(transform, **{name: value})) for name, value in other.items())}
    assert len(shown) == len(other) + 1


def test_a_transform_of_the_user():
    backbone, dataset = as_backbone(tiny_vit()), array_dataset(4)
    own = replace(backbone, transform=lambda image: backbone.transform(image))
    features = [extract_features(each, dataset, {"baseline": None})["baseline"] for each in (backbone, own)]
    assert np.array_equal(*features)
    with pytest.raises(ItaeError, match="transform is a function"):
        own.picture(dataset[0][0])
    with pytest.raises(ItaeError, match="transform is a function"):
        extract_features(replace(own, resize="device"), dataset, {"baseline": None})


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("preprocess", ["resize", "meta-eval"])
@pytest.mark.parametrize("image_size", [28, 84])
@pytest.mark.parametrize("draw", [photo_like, sharp])
def test_within_two_levels_of_pil(interpolation, preprocess, image_size, draw):
    transform = make_transform(image_size, preprocess, config(interpolation))
    shapes = [(20, 20), (50, 31), (20, 20), (31, 50), (90, 70), (150, 160), (8, 9), (96, 96), (20, 21)]  # up and down
    images = [draw(*shape) for shape in shapes]
    expected = torch.stack([transform(image) for image in images])
    levels = (on_device(transform, images) - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert levels.max() < 2.01
    assert levels.mean() < 0.05


def test_axes_are_resized_in_pil_s_order():
    """Pillow chooses the order by the shapes; the wrong order is far off at sharp edges."""
    rng = np.random.default_rng(1)
    for height, width, rows, columns in rng.integers(5, 80, (300, 4)).tolist():
        image = sharp(height, width)
        expected = v2.functional.pil_to_tensor(image.resize((columns, rows), Image.Resampling.BICUBIC))
        resized = resize_like_pil(v2.functional.pil_to_tensor(image)[None], (rows, columns), "bicubic")[0]
        assert (resized.int() - expected.int()).abs().max() <= 2, (height, width, rows, columns)


@pytest.mark.parametrize(("version", "differ"), [("12.3.0", True), ("13.0.0", False), ("13.1.0.dev0", False)])
def test_older_pillows_always_resize_the_columns_first(monkeypatch, version, differ):
    tall = v2.functional.pil_to_tensor(sharp(60, 40))[None]
    rows_first = resize_like_pil(resize_like_pil(tall, (20, 40), "bicubic"), (20, 30), "bicubic")
    monkeypatch.setattr("PIL.__version__", version)
    assert torch.equal(resize_like_pil(tall, (20, 30), "bicubic"), rows_first) != differ


def test_images_of_the_right_size_are_the_same_to_the_bit():
    transform = make_transform(28, "resize", config())
    images = [sharp(28, 28), photo_like(28, 28)]
    assert torch.equal(on_device(transform, images), torch.stack([transform(image) for image in images]))


@pytest.mark.parametrize("preprocess", ["resize", "meta-eval"])
@pytest.mark.parametrize("shape", [(57, 57), (10, 300), (41, 10)])
def test_large_and_long_images_are_resized_where_they_are_decoded(preprocess, shape):
    transform, image = make_transform(28, preprocess, config()), photo_like(*shape)
    resize = compose(28, preprocess).transforms[0]
    assert torch.equal(transform.decode(image), v2.functional.pil_to_tensor(resize(image)))
    assert torch.equal(on_device(transform, [image])[0], transform(image))


def test_other_images_are_sent_unchanged():
    transform, image = make_transform(28, "resize", config()), photo_like(56, 56)
    decoded = transform.decode(image)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, v2.functional.pil_to_tensor(image))
    assert decoded.numel() <= 4 * transform(image).numel()


def test_pixels_hold_images_of_any_sizes():
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in [(4, 5), (1, 1), (5, 4), (4, 5)]]
    pixels = Pixels.joined(images)
    assert pixels.buffer.numel() == sum(image.numel() for image in images)
    for again in (pixels, pixels.to(CPU, non_blocking=True)):
        assert all(torch.equal(one, other) for one, other in zip(again.split(), images, strict=True))


def test_where_to_resize():
    cuda = torch.device("cuda")
    assert resolve_resize("auto", CPU, config()) == "pil"
    assert resolve_resize("auto", cuda, config()) == "device"
    assert resolve_resize("pil", cuda, config()) == "pil"
    assert resolve_resize("device", CPU, config("bilinear")) == "device"
    assert resolve_resize("auto", cuda, config("lanczos")) == "pil"
    with pytest.raises(ItaeError, match="lanczos"):
        resolve_resize("device", cuda, config("lanczos"))
    with pytest.raises(ItaeError, match="resize='gpu'"):
        resolve_resize("gpu", CPU, config())


SHAPES = [(20, 20), (50, 31), (31, 50), (150, 161), (1, 7), (7, 1), (1, 1), (1, 3000), (3000, 2), (333, 125), (28, 28)]


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_keeps_the_aspect_ratio_and_has_the_mean_colour(shape, interpolation):
    transform, image = make_transform(28, "pad", config(interpolation)), sharp(*shape)
    height, width = (max(1, round(28 * side / max(shape))) for side in shape)
    top, left = (28 - height) // 2, (28 - width) // 2
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    prepared = transform(image)
    expected = v2.Resize((height, width), v2.InterpolationMode(interpolation))
    expected = v2.Compose([expected, *compose(28, "resize").transforms[1:]])(image)
    assert torch.equal(prepared[inside], expected)
    padding = torch.ones(3, 28, 28, dtype=torch.bool)
    padding[inside] = False
    assert (prepared[padding] == 0).all()
    np.testing.assert_allclose(transform.undo(prepared)[padding[0]], np.broadcast_to(MEAN, (int(padding[0].sum()), 3)))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("preprocess", ["resize", "meta-eval", "pad"])
def test_thin_tiny_and_large_images_are_prepared_on_the_device_as_with_pil(preprocess, interpolation):
    transform = make_transform(28, preprocess, config(interpolation))
    images = [photo_like(*shape) for shape in [*SHAPES, (2000, 1500), (1, 20_000), (20_000, 3)]]
    expected = torch.stack([transform(image) for image in images])
    levels = (on_device(transform, images) - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert expected.shape == (len(images), 3, 28, 28)
    assert levels.max() < 2.01
    assert levels.mean() < 0.05


@pytest.mark.parametrize("shape", [(3, 400), (401, 4), (2, 200), (1, 111)])
def test_the_crop_of_an_extremely_long_image_is_the_same_without_its_ends(shape):
    transform, image = make_transform(28, "meta-eval", config()), photo_like(*shape)
    assert min(shape) * 64 < max(shape)
    assert torch.equal(transform(image), compose(28, "meta-eval")(image))


def test_the_representation_of_a_transform_is_part_of_stored_keys():
    """Another representation would find no features that are stored already."""
    start = "Preprocessing(image_size=28, short_side="
    end = f", interpolation='bicubic', mean={MEAN}, std={STD})"
    for preprocess, text in {"resize": f"{start}None{end}", "meta-eval": f"{start}32{end}",
                             "pad": f"Padded{start}None{end}"}.items():
        assert repr(make_transform(28, preprocess, config())) == text


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_images_of_other_modes_are_prepared_as_their_rgb_picture(mode):
    image, transform = sharp(9, 12).convert("L").convert(mode), make_transform(28, "resize", config())
    expected = to_rgb(image)
    assert torch.equal(transform(image), transform(expected))
    assert torch.equal(transform.resized(image, (14, 28)), transform.resized(expected, (14, 28)))
    assert torch.equal(transform.decode(image), transform.decode(expected))


@pytest.mark.parametrize("image", [np.zeros((9, 9, 3), np.uint8), torch.zeros(3, 9, 9), "photo.jpg", None])
def test_what_is_no_pil_image_is_refused(image):
    transform = make_transform(28, "pad", config())
    for prepare in (transform, transform.decode):
        with pytest.raises(ItaeError, match=rf"PIL image, not a {type(image).__name__}"):
            prepare(image)
