"""Every notebook runs to its end and says the right things: with artifacts or none, with labels or none."""

import json
from importlib import resources

import jsonschema
import nbformat
import pytest

from itae_utils.data.datasets import load_dataset
from itae_utils.report.report import run_report

pytestmark = pytest.mark.slow

SMALL = {"limit": 200, "seeds": 2, "n_init": 1, "examples": 3, "percents": [1.0, 10.0]}
NAMES = ["01_artifact_discovery", "02_itae_ablation", "03_clustering"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A flat folder of 60 digits, and one of 20: too few patches to fit θ."""
    root, digits = tmp_path_factory.mktemp("pictures"), load_dataset("digits")
    for name, count in [("many", 60), ("few", 20)]:
        (root / name).mkdir()
        for index in range(count):
            digits[index][0].save(root / name / f"{index:02}.png")
    return root


@pytest.fixture(scope="module", params=["planted", "nothing found", "no labels", "no labels, nothing found"])
def run(request, tmp_path_factory, pictures):
    """The case, the output folder, and what each notebook showed, by its name."""
    backbone, dataset = {
        "planted": ("demo", "digits"),
        "nothing found": ("demo-clean", "digits"),
        "no labels": ("demo", f"imagefolder:{pictures / 'many'}"),
        "no labels, nothing found": ("demo-clean", f"imagefolder:{pictures / 'few'}"),
    }[request.param]
    output = tmp_path_factory.mktemp("report")
    report = run_report(backbone=backbone, dataset=dataset, only=["01", "02", "03"], parameters=SMALL, output=output,
                        say=lambda line: None)
    assert [run.error for run in report.runs] == [None] * 3
    return request.param, output, {name: outputs(output / name / f"{name}.ipynb") for name in NAMES}


def outputs(path):
    notebook = nbformat.read(path, as_version=4)
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def words(shown):
    """All text of the outputs, in order."""
    data = [output.get("data", {}) for output in shown]
    return "\n".join(each.get("text/markdown") or each.get("text/html") or each.get("text/plain", "") for each in data)


def results(output, name):
    return json.loads((output / name / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_results_fit_the_schema_and_their_figures_are_there(run, name):
    _, output, _ = run
    schema = json.loads(resources.files("itae_utils").joinpath("results.schema.json").read_text(encoding="utf-8"))
    found = results(output, name)
    jsonschema.validate(found, schema)
    assert found["notebook"] == name
    assert found["rows"]
    assert found["headline"]
    saved = {path.name for path in (output / name / "figures").iterdir()}
    assert saved == {f"{figure}.{suffix}" for figure in found["figures"] for suffix in ("png", "pdf")}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_printed_and_every_figure_is_shown(run, name):
    _, output, shown = run
    assert not [each for each in shown[name] if each.output_type in ("stream", "error")]
    pictures = [each for each in shown[name] if "image/png" in each.get("data", {})]
    assert len(pictures) == len(results(output, name)["figures"])


@pytest.mark.parametrize("name", NAMES)
def test_first_output_says_whether_artifacts_were_planted_and_labels_are_missing(run, name):
    case, _, shown = run
    text = words(shown[name])
    assert ("artifacts of this backbone were planted" in text) == (case in ("planted", "no labels"))
    assert ("images, without labels" in words(shown[name][:1])) == ("no labels" in case)


def test_discovery_says_what_was_found(run):
    case, output, shown = run
    text, found = words(shown["01_artifact_discovery"]), results(output, "01_artifact_discovery")
    planted = case in ("planted", "no labels")
    assert ("No artifacts were found" in text) == (case == "nothing found")
    assert ("Too few patches to look for artifacts" in text) == (case == "no labels, nothing found")
    assert ("attention_shares" in found["figures"]) == planted
    assert (found["thresholds"]["‖key‖, last block"] is not None) == planted
    assert ({"precision", "recall"} <= {row["metric"] for row in found["rows"]}) == planted
    assert ("true artifacts of this backbone are unknown" in text) == (not planted)
    if planted:
        rows = {(row["variant"], row["metric"]): row["value"] for row in found["rows"]}
        assert rows["key", "precision"] >= 0.99
        assert rows["key", "recall"] >= 0.98
        assert rows["baseline", "attention_on_artifacts"] > 0.5 > 10 * rows["itae", "attention_on_artifacts"]


def test_ablation_measures_what_can_be_measured(run):
    case, output, shown = run
    found = results(output, "02_itae_ablation")
    assert {row["metric"] for row in found["rows"]} == ({"change"} if "no labels" in case else {"acc", "nmi", "ari"})
    variants = {row["variant"] for row in found["rows"]}
    assert {"baseline", "key min 1 %", "value scale 10 %", "random like query 1 %", "3 blocks, all rows"} <= variants
    assert ("key min auto" in variants) == ("oracle" in variants) == ("nothing found" not in case)
    in_pass = len([name for name in variants if "rows" not in name])
    assert f"**{in_pass} variants ran in one pass**" in words(shown["02_itae_ablation"])


def test_clustering_compares_all_kinds_of_features(run):
    case, output, _ = run
    found = results(output, "03_clustering")
    kinds = {(row["variant"], row["backbone"]) for row in found["rows"]}
    name = "demo-clean" if "nothing found" in case else "demo"
    of_the_model = ("untrained", "baseline", "random control", "itae")
    expected = {("raw pixels", "no model"), *((kind, name) for kind in of_the_model)}
    if name == "demo":
        expected |= {("oracle", "demo"), ("baseline", "demo-clean")}
    assert kinds == expected
    if "nothing found" in case:
        baseline, itae = ([row["value"] for row in found["rows"]
                           if row["variant"] == kind and "difference" not in row["metric"]]
                          for kind in ("baseline", "itae"))
        assert itae == baseline


def test_clustering_checks_the_bench_only_where_it_is_one(run):
    case, _, shown = run
    text = words(shown["03_clustering"])
    assert ("ITAE recovers at least 80 % of that cost" in text) == (case == "planted")
    assert ("Only `demo` on `digits` has expected results" in text) == (case != "planted")


def test_clustering_without_labels_shows_the_clusters(run):
    case, output, _ = run
    figures = results(output, "03_clustering")["figures"]
    expected = {
        "planted": ["scores", "tsne", "confusion", "class_gains"],
        "nothing found": ["scores", "tsne", "confusion"],
        "no labels": ["scores", "clusters_baseline", "clusters_itae"],
        "no labels, nothing found": ["scores", "clusters_baseline"],
    }
    assert figures == expected[case]
