import pickle
import sys
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from itae_utils.data.datasets import download, load_dataset, size
from itae_utils.data.fingerprint import fingerprint
from itae_utils.data.huggingface import place_and_split
from itae_utils.errors import ItaeError
from tests.data.test_datasets import load, picture, save
from tests.loopback import closed_url

datasets = pytest.importorskip("datasets")
PICTURES = [picture(seed) for seed in range(6)]
NAMED = datasets.ClassLabel(names=["ant", "bee", "cat"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows(labels=None, kind=NAMED, label="label", image="image", **more):
    """Return a Dataset of six pictures, or as many as there are labels, with a column of labels if there are any."""
    number = 6 if labels is None else len(labels)
    content, features = {image: PICTURES[:number]}, {image: datasets.Image()}
    if labels is not None:
        content[label] = labels
        features[label] = kind if isinstance(kind, datasets.ClassLabel) else datasets.Value(kind)
    for name, (values, feature) in more.items():
        content[name], features[name] = values, feature
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def saved(folder, data):
    data.save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


def test_a_saved_data_set(tmp_path):
    name = saved(tmp_path, rows([2, 0, 0, 1, 2, 1]))
    dataset = load_dataset(name)
    assert (len(dataset), dataset.classes, dataset.targets.tolist()) == (6, ["ant", "bee", "cat"], [2, 0, 0, 1, 2, 1])
    assert (dataset.targets.dtype, dataset.names, dataset.split) == (np.int64, None, "all (6)")
    for (image, label), expected, target in zip(dataset, PICTURES, dataset.targets, strict=True):
        assert (image.tobytes(), label) == (expected.tobytes(), target)
    assert size(name)[0] == 6
    assert size(name, 4)[0] == 4
    download(name)


def test_features_can_be_stored_and_workers_can_read(tmp_path):
    name = saved(tmp_path, rows([0, 1, 0, 1, 0, 0]))
    for dataset in (load_dataset(name), load_dataset(name, limit=4)):
        again = pickle.loads(pickle.dumps(dataset))
        assert fingerprint(dataset) == fingerprint(again)
        assert [item[0].tobytes() for item in again] == [item[0].tobytes() for item in dataset]
    others = [load_dataset(name), load_dataset(saved(tmp_path / "labels", rows([1, 1, 0, 1, 0, 0]))),
              load_dataset(saved(tmp_path / "images", rows([0, 1, 0, 1, 0, 0]).select([2, 1, 0, 3, 4, 5])))]
    assert len({fingerprint(dataset), *map(fingerprint, others)}) == 4


class TestFolders:
    def test_parquet(self, tmp_path):
        rows([0, 1, 0]).to_parquet(tmp_path / "data/test-00000.parquet")
        dataset = load_dataset(f"hf:{tmp_path / 'data'}")
        assert (dataset.targets.tolist(), dataset.split) == ([0, 1, 0], "test (3)")
        assert dataset[1][0].tobytes() == PICTURES[1].tobytes()

    def test_parquet_that_does_not_declare_its_images(self, tmp_path):
        contents = [save(tmp_path / f"{seed}.png", PICTURES[seed]).read_bytes() for seed in range(3)]
        (tmp_path / "data").mkdir()
        pd.DataFrame({"picture": [{"bytes": each, "path": None} for each in contents], "label": ["b", "a", "b"]}
                     ).to_parquet(tmp_path / "data/train.parquet")
        dataset = load_dataset(f"hf:{tmp_path / 'data'}")
        assert (dataset.classes, dataset.targets.tolist()) == (["a", "b"], [1, 0, 1])
        assert dataset[2][0].tobytes() == PICTURES[2].tobytes()
        (tmp_path / "raw").mkdir()
        pd.DataFrame({"png": contents, "n": [1.5, 2, 3]}).to_parquet(tmp_path / "raw/train.parquet")
        dataset = load_dataset(f"hf:{tmp_path / 'raw'}", image_column="png")
        assert (dataset[0][0].tobytes(), dataset.targets) == (PICTURES[0].tobytes(), None)

    def test_images_in_folders_are_read_as_an_image_folder_reads_them(self, tmp_path):
        for number, image in enumerate(PICTURES):
            save(tmp_path / f"data/{('test', 'train')[number % 2]}/{'ab'[number > 2]}/{number}.png", image)
        theirs, ours = load_dataset(f"hf:{tmp_path / 'data'}"), load(tmp_path / "data")
        assert (theirs.classes, theirs.targets.tolist()) == (ours.classes, ours.targets.tolist())
        assert [image.tobytes() for image, _ in theirs] == [image.tobytes() for image, _ in ours]


class TestSplits:
    @pytest.fixture
    def name(self, tmp_path):
        splits = {"train": rows([0, 1, 0]), "validation": rows([0, 1]), "test": rows([1, 0, 1, 0])}
        return saved(tmp_path, datasets.DatasetDict(splits))

    @pytest.mark.parametrize(("part", "split", "size"), [
        ("", None, 4), (":train", None, 3), (":validation", None, 2), ("", "validation", 2), ("", "val", 2),
        (":test", "test", 4)])
    def test_the_name_or_the_option_chooses(self, name, part, split, size):
        dataset = load_dataset(name + part, split=split)
        assert len(dataset) == size
        assert "train" in " ".join(dataset.notes)

    @pytest.mark.parametrize(("part", "split", "message"), [
        (":dev2", None, "'dev2'.*train or validation or test"), ("", "dev2", "'dev2'"),
        (":train", "test", "train.*'test'")])
    def test_others_are_refused(self, name, part, split, message):
        with pytest.raises(ItaeError, match=message):
            load_dataset(name + part, split=split)

    def test_the_default_without_a_test_split(self, tmp_path):
        two = datasets.DatasetDict(train=rows([0, 1]), validation=rows([0, 1, 0]))
        assert len(load_dataset(saved(tmp_path / "two", two))) == 3
        assert len(load_dataset(saved(tmp_path / "one", datasets.DatasetDict(train=rows([0, 1]))))) == 2
        with pytest.raises(ItaeError, match="train or extra"):
            load_dataset(saved(tmp_path / "none", datasets.DatasetDict(train=rows([0, 1]), extra=rows([0, 1]))))

    def test_a_single_data_set_has_no_split_to_choose(self, tmp_path):
        with pytest.raises(ItaeError, match="'test'"):
            load_dataset(saved(tmp_path, rows([0, 1])) + ":test")

    @pytest.mark.parametrize(("name", "expected"), [
        ("hf:a/b", ("a/b", None)), ("hf:a/b:test", ("a/b", "test")), ("hf:mnist:train", ("mnist", "train"))])
    def test_names(self, name, expected):
        assert place_and_split(name) == expected


class TestLabels:
    @pytest.mark.parametrize(("values", "kind", "classes", "targets"), [
        (["b", "a", "b"], "string", ["a", "b"], [1, 0, 1]), ([7, 3, 3], "int32", ["3", "7"], [1, 0, 0]),
        ([True, False, True], "bool", ["False", "True"], [1, 0, 1]), ([5, 5, 5], "int64", None, None),
        ([2, 0, 2], NAMED, ["ant", "bee", "cat"], [2, 0, 2]), (["x", "y", "x"], "large_string", ["x", "y"], [0, 1, 0]),
        ([0.5, 1.5, 2.5], "float32", None, None)])
    def test_kinds(self, tmp_path, values, kind, classes, targets):
        dataset = load_dataset(saved(tmp_path, rows(values, kind)))
        assert (dataset.classes, dataset.targets if targets is None else dataset.targets.tolist()) == (classes, targets)

    @pytest.mark.parametrize(("values", "kind", "targets", "words"), [
        ([0, -1, 1, None], NAMED, [0, 1], "2 of 4"), (["b", None, "a"], "string", [1, 0], "1 of 3"),
        ([-1, -1, -1], NAMED, None, "label"), ([None, None], "string", None, "label"),
        ([-1, -1], "int64", None, "label")])
    def test_missing_ones_are_said(self, tmp_path, values, kind, targets, words):
        dataset = load_dataset(saved(tmp_path, rows(values, kind)))
        assert words in " ".join(dataset.notes)
        if targets is None:
            assert (dataset.targets, len(dataset)) == (None, len(values))
        else:
            known = [index for index, value in enumerate(values) if value not in (None, -1)]
            assert dataset.targets.tolist() == targets
            assert [item[0].tobytes() for item in dataset] == [PICTURES[index].tobytes() for index in known]

    @pytest.mark.parametrize("label", ["label", "labels", "fine_label", "target", "Category"])
    def test_the_usual_names(self, tmp_path, label):
        assert load_dataset(saved(tmp_path, rows([1, 2, 1], "int64", label))).targets.tolist() == [0, 1, 0]

    def test_other_names_are_chosen(self, tmp_path):
        name = saved(tmp_path, rows([1, 2, 1], "int64", "animal"))
        assert load_dataset(name).targets is None
        assert load_dataset(name, label_column="animal").targets.tolist() == [0, 1, 0]


class TestColumns:
    def test_several_that_may_be_meant(self, tmp_path):
        name = saved(tmp_path, rows([0, 1, 2], thumbnail=(PICTURES[3:], datasets.Image()), coarse=([1, 1, 0], NAMED)))
        with pytest.raises(ItaeError, match=r"image, thumbnail.*image_column="):
            load_dataset(name)
        with pytest.raises(ItaeError, match=r"label, coarse.*label_column="):
            load_dataset(name, image_column="image")
        dataset = load_dataset(name, image_column="thumbnail", label_column="coarse")
        assert dataset[0][0].tobytes() == PICTURES[3].tobytes()
        assert dataset.targets.tolist() == [1, 1, 0]
        assert size(name, image_column="image", label_column="label")[0] == 3

    @pytest.mark.parametrize(("option", "value"), [
        ("image_column", "label"), ("image_column", "picture"), ("label_column", "image"), ("label_column", "labels"),
        ("image_column", 3)])
    def test_wrong_ones_are_refused(self, tmp_path, option, value):
        with pytest.raises(ItaeError, match=f"{option}={value!r}"):
            load_dataset(saved(tmp_path, rows([0, 1])), **{option: value})

    def test_a_data_set_without_images(self, tmp_path):
        with pytest.raises(ItaeError, match=r"no column of images.*text, label"):
            load_dataset(saved(tmp_path, datasets.Dataset.from_dict({"text": ["a"], "label": [1]})))


class TestImages:
    def test_modes_are_those_of_files(self, tmp_path):
        icon = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        data = datasets.Dataset.from_dict({"image": [icon]}, features=datasets.Features(image=datasets.Image()))
        dataset = load_dataset(saved(tmp_path, data))
        assert dataset[0][0].getpixel((0, 0)) == (255, 255, 255)
        assert "alpha" in " ".join(dataset.notes)

    def test_missing_and_damaged_ones_are_named_by_their_row(self, tmp_path):
        name = saved(tmp_path, datasets.Dataset.from_dict(
            {"image": [PICTURES[0], None, {"bytes": b"text", "path": None}], "label": [0, 1, 0]},
            features=datasets.Features(image=datasets.Image(), label=NAMED)))
        with pytest.raises(ItaeError, match="row 1 of hf:"):
            load_dataset(name)
        dataset = load_dataset(name, on_error="skip")
        assert (len(dataset), len(dataset.skipped), dataset.targets.tolist()) == (1, 2, [0])
        assert "row 2 of" in dataset.skipped[1]


class TestNotLoaded:
    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ItaeError, match=r"pip install itae-utils\[datasets\]"):
            load_dataset(f"hf:{tmp_path}")

    @pytest.mark.parametrize("name", ["hf:{}/nowhere", "hf:{}", "hf:{}/file.txt", "hf:~nobody/x"])
    def test_folders(self, tmp_path, name):
        (tmp_path / "file.txt").touch()
        with pytest.raises(ItaeError, match="hf:") as refused:
            load_dataset(name.format(tmp_path / "empty" if name == "hf:{}" else tmp_path))
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("name", ["hf:user/data", "hf:mnist:test"])
    def test_the_hub_without_a_network(self, monkeypatch, name):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed_url())
        start = time.monotonic()
        for ask in (load_dataset, download):
            with pytest.raises(ItaeError, match=f"{name.removesuffix(':test')}.*HF_HUB_OFFLINE") as refused:
                ask(name)
            assert "\n" not in str(refused.value)
        assert time.monotonic() - start < 3
        assert size(name)[0] is None
