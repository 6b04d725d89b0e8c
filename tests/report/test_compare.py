import base64
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from torch.utils.data import Subset

from itae_utils.analysis.two_runs import compare_clusters, runs_that_fell, save_clusters
from itae_utils.cli import main
from itae_utils.errors import ItaeError
from itae_utils.files import write_json
from itae_utils.report import report as reports
from itae_utils.report.compare import compare_page, read_pair
from itae_utils.report.runs import RECORD_SCHEMA
from tests.browser import open_chromium
from tests.conftest import array_dataset
from tests.report.test_pages import PIXEL, external_references
from tests.tiny_notebooks import DELETED, RESULTS, changed

RNG = np.random.default_rng(0)
TARGETS = np.repeat(np.arange(4), 30)
RIGHT = np.stack([TARGETS, TARGETS])
RUNS = ("01_first", "03_scores")
WRONG = np.stack([RNG.permutation(TARGETS), RNG.permutation(TARGETS)])


def write_report(folder: Path, results: dict = RESULTS, *, runs: tuple[str, ...] = ("03_scores",), itae=RIGHT,
                 dataset=None, figure: bytes = b"picture") -> Path:
    """Write what a comparison reads of a report: its record, and results, figure and clusters of each run."""
    for run in runs:
        (folder / run / "figures").mkdir(parents=True)
        (folder / run / "figures" / "cover.png").write_bytes(figure)
        write_json(folder / run / "results.json", results)
        save_clusters(folder / run, dataset or array_dataset(len(TARGETS)), TARGETS, {"baseline": WRONG, "itae": itae})
    entries = [{"notebook": run, "pairing": "", "parameters": {}, "page": f"{run}/{run}.html", "results": "yes"}
               for run in runs]
    write_json(folder / "report.json", {"schema": RECORD_SCHEMA, "profile": "demo", "description": "", "grid": {},
                                        "notebooks": entries})
    return folder


def page_of(one: Path, other: Path, path: Path) -> str:
    pair = read_pair(one, other)
    compare_page(pair, *compare_clusters(pair.clusters, draws=50), path)
    page = path.read_text(encoding="utf-8")
    assert not external_references(page)
    return page


def rows_of(page: str) -> list[tuple[str, ...]]:
    """Return the rows of the table of changes."""
    table = page.partition('class="changes"')[2].partition("</table>")[0].partition("<tbody>")[2]
    rows = re.findall("<tr>(.*?)</tr>", table, re.DOTALL)
    return [tuple(re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)) for row in rows]


def test_a_parameter_an_image_and_a_version_are_named(tmp_path):
    results = changed(changed(RESULTS, "parameters.k", 7), "provenance.versions.torch", "2.9.1")
    images = array_dataset(len(TARGETS))
    images.images[5] += 1
    one = write_report(tmp_path / "a", results=RESULTS)
    other = write_report(tmp_path / "b", results=results, dataset=images)
    assert rows_of(page_of(one, other, tmp_path / "c.html")) == [
        ("parameter k", "none", "7"), ("version of torch", "2.9.0", "2.9.1"), ("images that only one has", "5", "5")]


def test_images_of_a_sample_are_those_of_the_whole(tmp_path):
    images = array_dataset(len(TARGETS))
    sample = Subset(images, range(0, len(TARGETS), 2))
    sample.images, sample.targets = images.images[::2], images.targets[::2]
    page = page_of(write_report(tmp_path / "a"), write_report(tmp_path / "b", dataset=sample), tmp_path / "c.html")
    assert rows_of(page) == [("images that only one has", f"1, 3, 5 and {len(TARGETS) // 2 - 3} more", "none")]


def test_it_names_what_is_the_same_and_links_to_both(tmp_path):
    results = changed(RESULTS, "provenance.versions.torch", "2.9.1")
    page = page_of(write_report(tmp_path / "a"), write_report(tmp_path / "b", results=results), tmp_path / "b/c.html")
    same = re.search(r"The same in both: ([^<]*)\.<", page)[1].split(", ")
    assert {"version of itae-utils", "weights", "device", "number of images"} <= set(same)
    assert "version of torch" not in same
    for name, link in re.findall(r'<a href="([^"]+)">(\w)</a> of', page):
        assert (tmp_path / "b" / name).resolve() == tmp_path / link / "index.html"


