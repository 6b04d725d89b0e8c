import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from itae_utils.data.folders import read_folder
from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE
from itae_utils.report import parameters, plan, report, runs
from itae_utils.results import read_results
from tests.fake_execution import FakeExecute
from tests.report.test_pages import external_references
from tests.tiny_notebooks import PARAMETERS, use_notebooks, write_grid, write_notebook, write_notebooks, write_profile

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


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


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
    def copy(path, target, parameters, *_kernels):
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


@pytest.mark.parametrize(("first", "second"), [
    ("out", "out/03_scores"), ("out", "out/03_scores/more"), ("out/03_scores", "out"), ("out/a", "out/a")])
def test_a_report_above_or_below_one_that_is_being_written_is_refused(execute, tmp_path, first, second):
    refused = []

    def during(parameters):
        with pytest.raises(ItaeError, match=str(tmp_path / second)) as error:
            run(only=["03"], output=second)
        refused.append(error)

    execute.during = during
    run(only=["03"], output=first)
    assert len(refused) == 1
    execute.during = lambda parameters: None
    run(only=["03"], output="out/other")


class TestWhatIsMissing:
    @pytest.fixture
    def tried(self, monkeypatch):
        """List what is downloaded; nothing can be."""
        tried = []

        def fetch(name, **_options):
            tried.append(name)
            if name != "digits":
                raise ItaeError(f"can't get {name}: use a network")

        monkeypatch.setattr(report, "download", fetch)
        monkeypatch.setattr(report, "published_weights", fetch)
        return tried

    def test_only_the_runs_that_need_it_fail_and_no_kernel_starts_for_them(self, execute, notebooks, tried):
        write_profile(notebooks, "sets", "grid: {dataset: [stl10, digits], backbone: [demo, vit_tiny_patch16_224]}\n")
        lines = []
        made = run(profile="sets", only=["01", "03"], say=lines.append)
        assert execute.take() == ["demo-digits/01_first", "demo-digits/03_scores"]
        assert sorted(tried) == ["digits", "stl10", "vit_tiny_patch16_224"], "each is tried once"
        assert {error: len(runs) for error, runs in made.failures.items()} == {
            "can't get stl10: use a network": 2, "can't get vit_tiny_patch16_224: use a network": 4}
        page = made.index.read_text(encoding="utf-8")
        assert page.count("can&#39;t get stl10") == 1
        assert not [line for line in lines if "network" in line], "the command prints errors at its end, each once"
        for failed in made.failed:
            assert "use a network" in (made.folder / failed.page).read_text(encoding="utf-8")

    def test_a_checkpoint_and_runs_that_are_reused_need_no_download(self, execute, notebooks, tried, monkeypatch):
        monkeypatch.setattr(plan, "check_checkpoint", lambda *_: None)
        (notebooks.parent / "w.pth").touch()
        write_notebook(notebooks, "03_scores", parameters=PARAMETERS + "checkpoint = None\n")
        given = {"only": ["03"], "backbone": "vit_tiny_patch16_224", "parameters": {"checkpoint": "w.pth"}}
        for _ in range(2):
            assert not run(**given).failed
        assert tried == ["digits"]


def test_folders_of_one_name_have_reports_of_their_own(execute, tmp_path):
    for year in ("2023", "2024"):
        picture(tmp_path / year / "images" / "1.png")
    options = {"only": ["01"], "output": None}
    first, second, again = (run(dataset=f"{year}/images", **options).folder for year in ("2023", "2024", "2024"))
    assert first.name == "demo-demo-imagefolder-images"
    assert second == again
    assert second.name.startswith(f"{first.name}-")
    assert str(tmp_path / "2023") in (first / "report.json").read_text()
    assert "2024" not in (first / "report.json").read_text()
    (second / "report.json").unlink()
    assert run(dataset="2024/images", **options).folder == second
    shutil.rmtree(first)
    assert run(dataset="2024/images", **options).folder == first


def test_a_named_output_that_replaces_the_report_of_another_data_set_says_so(execute, tmp_path):
    picture(tmp_path / "photos" / "1.png")
    lines = []
    for dataset in ("digits", "photos", "photos"):
        run(dataset=dataset, only=["01"], say=lines.append)
    assert [line for line in lines if "replaces" in line] == [f"{tmp_path}/out: replaces the report of digits"]


@pytest.mark.parametrize("output", ["photos/out", "photos/a/b", "."])
def test_a_report_inside_its_image_folder_does_not_change_the_data_set(execute, tmp_path, output):
    picture(tmp_path / "photos" / "1.png")
    seen = []

    def during(parameters):
        seen.append(read_folder(tmp_path / "photos").images)
        picture(Path(parameters["output_dir"]) / "figures" / "more.png")

    execute.during = during
    run(dataset="photos", only=["01", "03"], output=output)
    assert seen == [[tmp_path / "photos" / "1.png"]] * 2
    assert read_folder(tmp_path / "photos").images == seen[0]
    execute.take()
    assert all(each.reused for each in run(dataset="photos", only=["01", "03"], output=output).runs)
    with pytest.raises(ItaeError, match=str(tmp_path / "photos")):
        run(dataset="photos", only=["01", "03"], output="photos")


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(execute, notebooks, tmp_path):
    write_notebook(notebooks, "03_scores", parameters=PARAMETERS + "device = 'auto'\n")
    with pytest.raises(ItaeError, match="cuda:99"):
        run(only=["03"], parameters={"device": "cuda:99"})
    assert not (tmp_path / "out").exists()


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
        assert {step.notebook.key for step in plan.steps} >= ({"03", "04"} if path.stem == "mteb" else
                                                              {"01", "02", "03"})
