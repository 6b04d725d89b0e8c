"""Every notebook runs to its end and shows what was found: with artifacts or none, with labels or none."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import numpy as np
import pytest

from itae_utils.analysis.bench import RECOVERED
from itae_utils.data.datasets import load_dataset
from itae_utils.files import OUTPUT_MARK
from itae_utils.method.setting import ATTENUATIONS
from itae_utils.report.report import run_report
from itae_utils.results import read_results
from tests.browser import open_chromium

pytestmark = pytest.mark.slow

SMALL = {"limit": 200, "seeds": 2, "n_init": 1, "examples": 3, "percents": [1.0, 10.0]}
EXPLORER, *NAMES = ["00_explore", "01_artifact_discovery", "02_itae_ablation", "03_clustering", "05_remedies"]


@dataclass
class Case:
    """A backbone and a data set, and after the run the outputs and results of each notebook by its name."""

    backbone: str
    images: str
    outputs: dict[str, list] = field(default_factory=dict)
    results: dict[str, dict] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def planted(self) -> bool:
        return self.backbone == "demo"

    @property
    def labelled(self) -> bool:
        return self.images == "digits"

    def text(self, name: str, end: int | None = None) -> str:
        """Return the text that a notebook shows, in order."""
        data = [output.get("data", {}) for output in self.outputs[name][:end]]
        kinds = ("text/markdown", "text/html", "text/plain")
        return "\n".join(next((each[kind] for kind in kinds if each.get(kind)), "") for each in data)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Write a flat folder of 60 digits, and one of 20, which has too few patches to fit θ."""
    root, digits = tmp_path_factory.mktemp("pictures"), load_dataset("digits")
    for name, count in [("many", 60), ("few", 20)]:
        (root / name).mkdir()
        for index in range(count):
            digits[index][0].save(root / name / f"{index:02}.png")
    return root


@pytest.fixture(scope="module", ids=" on ".join, params=[
    ("demo", "digits"), ("demo-clean", "digits"), ("demo", "many"), ("demo-clean", "few")])
def case(request, tmp_path_factory, pictures):
    case = Case(*request.param, folder=tmp_path_factory.mktemp("report"))
    dataset = case.images if case.labelled else f"imagefolder:{pictures / case.images}"
    report = run_report(backbone=case.backbone, dataset=dataset, only=["00", "01", "02", "03", "05"],
                        parameters=SMALL, output=case.folder, say=lambda line: None)
    assert [run.error for run in report.runs] == [None] * 5
    for name in (EXPLORER, *NAMES):
        notebook = nbformat.read(case.folder / name / f"{name}.ipynb", as_version=4)
        case.outputs[name] = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        case.results[name] = read_results(case.folder / name / "results.json")
    return case


@pytest.mark.parametrize("name", [EXPLORER, *NAMES])
def test_results_figures_and_description(case, name):
    results = case.results[name]
    assert results["notebook"] == name
    assert results["rows"]
    assert results["headline"]
    saved = {path.name for path in (case.folder / name / "figures").iterdir() if path.name != OUTPUT_MARK}
    assert saved == {f"{figure}.{suffix}" for figure in results["figures"] for suffix in ("png", "pdf", "svg")}
    shown = [each for each in case.outputs[name] if "image/png" in each.get("data", {})]
    assert len(shown) == len(results["figures"])
    assert all(each.metadata["image/png"]["caption"].endswith(".") for each in shown)
    assert not [each for each in case.outputs[name] if each.output_type in ("stream", "error")]
    assert ("were planted" in case.text(name)) == case.planted
    assert ("10 classes" in case.text(name, 1)) == case.labelled


def test_the_explorer_shows_the_images_of_the_run(case):
    count = {"many": 60, "few": 20}.get(case.images, SMALL["limit"])
    text = f"{min(128, count)} images have their attention in this page, and {count} are on the map"
    assert text in case.text(EXPLORER)
    rows = {row["metric"]: row["value"] for row in case.results[EXPLORER]["rows"]}
    assert (rows["cluster_changed"] > 0) == (rows["neighbours_kept"] < 1) == case.planted


def test_pages_work_in_a_browser_and_have_no_accessibility_faults(case):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    with open_chromium() as browser:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        pages = [case.folder / name / f"{name}.html" for name in (EXPLORER, *NAMES)]
        for path in [case.folder / "index.html", *pages]:
            page.goto(path.as_uri())
            page.evaluate("() => Promise.all([...document.images].map((image) => "
                          "Object.assign(image, { loading: 'eager' }).decode()))")  # an error if one can't be shown
            for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme=scheme)
                faults = [fault for fault in axe.Axe().run(page).response["violations"] if fault["impact"] != "minor"]
                assert not [(path.name, width, scheme, each["id"], each["nodes"][0]["html"][:200]) for each in faults]
                assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.goto(pages[0].as_uri())
        assert page.locator(".strip button").count() == min(128, {"many": 60, "few": 20}.get(case.images, 200))
        assert not errors


