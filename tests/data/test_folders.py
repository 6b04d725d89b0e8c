import os
import re

import pytest

from itae_utils.data.folders import choose_split, read_folder, split_kind
from itae_utils.data.images import image_suffixes
from itae_utils.errors import ItaeError
from itae_utils.files import OUTPUT_MARK
from tests.data.test_datasets import labelled_paths, load, picture, save


def make(folder, names):
    for name in names:
        save(folder / name)


def told(folder, **options):
    return " ".join(load(folder, **options).notes)


class TestFilesLeftOut:
    @pytest.mark.parametrize("name", [
        "@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/cat/._1.png", "__MACOSX/1.png", ".hidden/1.png",
        "$RECYCLE.BIN/1.png", "cat/@eaDir/1.jpg", "cat/.1.png", "cat/._1.png", "lost+found/1.png",
        "#recycle/1.png", "@Recycle/1.png", ".ipynb_checkpoints/1.png", "System Volume Information/1.png"])
    def test_hidden_files_and_those_of_a_system_do_not_count(self, tmp_path, name):
        make(tmp_path, ["cat/1.png", "dog/1.png", name])
        for other in ("Thumbs.db", "desktop.ini", "cat/.DS_Store", "dog/Icon\r"):
            (tmp_path / other).touch()
        assert labelled_paths(tmp_path) == {"cat/1.png": "cat", "dog/1.png": "dog"}
        counted = [note for note in load(tmp_path).notes if "1" in note]
        assert len(counted) == len(load(tmp_path).notes) == (name in ("cat/.1.png", "cat/._1.png"))

    def test_a_folder_that_begins_with_a_sign_is_the_users(self, tmp_path):
        make(tmp_path, ["@anna/1.png", "#2/1.png", "$/1.png"])
        assert load(tmp_path).classes == ["#2", "$", "@anna"]

    def test_reports_inside_the_folder_are_left_out(self, tmp_path):
        make(tmp_path, ["cat/1.png", "dog/1.png", "reports/figures/1.png", "cat/out/deep/1.png"])
        for folder in ("reports", "cat/out", "."):
            (tmp_path / folder / OUTPUT_MARK).touch()
        assert labelled_paths(tmp_path) == {"cat/1.png": "cat", "dog/1.png": "dog"}
        assert len(load(tmp_path / "cat")) == 1

    def test_other_files_are_counted_by_ending(self, tmp_path):
        make(tmp_path, ["cat/1.png", "dog/1.png"])
        for name in ("dog/a.DNG", "dog/b.nef", "labels.csv", "cat/a.txt", "cat/b.TXT", "LICENSE", "dog/clip.mp4",
                     "dog/x.svg", "dog/manual.pdf"):
            (tmp_path / name).touch()
        notes = told(tmp_path)
        for part in (r"1 \.dng \(.*rawpy", r"1 \.nef", r"2 \.txt", r"1 \.csv", r"1 \.mp4", r"1 \.svg", r"1 \.pdf",
                     "1 without"):
            assert re.search(part, notes), part

    @pytest.mark.skipif(".heic" in image_suffixes(), reason="HEIC is read here")
    def test_heic_files_are_counted_with_the_package_that_reads_them(self, tmp_path):
        make(tmp_path, ["1.png"])
        for name in ("1.HEIC", "2.heic"):
            (tmp_path / name).touch()
        assert re.search(r"2 \.heic \(.*pillow-heif", told(tmp_path))

    def test_many_endings_are_summed_up(self, tmp_path):
        make(tmp_path, ["1.png"])
        for number in range(30):
            (tmp_path / f"1.e{number}").touch()
        (tmp_path / "1.cr2").touch()
        assert re.search(r"1 \.cr2.*21 others", told(tmp_path))

    def test_a_folder_without_images_says_what_it_holds(self, tmp_path):
        (tmp_path / "1.cr3").touch()
        (tmp_path / "1.txt").touch()
        with pytest.raises(ItaeError, match=r"no image.*1 \.cr3 \(.*rawpy.*1 \.txt"):
            load(tmp_path)

    def test_images_with_an_alpha_channel_and_unreadable_ones_are_counted(self, tmp_path):
        make(tmp_path, ["1.png"])
        save(tmp_path / "2.png", picture(mode="RGBA"))
        save(tmp_path / "3.png", picture(mode="LA"))
        (tmp_path / "4 é.png").write_text("text")
        dataset = load(tmp_path, on_error="skip")
        assert (len(dataset), dataset.names) == (3, ["1.png", "2.png", "3.png"])
        assert re.search(r"2 of 4 .* white.*1 of 4 .*4 é\.png", " ".join(dataset.notes))