def test_reports_that_are_the_same_have_no_changes(tmp_path):
    page = page_of(write_report(tmp_path / "a"), write_report(tmp_path / "b"), tmp_path / "c.html")
    assert rows_of(page) == []
    assert "are the same" in page


def test_what_differs_in_some_runs_names_them(tmp_path):
    one, other = (write_report(tmp_path / name, runs=RUNS) for name in "ab")
    write_json(other / "01_first" / "results.json", changed(RESULTS, "parameters.k", 7))
    assert rows_of(page_of(one, other, tmp_path / "c.html")) == [("parameter k (01_first)", "none", "7")]


def test_a_run_of_one_report_alone_is_named(tmp_path):
    one, other = write_report(tmp_path / "a"), write_report(tmp_path / "b", runs=RUNS)
    assert rows_of(page_of(one, other, tmp_path / "c.html")) == [("notebook 01_first", "not run", "run")]


def test_figures_stand_side_by_side(tmp_path):
    one, other = write_report(tmp_path / "a", figure=b"one"), write_report(tmp_path / "b", figure=b"two")
    page = page_of(one, other, tmp_path / "c.html")
    found = [base64.b64decode(each) for each in re.findall(r"data:image/png;base64,([\w+/=]+)", page)]
    assert found == [b"one", b"two"]


