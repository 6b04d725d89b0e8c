import numpy as np
import pytest
from PIL import Image

from itae_utils.analysis import inspection
from itae_utils.analysis.inspection import inspect_images
from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.method.attention import attention_map
from itae_utils.method.direction import singular_directions
from itae_utils.method.setting import ATTENUATIONS, ITAE, SOURCES
from itae_utils.method.statistics import qkv_norms, token_norms
from itae_utils.models.backbones import load_backbone
from tests.conftest import as_backbone, tiny_vit


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture
def files(tmp_path, digits):
    """A square picture, and a wide one of two digits."""
    digits[1][0].save(tmp_path / "square.png")
    wide = np.concatenate([np.asarray(digits[index][0]) for index in (2, 3)], axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    return [tmp_path / "square.png", tmp_path / "wide.png"]


def test_lines_give_sizes_threshold_and_planting(files):
    lines = inspect_images(files, threshold=2.5).lines
    assert lines[0].startswith("square.png: 8 × 8 shown to the model as 28 × 28, 7 × 7 patches, ")
    assert lines[1].startswith("wide.png: 16 × 8 shown to the model as 56 × 28, 14 × 7 patches, ")
    assert lines[2].startswith("θ = 2.5 on the norm of the key was given: ")
    assert "planted" in lines[3]


def test_sides_become_multiples_of_the_patch_and_the_short_one_the_image_size(tmp_path):
    Image.new("RGB", (64, 47)).save(tmp_path / "photo.png")
    Image.new("RGB", (30, 90)).save(tmp_path / "tall.png")
    backbone = as_backbone(tiny_vit())  # patch 8, image size 32
    lines = inspect_images([tmp_path / "photo.png", tmp_path / "tall.png"], backbone=backbone).lines
    assert lines[0] == "photo.png: 64 × 47 shown to the model as 40 × 32, 5 × 4 patches"
    assert lines[1] == "tall.png: 30 × 90 shown to the model as 32 × 96, 4 × 12 patches"


@pytest.mark.parametrize("structure", ["plain", "registers"])
def test_maps_are_those_of_the_model(tmp_path, structure):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    backbone = as_backbone(tiny_vit(structure))
    tensor = backbone.preprocessing.resized(Image.open(tmp_path / "a.png"), (32, 48))[None]
    norms = qkv_norms(backbone.model, tensor)["value"][0].numpy()
    theta = float(np.median(norms))
    (image,) = inspect_images([tmp_path / "a.png"], backbone=backbone, source="value", threshold=theta).images
    setting = ITAE(source="value", threshold=theta)
    np.testing.assert_array_equal(image.statistic, norms)
    np.testing.assert_array_equal(image.artifacts, norms <= theta)
    np.testing.assert_array_equal(image.before, attention_map(backbone.model, tensor)[0].numpy())
    np.testing.assert_array_equal(image.after, attention_map(backbone.model, tensor, itae=setting)[0].numpy())
    hidden = token_norms(backbone.model, tensor)[0].numpy()
    assert any(np.array_equal(image.hidden, block) for block in hidden)
    assert image.picture.shape == (32, 48, 3)


@pytest.fixture
def noise(tmp_path):
    """A random picture of 4 × 6 patches, and the tiny model that sees it as a tensor."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    backbone = as_backbone(tiny_vit())
    return tmp_path / "noise.png", backbone, backbone.preprocessing.resized(Image.open(tmp_path / "noise.png"),
                                                                            (32, 48))[None]


def expected_statistic(backbone, tensor, source, rank):
    """Measure a statistic of the last block's patches, one by one from the tokens that enter it."""
    model = backbone.model
    if source == "attention":
        return attention_map(model, tensor)[0].numpy()
    if source in ("query", "key", "value"):
        return qkv_norms(model, tensor)[source][0].numpy()
    entered = []
    handle = model.blocks[-1].register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    model(tensor)
    handle.remove()
    tokens = entered[0][0, model.num_prefix_tokens:].double().numpy()
    if source == "direction":
        along = tokens @ singular_directions(model, len(model.blocks) - 1, rank).numpy()
        values = [np.sqrt((part ** 2).sum() / (token ** 2).sum()) for part, token in zip(along, tokens, strict=True)]
    else:
        values = [np.sqrt((token ** 2).sum()) for token in tokens]
    return np.reshape(values, (4, 6))


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_and_side_with_a_share(noise, source):
    path, backbone, tensor = noise
    expected = expected_statistic(backbone, tensor, source, rank=2)
    for tail in ("low", "high", None) if source in ("query", "key", "value", "token") else ("high", None):
        found = inspect_images(path, backbone=backbone, source=source, threshold="share:25%", tail=tail, rank=2)
        (image,) = found.images
        np.testing.assert_allclose(image.statistic, expected, rtol=1e-5)
        assert image.artifacts.sum() == 6
        order, low = expected.ravel().argsort(), (tail or ("low" if source in ("query", "key", "value") else "high"))
        assert set(np.flatnonzero(image.artifacts)) == set(order[:6] if low == "low" else order[-6:])
        assert f"6 of 24 patches lie at or {'below' if low == 'low' else 'above'} it" in found.lines[1]
        assert found.source == source


def test_standard_deviations(noise):
    path, backbone, tensor = noise
    expected = expected_statistic(backbone, tensor, "token", rank=1)
    (image,) = inspect_images(path, backbone=backbone, source="token", threshold="sd:1.5").images
    np.testing.assert_array_equal(image.artifacts, expected > expected.mean() + 1.5 * expected.std())
    assert image.artifacts.any()


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
def test_attenuations(noise, attenuation):
    path, backbone, tensor = noise
    found = inspect_images(path, backbone=backbone, threshold="share:25%", attenuation=attenuation)
    (image,), words = found.images, "the attention stays as it is"
    if attenuation == "substitute":
        np.testing.assert_array_equal(image.after, image.before)
        assert words in found.lines[1]
        return
    theta = float(np.sort(image.statistic, axis=None)[5:7].mean())
    after = attention_map(backbone.model, tensor, itae=ITAE(threshold=theta, attenuation=attenuation))[0].numpy()
    np.testing.assert_allclose(image.after, after, rtol=1e-5, atol=1e-8)
    assert not np.allclose(after, image.before, rtol=1e-3)
    assert words not in found.lines[1]


def test_the_reason_names_the_side_that_has_a_second_mode(tmp_path, digits):
    """The planted artifacts have small keys and large tokens."""
    paths = [tmp_path / f"{index}.png" for index in range(45)]
    for index, path in enumerate(paths):
        digits[index][0].save(path)
    wrong = inspect_images(paths, source="token", tail="low")
    assert "set tail='high'" in wrong.threshold
    assert all(image.after is None for image in wrong.images)
    right = inspect_images(paths, source="token")
    assert "two modes" in right.threshold
    low_keys = inspect_images(paths)
    both, either = (sum(np.count_nonzero(join(one.artifacts, other.artifacts)) for one, other
                        in zip(right.images, low_keys.images, strict=True)) for join in (np.logical_and, np.logical_or))
    assert both / either > 0.9


@pytest.mark.parametrize(("change", "message"), [
    ({"rank": 25}, "rank=25 .*24"), ({"backbone": as_backbone(tiny_vit("qk_norm", depth=1))}, "direction"),
    ({"backbone": as_backbone(tiny_vit("scale_norm"))}, "block 0 has a norm inside its attention"),
])
def test_a_direction_that_the_model_does_not_have(noise, change, message):
    path, backbone, _ = noise
    with pytest.raises(ItaeError, match=message):
        inspect_images(path, **{"backbone": backbone, "source": "direction"} | change)
    inspect_images(path, **{"backbone": backbone, "source": "token"} | change)


def test_peak_block_is_where_a_token_is_longest_against_the_median():
    hidden = [np.ones((3, 2, 2)), np.ones((3, 4, 2))]
    for norms in hidden:
        norms[0] *= 100  # long, but all of them
    hidden[1][1, 2, 1] = 5
    assert inspection._peak_block(hidden) == 1


def test_too_few_patches_for_a_fit(files):
    found = inspect_images(files)
    assert "147 patches" in found.threshold
    assert found.threshold in found.lines
    assert "artifacts" not in found.lines[0]
    assert all(image.after is None and not image.artifacts.any() for image in found.images)


def test_theta_is_fitted_to_all_given_images_together(tmp_path, digits):
    paths = [tmp_path / f"{index}.png" for index in range(45)]
    for index, path in enumerate(paths):
        digits[index][0].save(path)
    found = inspect_images(paths)
    assert "two modes" in found.threshold
    theta = float(found.threshold.split("θ = ")[1].split()[0])
    backbone = load_backbone("demo")
    with backbone.truth.capture(backbone.model) as captured:
        for image, index in zip(found.images, range(45), strict=True):
            backbone.model(backbone.transform(digits[index][0])[None])
            np.testing.assert_array_equal(image.artifacts, image.statistic <= theta)
            assert not (image.artifacts.ravel() & ~captured.mask[0].numpy()).any()


@pytest.mark.parametrize(("change", "message"), [
    ({"paths": []}, "0 images"),
    ({"paths": ["a.png"] * 51}, "51 images"),
    ({"paths": ["missing.png"]}, "'missing.png'"),
    ({"source": "hidden"}, "source='hidden'"),
    ({"threshold": -1.0}, "threshold=-1.0"),
    ({"threshold": "share:50%"}, "'share:50%'"),
    ({"threshold": "sd:0"}, "'sd:0'"),
    ({"tail": "upper"}, "tail='upper'"),
    ({"tail": "low", "source": "attention"}, "tail='low' with source='attention'"),
    ({"rank": 0}, "rank=0"),
    ({"attenuation": "max"}, "attenuation='max'"),
    ({"on_error": "ignore"}, "on_error='ignore'"),
    ({"image_size": 30}, "30"),
    ({"checkpoint": "w.pth"}, "w.pth"),
])
def test_bad_input_is_named(files, change, message):
    with pytest.raises(ItaeError, match=message):
        inspect_images(**{"paths": files} | change)


def test_unreadable_image_is_named_or_skipped(files):
    files[1].write_bytes(files[1].read_bytes()[:60])
    with pytest.raises(ItaeError, match=r"wide\.png"):
        inspect_images(files)
    found = inspect_images(files, on_error="skip")
    assert [image.name for image in found.images] == ["square.png"]
    assert "wide.png" in found.lines[-1]
    with pytest.raises(ItaeError, match=r"wide\.png"):
        inspect_images(files[1:], on_error="skip")


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (17, 1), (400, 20)])
def test_images_that_are_lines_are_refused_before_the_backbone_is_loaded(tmp_path, monkeypatch, size):
    monkeypatch.setattr(inspection, "load_backbone", None)
    Image.new("RGB", size).save(tmp_path / "line.png")
    with pytest.raises(ItaeError, match=rf"line\.png has {size[0]} × {size[1]}"):
        inspect_images([tmp_path / "line.png"])


