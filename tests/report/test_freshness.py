import json
import os
import shutil
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from itae_utils.models import registry
from itae_utils.report import freshness, report, runs
from itae_utils.report.freshness import MARK
from itae_utils.report.pages import notebook_page
from itae_utils.report.plan import Step
from tests.pretended import Pretended
from tests.tiny_notebooks import PARAMETERS, write_grid, write_notebook

BOTH = ["out/01_first", "out/03_scores"]
GRID = [f"{pairing}-digits/{name}" for pairing in ("demo", "demo-clean") for name in ("01_first", "03_scores")]


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A working folder, with notebooks that measure (01, 03) and one that collects (04), none of which really runs."""
    folder, execute = write_grid(tmp_path / "nb"), Pretended()
    monkeypatch.setattr(report, "notebooks_folder", lambda: folder)
    monkeypatch.setattr(report, "execute", execute)
    monkeypatch.setattr(report, "notebook_page", lambda *_: None)
    monkeypatch.setattr(report, "index_page", lambda written: written.index.touch())
    monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ITAE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    return execute


def run(**options) -> runs.Report:
    return report.run_report(**{"output": "out", "say": str} | options)


def old(path: Path, content: bytes) -> None:
    """A file that was last changed long ago, and so is remembered by its size, time and inode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    long_ago = time.time_ns() - 10**11
    os.utime(path, ns=(long_ago, long_ago))


def images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number, dtype=np.uint8)).save(folder / name)


def test_what_is_unchanged_is_not_run_again(pretended):
    run()
    assert pretended.take() == BOTH
    again = run()
    assert pretended.take() == []
    assert [run.reused for run in again.runs] == [True, True]
    run(force=True)
    assert pretended.take() == BOTH
    run()
    assert pretended.take() == []


def test_a_mark_says_what_ran(pretended):
    made = run(parameters={"seed": 4})
    mark = json.loads((made.folder / "01_first" / MARK).read_text(encoding="utf-8"))
    assert mark["schema"] == freshness.MARK_SCHEMA
    assert len(mark["signature"]) == 64
    assert mark["parameters"] == {"backbone": "demo", "dataset": "digits", "limit": None, "seed": 4}
    assert mark["seconds"] == made.runs[0].seconds
    assert set(mark["files"]) == {"01_first.ipynb", "results.json", "figures/cover.png", "figures/cover.pdf"}


def edit_cell(folder: Path) -> None:
    write_notebook(folder, "01_first", "x = 1")


def edit_tag(folder: Path) -> None:
    path = folder / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["tags"] = ["hide"]
    nbformat.write(notebook, path)


def edit_default(folder: Path) -> None:
    write_notebook(folder, "01_first", parameters=PARAMETERS + "new = 1\n")


@pytest.mark.parametrize("edit", [edit_cell, edit_tag, edit_default])
def test_an_edited_notebook_runs_again_alone(pretended, tmp_path, edit):
    run()
    pretended.take()
    edit(tmp_path / "nb")
    run()
    assert pretended.take() == ["out/01_first"]


def test_what_an_editor_notes_beside_the_cells_does_not_count(pretended, tmp_path):
    run()
    pretended.take()
    path = tmp_path / "nb" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["language_info"] = {"name": "python", "version": "3"}
    notebook.cells[-1].metadata["scrolled"] = True
    notebook.cells[-1].execution_count = 7
    nbformat.write(notebook, path)
    run()
    assert pretended.take() == []


def test_another_parameter_runs_all_that_take_it(pretended, tmp_path):
    write_notebook(tmp_path / "nb", "03_scores", parameters=PARAMETERS + "k = None\n")
    run()
    pretended.take()
    run(parameters={"k": 7})
    assert pretended.take() == ["out/03_scores"]
    run(parameters={"seed": 2, "k": 7})
    assert pretended.take() == BOTH
    run()
    assert pretended.take() == BOTH, "only the last run is kept"


def change_code(monkeypatch, folder):
    """The same package with one more module."""
    shutil.copytree(freshness.PACKAGE, folder / "package", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "package" / "new.py").touch()
    monkeypatch.setattr(freshness, "PACKAGE", folder / "package")


