import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from itae_utils.data import datasets
from itae_utils.data.folders import read_folder
from itae_utils.report import freshness, report
from itae_utils.report.freshness import MARK
from itae_utils.report.pages import notebook_page
from tests.fake_execution import FakeExecute
from tests.tiny_notebooks import PARAMETERS, use_notebooks, write_grid, write_notebook

FIRST, BOTH = ["out/01_first"], ["out/01_first", "out/03_scores"]
GRID = [f"{pairing}-digits/{name}" for pairing in ("demo", "demo-clean") for name in ("01_first", "03_scores")]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Replace the execution of notebooks in a working folder with notebooks that measure (01, 03) and collect (04)."""
    use_notebooks(write_grid(tmp_path / "nb"), monkeypatch)
    monkeypatch.setattr(report, "execute", execute := FakeExecute())
    monkeypatch.setattr(report, "notebook_page", lambda *_: None)
    monkeypatch.setattr(report, "index_page", lambda written, _beside: written.index.touch())
    for fetch in ("download", "published_weights"):
        monkeypatch.setattr(report, fetch, lambda *_, **__: None)
    monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ITAE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return execute


def run(**options):
    return report.run_report(**{"output": "out", "say": str} | options)


def ran(execute, **options) -> list[str]:
    """Write a report and return the folders of the notebooks that ran for it."""
    run(**options)
    return execute.take()


def write_old(path: Path, content: bytes) -> None:
    """Write a file that was last changed long ago, so that its hash is cached by size, time and inode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    long_ago = time.time_ns() - 10**11
    os.utime(path, ns=(long_ago, long_ago))


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number, dtype=np.uint8)).save(folder / name)


def test_unchanged_notebooks_are_reused_unless_forced(execute):
    assert ran(execute) == BOTH
    assert [each.reused for each in run().runs] == [True, True]
    assert execute.take() == []
    assert ran(execute, force=True) == BOTH
    assert ran(execute, only=["01"], parameters={"seed": 3}) == FIRST
    assert ran(execute) == FIRST, "the run of a notebook that was not selected is still there"


@pytest.mark.parametrize(("edit", "expected"), [
    (lambda notebook: notebook.cells[-1].update(source="x = 1"), FIRST),
    (lambda notebook: notebook.cells[1].update(source=PARAMETERS + "new = 1\n"), FIRST),
    (lambda notebook: notebook.cells[-1].metadata.update(tags=["hide"]), FIRST),
    (lambda notebook: notebook.cells[-1].metadata.update(scrolled=True), []),
    (lambda notebook: notebook.cells[-1].update(execution_count=7), []),
    (lambda notebook: notebook.metadata.update(language_info={"name": "python"}), []),
], ids=["code", "default", "tag", "cell metadata", "count", "notebook metadata"])
def test_an_edited_notebook_runs_again_alone(execute, tmp_path, edit, expected):
    assert ran(execute) == BOTH
    path = tmp_path / "nb" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    edit(notebook)
    nbformat.write(notebook, path)
    assert ran(execute) == expected


def test_another_parameter_runs_the_notebooks_that_take_it(execute, tmp_path):
    write_notebook(tmp_path / "nb", "03_scores", parameters=PARAMETERS + "k = None\n")
    assert ran(execute) == BOTH
    assert ran(execute, parameters={"k": 7}) == ["out/03_scores"]
    assert ran(execute, parameters={"seed": 2, "k": 7}) == BOTH
    assert ran(execute) == BOTH, "only the last run is stored"


def test_the_images_that_k_means_is_fitted_on_decide_too(execute, tmp_path):
    write_notebook(tmp_path / "nb", "03_scores", parameters=PARAMETERS + "options = {'fit_split': None}\n")
    write_images(tmp_path / "split", "train/1.png", "test/1.png")
    asked = {"dataset": "split", "parameters": {"fit_split": "train"}}
    assert ran(execute, **asked) == BOTH
    assert ran(execute, **asked) == []
    write_images(tmp_path / "split", "train/2.png")
    assert ran(execute, **asked) == ["out/03_scores"]


