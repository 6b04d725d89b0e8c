import hashlib
import http.server
import io
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from itae_utils.data import datasets, published
from itae_utils.data.datasets import load_dataset
from itae_utils.data.download import within
from itae_utils.data.fingerprint import fingerprint
from itae_utils.errors import ItaeError
from tests.data.test_datasets import picture, save, truncate
from tests.loopback import Loopback, closed_url

ZIP = "tiny-imagenet-200.zip"


class Server(Loopback):
    """A loopback HTTP server for one folder that records its requests, with or without support for Range.

    It answers after `delay` seconds, sends `cut_after` bytes of the body at most, and then waits `stall` seconds.
    """

    def __init__(self, folder, ranges=True, cut_after=None, delay=0, stall=0):
        self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                span = handler.headers.get("Range")
                self.asked.append((handler.path, span))
                time.sleep(delay)
                path = folder / handler.path.lstrip("/")
                if not path.is_file():
                    handler.send_error(404)
                    return
                content = path.read_bytes()
                start = int(span.removeprefix("bytes=").removesuffix("-")) if span and ranges else 0
                if span and start >= len(content):
                    handler.send_error(416)
                    return
                handler.send_response(206 if span and ranges else 200)
                handler.send_header("Content-Length", str(len(content) - start))
                handler.end_headers()
                handler.wfile.write(content[start:][:cut_after])
                time.sleep(stall)

            def log_message(handler, *_args):
                pass

        super().__init__(Handler)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """Bypass any proxy for the loopback address."""
    monkeypatch.setenv("no_proxy", "*")


def tiny_zip(path):
    """Write a small archive in the layout of tiny-imagenet-200.zip: 3 classes, 6 validation and 4 training images."""
    ids = ["n02000000", "n01000000", "n03000000", "n01000000", "n03000000", "n02000000"]
    with zipfile.ZipFile(path, "w") as archive:
        rows, top = [], "tiny-imagenet-200"
        for number, wordnet_id in enumerate(ids):
            content = io.BytesIO()
            picture(number, size=(64, 64), mode="L" if number == 2 else "RGB").save(content, "JPEG")
            archive.writestr(f"{top}/val/images/val_{number}.JPEG", content.getvalue())
            rows.append(f"val_{number}.JPEG\t{wordnet_id}\t0\t32\t44\t62\n")
        archive.writestr(f"{top}/val/val_annotations.txt", "".join(rows))
        archive.writestr(f"{top}/wnids.txt", "\n".join(sorted(set(ids))))
        words = {"n01000000": "goldfish, Carassius auratus", "n02000000": "boa", "n03000000": "bus, coach", "n4": "cup"}
        archive.writestr(f"{top}/words.txt", "".join(f"{key}\t{value}\n" for key, value in words.items()))
        archive.writestr(f"{top}/train/n01000000/n01000000_boxes.txt", "")
        for number, wordnet_id in enumerate(["n03000000", "n01000000", "n02000000", "n01000000"]):
            content = io.BytesIO()
            picture(10 + number, size=(64, 64)).save(content, "JPEG")
            archive.writestr(f"{top}/train/{wordnet_id}/images/{wordnet_id}_{number}.JPEG", content.getvalue())
    return path


class TinyArchive:
    """A small archive in place of Tiny-ImageNet's, on a server or saved by hand."""

    def __init__(self, folder, monkeypatch):
        folder.mkdir()
        self.path, self.patch = tiny_zip(folder / ZIP), monkeypatch
        self.content = self.path.read_bytes()
        self.md5 = hashlib.md5(self.content).hexdigest()

    def at(self, url, **wrong):
        archive = {"md5": self.md5, "size": len(self.content)} | wrong
        self.patch.setattr(published, "TINY_IMAGENET", published.Archive(f"{url}/{ZIP}", ZIP, **archive))

    @contextmanager
    def served(self, wrong=(), **options):
        with Server(self.path.parent, **options) as server:
            self.at(server.url, **dict(wrong))
            yield server

    def save_by_hand(self, folder):
        self.at(closed_url())
        return self.path.rename(folder / ZIP)

    def check(self, root=None):
        """Load the images and compare them with the archive's."""
        dataset = load_dataset("tiny-imagenet", root=root)
        assert dataset.classes == ["goldfish", "boa", "bus"]
        assert dataset.targets.tolist() == [1, 0, 2, 0, 2, 1]
        assert dataset.targets.dtype == np.int64
        assert dataset.split == "validation (6)"
        assert [path.name for path in dataset.images] == [f"val_{number}.JPEG" for number in range(6)]
        for (image, label), target in zip(dataset, dataset.targets, strict=True):
            assert (image.size, image.mode, label) == ((64, 64), "RGB", target)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    return TinyArchive(tmp_path / "server", monkeypatch)


