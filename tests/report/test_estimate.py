import os
import subprocess
import sys

import pytest
from PIL import Image

from itae_utils.data.datasets import image_count
from itae_utils.files import PACKAGE
from itae_utils.models.registry import BACKBONES
from itae_utils.report import estimate, report
from itae_utils.report.estimate import Size, backbone_size, dry_run, matmul_rate, work


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(estimate, "matmul_rate", lambda device: 1e12)


def lines_of(**asked) -> str:
    return "\n".join(dry_run(report.plan_report(**asked)))


def test_the_paper_profile_is_told_whole(tmp_path):
    before = sorted(tmp_path.rglob("*"))
    text = lines_of(profile="paper")
    assert "profile paper: 25 runs of notebooks" in text
    assert text.count("01_artifact_discovery, 02_itae_ablation, 03_clustering") == 8
    for name in ("weights dinov2_vitb14 ", "weights dinov2_vitb14_reg", "images cifar10 ", "images stl10"):
        assert name in text
    assert text.count("not there yet") == 6
    assert "still to come: 3,919 MB" in text
    assert "rough" in text
    assert text.endswith("nothing was run or downloaded, no report written")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_demo_downloads_nothing():
    text = lines_of()
    assert "nothing to download" in text
    assert "disk: about 15 MB more" in text


def test_what_is_there_is_not_counted(tmp_path):
    (tmp_path / "data" / "stl10_binary").mkdir(parents=True)
    text = lines_of(profile="paper", backbone="demo")
    assert "weights" not in text.partition("disk")[0]
    assert "images stl10                           2,640 MB  already there" in text
    assert "still to come: 587 MB" in text


def test_a_local_checkpoint_is_no_download(tmp_path):
    (tmp_path / "weights.pth").touch()
    parameters = {"checkpoint": str(tmp_path / "weights.pth")}
    assert "nothing to download" in lines_of(backbone="dinov2_vits14", parameters=parameters)


def test_the_images_of_a_folder_are_counted(tmp_path):
    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    dataset = f"imagefolder:{tmp_path}"
    assert [image_count({"dataset": dataset, "limit": limit}) for limit in (None, 2)] == [3, 2]
    assert work("03", {"dataset": dataset, "clusters": 4}, Size(100, 8, 10), 3).kmeans == (
        2 * 3 * 8 * 4 * estimate.ITERATIONS * 6)
    assert "time: about" in lines_of(dataset=dataset)


@pytest.mark.parametrize(("dataset", "limit", "images"), [
    ("digits", None, 1797), ("digits", 200, 200), ("digits", 9999, 1797)])
def test_image_count(dataset, limit, images):
    assert image_count({"dataset": dataset, "limit": limit}) == images


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_sizes_are_those_of_the_structure(name):
    size = backbone_size(name, None)
    assert size.parameters / 1e6 == pytest.approx(BACKBONES[name].parameters, abs=0.1)
    assert (size.dim, size.tokens) == (384, 257 + 4 * name.endswith("_reg"))
    assert backbone_size(name, 28).tokens == size.tokens - 256 + 4
    assert backbone_size("demo", None).tokens == 50


def test_work_grows_with_what_it_should():
    size = Size(100, 8, 10)
    base = {"dataset": "cifar10", "limit": None, "sample": 2000, "seeds": 2, "n_init": 3,
            "sources": ["key"], "percents": [1, 2], "attenuations": ["min"]}
    assert work("01", base, size, 10_000) == estimate.Work(2 * 100 * 10 * 2512, 0)
    assert work("02", base, size, 10_000).kmeans == 2 * 10_000 * 8 * 10 * estimate.ITERATIONS * (1 * 3 * 2) * 6
    assert work("03", base, size, 10_000).model == 2 * 100 * 10 * 20_512
    assert work("03", base | {"dataset": "cifar100"}, size, 10).kmeans == 10 * work("03", base, size, 10).kmeans


def test_matmul_rate_is_a_rate():
    assert 1e7 < matmul_rate("cpu", side=64, seconds=0.01) < 1e15


def test_durations():
    assert [estimate._duration(seconds) for seconds in (5, 600, 36_000)] == ["5 s", "10 min", "10.0 h"]


@pytest.mark.slow
def test_the_command_asks_and_writes_nothing(tmp_path):
    code = "from itae_utils.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True,
        stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
    assert "profile demo: 3 runs of notebooks" in done.stdout
    assert not list(tmp_path.iterdir())