class TestLinks:
    def test_two_folders_that_link_to_each_other(self, tmp_path):
        make(tmp_path, ["a/1.png", "b/1.png", "outside/1.png"])
        (tmp_path / "a/to b").symlink_to(tmp_path / "b")
        (tmp_path / "b/to a").symlink_to("../a")
        assert labelled_paths(tmp_path) == {"a/1.png": "a", "b/1.png": "b", "outside/1.png": "outside"}

    def test_two_data_sets_that_link_to_each_other(self, tmp_path):
        make(tmp_path, ["one/a/1.png", "one/b/1.png", "two/c/1.png"])
        (tmp_path / "one/two").symlink_to(tmp_path / "two")
        (tmp_path / "two/c/one").symlink_to(tmp_path / "one")
        assert labelled_paths(tmp_path / "one") == {"a/1.png": "a", "b/1.png": "b", "two/c/1.png": "two"}


class TestSplits:
    @pytest.mark.parametrize(("names", "chosen"), [
        ("train val test", "test"), ("Train VAL Test", "Test"), ("training validation", "validation"),
        ("train valid", "valid"), ("TRAIN dev", "dev"), ("train eval", "eval"), ("train", "train"), ("val", "val"),
        ("train2017 val2017 unlabeled2017", "val2017"), ("train_set test_set", "test_set"),
        ("train extra test", "test"), ("Training Testing", "Testing"), ("train_images test_images", "test_images")])
    @pytest.mark.parametrize("above", ["", "data/"])
    def test_a_level_of_splits_is_no_level_of_classes(self, tmp_path, names, chosen, above):
        for name in names.split():
            make(tmp_path, [f"{above}{name}/cat/{name}.png", f"{above}{name}/dog/{name}.png"])
        dataset = load(tmp_path)
        assert dataset.classes == ["cat", "dog"]
        assert dataset.names == [f"{above}{chosen}/{label}/{chosen}.png" for label in ("cat", "dog")]
        assert dataset.split == f"{chosen} (2)"
        for name in names.split():
            assert re.search(rf"\b{name}\b", " ".join(dataset.notes))

    @pytest.mark.parametrize("asked", ["train", "Train", "training"])
    def test_a_split_can_be_chosen(self, tmp_path, asked):
        make(tmp_path, ["train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png"])
        assert load(tmp_path, split=asked).names == ["train/cat/1.png", "train/dog/1.png"]

    def test_splits_below_the_classes(self, tmp_path):
        make(tmp_path, ["cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"])
        assert labelled_paths(tmp_path) == {"cat/test/2.png": "cat", "dog/test/4.png": "dog"}
        assert load(tmp_path, split="train").names == ["cat/train/1.png", "dog/train/3.png"]

    def test_a_split_may_be_flat_or_hold_one_folder(self, tmp_path):
        make(tmp_path, ["train/cat/1.png", "train/dog/1.png", "test/images/2.png", "val/3.png"])
        for split, names in (("val", ["val/3.png"]), ("test", ["test/images/2.png"])):
            dataset = load(tmp_path, split=split)
            assert (dataset.names, dataset.targets) == (names, None)

    @pytest.mark.parametrize("names", ["train car", "test bus", "test1 test2", "training-shoes boots", "valley hill"])
    def test_classes_called_almost_like_splits(self, tmp_path, names):
        make(tmp_path, [f"{name}/1.png" for name in names.split()])
        assert load(tmp_path).classes == sorted(names.split())

    @pytest.mark.parametrize(("names", "asked", "message"), [
        ("train val", "test", r"'test'.*train or val"), ("train", "val", "'val'.*train"), ("train val", "", "''"),
        ("dev eval", None, "dev or eval"), ("val2014 val2017 train", None, "val2014 or val2017"),
        ("cat dog", "test", "split='test'")])
    def test_a_split_that_is_missing_or_unclear_names_those_that_exist(self, tmp_path, names, asked, message):
        for name in names.split():
            make(tmp_path, [f"{name}/a/1.png", f"{name}/b/1.png"])
        with pytest.raises(ItaeError, match=message) as refused:
            load(tmp_path, split=asked)
        assert "\n" not in str(refused.value)

    def test_files_of_other_splits_are_not_counted(self, tmp_path):
        make(tmp_path, ["train/a/1.png", "test/a/1.png", "test/b/1.png"])
        for name in ("train/a/1.cr2", "train/a/2.cr2", "test/b/3.cr2"):
            (tmp_path / name).touch()
        assert "1 .cr2" in told(tmp_path)

    def test_the_exact_name_wins(self):
        assert choose_split(["val", "validation", "Test"], "val", "x") == "val"
        assert choose_split(["a", "b"], "b", "x") == choose_split(["b"], None, "x") == "b"

    def test_kinds(self):
        assert [split_kind(name) for name in ("Train", "val_split", "test2019", "testimony", "trains")] == [
            "train", "validation", "test", None, None]