def refusal(name, root):
    with pytest.raises(ItaeError) as refused:
        load_dataset(name, root=root)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class TestTinyImageNet:
    def test_it_is_downloaded_once_and_unpacked_in_part(self, tiny, tmp_path):
        root = tmp_path / "new/data"
        with tiny.served() as server:
            tiny.check(root)
            tiny.check(root)
            assert server.asked == [(f"/{ZIP}", None)]
        assert sorted(path.name for path in root.glob("[!.]*")) == ["tiny-imagenet-200", ZIP]
        assert not (root / "tiny-imagenet-200/train").exists()

    @pytest.mark.parametrize(("variable", "root"), [("data", "data"), (None, ".cache/itae/data")])
    def test_the_folder_comes_from_the_environment_or_is_below_home(self, tiny, tmp_path, monkeypatch, variable, root):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("ITAE_DATA", str(tmp_path / variable) if variable else "")
        with tiny.served():
            tiny.check()
        assert (tmp_path / root / "tiny-imagenet-200").is_dir()

    @pytest.mark.parametrize("before", [True, False])
    def test_the_training_split_is_unpacked_when_it_is_asked_for(self, tiny, tmp_path, before):
        tiny.save_by_hand(tmp_path)
        if before:
            tiny.check(tmp_path)
        for name in ("train", "Training"):
            dataset = load_dataset("tiny-imagenet", split=name, root=tmp_path)
            assert (dataset.split, dataset.classes) == ("train (4)", ["goldfish", "boa", "bus"])
            assert [path.name for path in dataset.images] == [
                "n01000000_1.JPEG", "n01000000_3.JPEG", "n02000000_2.JPEG", "n03000000_0.JPEG"]
            assert dataset.targets.tolist() == [0, 0, 1, 2]
            assert dataset[0][0].size == (64, 64)
        tiny.check(tmp_path)
        assert fingerprint(dataset) != fingerprint(load_dataset("tiny-imagenet", root=tmp_path))
        for path in dataset.images:
            path.unlink()
        with pytest.raises(ItaeError, match=r"tiny-imagenet-200/train.* remove"):
            load_dataset("tiny-imagenet", split="train", root=tmp_path)

    def test_what_a_training_split_needs_is_fetched_before_a_run(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("ITAE_DATA", str(tmp_path / "data"))
        with tiny.served() as server:
            for split in (None, "train", "train"):
                datasets.download("tiny-imagenet", split)
                assert (tmp_path / "data/tiny-imagenet-200/train").is_dir() == (split is not None)
            assert len(server.asked) == 1

    def test_an_archive_saved_by_hand_needs_no_network_and_is_never_deleted(self, tiny, tmp_path):
        path = tiny.save_by_hand(tmp_path)
        truncate(path)
        assert str(path) in refusal("tiny-imagenet", tmp_path)
        path.write_bytes(tiny.content)
        tiny.check(tmp_path)

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_complete_part_is_used_and_a_server_without_ranges_sends_the_whole_file(self, tiny, tmp_path, ranges):
        part = tmp_path / f"{ZIP}.part"
        part.write_bytes(tiny.content if ranges else b"x" * 1000)
        with tiny.served(ranges=ranges):
            tiny.check(tmp_path)
        assert (tmp_path / ZIP).read_bytes() == tiny.content
        assert not part.exists()

    def test_a_cut_connection_leaves_a_part_to_resume(self, tiny, tmp_path):
        with tiny.served(cut_after=700):
            assert "700" in refusal("tiny-imagenet", tmp_path)
        assert [path.name for path in tmp_path.glob("*.zip*")] == [f"{ZIP}.part"]
        with tiny.served() as server:
            tiny.check(tmp_path)
            assert server.asked == [(f"/{ZIP}", "bytes=700-")]

    def test_a_file_with_a_wrong_checksum_is_deleted(self, tiny, tmp_path):
        with tiny.served({"md5": "0" * 32}) as server:
            message = refusal("tiny-imagenet", tmp_path / "data")
        assert server.url in message
        assert tiny.md5 in message
        assert list((tmp_path / "data").glob("[!.]*")) == []

    def test_an_answer_of_another_size_does_not_overwrite_the_part(self, tiny, tmp_path):
        part = tmp_path / f"{ZIP}.part"
        part.write_bytes(b"x" * 1000)
        with tiny.served({"size": 10_000_000}, ranges=False):
            assert "10,000,000" in refusal("tiny-imagenet", tmp_path)
        assert part.read_bytes() == b"x" * 1000

    def test_a_file_that_the_server_lacks_is_named(self, tiny, tmp_path):
        with Server(tmp_path) as server:
            tiny.at(server.url)
            message = refusal("tiny-imagenet", tmp_path / "data")
        assert f"{server.url}/{ZIP}" in message
        assert "Not Found" in message

    def test_unpacking_is_all_or_nothing(self, tiny, tmp_path, monkeypatch):
        tiny.save_by_hand(tmp_path)
        extract = zipfile.ZipFile.extractall

        def interrupted(self, path, members):
            extract(self, path, members[:3])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipFile, "extractall", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load_dataset("tiny-imagenet", root=tmp_path)
        assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["server", ZIP]
        tiny.check(tmp_path)

    def test_a_folder_that_was_rearranged_is_named(self, tmp_path):
        save(tmp_path / "tiny-imagenet-200/val/n01/1.png")
        assert str(tmp_path / "tiny-imagenet-200/val/val_annotations.txt") in refusal("tiny-imagenet", tmp_path)

    def test_a_full_disk_is_reported_and_leaves_no_archive(self, tiny, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / f"data/{ZIP}.part").symlink_to("/dev/full")
        with tiny.served():
            assert "No space left on device" in refusal("tiny-imagenet", tmp_path / "data")
        assert not {"tiny-imagenet-200", ZIP} & {path.name for path in (tmp_path / "data").iterdir()}

    def test_two_processes_at_once_download_once(self, tiny, tmp_path):
        code = (
            "import sys; from itae_utils.data import datasets, published; url, name, md5, root = sys.argv[1:];"
            "published.TINY_IMAGENET = published.Archive(url + '/' + name, name, md5);"
            "print(len(datasets.load_dataset('tiny-imagenet', root=root)))"
        )
        with Server(tiny.path.parent, delay=0.5) as server:
            command = [sys.executable, "-c", code, server.url, ZIP, tiny.md5, str(tmp_path / "data")]
            runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
            assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["6", "6"]
        assert len(server.asked) == 1

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        assert str(tmp_path / "file/data") in refusal("tiny-imagenet", tmp_path / "file/data")


def pack(folder, reader, pixels, targets, names, train=None):
    """Write the archive of CIFAR10, CIFAR100 or STL10; return the attributes of `reader` that hold its checksums.

    `pixels` are uint8 (n, 3, side, side), `targets` n class indices; `train` are both of the training split, if any.
    CIFAR-10's is divided among all its files.
    """
    parts = {"test": (pixels, targets)} | ({} if train is None else {"train": train})
    if reader is STL10:
        contents = {"class_names.txt": "\n".join(names).encode()}
        for part, (images, labels) in parts.items():
            contents[f"{part}_X.bin"] = images.transpose(0, 1, 3, 2).tobytes()  # the files hold columns
            contents[f"{part}_y.bin"] = bytes(label + 1 for label in labels)
    else:
        key, contents = "labels" if reader is CIFAR10 else "fine_labels", {}
        for part, (images, labels) in parts.items():
            files = [name for name, _ in getattr(reader, f"{part}_list")]
            for name, rows in zip(files, np.array_split(np.arange(len(labels)), len(files)), strict=True):
                contents[name] = pickle.dumps({"data": images[rows].reshape(len(rows), -1),
                                               key: [labels[row] for row in rows]})
        contents[reader.meta["filename"]] = pickle.dumps({reader.meta["key"]: names})
    path = folder / reader.filename
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{reader.base_folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    attributes = {each: [[name, sums[name]] for name, _ in getattr(reader, each) if name in sums]
                  for each in ("train_list", "test_list")}
    if reader is not STL10:
        attributes["meta"] = {**reader.meta, "md5": sums[reader.meta["filename"]]}
    return attributes | {"tgz_md5": hashlib.md5(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("reader", [CIFAR10, CIFAR100, STL10])
def test_torchvision_sets_are_downloaded_once_and_read(reader, tmp_path, monkeypatch):
    names, side = ["ant", "bee", "cat"], 96 if reader is STL10 else 32
    pixels = np.random.default_rng(0).integers(256, size=(11, 3, side, side), dtype=np.uint8)
    test, train = (pixels[:4], [2, 0, 1, 1]), (pixels[4:], [0, 1, 2, 1, 0, 0, 2])
    fingerprints = set()
    with Server(tmp_path) as server:
        monkeypatch.setattr(reader, "url", f"{server.url}/{reader.filename}")
        for attribute, value in pack(tmp_path, reader, *test, names, train).items():
            monkeypatch.setattr(reader, attribute, value)
        for split, name, (images, targets) in [(None, "test (4)", test), ("test", "test (4)", test),
                                               ("train", "train (7)", train), ("Training", "train (7)", train)]:
            dataset = load_dataset(reader.__name__.lower(), split=split, root=tmp_path / "data")
            assert (dataset.classes, dataset.split) == (names, name)
            assert (dataset.targets.dtype, dataset.targets.tolist()) == (np.int64, targets)
            for (image, label), expected, target in zip(dataset, images, targets, strict=True):
                np.testing.assert_array_equal(np.asarray(image), expected.transpose(1, 2, 0))
                assert label == target
            fingerprints.add(fingerprint(dataset))
        assert len(server.asked) == 1
    assert len(fingerprints) == 2


class TestNoNetwork:
    def test_the_message_says_how_to_download_tiny_imagenet_by_hand(self, tiny, tmp_path):
        tiny.at(url := closed_url())
        message = refusal("tiny-imagenet", tmp_path / "data")
        assert all(part in message for part in (f"{url}/{ZIP}", tiny.md5, str(tmp_path / "data")))

    @pytest.mark.parametrize("reader", [CIFAR10, CIFAR100, STL10])
    def test_the_message_says_how_to_download_torchvision_sets_by_hand(self, reader, tmp_path, monkeypatch):
        monkeypatch.setattr(reader, "url", url := f"{closed_url()}/{reader.filename}")
        message = refusal(reader.__name__.lower(), tmp_path / "data")
        assert all(part in message for part in (url, reader.tgz_md5, str(tmp_path / "data")))

    @pytest.fixture
    def assert_timeout(self, tmp_path, monkeypatch):
        """Return a function that loads with a limit of 0.3 s, and checks the time and that the message names it."""
        def check():
            monkeypatch.setenv("ITAE_TIMEOUT", "0.3")
            start = time.monotonic()
            assert "ITAE_TIMEOUT" in refusal("tiny-imagenet", tmp_path / "data")
            assert time.monotonic() - start < 3

        return check

    def test_a_host_that_never_answers(self, tiny, assert_timeout):
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections but never answers
            tiny.at(f"http://127.0.0.1:{silent.getsockname()[1]}")
            assert_timeout()

    def test_a_host_that_stops_sending(self, tiny, assert_timeout):
        with tiny.served(cut_after=700, stall=5):
            assert_timeout()

    def test_a_name_server_that_never_answers(self, tiny, assert_timeout, monkeypatch):
        """Socket timeouts do not cover DNS look-ups, so this needs a limit of its own."""
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
        tiny.at("http://nowhere.invalid")
        assert_timeout()

    def test_a_slow_host_gets_the_seconds_of_the_environment(self, tiny, tmp_path, monkeypatch):
        with tiny.served(delay=0.5):
            monkeypatch.setenv("ITAE_TIMEOUT", "0.1")
            assert "0.1 s" in refusal("tiny-imagenet", tmp_path / "data")
            monkeypatch.setenv("ITAE_TIMEOUT", "5")
            tiny.check(tmp_path / "data")


class TestWithin:
    @pytest.mark.parametrize("status", [200, 404])
    def test_an_answer_that_comes_too_late_is_closed(self, status):
        closed = threading.Event()

        class Late(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                time.sleep(0.4)
                self.send_response(status)
                self.send_header("Content-Length", "10")
                self.end_headers()
                try:
                    self.connection.recv(1)  # returns when the client closes the connection
                finally:
                    closed.set()

            def log_message(self, *_args):
                pass

        with Loopback(Late) as server:
            with pytest.raises(TimeoutError, match=r"0\.1 s") as caught:
                within(0.1, urllib.request.urlopen, server.url, timeout=5)
            assert closed.wait(3)
        del caught  # not earlier: an answer that it refers to would be closed with it

    def test_an_error_in_time_is_raised(self):
        def fail():
            raise TimeoutError("own")

        with pytest.raises(TimeoutError, match="own"):
            within(5, fail)
