import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itae_utils.data import datasets
from itae_utils.data.datasets import DATASETS, load_dataset
from itae_utils.data.folders import open_image
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


class TestDigits:
    def test_all_images_and_labels(self):
        from sklearn.datasets import load_digits

        dataset, digits = load_dataset("digits"), load_digits()
        assert len(dataset) == 1797
        assert dataset.name == "digits"
        assert dataset.split == "all (1,797)"
        assert "scikit-learn" in dataset.source
        assert dataset.classes == list("0123456789")
        assert dataset.targets.dtype == np.int64
        assert dataset.skipped == []
        for (image, label), pixels, digit in zip(dataset, digits.images, digits.target, strict=True):
            assert image.mode == "RGB"
            assert label == digit
            np.testing.assert_array_equal(np.asarray(image), np.round(pixels * 255 / 16)[..., None].repeat(3, axis=2))

    def test_labels_are_plain_numbers(self):
        assert type(load_dataset("digits")[0][1]) is int


class TestNames:
    def test_an_unknown_name(self):
        with pytest.raises(ItaeError, match=r"'cifar-10'.* cifar10 .*itae datasets"):
            load_dataset("cifar-10")

    @pytest.mark.parametrize("limit", [0, -3, 1.5, "10", True])
    def test_bad_limits(self, limit):
        with pytest.raises(ItaeError, match=re.escape(f"limit={limit!r}")):
            load_dataset("digits", limit=limit)

    def test_a_bad_on_error(self):
        with pytest.raises(ItaeError, match=r"on_error='ignore'.*'raise'.*'skip'"):
            load_dataset("digits", on_error="ignore")

    def test_the_registry_describes_the_digits(self):
        digits, info = load_dataset("digits"), DATASETS["digits"]
        assert (info.images, info.classes, info.megabytes) == (len(digits), len(digits.classes), 0)


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
        assert len(some) == 50
        assert some.split == "50 of all (1,797), drawn with seed 0"
        assert some.classes == whole.classes
        items = iter(whole)  # each image of the subset comes after the one before it, with its own label
        for image, label in some:
            assert any(other == image and number == label for other, number in items)

    def test_the_seed_decides(self):
        first, again, other = (load_dataset("digits", limit=50, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first.images, again.images)
        assert not np.array_equal(first.images, other.images)

    @pytest.mark.parametrize("limit", [1797, 5000])
    def test_a_limit_above_the_size_changes_nothing(self, limit):
        dataset = load_dataset("digits", limit=limit)
        assert len(dataset) == 1797
        assert dataset.split == "all (1,797)"

    def test_without_labels(self, tmp_path):
        for number in range(20):
            save(tmp_path / f"{number:02}.png")
        first, again, other = (load_dataset(f"imagefolder:{tmp_path}", limit=5, seed=seed) for seed in (0, 0, 1))
        assert first.targets is None
        assert first.images == again.images != other.images
        assert first.images == sorted(first.images)
        assert len(set(first.images)) == 5


class TestImageFolder:
    def test_class_folders(self, tmp_path):
        for name in ("dog/2.png", "dog/10.JPG", "cat/x.webp", "ant/y.bmp"):
            save(tmp_path / name)
        dataset = load_dataset(f"imagefolder:{tmp_path}")
        assert dataset.classes == ["ant", "cat", "dog"]
        assert dataset.targets.tolist() == [0, 1, 2, 2]
        assert dataset.targets.dtype == np.int64
        assert [path.name for path in dataset.images] == ["y.bmp", "x.webp", "10.JPG", "2.png"]
        assert [label for _, label in dataset] == [0, 1, 2, 2]
        assert dataset.name == f"imagefolder:{tmp_path}"
        assert dataset.split == "all (4)"
        assert str(tmp_path) in dataset.source
        assert dataset[3][0] == picture(sum(map(ord, "2.png")))

    def test_a_flat_folder_has_no_labels(self, tmp_path):
        for name in ("b.png", "a.png"):
            save(tmp_path / name)
        dataset = load_dataset(f"imagefolder:{tmp_path}")
        assert dataset.targets is None
        assert dataset.classes is None
        assert [path.name for path in dataset.images] == ["a.png", "b.png"]
        assert [label for _, label in dataset] == [-1, -1]

    def test_nested_folders_belong_to_the_class_at_the_top(self, tmp_path):
        for name in ("cat/siam/young/1.png", "cat/2.png", "dog/poodle/3.png"):
            save(tmp_path / name)
        dataset = load_dataset(f"imagefolder:{tmp_path}")
        assert dataset.classes == ["cat", "dog"]
        assert Counter(dataset.targets.tolist()) == {0: 2, 1: 1}

    def test_other_files_hidden_files_and_empty_folders_do_not_count(self, tmp_path):
        save(tmp_path / "cat/1.png")
        save(tmp_path / "dog/1.png")
        save(tmp_path / ".thumbnails/2.png")
        save(tmp_path / "cat/._1.png")
        (tmp_path / "notes.txt").write_text("not an image")
        (tmp_path / "empty").mkdir()
        dataset = load_dataset(f"imagefolder:{tmp_path}")
        assert dataset.classes == ["cat", "dog"]
        assert len(dataset) == 2

    def test_relative_paths_start_at_the_working_directory(self, tmp_path, monkeypatch):
        save(tmp_path / "data/1.png")
        monkeypatch.chdir(tmp_path)
        assert len(load_dataset("imagefolder:data")) == 1

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        save(tmp_path / "data/1.png")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(load_dataset("imagefolder:~/data")) == 1

    def test_images_on_both_levels_are_refused(self, tmp_path):
        save(tmp_path / "cat/1.png")
        save(tmp_path / "stray.png")
        with pytest.raises(ItaeError, match=r"stray\.png"):
            load_dataset(f"imagefolder:{tmp_path}")

    def test_missing(self, tmp_path):
        with pytest.raises(ItaeError, match=f"{tmp_path}/none"):
            load_dataset(f"imagefolder:{tmp_path}/none")

    def test_a_file(self, tmp_path):
        with pytest.raises(ItaeError, match=r"1\.png"):
            load_dataset(f"imagefolder:{save(tmp_path / '1.png')}")

    def test_without_images(self, tmp_path):
        (tmp_path / "cat").mkdir()
        with pytest.raises(ItaeError, match=rf"{tmp_path} .*\.png"):
            load_dataset(f"imagefolder:{tmp_path}")

    @pytest.mark.parametrize("name", ["imagefolder", "imagefolder:"])
    def test_without_a_path(self, name):
        with pytest.raises(ItaeError, match="imagefolder:PATH"):
            load_dataset(name)

    @pytest.mark.skipif(not CIFAR10_MINI.is_dir(), reason=f"the folder of photographs {CIFAR10_MINI} is not here")
    def test_real_photographs(self):
        dataset = load_dataset(f"imagefolder:{CIFAR10_MINI}", on_error="skip")
        assert len(dataset) == 1000
        assert dataset.skipped == []
        assert dataset.classes == [path.name for path in sorted(CIFAR10_MINI.iterdir())]
        assert np.bincount(dataset.targets).tolist() == [100] * 10
        assert {image.size for image, _ in dataset} == {(32, 32)}


class TestLinks:
    def labels(self, folder):
        """Load a folder and return its images, by path below the folder, with their class."""
        dataset = load_dataset(f"imagefolder:{folder}")
        return {path.relative_to(folder).as_posix(): None if dataset.classes is None else dataset.classes[label]
                for path, (_, label) in zip(dataset.images, dataset, strict=True)}

    def link(self, path, target):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def test_a_link_to_a_folder_elsewhere_is_followed(self, tmp_path):
        save(tmp_path / "elsewhere/deep/1.png")
        save(tmp_path / "data/dog/1.png")
        self.link(tmp_path / "data/cat", tmp_path / "elsewhere")
        assert self.labels(tmp_path / "data") == {"cat/deep/1.png": "cat", "dog/1.png": "dog"}

    def test_the_folder_itself_may_be_a_link(self, tmp_path):
        save(tmp_path / "data/1.png")
        self.link(tmp_path / "link", tmp_path / "data")
        assert self.labels(tmp_path / "link") == {"1.png": None}

    @pytest.mark.parametrize("links", [["a/up"], ["a/up", "b/up"], ["a/deep/up", "up"]])
    def test_links_to_a_parent_folder_add_nothing(self, tmp_path, links):
        """Two such links alone span 2 ** 40 paths before the system refuses to follow them."""
        save(tmp_path / "a/1.png")
        save(tmp_path / "b/1.png")
        for link in links:
            self.link(tmp_path / link, tmp_path)
        assert self.labels(tmp_path) == {"a/1.png": "a", "b/1.png": "b"}

    @pytest.mark.parametrize("link", ["a", "c", "b/a", "a/deep/c"])
    def test_an_image_belongs_to_its_own_folder_and_not_to_a_link_to_that(self, tmp_path, link):
        save(tmp_path / "b/1.png")
        save(tmp_path / "d/1.png")
        self.link(tmp_path / link, tmp_path / "b")
        assert self.labels(tmp_path) == {"b/1.png": "b", "d/1.png": "d"}

    def test_of_two_links_to_one_folder_the_first_counts(self, tmp_path):
        save(tmp_path / "pool/1.png")
        save(tmp_path / "data/z/1.png")
        for name in "ba":
            self.link(tmp_path / "data" / name, tmp_path / "pool")
        assert self.labels(tmp_path / "data") == {"a/1.png": "a", "z/1.png": "z"}

    def test_links_to_files_count_as_files(self, tmp_path):
        save(tmp_path / "pool.png")
        for name in ("a/1.png", "a/2.png", "b/1.png"):
            self.link(tmp_path / "data" / name, tmp_path / "pool.png")
        assert self.labels(tmp_path / "data") == {"a/1.png": "a", "a/2.png": "a", "b/1.png": "b"}

    def test_a_broken_link_is_a_damaged_file_if_it_is_called_an_image(self, tmp_path):
        save(tmp_path / "1.png")
        self.link(tmp_path / "gone", tmp_path / "nowhere")
        self.link(tmp_path / "loop", tmp_path / "loop")
        assert self.labels(tmp_path) == {"1.png": None}
        self.link(tmp_path / "2.png", tmp_path / "nowhere.png")
        with pytest.raises(ItaeError, match=r"2\.png"):
            load_dataset(f"imagefolder:{tmp_path}")
        assert load_dataset(f"imagefolder:{tmp_path}", on_error="skip").skipped == [tmp_path / "2.png"]


def test_a_single_class_gives_no_labels(tmp_path):
    for number in range(2):
        save(tmp_path / f"cats/{number}.png")
    dataset = load_dataset(f"imagefolder:{tmp_path}")
    assert (len(dataset), dataset.targets, dataset.classes) == (2, None, None)


class TestDamagedFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        save(tmp_path / "cat/1.png")
        save(tmp_path / "dog/1.png")
        return tmp_path

    def test_a_file_that_is_not_an_image_is_named_at_once(self, folder):
        (folder / "cat/2.png").write_text("not an image")
        with pytest.raises(ItaeError, match=r"cat/2\.png.*on_error='skip'") as caught:
            load_dataset(f"imagefolder:{folder}")
        assert "\n" not in str(caught.value)

    def test_a_broken_png_is_named_at_once(self, folder):
        truncate(save(folder / "cat/2.png"))
        with pytest.raises(ItaeError, match=r"cat/2\.png"):
            load_dataset(f"imagefolder:{folder}")

    def test_a_truncated_jpeg_is_named_when_it_is_decoded(self, folder):
        truncated_jpeg(folder / "cat/2.jpg")
        dataset = load_dataset(f"imagefolder:{folder}")
        assert len(dataset) == 3
        with pytest.raises(ItaeError, match=r"cat/2\.jpg"):
            dataset[1]

    def test_skip_leaves_them_out_and_lists_them(self, folder):
        (folder / "cat/0.png").write_text("not an image")
        truncated_jpeg(folder / "cat/2.jpg")
        (folder / "cat/3.png").write_bytes(b"")
        dataset = load_dataset(f"imagefolder:{folder}", on_error="skip")
        assert [path.relative_to(folder).as_posix() for path in dataset.images] == ["cat/1.png", "dog/1.png"]
        assert dataset.targets.tolist() == [0, 1]
        assert dataset.skipped == [folder / "cat/0.png", folder / "cat/2.jpg", folder / "cat/3.png"]
        assert dataset.split == "all (2 of 5 files, the others unreadable)"
        assert len(list(dataset)) == 2

    def test_skip_without_labels(self, tmp_path):
        save(tmp_path / "1.png")
        (tmp_path / "0.png").write_text("not an image")
        dataset = load_dataset(f"imagefolder:{tmp_path}", on_error="skip")
        assert dataset.targets is None
        assert dataset.skipped == [tmp_path / "0.png"]

    def test_a_limit_counts_readable_images(self, tmp_path):
        for number in range(6):
            save(tmp_path / f"cat/{number}.png")
            (tmp_path / f"cat/{number}-bad.png").write_text("not an image")
        assert len(load_dataset(f"imagefolder:{tmp_path}", on_error="skip", limit=6)) == 6

    def test_a_folder_without_readable_images(self, tmp_path):
        (tmp_path / "0.png").write_text("not an image")
        with pytest.raises(ItaeError, match=r"0\.png"):
            load_dataset(f"imagefolder:{tmp_path}", on_error="skip")


class TestOpenImage:
    @pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "RGB"])
    def test_png_modes_become_rgb_without_warnings(self, tmp_path, mode):
        image = picture(3, mode=mode)
        path = save(tmp_path / "x.png", image)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = open_image(path)
        assert found.mode == "RGB"
        assert found == image.convert("RGB")

    def test_cmyk_jpeg(self, tmp_path):
        assert open_image(save(tmp_path / "x.jpg", picture(mode="CMYK"))).mode == "RGB"

    def test_a_palette_with_transparency_gives_no_warning(self, tmp_path):
        path = tmp_path / "x.png"
        picture(3, mode="P").save(path, transparency=bytes(range(100)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert open_image(path).mode == "RGB"

    def test_16_bit_grey_is_scaled_and_not_clipped(self, tmp_path):
        values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
        path = save(tmp_path / "x.png", Image.fromarray(values))
        assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 0, 1, 128, 255]

    def test_floats_have_no_range(self, tmp_path):
        path = save(tmp_path / "x.tif", Image.fromarray(np.ones((2, 2), dtype=np.float32)))
        with pytest.raises(ItaeError, match=r"x\.tif.*mode F"):
            open_image(path)

    def test_it_is_upright_by_its_exif_data(self, tmp_path):
        image, exif = picture(size=(6, 4)), Image.Exif()
        exif[0x0112] = 6  # orientation: turn by 90° to the right
        path = tmp_path / "x.png"
        image.save(path, exif=exif)
        np.testing.assert_array_equal(np.asarray(open_image(path)), np.rot90(np.asarray(image), -1))
