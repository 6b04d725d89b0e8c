"""The paper profile from end to end, with weights and four small data sets from loopback servers."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save
from torchvision import datasets as real

from tests.data.test_download import Server, pack
from tests.hub_server import Hub

COUNT, CLASSES = 24, 3
TARGETS = [index % CLASSES for index in range(COUNT)]
NAMES = ["ant", "bee", "cat"]
SMALL = {"image_size": 56, "seeds": 2, "n_init": 1, "examples": 3, "percents": "[5.0]",
         "attenuations": "[min]", "sources": "[key]"}
SITE = """
import json, os
from pathlib import Path
archives = json.loads(Path(os.environ["MADE_ARCHIVES"]).read_text())
from torchvision import datasets as real
for name, attributes in archives["torchvision"].items():
    for attribute, value in attributes.items():
        setattr(getattr(real, name), attribute, value)
from itae_utils.data import datasets
datasets.TINY_IMAGENET = datasets.Archive(**archives["tiny"])
"""


def pixels(side: int) -> np.ndarray:
    """Return images (n, 3, side, side) with one colour per class."""
    noise = np.random.default_rng(side).integers(0, 80, (COUNT, 3, side, side))
    return (noise + 120 * np.eye(3, dtype=int)[TARGETS][:, :, None, None]).astype(np.uint8)


def pack_all(folder, url: str) -> dict:
    """Write all four archives to `folder`; return the attributes of their readers."""
    readers = {reader.__name__: pack(folder, reader, pixels(96 if reader is real.STL10 else 32), TARGETS, NAMES)
               | {"url": f"{url}/{reader.filename}"} for reader in (real.CIFAR10, real.CIFAR100, real.STL10)}
    path, top = folder / "tiny-imagenet-200.zip", "tiny-imagenet-200"
    with zipfile.ZipFile(path, "w") as archive:
        for index, picture in enumerate(pixels(64)):
            content = io.BytesIO()
            Image.fromarray(picture.transpose(1, 2, 0)).save(content, "JPEG")
            archive.writestr(f"{top}/val/images/val_{index}.JPEG", content.getvalue())
        rows = [f"val_{index}.JPEG\tn{label}\t0\t0\t63\t63\n" for index, label in enumerate(TARGETS)]
        archive.writestr(f"{top}/val/val_annotations.txt", "".join(rows))
        archive.writestr(f"{top}/words.txt", "".join(f"n{label}\t{name}\n" for label, name in enumerate(NAMES)))
    tiny = {"url": f"{url}/{path.name}", "filename": path.name, "md5": hashlib.md5(path.read_bytes()).hexdigest()}
    return {"torchvision": readers, "tiny": tiny}


@pytest.mark.slow
def test_the_comparison_is_filled_and_labels_what_is_not_the_papers(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    weights = {("timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors"): save(model.state_dict())}
    (tmp_path / "server").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    with Hub(weights) as hub, Server(tmp_path / "server") as server:
        (tmp_path / "archives.json").write_text(json.dumps(pack_all(tmp_path / "server", server.url)))
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*",
            "ITAE_DATA": str(tmp_path / "data"), "ITAE_CACHE": str(tmp_path / "cache"),
            "MADE_ARCHIVES": str(tmp_path / "archives.json"),
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]),
        }
        given = [word for name, value in SMALL.items() for word in ("-p", name, str(value))]
        command = [sys.executable, "-c", "from itae_utils.cli import main; main()", "report", "--profile", "paper",
                   "--backbone", "dinov2_vits14", "--output", str(tmp_path / "out"), *given]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [method for method, _ in hub.asked].count("GET") == 1
    assert sorted(path for path, _ in server.asked) == sorted(
        f"/{name}" for name in [real.CIFAR10.filename, real.CIFAR100.filename, real.STL10.filename,
                                "tiny-imagenet-200.zip"])
    rows = json.loads((tmp_path / "out/04_paper_comparison/results.json").read_text())["rows"]
    assert {row["dataset"] for row in rows} == {"cifar10", "cifar100", "stl10", "tiny-imagenet"}
    page = (tmp_path / "out/04_paper_comparison/04_paper_comparison.html").read_text(encoding="utf-8")
    for name in ("cifar10", "cifar100", "stl10", "tiny-imagenet"):
        assert re.search(rf"<strong>{name}</strong>[^<]*other images[^<]*\b{COUNT}\b", page)
    assert re.search(r"<strong>dinov2_vits14</strong>[^<]*other weights", page)
