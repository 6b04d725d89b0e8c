import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from itae_utils.data import datasets
from itae_utils.data.datasets import dataset_name, load_dataset
from itae_utils.data.fingerprint import fingerprint
from itae_utils.data.published import DATASETS
from itae_utils.errors import ItaeError

CIFAR10_MINI = Path(__file__).parents[3] / "shared/data/cifar10-mini"


def picture(seed=0, size=(6, 5), mode="RGB"):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def save(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(sum(map(ord, path.name)))).save(path)
    return path


def truncate(path, share=0.6):
    """Cut off the end of an image file; its header stays whole."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def truncated_jpeg(path):
    truncate(save(path, picture(1, size=(64, 64))))
    return path


def to_tensor(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 255


def load(folder, **options):
    return load_dataset(f"imagefolder:{folder}", **options)


def labelled_paths(folder):
    """Load a folder and return its images, by path below the folder, with the name of their class."""
    dataset = load(folder)
    return {path.relative_to(folder).as_posix(): None if dataset.classes is None else dataset.classes[label]
            for path, (_, label) in zip(dataset.images, dataset, strict=True)}


def test_digits():
    dataset, digits, info = load_dataset("digits"), load_digits(), DATASETS["digits"]
    assert (dataset.name, dataset.split, dataset.classes) == ("digits", "all (1,797)", list("0123456789"))
    assert (info.images, info.classes, info.megabytes) == (len(dataset), len(dataset.classes), 0) == (1797, 10, 0)
    assert "scikit-learn" in dataset.source
    assert dataset.targets.dtype == np.int64
    for (image, label), pixels, digit in zip(dataset, digits.images, digits.target, strict=True):
        assert (image.mode, type(label), label) == ("RGB", int, digit)
        np.testing.assert_array_equal(np.asarray(image), np.round(pixels * 255 / 16)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize(("name", "options", "message"), [
    ("cifar11", {}, r"'cifar11'.* cifar10 .*itae datasets"),
    ("imagefolder", {}, "imagefolder:PATH"), ("imagefolder:", {}, "imagefolder:PATH"), ("hf:", {}, "hf:NAME"),
    ("CIFAR11", {}, "cifar10"), ("tinyimagnet", {}, "tiny-imagenet"), ("photos/nowhere", {}, "'photos/nowhere'"),
    (Path("nowhere"), {}, "'nowhere'"), (Path("digits"), {}, "'digits'"), (__file__, {}, "file"),
    *((name, {}, type(name).__name__) for name in (None, 3, [3], [], {"a": 1}, b"digits", "", object())),
    ("digits", {"split": "train"}, "split='train'.*'all'"),
    ("cifar10", {"split": "dev"}, "split='dev'.*'test' or 'train'"), ("stl10", {"split": "unlabeled"}, "'unlabeled'"),
    ("tiny-imagenet", {"split": "test"}, "split='test'.*'validation' or 'train'"),
    ("digits", {"split": 1}, "split=1"), ("digits", {"root": 1}, "root=1"), ("digits", {"seed": "x"}, "seed='x'"),
    ("digits", {"seed": -1}, "seed=-1"), ("digits", {"image_column": "a"}, "image_column='a'.*Hugging Face"),
    ("digits", {"label_column": "a"}, "label_column='a'"),
    ("digits", {"on_error": "ignore"}, "on_error='ignore'.*'raise'.*'skip'"),
    *(("digits", {"limit": limit}, re.escape(f"limit={limit!r}")) for limit in (0, -3, 1.5, "10", True)),
])
def test_bad_arguments_are_named(name, options, message):
    with pytest.raises(ItaeError, match=message) as refused:
        load_dataset(name, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "name"), [
    ("CIFAR-10", "cifar10"), ("Cifar_100", "cifar100"), ("STL10", "stl10"), ("stl-10", "stl10"), ("Digits", "digits"),
    ("Tiny_ImageNet", "tiny-imagenet"), ("tiny imagenet", "tiny-imagenet"), ("TINYIMAGENET", "tiny-imagenet"),
    ("pictures", "imagefolder:{}/pictures"), ("./pictures", "imagefolder:{}/pictures"),
    ("~/pictures", "imagefolder:{}/pictures"),
    ("ImageFolder:pictures", "imagefolder:{}/pictures"), ("imagefolder:~/x/../pictures", "imagefolder:{}/pictures"),
    (Path("pictures"), "imagefolder:{}/pictures"), (Path("~/pictures"), "imagefolder:{}/pictures"),
    ("imagefolder:missing", "imagefolder:{}/missing"), (".", "imagefolder:{}"), ("a:b", "imagefolder:{}/a:b"),
    ("HF:user/data:test", "hf:user/data:test"), ("hf:pictures:train", "hf:{}/pictures:train"),
])
def test_a_data_set_has_one_name(tmp_path, monkeypatch, text, name):
    for folder in ("pictures", "a:b"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset_name(text) == name.format(tmp_path) == dataset_name(name.format(tmp_path))


def test_a_folder_called_like_a_data_set(tmp_path, monkeypatch):
    save(tmp_path / "STL-10/1.png")
    save(tmp_path / "digits/1.png")
    monkeypatch.chdir(tmp_path)
    assert dataset_name("digits") == "digits"
    assert dataset_name("./digits") == dataset_name(Path("digits")) == f"imagefolder:{tmp_path}/digits"
    with pytest.raises(ItaeError, match=r"'STL-10'.*imagefolder:STL-10 or stl10"):
        load_dataset("STL-10")


def test_a_data_set_is_described_in_one_line(tmp_path):
    for number in range(300):
        save(tmp_path / "ab"[number % 2] / f"{number}.png")
    dataset = load_dataset(tmp_path)
    assert repr(dataset).count("\n") == 0
    assert len(repr(dataset)) < 100 + len(str(tmp_path))
    assert all(part in repr(dataset) for part in (str(tmp_path), "300 images", "2 classes"))
    assert repr(load_dataset("digits")) == "<ImageDataset digits: 1,797 images, 10 classes>"


@pytest.mark.parametrize(("name", "split"), [("digits", "all"), ("digits", None)])
def test_the_own_split_may_be_named(name, split):
    assert load_dataset(name, split=split).split == "all (1,797)"


def test_a_folder_is_found_after_the_working_directory_changed(tmp_path, monkeypatch):
    save(tmp_path / "pictures/1.png")
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset("pictures")
    monkeypatch.chdir("/")
    assert dataset[0][0].size == (6, 5)
    assert fingerprint(dataset) == fingerprint(load_dataset(tmp_path / "pictures"))


def test_what_is_there_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_DATA", str(tmp_path))
    monkeypatch.setattr("itae_utils.data.published.fetch", lambda *_: pytest.fail("downloads"))
    (tmp_path / "tiny-imagenet-200").mkdir()
    save(tmp_path / "pictures/1.png")
    for name in ("tiny-imagenet", "digits", tmp_path / "pictures"):
        datasets.download(name)


class TestLimit:
    def reference(self, targets, limit):
        """Return the number of images per class, each given to the class that is furthest below its share."""
        shares = {c: np.count_nonzero(targets == c) * limit / len(targets) for c in np.unique(targets)}
        given = {c: int(share) for c, share in shares.items()}
        while sum(given.values()) < limit:
            given[max(given, key=lambda c: shares[c] - given[c])] += 1
        return given

    @pytest.mark.parametrize("limit", [1, 3, 7, 51, 99, 100])
    def test_every_class_gets_its_share(self, limit):
        targets = np.random.default_rng(0).permutation(np.repeat([4, 9, 2, 7], [60, 23, 11, 6]))
        chosen = datasets._choose(100, targets, limit, seed=0)
        assert len(set(chosen)) == len(chosen) == limit
        assert list(chosen) == sorted(chosen)
        expected = self.reference(targets, limit)
        assert Counter(targets[chosen].tolist()) == {c: count for c, count in expected.items() if count}

    def test_ties_are_broken_at_random(self):
        targets = np.repeat(np.arange(10), 10)
        winners = {tuple(targets[datasets._choose(100, targets, 5, seed)]) for seed in range(5)}
        assert len(winners) == 5
        assert all(len(set(five)) == 5 for five in winners)

    def test_items_labels_and_order_stay_together(self):
        whole, some = load_dataset("digits"), load_dataset("digits", limit=50)
        assert (len(some), some.classes) == (50, whole.classes)
        assert some.split == "50 of all (1,797), drawn with seed 0"
        items = iter(whole)  # each image of the subset comes after the one before it, with its own label
        for image, label in some:
            assert any(other == image and number == label for other, number in items)

    @pytest.mark.parametrize("labelled", [True, False])
    def test_the_seed_decides(self, tmp_path, labelled):
        for number in range(20):
            save(tmp_path / ("ab"[number % 2] if labelled else "") / f"{number:02}.png")
        first, again, other = (load(tmp_path, limit=5, seed=seed) for seed in (0, 0, 1))
        assert first.images == again.images != other.images
        assert first.images == sorted(set(first.images))
        assert len(first) == 5

    @pytest.mark.parametrize("limit", [1797, 5000])
    def test_a_limit_above_the_size_changes_nothing(self, limit):
        dataset = load_dataset("digits", limit=limit)
        assert (len(dataset), dataset.split) == (1797, "all (1,797)")

    @pytest.mark.parametrize("limit", [None, 2, 5000])
    def test_images_are_counted_without_loading_them(self, tmp_path, limit):
        for number in range(3):
            (tmp_path / f"{number}.png").touch()
        assert datasets.size(f"imagefolder:{tmp_path}", limit) == (min(3, limit or 3), None)
        assert datasets.size("digits", limit) == (min(1797, limit or 1797), 10)
        for name, classes, test, train in [("cifar10", 10, 10_000, 50_000), ("CIFAR-100", 100, 10_000, 50_000),
                                           ("stl10", 10, 8_000, 5_000), ("tiny-imagenet", 200, 10_000, 100_000)]:
            assert datasets.size(name, limit) == (min(test, limit or test), classes)
            assert datasets.size(name, limit, "train") == (min(train, limit or train), classes)


class TestImageFolder:
    def test_class_folders(self, tmp_path):
        for name in ("dog/2.png", "dog/10.JPG", "cat/x.webp", "ant/y.bmp"):
            save(tmp_path / name)
        dataset = load(tmp_path)
        assert (dataset.name, dataset.split) == (f"imagefolder:{tmp_path}", "all (4)")
        assert str(tmp_path) in dataset.source
        assert dataset.classes == ["ant", "cat", "dog"]
        assert dataset.targets.dtype == np.int64
        assert [path.name for path in dataset.images] == ["y.bmp", "x.webp", "10.JPG", "2.png"]
        assert dataset.targets.tolist() == [label for _, label in dataset] == [0, 1, 2, 2]
        assert dataset[3][0] == picture(sum(map(ord, "2.png")))

    @pytest.mark.parametrize("parent", ["", "cats/"])
    def test_a_flat_folder_and_a_single_class_give_no_labels(self, tmp_path, parent):
        for name in ("b.png", "a.png"):
            save(tmp_path / f"{parent}{name}")
        dataset = load(tmp_path)
        assert (dataset.targets, dataset.classes) == (None, None)
        assert [path.name for path in dataset.images] == ["a.png", "b.png"]
        assert [label for _, label in dataset] == [-1, -1]

    def test_images_belong_to_the_top_folder_and_other_files_are_ignored(self, tmp_path):
        images = {"cat/siam/young/1.png": "cat", "cat/2.png": "cat", "dog/poodle/3.png": "dog"}
        for name in (*images, ".thumbnails/2.png", "cat/._1.png"):
            save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("not an image")
        (tmp_path / "empty").mkdir()
        assert labelled_paths(tmp_path) == images

    @pytest.mark.parametrize("folder", ["data", "~/data"])
    def test_paths_may_be_relative_or_below_home(self, tmp_path, monkeypatch, folder):
        save(tmp_path / "data/1.png")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(load(folder)) == 1

    @pytest.mark.parametrize(("below", "message"), [
        ("", r"stray\.png"), ("none", "/none "), ("stray.png", r"stray\.png"), ("empty", r"/empty .*\.png")])
    def test_bad_folders_are_named(self, tmp_path, below, message):
        """Images on both levels, a missing folder, a file, and a folder without images."""
        save(tmp_path / "cat/1.png")
        save(tmp_path / "stray.png")
        (tmp_path / "empty/cat").mkdir(parents=True)
        with pytest.raises(ItaeError, match=f"{tmp_path}.*{message}"):
            load(tmp_path / below)

    @pytest.mark.skipif(not CIFAR10_MINI.is_dir(), reason=f"the folder of photographs {CIFAR10_MINI} is not here")
    def test_real_photographs(self):
        dataset = load(CIFAR10_MINI, on_error="skip")
        assert (len(dataset), dataset.skipped) == (1000, [])
        assert dataset.classes == [path.name for path in sorted(CIFAR10_MINI.iterdir())]
        assert np.bincount(dataset.targets).tolist() == [100] * 10
        assert {image.size for image, _ in dataset} == {(32, 32)}


@pytest.mark.parametrize(("links", "added"), [
    ({"data/c": "elsewhere"}, {"c/deep/1.png": "c"}),
    ({"data/d": "elsewhere", "data/c": "elsewhere"}, {"c/deep/1.png": "c"}),  # the first link counts
    ({"data/a/2.png": "pool.png", "data/c/3.png": "pool.png"}, {"a/2.png": "a", "c/3.png": "c"}),  # links to files
    ({"data/a/up": "data"}, {}),
    ({"data/a/up": "data", "data/b/up": "data"}, {}),  # these span 2 ** 40 paths
    ({"data/a/deep/up": "data", "data/up": "data"}, {}),
    *(({f"data/{link}": "data/b"}, {}) for link in ("0", "c", "a/b", "a/deep/c")),  # an image belongs to its own folder
    ({"data/gone": "nowhere", "data/loop": "data/loop"}, {}),
])
def test_links_are_followed_but_no_folder_is_read_twice(tmp_path, links, added):
    for name in ("data/a/1.png", "data/b/1.png", "elsewhere/deep/1.png", "pool.png"):
        save(tmp_path / name)
    for link, target in links.items():
        (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for folder in ("data", "link"):
        assert labelled_paths(tmp_path / folder) == {"a/1.png": "a", "b/1.png": "b"} | added


class TestFiles:
    """A list of paths."""

    NAMES = ("b.png", "it's \"q\".png", "<script>.png", "صورة جميلة.png")

    def files(self, folder):
        return [save(folder / name) for name in self.NAMES]

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_they_are_a_data_set_without_labels_in_their_order(self, tmp_path, kind):
        dataset = load_dataset(kind(map(str, self.files(tmp_path))))
        assert (dataset.names, dataset.targets, dataset.classes) == (list(self.NAMES), None, None)
        assert (dataset.name, dataset.split, dataset.notes) == ("image files", "all (4)", ())
        assert str(tmp_path) in dataset.source
        for name, (image, label) in zip(self.NAMES, dataset, strict=True):
            assert label == -1
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / name)))

    def test_names_of_several_folders_differ(self, tmp_path):
        paths = [save(tmp_path / name) for name in ("a/1.png", "a/b/1.png", "c/1.png")]
        assert load_dataset(paths).names == ["a/1.png", "a/b/1.png", "c/1.png"]
        assert load_dataset(paths[:2]).names == ["1.png", "b/1.png"]
        assert len({fingerprint(load_dataset([path])) for path in paths}) == 1, "the same name and content"

    def test_a_path_may_be_relative_below_home_or_given_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(save(tmp_path / "a" / "1.png").parent)
        dataset = load_dataset(["~/a/1.png", save(tmp_path / "a" / "2.png"), "1.png"])
        assert dataset.images == [tmp_path / "a" / "1.png", tmp_path / "a" / "2.png"]
        assert dataset.notes == ("Paths that are given again: 1.",)

    def test_a_limit_and_unreadable_files_are_as_in_a_folder(self, tmp_path):
        paths = [*self.files(tmp_path), truncated_jpeg(tmp_path / "bad.jpg")]
        dataset = load_dataset(paths, on_error="skip")
        assert (dataset.names, dataset.skipped) == (list(self.NAMES), [paths[-1]])
        few = load_dataset(paths[:-1], limit=2)
        assert few.names == [name for name in self.NAMES if name in few.names]
        assert (len(few), few.split) == (2, "2 of all (4), drawn with seed 0")
        paths[-1].write_text("no image")
        with pytest.raises(ItaeError, match=re.escape(str(paths[-1]))):
            load_dataset(paths)

    @pytest.mark.parametrize(("name", "options", "message"), [
        (".", {}, r"is a folder: .* imagefolder:.*"), ("nowhere.png", {}, "there is no file .*nowhere.png"),
        ("a.png", {"split": "train"}, "split='train'"), ("a.png", {"image_column": "x"}, "image_column='x'"),
        ("a.png", {"label_column": "x"}, "label_column='x'")])
    def test_what_is_no_file_and_options_of_others_are_refused(self, tmp_path, name, options, message):
        with pytest.raises(ItaeError, match=message) as refused:
            load_dataset([save(tmp_path / "a.png"), tmp_path / name], **options)
        assert "\n" not in str(refused.value)


class TestDamagedFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        save(tmp_path / "cat/1.png")
        save(tmp_path / "dog/1.png")
        return tmp_path

    @pytest.mark.parametrize("share", [0, 0.1, 0.6])
    def test_a_damaged_png_is_reported_at_once(self, folder, share):
        truncate(save(folder / "cat/2.png"), share)
        with pytest.raises(ItaeError, match=r"cat/2\.png.*on_error='skip'") as refused:
            load(folder)
        assert "\n" not in str(refused.value)

    def test_a_truncated_jpeg_is_reported_when_it_is_decoded(self, folder):
        truncated_jpeg(folder / "cat/2.jpg")
        dataset = load(folder)
        assert len(dataset) == 3
        with pytest.raises(ItaeError, match=r"cat/2\.jpg"):
            dataset[1]

    def test_skip_leaves_them_out_and_lists_them(self, folder):
        (folder / "cat/0.png").write_text("not an image")
        truncated_jpeg(folder / "cat/2.jpg")
        dataset = load(folder, on_error="skip")
        assert dataset.images == [folder / "cat/1.png", folder / "dog/1.png"]
        assert dataset.targets.tolist() == [label for _, label in dataset] == [0, 1]
        assert dataset.skipped == [folder / "cat/0.png", folder / "cat/2.jpg"]
        assert dataset.split == "all (2 of 4 files, the others unreadable)"

    def test_a_broken_link_is_a_damaged_file_if_it_is_called_an_image(self, folder):
        (folder / "cat/2.png").symlink_to("nowhere.png")
        with pytest.raises(ItaeError, match=r"cat/2\.png"):
            load(folder)
        assert load(folder, on_error="skip").skipped == [folder / "cat/2.png"]

    def test_a_limit_counts_readable_images(self, tmp_path):
        for number in range(6):
            save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}-bad.png").write_text("not an image")
        dataset = load(tmp_path, on_error="skip", limit=6)
        assert (len(dataset), len(dataset.skipped), dataset.targets) == (6, 6, None)

    def test_a_folder_without_readable_images(self, tmp_path):
        (tmp_path / "0.png").write_text("not an image")
        with pytest.raises(ItaeError, match=r"0\.png"):
            load(tmp_path, on_error="skip")
