import json
import re

import pytest

from itae_utils.analysis import collection
from itae_utils.analysis.collection import collect, judge_images, judge_weights, saved_figure, show_figures, sources
from itae_utils.errors import ItaeError
from itae_utils.files import write_json
from itae_utils.results import collected_provenance
from tests.made_results import about, write_cell
from tests.tiny_notebooks import RESULTS


@pytest.mark.parametrize(("backbone", "changes", "kind", "why"), [
    ("dinov2_vitb14", {}, None, None),
    ("dinov2_vitb14", {"source": "DINOv2, Meta, through timm; position embedding by Meta's rule"}, None, None),
    ("dinov2_vitb14", {"hub": "https://mirror.example.org"}, "unverified", "served by https://mirror.example.org"),
    ("dinov2_vitb14", {"hub": "http://127.0.0.1:80/x"}, "stand-in", r"served by http://127\.0\.0\.1"),
    ("dinov2_vitb14", {"hub": "http://localhost:80"}, "stand-in", "served by"),
    ("dinov2_vitb14", {"source": "local file w.pth"}, "unverified", r"from a local file w\.pth"),
    ("dinov2_vitb14", {"source": "vit_base_patch14_dinov2 with random weights"}, "stand-in", "random weights"),
    ("demo", {}, "stand-in", "artifacts were planted"),
    ("demo-clean", {}, "stand-in", "no published checkpoint"),
    ("vit_base_patch16_224.mae", {}, None, None),
    ("vit_base_patch16_224.mae", {"source": "local file w.pth"}, "unverified", "local file"),
    ("vit_base_patch16_224.mae", {"source": "x with random weights"}, "stand-in", "random weights"),
])
def test_weights_are_called_what_they_are(backbone, changes, kind, why):
    mark = judge_weights(about(backbone, "cifar10", **changes)["backbone"])
    if kind is None:
        assert mark is None
    else:
        assert mark[0] == kind
        assert re.search(why, mark[1])


@pytest.mark.parametrize(("dataset", "changes", "why"), [
    ("cifar10", {}, None), ("tiny-imagenet", {}, None),
    ("cifar10", {"size": 300, "split": "300 of test (10,000)"}, "300 images (300 of test (10,000)) instead of 10,000"),
    ("stl10", {"classes": 3}, "3 classes instead of 10"),
    ("digits", {}, "none of the paper's data sets"),
    ("imagefolder:/x", {}, "none of the paper's data sets"),
])
def test_images_are_called_what_they_are(dataset, changes, why):
    mark = judge_images(about("demo", dataset, **changes)["dataset"])
    assert (mark is None) if why is None else (mark[0] == "stand-in" and why in mark[1])


def test_all_cells_of_a_folder_are_found(tmp_path):
    write_cell(tmp_path / "dinov2_vitb14-cifar10", "dinov2_vitb14", "cifar10")
    write_cell(tmp_path / "a" / "x", "demo", "digits")
    cells, left_out = collect(tmp_path)
    assert [cell.title for cell in cells] == ["dinov2_vitb14 on cifar10", "demo on digits"]
    assert left_out == []
    assert cells[0].marks() == {}
    assert set(cells[1].marks()) == {"backbone", "dataset"}
    assert cells[1].path("02") == tmp_path / "a" / "x" / "02_itae_ablation"


def test_a_plain_report_is_one_cell(tmp_path):
    write_cell(tmp_path, "demo", "digits", notebooks=("03",))
    cells, _ = collect(tmp_path)
    assert [cell.title for cell in cells] == ["demo on digits"]


def test_what_is_left_out_is_said(tmp_path):
    write_cell(tmp_path / "old", "demo", "digits", date="2026-01-01T00:00:00+00:00")
    write_cell(tmp_path / "new", "demo", "digits", date="2026-02-01T00:00:00+00:00")
    write_cell(tmp_path / "half", "demo", "stl10", notebooks=("01",))
    told = tmp_path / "old" / "03_clustering" / "results.json"
    results = json.loads(told.read_text(encoding="utf-8"))
    results["parameters"] |= {"seed": 7, "output_dir": "elsewhere"}
    told.write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "results.json").write_text("{", encoding="utf-8")
    cells, left_out = collect(tmp_path)
    assert [cell.folder.name for cell in cells] == ["new"]
    assert len(left_out) == 3
    for words in ("old is an earlier run of demo on digits than new, with seed=7 instead of 0",
                  "half has no results of notebook 03", "can't be read as results"):
        assert any(words in line for line in left_out), words


def test_collections_are_not_collected(tmp_path):
    write_cell(tmp_path / "a", "demo", "digits")
    cells, _ = collect(tmp_path)
    collected = RESULTS | {"notebook": "04_x", "provenance": collected_provenance(sources(cells, tmp_path))}
    (tmp_path / "04_x").mkdir()
    write_json(tmp_path / "04_x" / "results.json", collected)
    again, left_out = collect(tmp_path)
    assert [cell.title for cell in again] == ["demo on digits"]
    assert left_out == []
    assert [entry["path"] for entry in collected["provenance"]["collected"]] == [
        f"a/{name}/results.json" for name in ("01_artifact_discovery", "02_itae_ablation", "03_clustering")]


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ItaeError, match="is no folder: name a report"):
        collect(tmp_path / "nowhere")
    assert collect(tmp_path) == ([], [])


def test_saved_figures(tmp_path):
    write_cell(tmp_path, "demo", "digits", notebooks=("01", "03"))
    ((cell,), _) = collect(tmp_path)
    assert saved_figure(cell, "01", "attention_maps") == (
        tmp_path / "01_artifact_discovery" / "figures" / "attention_maps.png")
    assert saved_figure(cell, "01", "unknown") is None
    assert saved_figure(cell, "02", "ablation_grid") is None
    (tmp_path / "03_clustering" / "figures" / "tsne.png").unlink()
    assert saved_figure(cell, "03", "tsne") is None


def test_figures_are_shown_with_links(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(collection, "display", lambda *things: shown.extend(things))
    write_cell(tmp_path / "a", "demo", "digits")
    write_cell(tmp_path / "b", "demo", "stl10", notebooks=("03",))
    cells, _ = collect(tmp_path)
    show_figures(cells, "01", "attention_maps", tmp_path / "04_x")
    text, image, missing = shown
    assert text.data == ("**demo on digits** · [page](../a/01_artifact_discovery/01_artifact_discovery.html) · "
                         "[PDF](../a/01_artifact_discovery/figures/attention_maps.pdf)")
    assert image.alt == "attention maps of demo on digits"
    assert missing.data == "Not drawn for demo on stl10."
    shown.clear()
    show_figures([], "01", "attention_maps", tmp_path)
    assert [thing.data for thing in shown] == ["Nothing was run."]
