import json
import os
import re
import sys

import jsonschema
import pytest

from itae_utils import results
from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE
from itae_utils.report import parameters, report, runs
from tests.report.test_pages import external_references
from tests.tiny_notebooks import PARAMETERS, write_grid, write_notebook, write_notebooks


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = write_notebooks(tmp_path / "nb")
    monkeypatch.setattr(report, "notebooks_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report made where another Python is installed as kernel `python3`, and its own is not on the PATH."""
    folder = tmp_path_factory.mktemp("report")
    foreign = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    foreign.parent.mkdir(parents=True)
    specification = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    foreign.write_text(json.dumps(specification), encoding="utf-8")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "notebooks_folder", lambda: write_notebooks(folder / "nb"))
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("PATH", "/usr/bin:/bin")
        patch.setenv("MPLBACKEND", "agg")
        patch.chdir(folder)
        made = report.run_report(parameters={"seed": 5}, say=lines.append)
        assert os.environ["JUPYTER_PATH"] == str(folder / "jupyter")
    return made, lines


def shown(made: runs.Report, name: str) -> str:
    return (made.folder / name / f"{name}.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_report_is_whole(written):
    made, lines = written
    assert made.folder.name == "demo-demo-digits"
    assert made.folder.parent.name == "reports"
    index = made.index.read_text(encoding="utf-8")
    for name in ("01_first", "02_fails", "03_scores"):
        assert f'href="{name}/{name}.html"' in index
        assert (made.folder / name / f"{name}.ipynb").is_file()
        assert not external_references(shown(made, name))
    assert not external_references(index)
    assert [line.split()[0] for line in lines] == [name for name in ("01_first", "02_fails", "03_scores") for _ in "se"]
    assert "took" in lines[1]
    assert not list(made.folder.rglob("*.part"))


@pytest.mark.slow
def test_kernel_is_this_python_in_the_notebooks_folder(written):
    made, _ = written
    folder = made.folder / "01_first"
    seen = f"SEEN {sys.executable} {PACKAGE} 0 {made.folder.parents[1] / 'nb'} {folder} 0.25"
    assert seen in shown(made, "01_first")


@pytest.mark.slow
def test_no_warning_reaches_a_page(written):
    made, _ = written
    page = shown(made, "01_first")
    assert "MURMUR" not in page
    assert "MUMBLE" not in page
    assert 'class="stderr"' not in page


@pytest.mark.slow
def test_failing_notebook_keeps_what_it_did_and_the_others_run(written):
    made, _ = written
    assert [run.notebook.key for run in made.failed] == ["02"]
    assert made.failed[0].error == "ValueError: of no use at all (cell [4])"
    assert "BEFORE" in shown(made, "02_fails")
    assert "of no use" in shown(made, "02_fails")
    assert "ValueError: of no use at all (cell [4])" in made.index.read_text(encoding="utf-8")
    assert made.runs[2].results["parameters"]["seed"] == 5


@pytest.mark.slow
def test_results_hold_seconds_and_fit_the_schema(written):
    made, _ = written
    schema = json.loads((PACKAGE / "results.schema.json").read_text(encoding="utf-8"))
    for name in ("01_first", "03_scores"):
        content = results.read_results(made.folder / name / "results.json")
        jsonschema.validate(content, schema)
        assert content["provenance"]["seconds"] > 0


@pytest.mark.slow
def test_manifest(written):
    made, _ = written
    manifest = json.loads((made.folder / "report.json").read_text(encoding="utf-8"))
    assert [entry["notebook"] for entry in manifest["notebooks"]] == ["01_first", "02_fails", "03_scores"]
    assert [bool(entry["error"]) for entry in manifest["notebooks"]] == [False, True, False]
    assert manifest["notebooks"][0]["parameters"]["alpha"] == 0.25
    assert manifest["notebooks"][1]["results"] is None
    for entry in manifest["notebooks"]:
        assert (made.folder / entry["page"]).is_file()


def test_a_new_report_takes_the_place_of_an_old_one(notebooks, tmp_path):
    output = tmp_path / "out"
    for old in ("index.html", "report.json", "02_fails/results.json", "02_fails/figures/old.png", "mine.txt"):
        (output / old).parent.mkdir(parents=True, exist_ok=True)
        (output / old).write_text("old", encoding="utf-8")
    check = f"import os\nassert not os.path.exists({str(output / 'index.html')!r})"
    write_notebook(notebooks, "02_fails", check, measure=False)
    made = report.run_report(only=["02"], output=output, say=str)
    assert made.failed[0].error.startswith(f"{output / '02_fails' / 'results.json'} can't be read")
    assert not (output / "02_fails" / "figures").exists()
    assert "old" not in made.index.read_text(encoding="utf-8").split("</style>")[1]
    assert (output / "mine.txt").read_text(encoding="utf-8") == "old"


def test_a_reused_run_is_reported_everywhere(notebooks, tmp_path):
    lines = []
    made = report.run_report(only=["01", "03"], output=tmp_path / "out", say=str)
    assert "unchanged" not in made.index.read_text(encoding="utf-8")
    write_notebook(notebooks, "03_scores", "x = 1", parameters=PARAMETERS + "k = None\n")
    again = report.run_report(only=["01", "03"], output=tmp_path / "out", say=lines.append)
    first, before = again.runs[0], made.runs[0]
    assert [run.reused for run in again.runs] == [True, False]
    assert (first.seconds, first.results, first.parameters) == (before.seconds, before.results, before.parameters)
    assert lines[0] == f"01_first unchanged, reused (took {before.seconds:.1f} s)"
    assert lines[1] == "03_scores …"
    record = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [entry["reused"] for entry in record["notebooks"]] == [True, False]
    assert record["notebooks"][0]["seconds"] == round(before.seconds, 1)
    index = again.index.read_text(encoding="utf-8")
    assert index.count(" s, unchanged</span>") == 1
    assert "for 2 notebooks, profile demo; 1 of them reused from an earlier run" in index


def test_a_file_that_can_t_be_removed_is_named(notebooks, tmp_path):
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    with pytest.raises(ItaeError, match=r"index\.html"):
        report.run_report(only=["03"], output=tmp_path / "out")


def test_an_old_run_that_can_t_be_removed_is_not_taken_for_a_new_one(notebooks, tmp_path, monkeypatch):
    (tmp_path / "out" / "03_scores").mkdir(parents=True)

    def rmtree(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(report.shutil, "rmtree", rmtree)
    with pytest.raises(ItaeError, match="03_scores"):
        report.run_report(only=["03"], output=tmp_path / "out", say=str)


def test_two_reports_into_one_folder_are_refused(notebooks, tmp_path, monkeypatch):
    """A second one would delete the runs of the first."""
    refused = []

    def execute(path, target, parameters):
        (target.parent / "half").touch()
        with pytest.raises(ItaeError) as error:
            report.run_report(only=["03"], output=tmp_path / "out", say=str)
        refused.append(str(error.value))
        assert (target.parent / "half").exists()
        target.write_bytes(path.read_bytes())
        return "ValueError: enough"

    monkeypatch.setattr(report, "execute", execute)
    report.run_report(only=["03"], output=tmp_path / "out", say=str)
    assert len(refused) == 1
    assert str(tmp_path / "out") in refused[0]
    monkeypatch.setattr(report, "execute", lambda path, target, _: target.write_bytes(path.read_bytes()) and "no")
    assert report.run_report(only=["03"], output=tmp_path / "out", say=str).failed, "free again"


def test_a_dead_kernel_is_a_failure(notebooks, tmp_path):
    write_notebook(notebooks, "02_fails", "import os\nos._exit(1)")
    made = report.run_report(only=["02"], output=tmp_path / "out", say=str)
    assert made.failed[0].error.startswith("the kernel died")
    assert "the kernel died" in made.index.read_text(encoding="utf-8")


@pytest.mark.parametrize(("options", "message"), [
    ({"only": ["07"]}, "no notebook '07'"),
    ({"profile": "papier"}, "unknown profile 'papier'"),
    ({"parameters": {"sed": 1}}, "no parameter 'sed'"),
    ({"parameters": {"seed": "x"}}, "seed='x'"),
    ({"parameters": {"seed": -1}}, "seed=-1"),
    ({"parameters": {"alpha": 2}}, "alpha=2"),
    ({"output": "x\udcff"}, "is not UTF-8"),
    ({"parameters": {"output_dir": "x"}}, "use --output"),
    ({"backbone": "demmo"}, "unknown backbone 'demmo': did you mean demo"),
    ({"dataset": "cifar11"}, "unknown data set 'cifar11': did you mean cifar10"),
    ({"dataset": "imagefolder:nowhere"}, "no such folder"),
])
def test_bad_input_is_refused_before_anything_is_written(notebooks, tmp_path, options, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ItaeError, match=message) as refused:
        report.run_report(**options)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_output_below_a_file_is_refused(notebooks, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ItaeError, match="can't be made"):
        report.run_report(output=tmp_path / "file" / "out")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A report over a grid of two cells, and the same run again from its record."""
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        write_grid(folder / "nb")
        patch.setattr(report, "notebooks_folder", lambda: folder / "nb")
        patch.chdir(folder)
        made = report.run_report(profile="grid", parameters={"limit": 5}, say=str)
        lines = []
        again = report.repeat_report("reports/grid", say=lines.append)
    return made, again, lines


@pytest.mark.slow
def test_a_grid_runs_each_cell_and_collects_them(grid):
    made, _, _ = grid
    assert made.folder.name == "grid"
    assert not made.failed
    assert [run.page for run in made.runs] == [
        *(f"{cell}-digits/{name}/{name}.html" for cell in ("demo", "demo-clean") for name in ("01_first", "03_scores")),
        "04_collects/04_collects.html"]
    for run in made.runs:
        page = (made.folder / run.page).read_text(encoding="utf-8")
        assert not external_references(page)
        for link in re.findall(r'href="([^"#]+)"', page):
            assert ((made.folder / run.page).parent / link).resolve().exists(), link
    collected = (made.folder / made.runs[-1].page).read_text(encoding="utf-8")
    assert "COLLECTED demo-clean on digits demo on digits" in collected
    assert [run.results["parameters"]["backbone"] for run in made.runs[:4:2]] == ["demo", "demo-clean"]
    assert {run.results["parameters"]["seed"] for run in made.runs[:4]} == {3}


@pytest.mark.slow
def test_the_index_of_a_grid(grid):
    made, _, _ = grid
    page = made.index.read_text(encoding="utf-8")
    assert "Attention artifacts of <em>demo</em> and <em>demo-clean</em> on <em>digits</em>" in page
    links = re.findall(r'<h3><a href="([^"]+)"', page)
    assert links == [made.runs[-1].page, *(run.page for run in made.runs[:-1])], "what collects comes first"
    for link in re.findall(r'href="([^"#]+)"', page):
        assert (made.folder / link).exists(), link
    assert page.count('<h3 class="pairing">') == 2
    assert "seed of" not in page, "the headline is that of the collection"
    assert ">collected<" in page
    assert "Clustering scores" not in page, "a table of several cells is the collection's"
    assert f"demo: {'ab' * 32}" in page


@pytest.mark.slow
def test_a_report_is_repeated_from_its_record(grid):
    made, again, lines = grid
    assert again.folder == made.folder.with_name("grid-repeated")
    assert [run.folder for run in again.runs] == [run.folder for run in made.runs]
    for before, after in zip(made.runs, again.runs, strict=True):
        strip = {"output_dir", "results_dir"}
        assert {k: v for k, v in before.parameters.items() if k not in strip} == {
            k: v for k, v in after.parameters.items() if k not in strip}
    assert again.runs[-1].parameters["results_dir"] == str(again.folder)
    assert (again.profile, again.description, again.grid) == (made.profile, made.description, made.grid)
    assert lines[-1] == "weights and images are those of the record"
    records = [json.loads((each.folder / "report.json").read_text(encoding="utf-8")) for each in (made, again)]
    for record in records:
        record.pop("seconds")
        for entry in record["notebooks"]:
            entry.pop("seconds")
    assert records[0] == records[1]


def test_a_report_does_not_replace_what_it_collects(tmp_path, monkeypatch):
    folder = write_grid(tmp_path / "nb")
    monkeypatch.setattr(report, "notebooks_folder", lambda: folder)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.html").write_text("old", encoding="utf-8")
    with pytest.raises(ItaeError, match=r"output=.*old"):
        report.run_report(only=["04"], parameters={"results_dir": str(tmp_path / "old")}, output=tmp_path / "old")
    assert (tmp_path / "old" / "index.html").read_text(encoding="utf-8") == "old"


def test_notebooks_lie_beside_the_package_or_in_it(tmp_path, monkeypatch):
    assert parameters.notebooks_folder() == PACKAGE.parent / "notebooks"
    (tmp_path / "_notebooks").mkdir()
    monkeypatch.setattr(parameters, "PACKAGE", tmp_path)
    assert parameters.notebooks_folder() == tmp_path / "_notebooks"


def test_shipped_profiles_are_legal():
    folder = PACKAGE.parent / "notebooks"
    for path in (folder / "profiles").glob("*.yaml"):
        made = report.plan_report(profile=path.stem)
        assert {step.notebook.key for step in made.steps} >= {"01", "02", "03"}