@pytest.mark.parametrize("change", [
    change_code,
    lambda monkeypatch, _: monkeypatch.setattr(freshness, "version_of", lambda name: "9"),
    lambda monkeypatch, _: monkeypatch.setattr(freshness.platform, "python_version", lambda: "3.99"),
    lambda monkeypatch, _: monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1"),
    lambda monkeypatch, _: (monkeypatch.setattr(torch.cuda, "is_available", lambda: True),
                            monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")),
])
def test_other_code_versions_server_or_device_run_all(pretended, monkeypatch, tmp_path, change):
    run()
    pretended.take()
    change(monkeypatch, tmp_path)
    run()
    assert pretended.take() == BOTH


def test_store_workers_and_processes_decide_nothing(pretended, tmp_path):
    for notebook in ("01_first", "03_scores"):
        write_notebook(tmp_path / "nb", notebook, parameters=PARAMETERS + "options = {}\n")
    run()
    pretended.take()
    made = run(parameters={"store": "elsewhere", "num_workers": 2})
    assert pretended.take() == []
    assert "elsewhere" not in (made.folder / "report.json").read_text(encoding="utf-8")
    run(parameters={"image_size": 56})
    assert pretended.take() == BOTH


def test_code_is_modules_and_embedded_files_of_the_whole_package(tmp_path, monkeypatch):
    package = tmp_path / "package"
    for name in ("freshness.py", "demo/plant.py", "demo/demo.safetensors", "demo/demo.json", "templates/style.css"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name, encoding="utf-8")
    monkeypatch.setattr(freshness, "PACKAGE", package)
    found = [freshness._code()]
    for name in ("demo/plant.py", "demo/demo.safetensors", "demo/demo.json"):
        (package / name).write_text("other", encoding="utf-8")
        found.append(freshness._code())
    (package / "new.py").touch()
    found.append(freshness._code())
    assert len(set(found)) == 5
    (package / "templates" / "style.css").write_text("other", encoding="utf-8")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "new.pyc").touch()
    assert freshness._code() == found[-1], "pages are always rendered again"


def edit_image(folder: Path) -> None:
    Image.fromarray(np.full((4, 4), 99, dtype=np.uint8)).save(folder / "a/1.png")


def relabel(folder: Path) -> None:
    (folder / "a/1.png").rename(folder / "b/1.png")


@pytest.mark.parametrize(("change", "runs"), [
    (edit_image, BOTH), (relabel, BOTH), (lambda folder: images(folder, "a/3.png"), BOTH),
    (lambda folder: (folder / "b/2.png").unlink(), BOTH), (lambda folder: (folder / "note.txt").touch(), []),
    (lambda folder: os.utime(folder / "a/1.png", (1, 1)), [])])
def test_a_folder_of_images(pretended, tmp_path, change, runs):
    images(tmp_path / "pictures", "a/1.png", "a/2.png", "b/1.jpg", "b/2.png")
    for _ in range(2):
        run(dataset="imagefolder:pictures")
    assert pretended.take() == BOTH
    change(tmp_path / "pictures")
    run(dataset="imagefolder:pictures")
    assert pretended.take() == runs


def test_a_downloaded_data_set_is_known_by_its_files(pretended, tmp_path):
    run(dataset="cifar10")
    run(dataset="cifar10")
    assert pretended.take() == BOTH * 2, "it isn't there: it can't be told, and isn't downloaded to be told"
    batch = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
    old(batch, b"images")
    run(dataset="cifar10")
    run(dataset="cifar10")
    assert pretended.take() == BOTH
    old(batch, b"imagez")
    os.utime(batch)
    run(dataset="cifar10")
    assert pretended.take() == BOTH


def test_inputs_that_a_run_brings_are_known_afterwards(pretended, tmp_path):
    batch = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
    pretended.during = lambda parameters: old(batch, b"images")
    run(dataset="cifar10")
    run(dataset="cifar10")
    assert pretended.take() == BOTH


def test_what_changes_during_a_run_is_not_taken_for_what_it_ran_on(pretended, tmp_path):
    images(tmp_path / "pictures", "1.png", "2.png")
    count = iter(range(3, 9))
    pretended.during = lambda parameters: images(tmp_path / "pictures", f"{next(count)}.png")
    run(dataset="imagefolder:pictures")
    assert not list((tmp_path / "out").rglob(MARK))
    pretended.take()
    pretended.during = lambda parameters: None
    run(dataset="imagefolder:pictures")
    assert pretended.take() == BOTH