def test_discovery_shows_what_was_found(case):
    text, results = case.text(NAMES[0]), case.results[NAMES[0]]
    assert ("No artifacts were found" in text) == (not case.planted and case.labelled)
    assert ("Too few patches" in text) == (case.images == "few")
    assert ("artifacts of this backbone are unknown" in text) == (not case.planted)
    assert ("attention_shares" in results["figures"]) == case.planted
    assert (results["thresholds"]["‖key‖₂, last block"] is not None) == case.planted
    assert ({"precision", "recall"} <= {row["metric"] for row in results["rows"]}) == case.planted
    if case.planted:
        rows = {(row["variant"], row["metric"]): row["value"] for row in results["rows"]}
        assert rows["key", "precision"] >= 0.99
        assert rows["key", "recall"] >= 0.98
        assert rows["baseline", "attention_on_artifacts"] > 0.5 > 10 * rows["itae", "attention_on_artifacts"]


def test_maps_of_the_example_images_are_saved(case):
    with np.load(case.folder / NAMES[0] / "attention.npz") as arrays:
        assert arrays["before"].shape == arrays["after"].shape == (3, 7, 7)
        assert arrays["artifacts"].any() == case.planted
        assert ("names" in arrays) == (not case.labelled)


def test_each_theta_of_the_ablation_is_listed_once(case):
    thresholds = case.results[NAMES[1]]["thresholds"].values()
    numbers = [theta for theta in thresholds if isinstance(theta, float)]
    assert len(set(numbers)) == len(numbers) == 6 + case.planted


def test_ablation_measures_all_variants(case):
    rows = case.results[NAMES[1]]["rows"]
    assert {row["metric"] for row in rows} == ({"acc", "nmi", "ari"} if case.labelled else {"change"})
    variants = {row["variant"] for row in rows}
    assert {"baseline", "key min 1 %", "value scale 10 %", "random like query 1 %", "3 blocks, all rows"} <= variants
    assert ("key min auto" in variants) == ("oracle" in variants) == case.planted
    assert ({f"edit {attenuation}" for attenuation in ATTENUATIONS} <= variants) == case.planted
    in_grid = {f"edit {name}" for name in ("min", "mask", "mean", "scale")}  # equal to "key min auto" and so on
    in_pass = len([name for name in variants - in_grid if "rows" not in name])
    assert f"**{in_pass} variants" in case.text(NAMES[1])


def test_clustering_compares_all_kinds_of_features(case):
    rows = case.results[NAMES[2]]["rows"]
    expected = {("raw pixels", "no model"), *((kind, case.backbone) for kind in (
        "untrained", "baseline", "random control", "itae"))}
    if case.planted:
        expected |= {("oracle", "demo"), ("baseline", "demo-clean")}
    assert {(row["variant"], row["backbone"]) for row in rows} == expected
    baseline, itae = ([row["value"] for row in rows if row["variant"] == kind and "difference" not in row["metric"]
                       and row["backbone"] == case.backbone] for kind in ("baseline", "itae"))
    assert (itae == baseline) == (not case.planted)


def test_clustering_shows_the_figures_and_expected_results_of_the_case(case):
    text, expected = case.text(NAMES[2]), case.planted and case.labelled
    assert (RECOVERED in text, "has expected results" in text) == (expected, not expected)
    figures = ["scores", "tsne", "confusion"] if case.labelled else ["scores", "clusters_baseline"]
    if case.planted:
        figures.append("class_gains" if case.labelled else "clusters_itae")
    assert case.results[NAMES[2]]["figures"] == figures


def test_remedies_are_compared_and_those_that_find_nothing_change_nothing(case):
    rows, text = case.results[NAMES[3]]["rows"], case.text(NAMES[3])
    acc = {row["variant"]: row["value"] for row in rows if row["metric"] == "acc"}
    shares = {row["variant"]: row["value"] for row in rows if row["metric"] == "attention_on_artifacts"}
    rivals = {"itae", "registers", "late registers", "register bias", "neurons zeroed", "registers and itae"}
    assert rivals | {"baseline", "no patches"} == set(shares)
    assert bool(acc) == case.labelled
    if case.labelled:
        assert set(acc) == set(shares) | {"mean of patches", "mean of normal patches", "[CLS] and mean"}
        assert all((acc[name] == acc["baseline"]) == (not case.planted) for name in rivals - {"registers and itae"})
    if case.planted:
        assert shares["baseline"] > 0.5 > 10 * max(shares[name] for name in rivals)
        assert "4 of 4" in text, "planted neurons"
    assert not (case.planted and "★" in text)
    ranked = case.labelled and not case.planted
    assert case.results[NAMES[3]]["figures"] == ["score_against_cost"] * ranked + ["remedy_maps"]
    assert ("does not rank" in text) == (case.planted and case.labelled)
    assert ("equal to the bit" in text) == (case.backbone == "demo")


def test_remedies_do_no_harm_to_a_model_without_artifacts(case):
    harm = dict(re.findall(r"<th>([^<]+)</th>\s*<td>(yes|no)</td>", case.text(NAMES[3])))
    assert bool(harm) == case.planted
    if case.planted:
        assert [name for name, equal in harm.items() if equal == "no"] == ["no patches", "mean of patches"]
        assert len(harm) == 9