def test_store_and_workers_do_not_decide_but_other_options_do(execute, tmp_path):
    for notebook in ("01_first", "03_scores"):
        write_notebook(tmp_path / "nb", notebook, parameters=PARAMETERS + "options = {}\n")
    assert ran(execute) == BOTH
    assert ran(execute, parameters={"store": "elsewhere", "num_workers": 2}) == []
    assert "elsewhere" not in (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    assert ran(execute, parameters={"image_size": 56}) == BOTH


@pytest.mark.parametrize("change", [
    lambda patch: patch.setattr(freshness, "version_of", lambda name: "9"),
    lambda patch: patch.setattr(freshness.platform, "python_version", lambda: "3.99"),
    lambda patch: patch.setenv("HF_ENDPOINT", "http://localhost:1"),
    lambda patch: (patch.setattr(report, "resolve_device", lambda _: None),
                   patch.setattr(torch.cuda, "is_available", lambda: True),
                   patch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")),
], ids=["packages", "python", "hub", "device"])
def test_other_versions_another_hub_or_device_run_all(execute, monkeypatch, change):
    assert ran(execute) == BOTH
    change(monkeypatch)
    assert ran(execute) == BOTH


@pytest.mark.parametrize(("name", "expected"), [
    ("plant.py", BOTH), ("demo/plant.py", BOTH), ("demo/demo.safetensors", BOTH), ("demo/demo.json", BOTH),
    ("new.py", BOTH), ("explorer/explorer.js", BOTH), ("templates/style.css", []), ("__pycache__/new.pyc", [])])
def test_changed_code_runs_all_but_changed_templates_do_not(execute, tmp_path, monkeypatch, name, expected):
    package = tmp_path / "package"
    for each in ("plant.py", "demo/plant.py", "demo/demo.safetensors", "demo/demo.json", "templates/style.css", name):
        (package / each).parent.mkdir(parents=True, exist_ok=True)
        (package / each).write_text("old", encoding="utf-8")
    if name == "new.py":
        (package / name).unlink()
    monkeypatch.setattr(freshness, "PACKAGE", package)
    assert ran(execute) == BOTH
    (package / name).write_text("new", encoding="utf-8")
    assert ran(execute) == expected


@pytest.mark.parametrize(("change", "expected"), [
    (lambda folder: Image.fromarray(np.full((4, 4), 99, dtype=np.uint8)).save(folder / "a/1.png"), BOTH),
    (lambda folder: (folder / "a/1.png").rename(folder / "b/1.png"), BOTH),
    (lambda folder: write_images(folder, "a/3.png"), BOTH),
    (lambda folder: (folder / "b/2.png").unlink(), BOTH),
    (lambda folder: (folder / "note.txt").touch(), BOTH),  # results hold the number of such files
    (lambda folder: (folder / ".note").touch(), []),
    (lambda folder: os.utime(folder / "a/1.png", (1, 1)), []),
], ids=["edited", "relabelled", "added", "deleted", "other file", "hidden file", "touched"])
def test_a_changed_image_folder_runs_all(execute, tmp_path, change, expected):
    write_images(tmp_path / "pictures", "a/1.png", "a/2.png", "b/1.jpg", "b/2.png")
    assert ran(execute, dataset="imagefolder:pictures") == BOTH
    assert ran(execute, dataset="imagefolder:pictures") == []
    change(tmp_path / "pictures")
    assert ran(execute, dataset="imagefolder:pictures") == expected


def test_the_split_that_is_used_decides(execute, tmp_path):
    for notebook in ("01_first", "03_scores"):
        write_notebook(tmp_path / "nb", notebook, parameters=PARAMETERS + "options = {}\n")
    write_images(tmp_path / "pictures", "train/a/1.png", "train/b/1.png", "test/a/2.png", "test/b/2.png")
    for split, other in (("train", "test"), ("test", "train")):
        options = {"dataset": "pictures", "parameters": {"split": split}}
        assert ran(execute, **options) == BOTH
        write_images(tmp_path / "pictures", f"{other}/a/{split}.png")
        assert ran(execute, **options) == []
        write_images(tmp_path / "pictures", f"{split}/a/{split}.png")
        assert ran(execute, **options) == BOTH


def test_a_downloaded_data_set_is_identified_by_its_files(execute, tmp_path):
    batch = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
    assert ran(execute, dataset="cifar10") == BOTH
    assert ran(execute, dataset="cifar10") == BOTH, "a missing data set is unknown; it is not downloaded for this"
    execute.during = lambda parameters: write_old(batch, b"images")
    assert ran(execute, dataset="cifar10") == BOTH
    assert ran(execute, dataset="cifar10") == [], "inputs that a run downloads are known afterwards"
    execute.during = lambda parameters: None
    batch.write_bytes(b"imagez")
    assert ran(execute, dataset="cifar10") == BOTH


def test_a_run_whose_inputs_change_is_repeated(execute, tmp_path):
    write_images(tmp_path / "pictures", "1.png", "2.png")
    count = iter(range(3, 9))
    execute.during = lambda parameters: write_images(tmp_path / "pictures", f"{next(count)}.png")
    assert ran(execute, dataset="imagefolder:pictures") == BOTH
    assert not list((tmp_path / "out").rglob(MARK))
    execute.during = lambda parameters: None
    assert ran(execute, dataset="imagefolder:pictures") == BOTH


@pytest.mark.parametrize(("name", "changed"), [
    ("weights.pth", "weights.pth"), ("folder", "folder/model.safetensors"),
    ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
])
def test_a_changed_checkpoint_runs_all(execute, tmp_path, monkeypatch, name, changed):
    monkeypatch.setattr("itae_utils.report.plan.check_checkpoint", lambda *_: None)
    for notebook in ("01_first", "03_scores"):
        write_notebook(tmp_path / "nb", notebook, parameters=PARAMETERS + "checkpoint = None\n")
    options = {"backbone": "dinov2_vits14", "parameters": {"checkpoint": name}}
    if "." in name:
        write_old(tmp_path / name, b"weights")
    write_old(file := tmp_path / changed, b"weights")
    assert ran(execute, **options) == BOTH
    assert ran(execute, **options) == []
    file.write_bytes(b"others!")
    assert ran(execute, **options) == BOTH
    (file.parent / "config.json").touch()
    assert ran(execute, **options) == BOTH


def test_published_weights_are_identified_by_the_file_in_the_hubs_cache(execute, tmp_path, monkeypatch):
    def try_to_load_from_cache(repository, name, revision=None):
        path = tmp_path / "hub" / name
        return str(path) if path.exists() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", try_to_load_from_cache)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("nothing is downloaded"))
    for content, expected in [(None, BOTH), (None, BOTH), (b"weights", BOTH), (None, []), (b"other", BOTH)]:
        if content:
            write_old(tmp_path / "hub" / "model.safetensors", content)
        assert ran(execute, backbone="dinov2_vits14") == expected


def test_a_grid_is_reused_by_pairing_and_collected_again_if_one_ran(execute, tmp_path):
    assert ran(execute, profile="grid") == [*GRID, "04_collects"]
    assert ran(execute, profile="grid") == []
    (tmp_path / "out" / GRID[2] / "results.json").unlink()
    assert ran(execute, profile="grid") == [GRID[2], "04_collects"]
    assert ran(execute, profile="grid", parameters={"seed": 9}) == [*GRID, "04_collects"], "its sources will change"
    assert ran(execute, profile="grid") == [*GRID, "04_collects"]
    assert ran(execute, profile="grid", backbone="demo-clean") == [], "the other pairing's results still exist"
    shutil.rmtree(tmp_path / "out" / "demo-digits")
    assert ran(execute, profile="grid", backbone="demo-clean") == ["04_collects"]


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "results.json").write_text((folder / "results.json").read_text() + " "),
    lambda folder: (folder / "figures" / "cover.png").write_bytes(b"other"),
    lambda folder: (folder / "figures" / "more.pdf").touch(),
    lambda folder: shutil.copytree(folder, folder.with_name("more")),
    lambda folder: shutil.rmtree(folder),
], ids=["results", "figure", "new figure", "new results", "deleted"])
def test_another_report_is_collected_again_only_if_it_has_changed(execute, tmp_path, change):
    run()
    (tmp_path / "out").rename(tmp_path / "measured")
    source = {"results_dir": "measured"}
    execute.take()
    assert ran(execute, parameters=source) == [*BOTH, "04_collects"]
    assert ran(execute, parameters=source | {"seed": 9}) == BOTH, "the collected report has not changed"
    change(tmp_path / "measured" / "03_scores")
    assert ran(execute, only=["04"], parameters=source) == ["04_collects"]


