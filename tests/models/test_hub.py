"""Published weights: cached files, and real downloads from a loopback server with random weights.

The client reads its server's address when it is imported, so each download runs in a process of its own.
"""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save

from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE
from itae_utils.models import hub as hub_module
from itae_utils.models.backbones import weights_sha256
from itae_utils.models.hub import cached_weights, published_weights
from tests.hub_server import COMMIT, Hub
from tests.loopback import closed_url

NAME = "test_vit.r160_in1k"  # timm's own tiny model: 1.5 MB
REPOSITORY = f"timm/{NAME}"
CLIENT = """
import json, sys, time
import timm, torch, huggingface_hub  # imported before the clock starts
from itae_utils.models.backbones import load_backbone
from itae_utils.errors import ItaeError
start = time.monotonic()
try:
    backbone = load_backbone(sys.argv[1])
    answer = {name: getattr(backbone, name) for name in ("weights_sha256", "pos_embed", "source", "kind")}
except ItaeError as error:
    answer = {"error": str(error)}
print(json.dumps(answer | {"seconds": time.monotonic() - start}))
"""


def random_model(name, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return timm.create_model(name, **options)


def published(model, repository=REPOSITORY):
    return {(repository, "model.safetensors"): save(model.state_dict())}


@pytest.fixture(scope="module")
def files():
    """Return the published file, which includes a classifier."""
    return published(random_model("test_vit"))


@pytest.fixture(scope="module")
def expected():
    """Return the hash of the same weights without the classifier."""
    model = random_model("test_vit")
    model.reset_classifier(0)
    return weights_sha256(model)


def start(url, home, name=NAME, largest_file=None, **variables):
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*",
                                "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    for unwanted in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_ETAG_TIMEOUT", "ITAE_TIMEOUT"):
        environment.pop(unwanted, None)
    limit = largest_file and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, largest_file))
    return subprocess.Popen([sys.executable, "-c", CLIENT, name], env=environment | variables, cwd=PACKAGE.parent,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


def answer_of(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    answer = json.loads(out.splitlines()[-1])
    assert "\n" not in answer.get("error", "")
    return answer


def load(url, home, name=NAME):
    return answer_of(start(url, home, name))


def blobs(home):
    return [path.name for path in home.glob("hub/models--*/blobs/*")]


@pytest.mark.slow
class TestDownload:
    def test_weights_are_downloaded_once_and_then_read_from_the_cache(self, files, expected, tmp_path):
        with Hub(files) as hub:
            answer = load(hub.url, tmp_path)
            assert (answer["weights_sha256"], answer["pos_embed"]) == (expected, "timm")
            assert (answer["source"], answer["kind"]) == (f"{NAME}, through timm", "published")
            assert hub.statuses("GET") == [200]
        assert blobs(tmp_path) == [hashlib.sha256(files[REPOSITORY, "model.safetensors"]).hexdigest()]
        with Hub({}, delay=60) as hub:  # an answer would come too late
            answer = load(hub.url, tmp_path)
            assert answer["weights_sha256"] == expected
            assert answer["seconds"] < 10
            assert hub.asked == []

    def test_a_dinov2_checkpoint_over_a_connection_that_is_cut(self, tmp_path):
        model = random_model("vit_small_patch14_dinov2", num_classes=0)
        repository = "timm/vit_small_patch14_dinov2.lvd142m"
        with Hub(published(model, repository=repository), cut_after=50_000_000) as hub:
            answer = load(hub.url, tmp_path, "dinov2_vits14")
            assert hub.statuses("GET") == [200, 206]  # the download was resumed
        assert answer["weights_sha256"] == weights_sha256(model)
        assert (answer["pos_embed"], answer["kind"]) == ("meta", "published")

    def test_corrupt_bytes_of_the_right_length_are_deleted(self, files, expected, tmp_path):
        key = (REPOSITORY, "model.safetensors")
        content = bytearray(files[key])
        content[-2] ^= 1  # one bit of a weight, which only the checksum shows
        with Hub(files, sends={key: bytes(content)}) as hub:
            answer = load(hub.url, tmp_path)
        path = tmp_path / f"hub/models--timm--{NAME}/snapshots/{COMMIT}/model.safetensors"
        assert str(path) in answer["error"]
        assert hashlib.sha256(content).hexdigest() in answer["error"]
        assert blobs(tmp_path) == []
        assert not path.is_symlink()
        with Hub(files) as hub:
            assert load(hub.url, tmp_path)["weights_sha256"] == expected

    @pytest.mark.parametrize(("cut_after", "largest_file", "named"), [
        (0, None, f"/{REPOSITORY}"), (None, (1_000_000, 1_000_000), "Errno")])  # no bytes are sent, the disk is full
    def test_after_an_interrupted_download_the_next_one_succeeds(
            self, files, expected, tmp_path, cut_after, largest_file, named):
        with Hub(files, cut_after=cut_after) as hub:
            assert named in answer_of(start(hub.url, tmp_path, largest_file=largest_file))["error"]
        with Hub(files) as hub:
            assert load(hub.url, tmp_path)["weights_sha256"] == expected

    def test_two_processes_at_once(self, files, expected, tmp_path):
        with Hub(files) as hub:
            both = [start(hub.url, tmp_path) for _ in range(2)]
            assert [answer_of(process)["weights_sha256"] for process in both] == [expected] * 2
        assert len(blobs(tmp_path)) == 1

    def test_weights_that_are_not_safetensors(self, expected, tmp_path):
        torch.save(random_model("test_vit").state_dict(), tmp_path / "w")
        with Hub({(REPOSITORY, "pytorch_model.bin"): (tmp_path / "w").read_bytes()}) as hub:
            assert load(hub.url, tmp_path / "home")["weights_sha256"] == expected
            assert hub.statuses("HEAD")[0] == 404

    @pytest.mark.parametrize("content", [{}, {(REPOSITORY, "README.md"): b"no weights"}])
    def test_a_repository_without_weights(self, content, tmp_path):
        with Hub(content) as hub:
            answer = load(hub.url, tmp_path)
        assert "NotFoundError" in answer["error"]
        assert answer["seconds"] < 10

    @pytest.mark.parametrize("silent", [False, True])
    def test_no_network(self, silent, tmp_path):
        with Hub({}, delay=60) as hub:
            url = hub.url if silent else closed_url()
            answer = load(url, tmp_path)
        assert answer["seconds"] < 10
        for words in (NAME, f"{url}/{REPOSITORY}", "model.safetensors", "checkpoint=FILE", "ITAE_TIMEOUT"):
            assert words in answer["error"]

    def test_a_slow_network(self, files, expected, tmp_path):
        """The client's own time limits are 10 s."""
        patient = {"HF_HUB_DOWNLOAD_TIMEOUT": "20"}
        with Hub(files, delay=11) as hub:
            refused = start(hub.url, tmp_path / "a", ITAE_TIMEOUT="1")
            loaded = [start(hub.url, tmp_path / "b", ITAE_TIMEOUT="20", **patient),
                      start(hub.url, tmp_path / "c", ITAE_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="20", **patient)]
            assert re.search(r"ITAE_TIMEOUT.*\b1 s", answer_of(refused)["error"])
            assert [answer_of(process)["weights_sha256"] for process in loaded] == [expected] * 2


class TestCache:
    @pytest.fixture
    def add(self, tmp_path, monkeypatch):
        """Add a file to the hub's cache; return its path and the path of its content."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        folder = tmp_path / f"models--timm--{NAME}"
        for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
            (folder / part).mkdir(parents=True)
        (folder / "refs/main").write_text(COMMIT)

        def add(content, name="model.safetensors"):
            blob, path = folder / "blobs" / hashlib.sha256(content).hexdigest(), folder / "snapshots" / COMMIT / name
            blob.write_bytes(content)
            path.symlink_to(blob)
            return path, blob

        return add

    def test_an_unchanged_file_is_hashed_once_and_a_damaged_one_deleted(self, add, monkeypatch):
        monkeypatch.setattr("itae_utils.data.fingerprint.RACY", -1)  # new files are cached, too
        path, blob = add(b"weights")
        assert published_weights(NAME) == path
        with monkeypatch.context() as patch:
            patch.setattr(hashlib, "file_digest", None)  # the file is not read again
            assert published_weights(NAME) == path
        blob.write_bytes(b"w3ights")
        with pytest.raises(ItaeError, match=re.escape(str(path))):
            published_weights(NAME)
        assert not blob.exists()
        assert not path.is_symlink()

    def test_a_cache_without_links(self, add):
        path, _ = add(b"weights")
        path.unlink()
        path.write_bytes(b"weights")
        assert published_weights(NAME) == path

    @pytest.mark.parametrize(("named", "cached", "found"), [
        (None, [], None),
        (None, ["pytorch_model.bin", "model.safetensors"], "model.safetensors"),
        (None, ["pytorch_model.bin", "other.safetensors"], "pytorch_model.bin"),
        ("weights.bin", ["weights.bin", "weights.safetensors"], "weights.safetensors"),
        ("open_clip_pytorch_model.bin", ["open_clip_model.safetensors"], "open_clip_model.safetensors"),
        ("open_clip_model.safetensors", ["open_clip_model.safetensors"], "open_clip_model.safetensors"),
    ])
    def test_safetensors_are_preferred(self, named, cached, found, add, monkeypatch):
        monkeypatch.setattr(hub_module, "get_pretrained_cfg",
                            lambda _name: SimpleNamespace(hf_hub_id=REPOSITORY, hf_hub_filename=named))
        paths = {name: add(name.encode(), name)[0] for name in cached}
        assert cached_weights(NAME) == paths.get(found)


def test_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: time.sleep(30))
    monkeypatch.setenv("ITAE_TIMEOUT", "0.2")
    begin = time.monotonic()
    with pytest.raises(ItaeError, match=r"checkpoint=FILE.*ITAE_TIMEOUT.*\b0\.2 s"):
        published_weights(NAME)
    assert time.monotonic() - begin < 5


def test_offline_mode_is_one_quick_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    with pytest.raises(ItaeError, match=rf"{NAME}: get model\.safetensors .*checkpoint=FILE.*HF_HUB_OFFLINE"):
        published_weights(NAME)
    assert time.monotonic() - begin < 1


def test_models_without_published_weights():
    assert cached_weights("vit_small_patch16_36x1_224") is None
    with pytest.raises(ItaeError, match=r"'vit_small_patch16_36x1_224'.*pretrained=False"):
        published_weights("vit_small_patch16_36x1_224")
