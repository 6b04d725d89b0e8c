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
from itae_utils.data import published
published.TINY_IMAGENET = published.Archive(**archives["tiny"])
"""


def pixels(side: int) -> np.ndarray:
    """Return images (n, 3, side, side) with one colour per class."""
    noise = np.random.default_rng(side).integers(0, 80, (COUNT, 3, side, side))
    return (noise + 120 * np.eye(3, dtype=int)[TARGETS][:, :, None, None]).astype(np.uint8)


def pack_all(folder, url: str) -> dict:
    """Write all four archives to `folder`, with as many training images; return the attributes of their readers."""
    readers = {}
    for reader in (real.CIFAR10, real.CIFAR100, real.STL10):
        images = pixels(96 if reader is real.STL10 else 32)
        made = pack(folder, reader, images, TARGETS, NAMES, (255 - images, TARGETS))
        readers[reader.__name__] = made | {"url": f"{url}/{reader.filename}"}
    path, top = folder / "tiny-imagenet-200.zip", "tiny-imagenet-200"
    with zipfile.ZipFile(path, "w") as archive:
        for index, (picture, label) in enumerate(zip(pixels(64), TARGETS, strict=True)):
            for name, values in ((f"val/images/val_{index}.JPEG", picture),
                                 (f"train/n{label}/images/n{label}_{index}.JPEG", 255 - picture)):
                content = io.BytesIO()
                Image.fromarray(values.transpose(1, 2, 0)).save(content, "JPEG")
                archive.writestr(f"{top}/{name}", content.getvalue())
        rows = [f"val_{index}.JPEG\tn{label}\t0\t0\t63\t63\n" for index, label in enumerate(TARGETS)]
        archive.writestr(f"{top}/val/val_annotations.txt", "".join(rows))
        archive.writestr(f"{top}/words.txt", "".join(f"n{label}\t{name}\n" for label, name in enumerate(NAMES)))
    tiny = {"url": f"{url}/{path.name}", "filename": path.name, "md5": hashlib.md5(path.read_bytes()).hexdigest()}
    return {"torchvision": readers, "tiny": tiny}


class Site:
    """Weights and data sets on loopback servers, and a folder; `run` runs Python code with them."""

    def __init__(self, folder, hub, server):
        self.folder, self.hub, self.server = folder, hub, server
        (folder / "archives.json").write_text(json.dumps(pack_all(folder / "server", server.url)))
        self.environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*",
            "ITAE_DATA": str(folder / "data"), "ITAE_CACHE": str(folder / "cache"),
            "ITAE_STORE": str(folder / "store"), "MADE_ARCHIVES": str(folder / "archives.json"),
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
        }

    def run(self, code: str, *arguments: str) -> None:
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=self.environment, capture_output=True,
                              text=True, check=False)
        assert done.returncode == 0, done.stderr

    def report(self, *arguments: str):
        """Write a report, and return its folder."""
        output = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        self.run("from itae_utils.cli import main; main()", "report", *arguments, "--output", str(output))
        return output


@pytest.fixture
def site(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        names = ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2")
        models = {name: timm.create_model(name, num_classes=0) for name in names}
    weights = {(f"timm/{name}.lvd142m", "model.safetensors"): save(models[name].state_dict()) for name in names}
    for name in ("server", "site"):
        (tmp_path / name).mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    with Hub(weights) as hub, Server(tmp_path / "server") as server:
        yield Site(tmp_path, hub, server)


@pytest.mark.slow
def test_the_comparison_is_filled_and_labels_what_is_not_the_papers(site):
    given = [word for name, value in SMALL.items() for word in ("-p", name, str(value))]
    out = site.report("--profile", "paper", "--backbone", "dinov2_vits14", *given)
    assert [method for method, _ in site.hub.asked].count("GET") == 2  # the checkpoint, and that with registers
    assert sorted(path for path, _ in site.server.asked) == sorted(
        f"/{name}" for name in [real.CIFAR10.filename, real.CIFAR100.filename, real.STL10.filename,
                                "tiny-imagenet-200.zip"])
    rows = json.loads((out / "04_paper_comparison/results.json").read_text())["rows"]
    assert {row["dataset"] for row in rows} == {"cifar10", "cifar100", "stl10", "tiny-imagenet"}
    page = (out / "04_paper_comparison/04_paper_comparison.html").read_text(encoding="utf-8")
    for name in ("cifar10", "cifar100", "stl10", "tiny-imagenet"):
        assert re.search(rf"<strong>{name}</strong>[^<]*other images[^<]*\b{COUNT}\b", page)
    assert re.search(r"<strong>dinov2_vits14</strong>[^<]*other weights", page)
    assert "itae report --profile mteb" in page


DIRECT = """
import numpy as np
from sklearn.cluster import MiniBatchKMeans
import itae_utils as itae
from itae_utils.analysis import remembered
remembered.cluster_seeds = None  # the clusters of the notebook, from the store
for rule in ("meta", "transformers"):
    vit = itae.load_backbone("dinov2_vits14", preprocess="meta-eval", pos_embed=rule)
    features = itae.extract_features(vit, itae.load_dataset("cifar10", limit=12), {"baseline": None})["baseline"]
    labels, _ = remembered.clusters(features, 3, seeds=range(10), n_init=1, normalize=False, algorithm="mini-batch")
    for seed, found in enumerate(labels):
        direct = MiniBatchKMeans(3, batch_size=500, n_init="auto", random_state=seed).fit(features)
        assert np.array_equal(direct.labels_, found)
"""


@pytest.mark.slow
def test_the_mteb_profile_is_mteb_s_protocol(site):
    out = site.report("--profile", "mteb", "--backbone", "dinov2_vits14", "--dataset", "cifar10", "-p", "limit", "12")
    assert sorted(path.name for path in out.glob("dinov2*")) == [
        f"dinov2_vits14-cifar10-{rule}" for rule in ("meta", "transformers")]
    assert not list(out.glob("*/01_*"))
    rows = json.loads((out / "04_paper_comparison/results.json").read_text())["rows"]
    assert len(rows) == 2 * 3
    assert {row["variant"] for row in rows} == {"baseline, pos_embed=meta", "baseline, pos_embed=transformers"}
    page = (out / "04_paper_comparison/04_paper_comparison.html").read_text(encoding="utf-8")
    for words in ("Is the baseline right?", "here, pos_embed=transformers", "other images: 12", "0.8006", "theirs is",
                  "mini-batch", "not normalised", "1 start", "fitted on the scored images, 12 of test"):
        assert words in page, words
    site.run(DIRECT)


@pytest.mark.slow
def test_k_means_is_fitted_on_the_training_split(site):
    out = site.report("--only", "03", "--dataset", "tiny-imagenet", "-p", "fit_split", "train", "-p", "seeds", "2")
    results = json.loads((out / "03_clustering/results.json").read_text())
    about = results["provenance"]
    assert (about["dataset"]["split"], about["fitted_on"]["split"]) == (f"validation ({COUNT})", f"train ({COUNT})")
    assert about["fitted_on"]["fingerprint"] not in (None, about["dataset"]["fingerprint"])
    page = (out / "03_clustering/03_clustering.html").read_text(encoding="utf-8")
    assert f"fitted on train ({COUNT}), scored on validation ({COUNT})" in page