@pytest.mark.parametrize(("size", "shape"), [((1, 1), (28, 28)), ((16, 1), (28, 448)), ((1, 5), (140, 28))])
def test_tiny_and_long_images_are_inspected(tmp_path, size, shape):
    Image.new("RGB", size).save(tmp_path / "tiny.png")
    (image,) = inspect_images(tmp_path / "tiny.png").images
    assert image.picture.shape[:2] == shape


def test_too_many_patches_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MOST_PATCHES", 100)
    Image.new("RGB", (8, 20)).save(tmp_path / "tall.png")
    with pytest.raises(ItaeError, match=r"tall\.png .*7 × 18"):
        inspect_images([tmp_path / "tall.png"])
    assert inspect_images([tmp_path / "tall.png"], image_size=16).images[0].hidden.shape == (10, 4)


def test_options_of_the_backbone_are_passed_on(files):
    found = inspect_images(files[:1], image_size=56, device="cpu", precision="bf16")
    assert found.images[0].hidden.shape == (14, 14)
    with pytest.raises(ItaeError, match="image_size"):
        inspect_images(files, backbone=as_backbone(tiny_vit()), image_size=56)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F"])
def test_images_of_all_modes_are_inspected(tmp_path, mode):
    path = tmp_path / "ünï $x$\n猫.tiff"
    Image.new(mode, (9, 8)).save(path)
    found = inspect_images([path])
    assert found.images[0].name == path.name
    assert found.lines[0].startswith(r"ünï $x$\n猫.tiff: 9 × 8")
