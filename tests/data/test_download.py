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

import numpy as np
import pytest

from itae_utils.data import datasets
from itae_utils.data.datasets import load_dataset
from itae_utils.data.download import within
from itae_utils.errors import ItaeError
from tests.data.test_datasets import picture, save, truncate
from tests.loopback import Loopback


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


def closed_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def tiny_zip(path):
    """Write a small archive in the layout of tiny-imagenet-200.zip: 3 classes, 6 validation images."""
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
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Return a function that makes the loader download a small archive from a URL; its `path` is the archive."""
    (tmp_path / "server").mkdir()
    path = tiny_zip(tmp_path / "server/tiny-imagenet-200.zip")
    content = path.read_bytes()

    def point_to(url, **wrong):
        truth = {"md5": hashlib.md5(content).hexdigest(), "size": len(content)}
        archive = datasets.Archive(f"{url}/tiny-imagenet-200.zip", path.name, **{**truth, **wrong})
        monkeypatch.setattr(datasets, "TINY_IMAGENET", archive)

    point_to.path = path
    return point_to


class TestTinyImageNet:
    def check(self, dataset):
        assert dataset.classes == ["goldfish", "boa", "bus"]
        assert dataset.targets.tolist() == [1, 0, 2, 0, 2, 1]
        assert dataset.targets.dtype == np.int64
        assert dataset.split == "validation (6)"
        for number, (image, label) in enumerate(dataset):
            assert image.size == (64, 64)
            assert image.mode == "RGB"
            assert label == dataset.targets[number]
            assert dataset.images[number].name == f"val_{number}.JPEG"

    def test_from_the_server_to_images(self, tiny, tmp_path):
        root = tmp_path / "new/data"
        with Server(tiny.path.parent) as server:
            tiny(server.url)
            self.check(load_dataset("tiny-imagenet", root=root))
            assert server.asked == [("/tiny-imagenet-200.zip", None)]
            self.check(load_dataset("tiny-imagenet", root=root))
            assert len(server.asked) == 1
        assert sorted(path.name for path in root.glob("[!.]*")) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]
        assert not (root / "tiny-imagenet-200/train").exists()

    def test_root_comes_from_the_environment(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("ITAE_DATA", str(tmp_path / "data"))
        with Server(tiny.path.parent) as server:
            tiny(server.url)
            load_dataset("tiny-imagenet")
        assert (tmp_path / "data/tiny-imagenet-200").is_dir()

    def test_root_is_below_home_by_default(self, tiny, tmp_path, monkeypatch):
        monkeypatch.delenv("ITAE_DATA", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        with Server(tiny.path.parent) as server:
            tiny(server.url)
            load_dataset("tiny-imagenet")
        assert (tmp_path / ".cache/itae/data/tiny-imagenet-200").is_dir()

    def test_an_archive_saved_by_hand_needs_no_network(self, tiny, tmp_path):
        tiny(f"http://127.0.0.1:{closed_port()}")
        tiny.path.rename(tmp_path / tiny.path.name)
        self.check(load_dataset("tiny-imagenet", root=tmp_path))

    def test_a_damaged_archive_saved_by_hand_is_named_and_not_deleted(self, tiny, tmp_path):
        tiny(f"http://127.0.0.1:{closed_port()}")
        truncate(tiny.path)
        with pytest.raises(ItaeError, match=str(tiny.path)):
            load_dataset("tiny-imagenet", root=tiny.path.parent)
        assert tiny.path.exists()

    def test_a_partial_download_is_resumed(self, tiny, tmp_path):
        content = tiny.path.read_bytes()
        (tmp_path / "tiny-imagenet-200.zip.part").write_bytes(content[:1000])
        with Server(tiny.path.parent) as server:
            tiny(server.url)
            self.check(load_dataset("tiny-imagenet", root=tmp_path))
            assert server.asked == [("/tiny-imagenet-200.zip", "bytes=1000-")]
        assert (tmp_path / "tiny-imagenet-200.zip").read_bytes() == content
        assert not (tmp_path / "tiny-imagenet-200.zip.part").exists()

    def test_a_server_that_cannot_resume_sends_the_whole_file(self, tiny, tmp_path):
        (tmp_path / "tiny-imagenet-200.zip.part").write_bytes(b"x" * 1000)
        with Server(tiny.path.parent, ranges=False) as server:
            tiny(server.url)
            self.check(load_dataset("tiny-imagenet", root=tmp_path))

    def test_a_complete_download_is_only_renamed(self, tiny, tmp_path):
        (tmp_path / "tiny-imagenet-200.zip.part").write_bytes(tiny.path.read_bytes())
        with Server(tiny.path.parent) as server:
            tiny(server.url)
            self.check(load_dataset("tiny-imagenet", root=tmp_path))

    def test_a_cut_connection_leaves_a_part_to_resume(self, tiny, tmp_path):
        content = tiny.path.read_bytes()
        with Server(tiny.path.parent, cut_after=700) as server:
            tiny(server.url)
            with pytest.raises(ItaeError, match="700"):
                load_dataset("tiny-imagenet", root=tmp_path)
        assert (tmp_path / "tiny-imagenet-200.zip.part").read_bytes() == content[:700]
        assert not (tmp_path / "tiny-imagenet-200.zip").exists()
        with Server(tiny.path.parent) as server:
            tiny(server.url)
            self.check(load_dataset("tiny-imagenet", root=tmp_path))
            assert server.asked == [("/tiny-imagenet-200.zip", "bytes=700-")]

    def test_a_file_with_a_wrong_checksum_is_deleted(self, tiny, tmp_path):
        with Server(tiny.path.parent) as server:
            tiny(server.url, md5="0" * 32)
            with pytest.raises(ItaeError, match=rf"{server.url}.* [0-9a-f]{{32}}"):
                load_dataset("tiny-imagenet", root=tmp_path / "data")
        assert list((tmp_path / "data").glob("[!.]*")) == []

    def test_an_answer_of_another_size_does_not_overwrite_the_part(self, tiny, tmp_path):
        part = tmp_path / "tiny-imagenet-200.zip.part"
        part.write_bytes(b"x" * 1000)
        with Server(tiny.path.parent, ranges=False) as server:
            tiny(server.url, size=10_000_000)
            with pytest.raises(ItaeError, match="10,000,000"):
                load_dataset("tiny-imagenet", root=tmp_path)
        assert part.read_bytes() == b"x" * 1000

    def test_a_file_the_server_lacks(self, tiny, tmp_path):
        with Server(tmp_path) as server:
            tiny(server.url)
            with pytest.raises(ItaeError, match=r"tiny-imagenet-200\.zip .*Not Found"):
                load_dataset("tiny-imagenet", root=tmp_path / "data")

    def test_unpacking_is_all_or_nothing(self, tiny, tmp_path, monkeypatch):
        tiny("http://127.0.0.1:1")
        tiny.path.rename(tmp_path / tiny.path.name)
        extract = zipfile.ZipFile.extractall

        def interrupted(self, path, members):
            extract(self, path, members[:3])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipFile, "extractall", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load_dataset("tiny-imagenet", root=tmp_path)
        assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["server", "tiny-imagenet-200.zip"]
        self.check(load_dataset("tiny-imagenet", root=tmp_path))

    def test_a_folder_that_was_rearranged(self, tmp_path):
        save(tmp_path / "tiny-imagenet-200/val/n01/1.png")
        with pytest.raises(ItaeError, match=r"val_annotations\.txt"):
            load_dataset("tiny-imagenet", root=tmp_path)

    def test_a_full_disk_is_named_and_leaves_no_archive(self, tiny, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/tiny-imagenet-200.zip.part").symlink_to("/dev/full")
        with Server(tiny.path.parent) as server:
            tiny(server.url)
            with pytest.raises(ItaeError, match="No space left on device"):
                load_dataset("tiny-imagenet", root=tmp_path / "data")
        assert not (tmp_path / "data/tiny-imagenet-200").exists()
        assert not (tmp_path / "data/tiny-imagenet-200.zip").exists()

    def test_two_processes_at_once_download_once(self, tiny, tmp_path):
        code = (
            "import sys; from itae_utils.data import datasets; url, md5, root = sys.argv[1:];"
            "datasets.TINY_IMAGENET = datasets.Archive(url + '/tiny-imagenet-200.zip', 'tiny-imagenet-200.zip', md5);"
            "print(len(datasets.load_dataset('tiny-imagenet', root=root)))"
        )
        md5 = hashlib.md5(tiny.path.read_bytes()).hexdigest()
        with Server(tiny.path.parent, delay=0.5) as server:
            command = [sys.executable, "-c", code, server.url, md5, str(tmp_path / "data")]
            runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
            assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["6", "6"]
        assert len(server.asked) == 1

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ItaeError, match=f"{tmp_path}/file/data"):
            load_dataset("tiny-imagenet", root=tmp_path / "file/data")


@pytest.fixture
def small_archive(tmp_path, monkeypatch):
    """Return a function that packs files as one of torchvision's archives, and gives torchvision URL and checksums."""
    (tmp_path / "server").mkdir()

    def pack(reader, url, contents):
        path = tmp_path / "server" / reader.filename
        with tarfile.open(path, "w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"{reader.base_folder}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
        for attribute in ("train_list", "test_list"):
            kept = [[name, sums[name]] for name, _ in getattr(reader, attribute) if name in sums]
            monkeypatch.setattr(reader, attribute, kept)
        if hasattr(reader, "meta"):
            monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": sums[reader.meta["filename"]]})
        monkeypatch.setattr(reader, "url", f"{url}/{reader.filename}")
        monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())

    pack.folder = tmp_path / "server"
    return pack