def test_pages_have_no_accessibility_faults(tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    one = write_report(tmp_path / "a", figure=PIXEL.getvalue())
    other = write_report(tmp_path / "b", changed(RESULTS, "parameters.k", 7), figure=PIXEL.getvalue())
    page_of(one, other, tmp_path / "b/beside-a.html")
    CliRunner().invoke(main, ["reports", str(tmp_path)])
    with open_chromium() as browser:
        page = browser.new_page()
        for name, width in itertools.product(("b/beside-a.html", "index.html"), (1280, 390)):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto((tmp_path / name).as_uri())
            faults = [fault for fault in axe.Axe().run(page).response["violations"] if fault["impact"] != "minor"]
            assert not [(name, fault["id"], fault["nodes"][0]["html"][:200]) for fault in faults]
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("same", [True, False])
def test_intervals_are_paired_if_the_images_are_the_same(tmp_path, same):
    images = array_dataset(len(TARGETS), seed=0 if same else 1)
    one, other = write_report(tmp_path / "a", itae=WRONG), write_report(tmp_path / "b", dataset=images)
    rows, (note, _) = compare_clusters(read_pair(one, other).clusters, draws=200)
    assert ("are paired" in note) == same
    baseline, itae = (next(row for row in rows if row["variant"] == name and row["score"] == "ACC")
                      for name in ("baseline", "itae"))
    assert itae["after"] == 1 > itae["before"]
    assert itae["difference"] == pytest.approx(itae["after"] - itae["before"])
    assert 0 < itae["low"] < itae["difference"] < itae["high"]
    assert (baseline["low"] == baseline["high"] == 0) == same, "equal clusters of the same images never differ"
    assert baseline["difference"] == 0


def test_only_a_clear_fall_counts(tmp_path):
    better, worse, again = (write_report(tmp_path / name, itae=labels)
                            for name, labels in (("a", RIGHT), ("b", WRONG), ("c", RIGHT)))
    fell = {pair: runs_that_fell(compare_clusters(read_pair(*pair).clusters, draws=50)[0])
            for pair in ((better, worse), (worse, better), (better, again))}
    assert list(fell.values()) == [["03_scores"], [], []]


class TestErrors:
    def check(self, one: Path, other: Path, message: str) -> None:
        result = CliRunner().invoke(main, ["compare", str(one), str(other), "--output", str(one.parent / "c.html")])
        assert result.exit_code == 2
        assert re.search(message, result.output), result.output
        assert len(result.output.strip().splitlines()) == 1
        assert not (one.parent / "c.html").exists()

    def test_a_folder_that_is_no_report_or_given_twice(self, tmp_path):
        report = write_report(tmp_path / "a")
        (tmp_path / "empty").mkdir()
        self.check(report, tmp_path / "empty", r"'.*empty' holds no report\.json: give")
        self.check(report, tmp_path / "a" / ".", "given twice")

    def test_another_schema_damaged_results_and_nothing_in_common(self, tmp_path):
        one, other, third = (write_report(tmp_path / name) for name in "abd")
        record = json.loads((other / "report.json").read_text(encoding="utf-8"))
        write_json(other / "report.json", record | {"schema": 2})
        self.check(one, other, "schema 2")
        write_json(third / "03_scores" / "results.json", changed(RESULTS, "rows", DELETED))
        self.check(one, third, "rows")
        self.check(one, write_report(tmp_path / "e", runs=("01_first",)), "in common.*03_scores and 01_first")

    def test_figures_that_were_deleted(self, tmp_path):
        one, other = write_report(tmp_path / "a"), write_report(tmp_path / "b")
        (other / "03_scores" / "figures" / "cover.png").unlink()
        self.check(one, other, "cover.png is missing: run the report again")

    def test_an_output_that_is_no_page(self, tmp_path):
        one, other = write_report(tmp_path / "a"), write_report(tmp_path / "b")
        result = CliRunner().invoke(main, ["compare", str(one), str(other), "--output", str(tmp_path / "c.txt")])
        assert "must end in .html" in result.output


def test_damaged_clusters_are_named(tmp_path):
    one, other = write_report(tmp_path / "a"), write_report(tmp_path / "b")
    (one / "03_scores" / "clusters.npz").write_bytes(b"PK")
    with pytest.raises(ItaeError, match=r"clusters\.npz"):
        _ = read_pair(one, other).clusters


@pytest.mark.parametrize(("labels", "failed", "status"), [(WRONG, (), 3), (RIGHT, (), 0), (WRONG, ("a run",), 1)])
def test_a_report_against_an_earlier_one_fails_if_acc_fell(tmp_path, monkeypatch, labels, failed, status):
    earlier, new = write_report(tmp_path / "a"), tmp_path / "new"

    def run_report(*, against: Path, **_: object) -> SimpleNamespace:
        assert against == earlier
        write_report(new, itae=labels)
        return SimpleNamespace(folder=new, index=new / "index.html", failures={}, failed=failed)

    monkeypatch.setattr(reports, "run_report", run_report)
    result = CliRunner().invoke(main, ["report", "--output", str(new), "--against", str(earlier)])
    assert result.exit_code == status, result.output
    assert ("interval: 03_scores" in result.output) == (status == 3)
    assert (new / "beside-a.html").is_file() == (status != 1)


@pytest.mark.parametrize("arguments", [["--output", "{report}"], ["--from", "{report}", "--output", "{report}"]])
def test_a_report_against_itself_or_against_none_is_refused_before_it_runs(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(reports, "execute", lambda *_: pytest.fail("ran"))
    earlier = write_report(tmp_path / "a", runs=("01_artifact_discovery",))
    before = sorted(path for path in earlier.rglob("*"))
    arguments = [each.format(report=earlier) for each in arguments]
    for folder, words in ((earlier, "would be written"), (tmp_path / "none", "holds no report.json")):
        result = CliRunner().invoke(main, ["report", *arguments, "--against", str(folder)])
        assert result.exit_code == 2
        assert words in result.output
    assert sorted(path for path in earlier.rglob("*")) == before


def test_clusters_are_read_once(tmp_path, monkeypatch):
    calls, load = [], np.load
    pair = read_pair(write_report(tmp_path / "a", runs=RUNS), write_report(tmp_path / "b", runs=RUNS))
    monkeypatch.setattr(np, "load", lambda path: calls.append(path) or load(path))
    compare_page(pair, *compare_clusters(pair.clusters, draws=5), tmp_path / "c.html")
    assert len(calls) == len(set(calls)) == 2 * len(RUNS)
