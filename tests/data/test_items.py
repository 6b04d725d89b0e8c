import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, random_split
from torchvision.transforms.v2 import functional

from itae_utils.data.datasets import ImageDataset, load_dataset
from itae_utils.data.fingerprint import fingerprint
from itae_utils.data.images import to_rgb
from itae_utils.data.items import as_dataset, label_of, picture_of, targets_of
from itae_utils.errors import ItaeError
from tests.conftest import MadeDataset, array_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
GREY = PIXELS[..., 0]
TENSOR = torch.from_numpy(PIXELS).permute(2, 0, 1)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


class TestPictures:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV",
                                      "I", "F", "I;16"])
    def test_images_of_any_mode_become_rgb(self, mode):
        image = (RGB.convert("L") if mode in ("I", "F", "I;16", "LA", "PA", "1") else RGB)
        image = image.convert("LA").convert("PA") if mode == "PA" else (
            image.convert("RGBA") if mode == "RGBa" else image).convert(mode)
        found = picture_of((image, 0), 0)
        assert found.mode == "RGB"
        assert np.array_equal(found, to_rgb(image))

    def test_an_rgb_image_is_used_as_it_is_unless_a_colour_is_transparent(self):
        assert picture_of(RGB, 0) is RGB
        image = Image.new("RGB", (2, 1), (9, 9, 9))
        image.info["transparency"] = (9, 9, 9)
        assert np.asarray(picture_of(image, 0)).min() == 255

    @pytest.mark.parametrize("picture", [
        PIXELS, TENSOR, PIXELS / 255, (PIXELS / 255).astype(np.float32), TENSOR / 255, (TENSOR / 255).double(),
        functional.to_dtype(functional.pil_to_tensor(RGB), torch.float32, scale=True), np.asfortranarray(PIXELS),
        TENSOR.contiguous(), png(RGB)])
    @pytest.mark.parametrize("form", [lambda picture: picture, lambda picture: (picture, 3), lambda picture: [picture],
                                      lambda picture: {"img": picture, "fine_label": 3}])
    def test_arrays_tensors_and_files_give_the_same_pixels(self, picture, form):
        assert np.array_equal(picture_of(form(picture), 0), PIXELS)

    @pytest.mark.parametrize("grey", [GREY, GREY[..., None], torch.from_numpy(GREY.copy()), TENSOR[:1], GREY / 255])
    def test_grey_pictures(self, grey):
        assert np.array_equal(picture_of(grey, 0), np.stack([GREY] * 3, axis=-1))

    def test_four_channels_are_composited_on_white(self):
        clear = np.dstack([PIXELS, np.zeros((6, 5), np.uint8)])
        assert np.asarray(picture_of(clear, 0)).min() == 255
        assert np.asarray(picture_of(torch.from_numpy(clear).permute(2, 0, 1), 0)).min() == 255

    def test_paths(self, tmp_path):
        RGB.save(tmp_path / "a.png")
        for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
            assert np.array_equal(picture_of((path, 1), 0), PIXELS)

    @pytest.mark.parametrize("name", ["image", "img", "photo"])
    def test_rows(self, name):
        row = {"id": 7, name: RGB, "caption": "a cat", "label": 2}
        assert (picture_of(row, 0), label_of(row, 0)) == (RGB, 2)
        encoded = {"image": {"bytes": png(RGB), "path": None}, "label": 2}
        assert np.array_equal(picture_of(encoded, 0), PIXELS)

    @pytest.mark.parametrize(("item", "named"), [
        ((TENSOR / 255 - 0.5, 1), "normalisation"), (TENSOR.float(), "0 to 1"), (TENSOR.float() * float("nan"), "nan"),
        (PIXELS.astype(np.int64), "int64"), (GREY > 9, "bool"), (PIXELS.transpose(2, 0, 1), r"\(3, 6, 5\)"),
        (TENSOR.permute(1, 2, 0), r"\(6, 5, 3\)"), (TENSOR[None], r"\(1, 3, 6, 5\)"), (GREY[0], r"\(5,\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"), ((RGB, 1, 2), r"\(Image, int, int\)"), (None, "NoneType"),
        ((), "picture"), (3, "int"), ((b"no image", 0), "item 4"), ((Path("nowhere.png"), 0), "nowhere"),
        ({"a": RGB, "b": RGB}, "'a': Image, 'b': Image"), ({"image": RGB, "img": RGB}, "'img'"),
        ({"label": 3}, "'label'"), ({"image": None}, "'image': NoneType"), ({}, "'image'"),
        (Image.fromarray(np.array([[-1, 300]], dtype=np.int32)), "mode I")])
    def test_anything_else_is_one_line_that_names_the_item(self, item, named):
        with pytest.raises(ItaeError, match=named) as error:
            picture_of(item, 4)
        assert "item 4 " in str(error.value)
        assert "\n" not in str(error.value)