def test_a_plan_and_a_comparison_list_a_folder_of_images_once_for_all_notebooks(execute, tmp_path, monkeypatch):
    write_images(tmp_path / "pictures", "1.png", "2.png")
    asked, listed = {"profile": "grid", "dataset": "imagefolder:pictures"}, []
    run(**asked)
    for module in (datasets, freshness):
        monkeypatch.setattr(module, "read_folder", lambda *given: listed.append(given) or read_folder(*given))
    plan = report.plan_report(**asked)
    assert len(listed) == 1
    assert report.unchanged_runs(plan, "out") == {step.folder for step in plan.steps}
    assert len(listed) == 2


def edit_mark(folder: Path, **changes: object) -> None:
    mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    (folder / MARK).write_text(json.dumps(mark | changes), encoding="utf-8")


@pytest.mark.parametrize("damage", [
    *(lambda folder, text=text: (folder / MARK).write_text(text) for text in ("{", "[]", "{}")),
    *(lambda folder, change=change: edit_mark(folder, **change) for change in (
        {"schema": 0}, {"seconds": -1}, {"files": {}}, {"signature": None})),
    *(lambda folder, name=name: (folder / name).unlink() for name in (
        MARK, "results.json", "figures/cover.png", "01_first.ipynb")),
    *(lambda folder, name=name: (folder / name).write_text("{}") for name in (
        "results.json", "figures/cover.pdf", "01_first.ipynb")),
    shutil.rmtree,
])
def test_a_damaged_run_is_repeated(execute, tmp_path, damage):
    assert ran(execute) == BOTH
    damage(tmp_path / "out" / "01_first")
    assert [each.reused for each in run().runs] == [False, True]
    assert execute.take() == FIRST


