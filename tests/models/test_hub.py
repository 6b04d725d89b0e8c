"""Weights really downloaded, from a server on the loopback address that has random ones under the real names.

The client reads its server's address when it is imported, so each download runs in a process of its own.
"""

import hashlib
import json
import os
import resource
import socket
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save

from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE
from itae_utils.models.backbones import weights_sha256
from itae_utils.models.hub import _checked, _file_names, published_weights
from tests.hub_server import COMMIT, Hub

NAME = "test_vit.r160_in1k"  # timm's own tiny one: 1.5 MB
REPOSITORY = f"timm/{NAME}"
CLIENT = """
import json, sys, time
import timm, torch, huggingface_hub  # their import isn't what is timed
from itae_utils.backbones import load_backbone
from itae_utils.errors import ItaeError
start = time.monotonic()
try:
    backbone = load_backbone(sys.argv[1])
    told = {"sha256": backbone.weights_sha256, "pos_embed": backbone.pos_embed, "source": backbone.source}
except ItaeError as error:
    told = {"error": str(error)}
print(json.dumps(told | {"seconds": time.monotonic() - start}))
"""


def random_model(name, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return timm.create_model(name, **options)


def published(model, file="model.safetensors", repository=REPOSITORY):
    return {(repository, file): save(model.state_dict())}


@pytest.fixture(scope="module")
def files():
    """What timm publishes has a classifier."""
    return published(random_model("test_vit"))


@pytest.fixture(scope="module")
def expected():
    """The hash of the same weights without a classifier."""
    whole = random_model("test_vit")
    bare = timm.create_model("test_vit", num_classes=0)
    bare.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if "head" not in name})
    return weights_sha256(bare)