class TestLabels:
    @pytest.mark.parametrize(("label", "number"), [
        (3, 3), (None, -1), (np.uint8(3), 3), (torch.tensor(3), 3), (np.array(3), 3), (True, 1)])
    def test_whole_numbers_or_none(self, label, number):
        assert label_of((RGB, label), 0) == label_of({"image": RGB, "target": label}, 0) == number

    @pytest.mark.parametrize("label", ["cat", 0.5, torch.tensor(0.5), np.array([1, 0]), [1]])
    def test_others_are_refused(self, label):
        with pytest.raises(ItaeError, match="item 2 "):
            label_of((RGB, label), 2)

    def test_two_labels_in_a_row_are_none(self):
        assert label_of({"img": RGB, "fine_label": 1, "coarse_label": 2}, 0) == -1
        assert label_of({"img": RGB, "label": 1, "coarse_label": 2}, 0) == 1

    def test_of_data_sets_in_data_sets(self):
        made = MadeDataset(9)
        nested = Subset(Subset(made, [1, 3, 5, 8]), np.array([3, 0]))
        assert targets_of(nested).tolist() == [made.targets[8], made.targets[1]]
        first, second = random_split(made, [4, 5], torch.Generator().manual_seed(1))
        assert targets_of(first).tolist() == [label for _, label in first]
        both = ConcatDataset([first, second])
        assert targets_of(both).tolist() == [label for _, label in both]
        assert targets_of(ConcatDataset([made, [RGB]])) is None

    def test_equal_numbers_of_different_classes_are_not_mixed(self):
        other = MadeDataset(3)
        other.classes = ["x", "y", "z"]
        assert targets_of(ConcatDataset([MadeDataset(3), other])) is None

    @pytest.mark.parametrize("targets", [[0, 1, 2], np.array([0, 1, 2]), torch.tensor([0, 1, 2]), (0, 1, 2)])
    @pytest.mark.parametrize("name", ["targets", "labels"])
    def test_of_attributes(self, targets, name):
        dataset = MadeDataset(3)
        dataset.targets = None
        setattr(dataset, name, targets)
        assert targets_of(dataset).tolist() == [0, 1, 2]

    @pytest.mark.parametrize("targets", [None, [None] * 3, [0, 1], [[0], [1, 2], []], [{}, {}, {}], 3, "abc"])
    def test_none_unless_there_is_one_per_item(self, targets):
        dataset = MadeDataset(3)
        dataset.targets = targets
        assert targets_of(dataset) is None

    def test_of_lists_tensors_and_tables(self):
        assert targets_of([(RGB, 2), (RGB, 5)]).tolist() == [2, 5]
        assert targets_of([(RGB, None), RGB]) is None
        assert targets_of(TensorDataset(torch.stack([TENSOR] * 2), torch.tensor([4, 1]))).tolist() == [4, 1]
        assert targets_of(TensorDataset(TENSOR[None])) is None

        class Rows:
            column_names = ["img", "label"]  # noqa: RUF012
            __len__ = lambda self: 2  # noqa: E731
            __getitem__ = lambda self, key: [0, 1] if key == "label" else {"img": RGB, "label": key}  # noqa: E731

        assert targets_of(Rows()).tolist() == [0, 1]


class TestDataSets:
    def test_a_subset_of_a_loaded_data_set_is_one(self):
        whole = load_dataset("digits")
        chosen = as_dataset(Subset(Subset(whole, range(100, 200)), [5, 0, 7]))
        assert isinstance(chosen, ImageDataset)
        assert np.array_equal(chosen.images, whole.images[[105, 100, 107]])
        assert chosen.targets.tolist() == whole.targets[[105, 100, 107]].tolist()
        assert "3 of" in chosen.split
        assert len({fingerprint(each) for each in (chosen, whole, as_dataset(Subset(whole, [105, 100, 106])))}) == 3

    def test_a_subset_of_a_folder_keeps_its_names(self, tmp_path):
        for number in range(4):
            RGB.save(tmp_path / f"{number}.png")
        chosen = as_dataset(Subset(load_dataset(tmp_path), [3, 1]))
        assert chosen.names == ["3.png", "1.png"]
        assert [path.name for path in chosen.images] == ["3.png", "1.png"]
        assert chosen.targets is None

    @pytest.mark.parametrize("dataset", [
        MadeDataset(2), [RGB], (RGB, RGB), np.stack([PIXELS]), TENSOR[None], TensorDataset(TENSOR[None]),
        Subset(MadeDataset(3), [1]), ConcatDataset([MadeDataset(1)])])
    def test_others_stay_as_they_are(self, dataset):
        assert as_dataset(dataset) is dataset

    class Stream(IterableDataset):
        def __iter__(self):
            yield RGB, 0

    @pytest.mark.parametrize(("given", "named"), [
        ("digits", r"load_dataset\('digits'\)"), (Path("photos"), "load_dataset"), (b"digits", "name"),
        (DataLoader(MadeDataset(2)), r"\.dataset"), (Stream(), "Stream"), ({"train": [RGB]}, "'train'"), ({}, "dict"),
        ([], "empty"), (Subset(MadeDataset(2), []), "empty"), (np.zeros((0, 2, 2, 3)), "empty"), (None, "NoneType"),
        (MadeDataset, "MadeDataset"), (RGB, "Image"), (PIXELS, r"\(6, 5, 3\)"), (TENSOR, r"\(3, 6, 5\)"),
        (iter([RGB]), "iterator"), ({RGB.mode}, "set"), (7, "int"), (Subset(array_dataset(2), [5]), "5")])
    def test_what_is_no_data_set_is_one_line(self, given, named):
        with pytest.raises(ItaeError, match=named) as error:
            as_dataset(given)
        assert "\n" not in str(error.value)