@pytest.mark.parametrize("name", ["weights.pth", "folder"])
def test_a_checkpoint(pretended, tmp_path, name):
    for notebook in ("01_first", "03_scores"):
        write_notebook(tmp_path / "nb", notebook, parameters=PARAMETERS + "checkpoint = None\n")
    file = tmp_path / name if name.endswith("pth") else tmp_path / name / "model.safetensors"
    options = {"backbone": "dinov2_vits14", "parameters": {"checkpoint": name}}
    old(file, b"weights")
    run(**options)
    run(**options)
    assert pretended.take() == BOTH
    file.write_bytes(b"others!")
    run(**options)
    assert pretended.take() == BOTH
    if name == "folder":
        (tmp_path / name / "config.json").touch()
        run(**options)
        assert pretended.take() == BOTH


def test_published_weights_are_known_by_the_file_in_the_cache(pretended, tmp_path, monkeypatch):
    import huggingface_hub

    def try_to_load_from_cache(repository, name, revision=None):
        path = tmp_path / "hub" / name
        return str(path) if path.exists() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", try_to_load_from_cache)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("nothing is downloaded"))
    run(backbone="dinov2_vits14")
    run(backbone="dinov2_vits14")
    assert pretended.take() == BOTH * 2
    old(tmp_path / "hub" / "model.safetensors", b"weights")
    run(backbone="dinov2_vits14")
    run(backbone="dinov2_vits14")
    assert pretended.take() == BOTH
    old(tmp_path / "hub" / "model.safetensors", b"other weights")
    run(backbone="dinov2_vits14")
    assert pretended.take() == BOTH


def test_a_grid_is_kept_by_cell_and_collected_again_where_a_cell_ran(pretended, tmp_path):
    run(profile="grid")
    assert pretended.take() == [*GRID, "04_collects"]
    run(profile="grid")
    assert pretended.take() == []
    (tmp_path / "out" / GRID[2] / "results.json").unlink()
    run(profile="grid")
    assert pretended.take() == [GRID[2], "04_collects"]
    run(profile="grid", parameters={"seed": 9})
    assert pretended.take() == [*GRID, "04_collects"], "nothing was changed yet where it collects, but would be"
    run(profile="grid")
    pretended.take()
    run(profile="grid", backbone="demo-clean")
    assert pretended.take() == [], "the other cell's results lie there still"
    shutil.rmtree(tmp_path / "out" / "demo-digits")
    run(profile="grid", backbone="demo-clean")
    assert pretended.take() == ["04_collects"]


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "results.json").write_text((folder / "results.json").read_text() + " "),
    lambda folder: (folder / "figures" / "cover.png").write_bytes(b"other"),
    lambda folder: (folder / "figures" / "more.pdf").touch(),
    lambda folder: shutil.copytree(folder, folder.with_name("more")),
    lambda folder: shutil.rmtree(folder),
])
def test_a_collection_runs_again_where_what_it_collects_has_changed(pretended, tmp_path, change):
    run()
    (tmp_path / "out").rename(tmp_path / "measured")
    collecting = {"only": ["04"], "parameters": {"results_dir": "measured"}}
    run(**collecting)
    run(**collecting)
    assert pretended.take() == [*BOTH, "04_collects"]
    change(tmp_path / "measured" / "03_scores")
    run(**collecting)
    assert pretended.take() == ["04_collects"]


def test_a_collection_of_another_report_is_kept_while_notebooks_run(pretended, tmp_path):
    run()
    (tmp_path / "out").rename(tmp_path / "measured")
    run(parameters={"results_dir": "measured"})
    pretended.take()
    run(parameters={"results_dir": "measured", "seed": 9})
    assert pretended.take() == BOTH


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / MARK).unlink(),
    lambda folder: (folder / MARK).write_text("{"),
    lambda folder: (folder / MARK).write_text("[]"),
    lambda folder: (folder / MARK).write_text("{}"),
    lambda folder: (folder / MARK).write_text((folder / MARK).read_text().replace('"schema": 2', '"schema": 0')),
    lambda folder: (folder / MARK).write_text((folder / MARK).read_text().replace('"seconds": ', '"seconds": -')),
    lambda folder: (folder / MARK).write_text(json.dumps(json.loads((folder / MARK).read_text()) | {"files": {}})),
    lambda folder: (folder / "results.json").unlink(),
    lambda folder: (folder / "results.json").write_text("{}"),
    lambda folder: (folder / "figures" / "cover.png").unlink(),
    lambda folder: (folder / "figures" / "cover.pdf").write_bytes(b"%P"),
    lambda folder: (folder / "01_first.ipynb").unlink(),
    lambda folder: (folder / "01_first.ipynb").write_text("{}"),
    lambda folder: shutil.rmtree(folder),
])
def test_what_is_not_whole_runs_again(pretended, tmp_path, damage):
    run()
    pretended.take()
    damage(tmp_path / "out" / "01_first")
    made = run()
    assert pretended.take() == ["out/01_first"]
    assert [run.reused for run in made.runs] == [False, True]