def start(url, home, name=NAME, largest_file=None):
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*",
                                "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    for unwanted in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(unwanted, None)
    limit = largest_file and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, largest_file))
    return subprocess.Popen([sys.executable, "-c", CLIENT, name], env=environment, cwd=PACKAGE.parent,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


def told_by(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    told = json.loads(out.splitlines()[-1])
    assert "\n" not in told.get("error", "")
    return told


def load(url, home, name=NAME):
    return told_by(start(url, home, name))


def blobs(home, repository=REPOSITORY):
    folder = home / f"hub/models--{repository.replace('/', '--')}/blobs"
    return {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}


def closed_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
class TestDownload:
    def test_from_the_server_to_the_model_and_then_from_the_cache(self, files, expected, tmp_path):
        with Hub(files) as hub:
            told = load(hub.url, tmp_path)
            assert (told["sha256"], told["pos_embed"]) == (expected, "timm")
            assert told["source"] == f"{NAME}, through timm"
            assert hub.statuses("GET") == [200]
        assert list(blobs(tmp_path)) == [hashlib.sha256(files[REPOSITORY, "model.safetensors"]).hexdigest()]
        told = load(f"http://127.0.0.1:{closed_port()}", tmp_path)  # the network is gone
        assert told["sha256"] == expected
        with Hub({}, silent=True) as hub:  # or worse
            told = load(hub.url, tmp_path)
            assert told["sha256"] == expected
            assert told["seconds"] < 10
            assert hub.asked == []

    def test_a_dinov2_checkpoint_by_our_name_over_a_connection_that_is_cut(self, tmp_path):
        model = random_model("vit_small_patch14_dinov2", num_classes=0)
        repository = "timm/vit_small_patch14_dinov2.lvd142m"
        with Hub(published(model, repository=repository), cut_after=50_000_000) as hub:
            told = load(hub.url, tmp_path, "dinov2_vits14")
            assert hub.statuses("GET") == [200, 206]  # the rest alone was asked for again
        assert told["sha256"] == weights_sha256(model)
        assert (told["pos_embed"], told["source"]) == ("meta", "DINOv2, Meta, through timm")

    def test_corrupt_bytes_of_the_right_length_are_deleted_and_named(self, files, expected, tmp_path):
        key = (REPOSITORY, "model.safetensors")
        content = bytearray(files[key])
        content[-2] ^= 1  # one bit of a weight: nothing but the checksum can tell
        with Hub(files, sends={key: bytes(content)}) as hub:
            told = load(hub.url, tmp_path)
        path = tmp_path / f"hub/models--timm--{NAME}/snapshots/{COMMIT}/model.safetensors"
        assert str(path) in told["error"]
        assert "run again" in told["error"]
        assert hashlib.sha256(content).hexdigest() in told["error"]
        assert blobs(tmp_path) == {}
        assert not path.is_symlink()
        with Hub(files) as hub:
            assert load(hub.url, tmp_path)["sha256"] == expected

    def test_a_server_that_sends_nothing_more(self, files, expected, tmp_path):
        with Hub(files, cut_after=0) as hub:
            told = load(hub.url, tmp_path)
            assert f"can't get the weights of {NAME} from {hub.url}/{REPOSITORY}" in told["error"]
            assert "give checkpoint=FILE" in told["error"]
        with Hub(files) as hub:
            assert load(hub.url, tmp_path)["sha256"] == expected

    def test_a_disk_that_is_full(self, files, expected, tmp_path):
        with Hub(files) as hub:
            told = told_by(start(hub.url, tmp_path, largest_file=(1_000_000, 1_000_000)))
            assert f"can't get the weights of {NAME} from {hub.url}/{REPOSITORY} (OSError: [Errno " in told["error"]
            assert load(hub.url, tmp_path)["sha256"] == expected

    def test_two_processes_at_once(self, files, expected, tmp_path):
        with Hub(files) as hub:
            both = [start(hub.url, tmp_path) for _ in range(2)]
            assert [told_by(process)["sha256"] for process in both] == [expected] * 2
        assert len(blobs(tmp_path)) == 1

    def test_weights_that_are_not_safetensors(self, expected, tmp_path):
        torch.save(random_model("test_vit").state_dict(), tmp_path / "w")
        with Hub({(REPOSITORY, "pytorch_model.bin"): (tmp_path / "w").read_bytes()}) as hub:
            assert load(hub.url, tmp_path / "home")["sha256"] == expected
            assert hub.statuses("HEAD")[0] == 404

    @pytest.mark.parametrize("there", [{}, {(REPOSITORY, "README.md"): b"nothing here"}])
    def test_a_repository_without_weights(self, there, tmp_path):
        with Hub(there) as hub:
            told = load(hub.url, tmp_path)
        assert "NotFoundError" in told["error"]
        assert told["seconds"] < 10

    @pytest.mark.parametrize("silent", [False, True])
    def test_no_network(self, silent, tmp_path):
        with Hub({}, silent=True) as hub:
            url = hub.url if silent else f"http://127.0.0.1:{closed_port()}"
            told = load(url, tmp_path)
        assert told["seconds"] < 10
        assert f"can't get the weights of {NAME} from {url}/{REPOSITORY} (" in told["error"]
        assert told["error"].endswith("download model.safetensors there, give checkpoint=FILE")


def test_a_blob_is_compared_with_its_name(tmp_path):
    content = b"weights"
    name = hashlib.sha256(content).hexdigest()
    (tmp_path / name).write_bytes(content)
    (tmp_path / "model.safetensors").symlink_to(name)
    assert _checked(tmp_path / "model.safetensors").read_bytes() == content
    (tmp_path / name).write_bytes(b"w3ights")
    with pytest.raises(ItaeError, match=r"model\.safetensors were damaged.* run again"):
        _checked(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a copy").write_bytes(content)  # where the file system has no links
    assert _checked(tmp_path / "a copy").read_bytes() == content


def test_names_of_files():
    assert _file_names(None) == ["model.safetensors", "pytorch_model.bin"]
    assert _file_names("open_clip_pytorch_model.bin") == [
        "open_clip_pytorch_model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert _file_names("open_clip_model.safetensors") == ["open_clip_model.safetensors"]


def test_models_that_nobody_published():
    with pytest.raises(ItaeError, match="timm has no weights for 'vit_small_patch16_36x1_224'"):
        published_weights("vit_small_patch16_36x1_224")