class TestFolderAbove:
    @pytest.mark.parametrize("above", ["images", "data/images"])
    def test_it_is_followed_to_the_classes(self, tmp_path, above):
        make(tmp_path, [f"{above}/cat/1.png", f"{above}/dog/deep/2.png"])
        dataset = load(tmp_path)
        assert (dataset.classes, dataset.targets.tolist()) == (["cat", "dog"], [0, 1])
        assert f"below {above}." in " ".join(dataset.notes)
        assert dataset.names == [f"{above}/cat/1.png", f"{above}/dog/deep/2.png"]

    @pytest.mark.parametrize("names", [
        ["cats/1.png", "cats/2.png"], ["cats/1.png", "cats/siam/2.png"], ["a/b/c/1.png"]])
    def test_one_folder_of_images_gives_no_labels(self, tmp_path, names):
        make(tmp_path, names)
        dataset = load(tmp_path)
        assert (dataset.names, dataset.targets, dataset.classes) == (names, None, None)
        assert "no labels" in " ".join(dataset.notes)


class TestNames:
    @pytest.mark.parametrize("name", ["Zoë/été 1.png", "字/a b.png", "a/#1 (2) [x].png", "b/$x_1$.png"])
    def test_they_are_shown_as_they_are(self, tmp_path, name):
        make(tmp_path, [name, "other/1.png"])
        dataset = load(tmp_path)
        assert name in dataset.names
        assert name.split("/")[0] in dataset.classes
        (tmp_path / name).write_text("text")
        with pytest.raises(ItaeError, match=re.escape(name)):
            load(tmp_path)

    def test_those_that_are_not_utf8_or_span_lines_are_escaped(self, tmp_path):
        for name in (b"caf\xe9", b"two\nlines"):
            save(tmp_path / os.fsdecode(name) / "1.png")
        dataset = load(tmp_path)
        assert dataset.classes == [r"caf\udce9", r"two\nlines"]
        assert dataset.names == [r"caf\udce9/1.png", r"two\nlines/1.png"]
        dataset.images[1].write_text("text")
        with pytest.raises(ItaeError, match=re.escape(r"two\nlines")) as refused:
            load(tmp_path)
        assert b"\n" not in str(refused.value).encode()


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make(tmp_path, ["cat/1.png", "dog/1.png"])
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ItaeError, match=r"/dog \(Permission denied"):
        read_folder(tmp_path)