def test_a_run_without_a_figure_that_its_results_name_is_repeated(execute):
    execute.missing_figures = ["missing"]
    assert ran(execute) == BOTH
    assert ran(execute) == BOTH


def test_pages_are_always_rendered(execute, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "notebook_page", notebook_page)
    page = tmp_path / "out" / "01_first" / "01_first.html"
    assert ran(execute, only=["01"]) == FIRST
    assert "03_scores" not in page.read_text(encoding="utf-8")
    assert ran(execute) == ["out/03_scores"]
    assert "../03_scores/03_scores.html" in page.read_text(encoding="utf-8")
    page.unlink()
    assert ran(execute) == []
    assert page.is_file()


def test_a_failed_run_is_repeated_even_after_a_successful_one(execute):
    assert ran(execute) == BOTH
    execute.during = lambda parameters: "ValueError: no" if "03" in parameters["output_dir"] else None
    assert ran(execute, force=True) == BOTH
    execute.during = lambda parameters: None
    assert ran(execute) == ["out/03_scores"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError])
def test_a_stopped_report_resumes(execute, tmp_path, stop):
    assert ran(execute, parameters={"seed": 1}) == BOTH

    def during(parameters):
        assert not (Path(parameters["output_dir"]) / MARK).exists()
        assert not (tmp_path / "out" / "index.html").exists()
        if "03" in parameters["output_dir"]:
            raise stop

    execute.during = during
    with pytest.raises(stop):
        run()
    left = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert left == {"01_first", "03_scores"}, "an incomplete report has neither index nor record"
    assert execute.take() == BOTH
    execute.during = lambda parameters: None
    assert ran(execute) == ["out/03_scores"]
    assert {"index.html", "report.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_signature_needs_every_part_in_json():
    for unknown in ({"parameters": {"x": float("nan")}}, {"parameters": {"x": object()}}, {"images": None}):
        assert freshness.signature(unknown) is None
    assert freshness.signature({"images": "x"}) != freshness.signature({"images": "y"})
