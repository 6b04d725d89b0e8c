import numpy as np
import pytest
from PIL import Image

from itae_utils.analysis.clustering import pixel_features
from itae_utils.analysis.kmeans import cluster
from itae_utils.errors import ItaeError
from itae_utils.models.backbones import load_backbone, picture


def images(count=6, side=40, *, grey=False, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, side, side) if grey else (count, side, side, 3)
    return [(Image.fromarray(array).convert("RGB"), -1) for array in rng.integers(0, 256, shape, dtype=np.uint8)]


def test_pixels_are_resized_flattened_and_between_0_and_1():
    data = images()
    features = pixel_features(data, 8)
    assert features.shape == (6, 8 * 8 * 3)
    expected = np.asarray(data[2][0].resize((8, 8)), dtype=np.float64).ravel() / 255
    np.testing.assert_allclose(features[2], expected, atol=1e-6)


def test_at_most_32_pixels_a_side():
    assert pixel_features(images(), 224).shape == (6, 32 * 32 * 3)


def test_grey_images_need_one_channel_which_clusters_the_same():
    data = images(40, 8, grey=True)
    one = pixel_features(data, 8)
    assert one.shape == (40, 64)
    three = np.repeat(one, 3, axis=1)
    np.testing.assert_array_equal(cluster(one, 3)[0], cluster(three, 3)[0])


def test_size_below_one_is_refused():
    with pytest.raises(ItaeError, match="size=0"):
        pixel_features(images(), 0)


@pytest.mark.parametrize("preprocess", ["resize", "meta-eval"])
def test_picture_is_what_the_model_gets(preprocess):
    backbone = load_backbone("demo", preprocess=preprocess)
    image = images(1)[0][0]
    seen = picture(backbone, image)
    assert seen.shape == (28, 28, 3)
    # the demo's normalisation takes [0, 1] to [-1, 1]
    np.testing.assert_allclose(seen * 2 - 1, backbone.transform(image).permute(1, 2, 0).numpy(), atol=1e-6)
