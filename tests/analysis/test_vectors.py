import numpy as np
import pytest
import torch
from PIL import Image

from itae_utils.analysis.kmeans import cluster
from itae_utils.analysis.vectors import all_equal, cosine_distance, neighbour_agreement, pixel_features
from itae_utils.errors import ItaeError

NOISE = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)


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
    assert pixel_features(data, 224).shape == (6, 32 * 32 * 3), "at most 32 pixels per side"


def test_grey_images_need_one_channel_which_clusters_the_same():
    one = pixel_features(images(40, 8, grey=True), 8)
    assert one.shape == (40, 64)
    np.testing.assert_array_equal(cluster(one, 3)[0], cluster(np.repeat(one, 3, axis=1), 3)[0])


def test_pixel_size_below_one_is_refused():
    with pytest.raises(ItaeError, match="size=0"):
        pixel_features(images(), 0)


@pytest.mark.parametrize("kind", ["rows", "arrays", "tensors", "grey", "alone"])
def test_pixels_of_items_in_any_form(kind):
    pictures = [image for image, _ in images(3, 8)]
    arrays = [np.asarray(picture) for picture in pictures]
    forms = {"rows": [{"image": picture, "label": 1} for picture in pictures],
             "arrays": [(array, 0) for array in arrays],
             "tensors": [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays], "alone": pictures,
             "grey": [picture.convert("L") for picture in pictures]}
    expected = pixel_features([(picture, 0) for picture in pictures], 8)
    found = pixel_features(forms[kind], 8)
    assert found.shape == (3, 64 if kind == "grey" else 192)
    if kind != "grey":
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("rows", "normalize", "equal"), [
    (np.ones((16, 8)), True, True), (np.zeros((16, 8)), True, True), (np.ones((1, 8)), True, True),
    (np.ones((12, 8)) + 1e-7 * NOISE, True, True), (np.arange(1, 5)[:, None] * np.ones(8), True, True),
    (np.arange(1, 5)[:, None] * np.ones(8), False, False), (NOISE, True, False), (NOISE[[0] * 11 + [1]], True, False),
    ([[1, 2], [1, 2]], False, True),
])
def test_equal_features(rows, normalize, equal):
    assert all_equal(rows, normalize=normalize) == equal


def test_cosine_distance_is_finite_and_never_negative():
    assert cosine_distance(np.zeros((2, 3)), np.ones((2, 3))) == 1
    rows = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    assert 0 <= cosine_distance(rows, rows) < 1e-6


def test_neighbour_agreement_against_a_slow_count():
    rng = np.random.default_rng(0)
    points, targets = rng.normal(size=(30, 2)), rng.integers(0, 3, 30)
    shares = []
    for place, point in enumerate(points):
        order = np.argsort(np.linalg.norm(points - point, axis=1))
        nearest = [other for other in order if other != place][:5]
        shares.append(np.mean(targets[nearest] == targets[place]))
    assert neighbour_agreement(points, targets, 5) == pytest.approx(np.mean(shares))
    assert neighbour_agreement(np.eye(3), np.zeros(3)) == 1, "fewer points than neighbours"


@pytest.mark.parametrize(("call", "named"), [
    (lambda: cosine_distance({"baseline": NOISE}, NOISE), "baseline"),
    (lambda: cosine_distance(NOISE, NOISE[:3]), r"\(3, 8\)"),
    (lambda: all_equal(NOISE[0]), r"\(8,\)"),
    (lambda: neighbour_agreement([["a", "b"]], [0]), "type"),
])
def test_wrong_objects_are_named(call, named):
    with pytest.raises(ItaeError, match=named) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_lists_are_taken_as_arrays():
    assert neighbour_agreement([[0, 0], [0, 1], [9, 9]], [0, 0, 0]) == 1
    assert cosine_distance([[1, 0]], [[0, 1]]) == 1