class TestTorchvision:
    pixels = np.random.default_rng(0).integers(256, size=(4, 3, 96, 96), dtype=np.uint8)

    @pytest.mark.parametrize(("name", "labels"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
    def test_cifar(self, name, labels, small_archive, tmp_path):
        import torchvision.datasets

        reader = getattr(torchvision.datasets, name.upper())
        pixels = self.pixels[:, :, :32, :32]
        test_split = {"data": pixels.reshape(4, -1), labels: [2, 0, 1, 1]}
        with Server(small_archive.folder) as server:
            small_archive(reader, server.url, {
                reader.test_list[0][0]: pickle.dumps(test_split),
                reader.meta["filename"]: pickle.dumps({reader.meta["key"]: ["ant", "bee", "cat"]}),
            })
            dataset = load_dataset(name, root=tmp_path / "data")
            self.check(dataset, pixels, [2, 0, 1, 1])
            self.check(load_dataset(name, root=tmp_path / "data"), pixels, [2, 0, 1, 1])
            assert len(server.asked) == 1

    def test_stl10(self, small_archive, tmp_path):
        from torchvision.datasets import STL10

        with Server(small_archive.folder) as server:
            small_archive(STL10, server.url, {
                "test_X.bin": self.pixels.transpose(0, 1, 3, 2).tobytes(),  # the files hold columns
                "test_y.bin": bytes([3, 1, 2, 2]),
                "class_names.txt": b"ant\nbee\ncat\n",
            })
            self.check(load_dataset("stl10", root=tmp_path / "data"), self.pixels, [2, 0, 1, 1])

    def check(self, dataset, pixels, targets):
        assert dataset.classes == ["ant", "bee", "cat"]
        assert dataset.targets.dtype == np.int64
        assert dataset.targets.tolist() == targets
        assert dataset.split == "test (4)"
        for number, (image, label) in enumerate(dataset):
            np.testing.assert_array_equal(np.asarray(image), pixels[number].transpose(1, 2, 0))
            assert label == targets[number]


class TestNoNetwork:
    def ask(self, name, root):
        start = time.monotonic()
        with pytest.raises(ItaeError) as caught:
            load_dataset(name, root=root)
        assert time.monotonic() - start < 10
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_tiny_imagenet(self, tiny, tmp_path):
        url = f"http://127.0.0.1:{closed_port()}"
        tiny(url)
        message = self.ask("tiny-imagenet", tmp_path / "data")
        assert f"{url}/tiny-imagenet-200.zip" in message
        assert str(tmp_path / "data") in message

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
    def test_torchvision_sets(self, name, tmp_path, monkeypatch):
        import torchvision.datasets

        reader = getattr(torchvision.datasets, name.upper())
        url = f"http://127.0.0.1:{closed_port()}/{reader.filename}"
        monkeypatch.setattr(reader, "url", url)
        message = self.ask(name, tmp_path / "data")
        assert url in message
        assert reader.tgz_md5 in message
        assert str(tmp_path / "data") in message

    def test_a_host_that_never_answers(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("ITAE_TIMEOUT", "0.3")
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections but never answers
            tiny(f"http://127.0.0.1:{silent.getsockname()[1]}")
            assert "ITAE_TIMEOUT" in self.ask("tiny-imagenet", tmp_path / "data")

    def test_a_host_that_stops_sending(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("ITAE_TIMEOUT", "0.3")
        with Server(tiny.path.parent, cut_after=700, stall=5) as server:
            tiny(server.url)
            assert "ITAE_TIMEOUT" in self.ask("tiny-imagenet", tmp_path / "data")

    def test_a_name_server_that_never_answers(self, tiny, tmp_path, monkeypatch):
        """Socket timeouts do not cover DNS look-ups, so this needs a limit of its own."""
        monkeypatch.setenv("ITAE_TIMEOUT", "0.3")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
        tiny("http://nowhere.invalid")
        start = time.monotonic()
        message = self.ask("tiny-imagenet", tmp_path / "data")
        assert time.monotonic() - start < 3
        assert "0.3 s" in message
        assert "ITAE_TIMEOUT" in message

    def test_a_slow_host_gets_the_seconds_of_the_environment(self, tiny, tmp_path, monkeypatch):
        with Server(tiny.path.parent, delay=0.5) as server:
            tiny(server.url)
            monkeypatch.setenv("ITAE_TIMEOUT", "0.1")
            assert "ITAE_TIMEOUT" in self.ask("tiny-imagenet", tmp_path / "data")
            monkeypatch.setenv("ITAE_TIMEOUT", "5")
            assert len(load_dataset("tiny-imagenet", root=tmp_path / "data")) == 6

    def test_an_embedded_data_set_makes_no_request(self, monkeypatch):
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a request was made"))
        load_dataset("digits")


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
        del caught  # kept until here: an answer that it refers to would be closed when it goes

    def test_an_error_in_time_is_raised(self):
        with pytest.raises(TimeoutError, match="own"):
            within(5, self.fail)

    def fail(self):
        raise TimeoutError("own")
