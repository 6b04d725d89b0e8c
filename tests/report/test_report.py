import json
import re
import shutil
import sys

import pytest

from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE
from itae_utils.report import parameters, report, runs
from itae_utils.results import read_results
from tests.fake_execution import FakeExecute
from tests.report.test_pages import external_references
from tests.tiny_notebooks import use_notebooks, write_grid, write_notebook, write_notebooks

NAMES = ("01_first", "02_fails", "03_scores")


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = write_notebooks(tmp_path / "nb")
    use_notebooks(folder, monkeypatch)
    return folder


@pytest.fixture
def execute(notebooks, monkeypatch):
    monkeypatch.setattr(report, "execute", execute := FakeExecute())
    return execute


def run(**options) -> runs.Report:
    return report.run_report(**{"output": "out", "say": str} | options)


def record_of(made: runs.Report) -> dict:
    return json.loads((made.folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a report in which notebook 02 fails; return it with the lines printed on the way."""
    folder, lines = tmp_path_factory.mktemp("report"), []
    with pytest.MonkeyPatch.context() as patch:
        use_notebooks(write_notebooks(folder / "nb"), patch)
        return report.run_report(parameters={"seed": 5}, say=lines.append), lines


@pytest.fixture(scope="module")
def pages(written):
    return {name: (written[0].folder / name / f"{name}.html").read_text(encoding="utf-8") for name in NAMES}


@pytest.mark.slow
class TestReport:
    def test_it_is_complete(self, written, pages):
        made, lines = written
        assert (made.folder.parent.name, made.folder.name) == ("reports", "demo-demo-digits")
        index = made.index.read_text(encoding="utf-8")
        for name in NAMES:
            assert f'href="{name}/{name}.html"' in index
            assert (made.folder / name / f"{name}.ipynb").is_file()
        assert not any(external_references(page) for page in (index, *pages.values()))
        assert not list(made.folder.rglob("*.part"))
        assert [line.split()[0] for line in lines] == [name for name in NAMES for _ in ("start", "end")]

    def test_its_record_names_parameters_errors_and_pages(self, written):
        made, _ = written
        entries = record_of(made)["notebooks"]
        assert [entry["notebook"] for entry in entries] == list(NAMES)
        assert [bool(entry["error"]) for entry in entries] == [False, True, False]
        assert entries[0]["parameters"]["alpha"] == 0.25
        assert entries[1]["results"] is None
        assert all((made.folder / entry["page"]).is_file() for entry in entries)

    def test_kernels_work_in_the_notebooks_folder_and_no_warning_reaches_a_page(self, written, pages):
        made, _ = written
        folder = made.folder / "01_first"
        assert f"SEEN {sys.executable} {PACKAGE} 0 {made.folder.parents[1] / 'nb'} {folder} 0.25" in pages["01_first"]
        assert not any(text in pages["01_first"] for text in ("MURMUR", "MUMBLE", 'class="stderr"'))

    def test_a_failed_notebook_shows_how_far_it_came_and_the_others_run(self, written, pages):
        made, _ = written
        assert [(each.notebook.key, each.error) for each in made.failed] == [
            ("02", "ValueError: of no use at all (cell [4])")]
        assert "BEFORE" in pages["02_fails"]
        for page in (pages["02_fails"], made.index.read_text(encoding="utf-8")):
            assert "ValueError: of no use at all (cell [4])" in page
        for name in ("01_first", "03_scores"):
            results = read_results(made.folder / name / "results.json")
            assert results["parameters"]["seed"] == 5
            assert "seconds" in results["provenance"]


def test_a_new_report_replaces_an_old_one(execute, tmp_path):
    output = tmp_path / "out"
    for old in ("index.html", "report.json", "02_fails/results.json", "02_fails/figures/old.png", "mine.txt"):
        (output / old).parent.mkdir(parents=True, exist_ok=True)
        (output / old).write_text("old", encoding="utf-8")

    def during(parameters):
        assert not (output / "index.html").exists()
        assert not (output / "02_fails" / "results.json").exists()
        return "ValueError: no"

    execute.during = during
    made = run(only=["02"])
    assert made.runs[0].results is None
    assert not (output / "02_fails" / "figures" / "old.png").exists()
    assert "old" not in made.index.read_text(encoding="utf-8").split("</style>")[1]
    assert (output / "mine.txt").read_text(encoding="utf-8") == "old"


def test_a_notebook_without_results_is_a_failure(execute, tmp_path, monkeypatch):
    def copy(path, target, parameters):
        shutil.copy(path, target)

    monkeypatch.setattr(report, "execute", copy)
    assert str(tmp_path / "out" / "03_scores" / "results.json") in run(only=["03"]).failed[0].error


def test_a_reused_run_is_reported_everywhere(execute, notebooks):
    lines, made = [], run(only=["01", "03"])
    assert "unchanged" not in made.index.read_text(encoding="utf-8")
    write_notebook(notebooks, "03_scores", "x = 1")
    again = run(only=["01", "03"], say=lines.append)
    first, before = again.runs[0], made.runs[0]
    assert [each.reused for each in again.runs] == [True, False]
    assert (first.seconds, first.results, first.parameters) == (before.seconds, before.results, before.parameters)
    assert lines[:2] == [f"01_first unchanged, reused (took {before.seconds:.1f} s)", "03_scores …"]
    entries = record_of(again)["notebooks"]
    assert [entry["reused"] for entry in entries] == [True, False]
    assert entries[0]["seconds"] == round(before.seconds, 1)
    index = again.index.read_text(encoding="utf-8")
    assert index.count(" s, unchanged</span>") == 1
    assert "1 of them reused" in index


def test_an_old_file_or_run_that_cannot_be_removed_is_named(execute, tmp_path, monkeypatch):
    """Otherwise its results would be read as those of the new run."""
    def rmtree(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a" / "index.html").mkdir(parents=True)
    (tmp_path / "b" / "03_scores").mkdir(parents=True)
    monkeypatch.setattr(report.shutil, "rmtree", rmtree)
    for output, old in (("a", "index.html"), ("b", "03_scores")):
        with pytest.raises(ItaeError, match=str(tmp_path / output / old)):
            run(output=output)
    assert execute.ran == []


def test_two_reports_into_one_folder_are_refused(execute, tmp_path):
    """The second one would delete the runs of the first."""
    refused = []

    def during(parameters):
        with pytest.raises(ItaeError, match=str(tmp_path / "out")) as error:
            run(only=["03"])
        refused.append(error)
        return "ValueError: no"

    execute.during = during
    run(only=["03"])
    assert len(refused) == 1
    execute.during = lambda parameters: None
    assert not run(only=["03"]).failed, "the folder is free again"


def test_a_dead_kernel_is_a_failure(notebooks):
    write_notebook(notebooks, "02_fails", "import os\nos._exit(1)")
    made = run(only=["02"])
    assert made.failed[0].error.startswith("the kernel died")
    assert "the kernel died" in made.index.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Write a report over a grid of two pairings, repeat it from its record, and collect the lines printed."""
    folder, lines = tmp_path_factory.mktemp("grid"), []
    with pytest.MonkeyPatch.context() as patch:
        use_notebooks(write_grid(folder / "nb"), patch)
        made = report.run_report(profile="grid", parameters={"limit": 5}, say=str)
        return made, report.repeat_report("reports/grid", say=lines.append), lines


@pytest.mark.slow
class TestGrid:
    def test_it_runs_each_pairing_and_collects_them(self, grid):
        made, _, _ = grid
        assert (made.folder.name, made.failed) == ("grid", ())
        assert [run.page for run in made.runs] == [
            *(f"{pairing}-digits/{name}/{name}.html"
              for pairing in ("demo", "demo-clean") for name in ("01_first", "03_scores")),
            "04_collects/04_collects.html"]
        for page in (made.index, *(made.folder / run.page for run in made.runs)):
            text = page.read_text(encoding="utf-8")
            assert not external_references(text)
            for link in re.findall(r'href="([^"#]+)"', text):
                assert (page.parent / link).resolve().exists(), link
        collected = (made.folder / made.runs[-1].page).read_text(encoding="utf-8")
        assert "COLLECTED demo-clean on digits demo on digits" in collected
        assert [run.results["parameters"]["backbone"] for run in made.runs[:4:2]] == ["demo", "demo-clean"]
        assert {run.results["parameters"]["seed"] for run in made.runs[:4]} == {3}

    def test_its_index_shows_the_collection_first(self, grid):
        made, _, _ = grid
        page = made.index.read_text(encoding="utf-8")
        heading = re.search(r"<h1[^>]*>(.*?)</h1>", page, flags=re.DOTALL)[1]
        assert re.findall("<em>(.*?)</em>", heading) == ["demo", "demo-clean", "digits"]
        links = re.findall(r'<h3><a href="([^"]+)"', page)
        assert links == [made.runs[-1].page, *(run.page for run in made.runs[:-1])]
        assert page.count('<h3 class="pairing">') == 2
        assert ">collected<" in page
        assert "seed of" not in page, "the headline is that of the collection"
        assert "Clustering scores" not in page, "a table of several pairings is the collection's"
        assert f"demo: {'ab' * 32}" in page

    def test_it_is_repeated_from_its_record(self, grid):
        made, again, lines = grid
        assert again.folder == made.folder.with_name("grid-repeated")
        assert [run.folder for run in again.runs] == [run.folder for run in made.runs]
        assert again.runs[-1].parameters["results_dir"] == str(again.folder)
        assert lines[-1] == "weights and images are those of the record"
        records = [record_of(made), record_of(again)]
        for record in records:
            for entry in (record, *record["notebooks"]):
                entry.pop("seconds")
        assert records[0] == records[1]


def test_a_report_does_not_replace_the_one_that_it_collects(tmp_path, monkeypatch):
    use_notebooks(write_grid(tmp_path / "nb"), monkeypatch)
    old = tmp_path / "old" / "index.html"
    old.parent.mkdir()
    old.write_text("old", encoding="utf-8")
    with pytest.raises(ItaeError, match=r"output=.*old"):
        run(only=["04"], parameters={"results_dir": str(tmp_path / "old")}, output="old")
    assert old.read_text(encoding="utf-8") == "old"


def test_notebooks_are_beside_the_package_or_in_it(tmp_path, monkeypatch):
    assert parameters.notebooks_folder() == PACKAGE.parent / "notebooks"
    (tmp_path / "_notebooks").mkdir()
    monkeypatch.setattr(parameters, "PACKAGE", tmp_path)
    assert parameters.notebooks_folder() == tmp_path / "_notebooks"


def test_shipped_profiles_are_valid():
    for path in (PACKAGE.parent / "notebooks" / "profiles").glob("*.yaml"):
        plan = report.plan_report(profile=path.stem)
        assert {step.notebook.key for step in plan.steps} >= {"01", "02", "03"}