def test_a_mark_without_signature_marks_nothing(pretended, tmp_path, monkeypatch):
    run()
    path = tmp_path / "out" / "01_first" / MARK
    mark = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(mark | {"signature": None}), encoding="utf-8")
    monkeypatch.setattr(freshness, "signature", lambda state: None)
    pretended.take()
    run()
    assert pretended.take() == BOTH


def test_a_figure_that_is_named_but_was_never_drawn(pretended, tmp_path):
    pretended.undrawn = ["missing"]
    run()
    assert not list((tmp_path / "out").rglob(MARK))


def test_pages_are_always_rendered_again(pretended, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "notebook_page", notebook_page)
    run(only=["01"])
    page = tmp_path / "out" / "01_first" / "01_first.html"
    assert "03_scores" not in page.read_text(encoding="utf-8")
    pretended.take()
    run()
    assert pretended.take() == ["out/03_scores"]
    assert "../03_scores/03_scores.html" in page.read_text(encoding="utf-8")
    page.unlink()
    run()
    assert page.is_file()
    assert pretended.take() == []


def test_a_failed_run_is_run_again(pretended, tmp_path):
    pretended.during = lambda parameters: "ValueError: no" if "03" in parameters["output_dir"] else None
    run()
    assert not (tmp_path / "out" / "03_scores" / MARK).exists()
    pretended.take()
    pretended.during = lambda parameters: None
    assert not run().failed
    assert pretended.take() == ["out/03_scores"]


def test_a_run_that_fails_after_one_that_did_not_leaves_no_mark(pretended, tmp_path):
    run()
    pretended.during = lambda parameters: "ValueError: no"
    run(force=True)
    assert not list((tmp_path / "out").rglob(MARK))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError])
def test_after_being_stopped_midway_only_the_rest_runs(pretended, tmp_path, stop):
    run(parameters={"seed": 1})
    pretended.take()

    def during(parameters):
        assert not (Path(parameters["output_dir"]) / MARK).exists()
        assert not (tmp_path / "out" / "index.html").exists()
        if "03" in parameters["output_dir"]:
            raise stop

    pretended.during = during
    with pytest.raises(stop):
        run()
    left = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert left == {"01_first", "03_scores"}, "a report that isn't whole has neither index nor record"
    assert [path.parent.name for path in (tmp_path / "out").rglob(MARK)] == ["01_first"]
    assert pretended.take() == BOTH
    pretended.during = lambda parameters: None
    made = run()
    assert pretended.take() == ["out/03_scores"]
    assert [run.reused for run in made.runs] == [True, False]
    assert {"index.html", "report.json"} <= {path.name for path in made.folder.iterdir()}


def test_what_other_steps_left_stays(pretended, tmp_path):
    run()
    run(only=["01"], parameters={"seed": 3})
    assert pretended.take() == [*BOTH, "out/01_first"]
    run()
    assert pretended.take() == ["out/01_first"]


def test_a_parameter_without_a_word_in_json_is_run(tmp_path):
    assert freshness.signature({"parameters": {"x": float("nan")}}) is None
    assert freshness.signature({"parameters": {"x": object()}}) is None
    assert freshness.signature({"images": None}) is None
    assert freshness.signature({"images": "x"}) != freshness.signature({"images": "y"})


def test_every_data_set_and_all_weights_are_looked_at_once(pretended, monkeypatch):
    asked = []
    monkeypatch.setattr(freshness, "_images", lambda name: asked.append(name) or "images")
    monkeypatch.setattr(freshness, "_weights", lambda *names: asked.append(names) or "weights")
    monkeypatch.setattr(freshness, "_code", lambda: asked.append("code") or "code")
    steps = [Step(step.notebook, step.given | {"output_dir": "x", "results_dir": "."})
             for step in report.plan_report(profile="grid").steps]
    assert len(list(freshness._states(steps))) == 5
    assert sorted(map(str, asked)) == ["('demo', None)", "('demo-clean', None)", "code", "digits"]


def test_embedded_backbones_are_told_by_the_code():
    for name, entry in registry.BACKBONES.items():
        if entry.timm_name is None:
            assert freshness._weights(name, None) == "embedded"
