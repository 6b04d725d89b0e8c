import json

import pytest
from nbconvert.filters import markdown2html

from itae_utils.analysis import collection
from itae_utils.analysis.collection import PUBLISHED, collect, judge_images, judge_weights, saved_figure, show_figures
from itae_utils.data.published import DATASETS
from itae_utils.errors import ItaeError
from itae_utils.files import write_json
from itae_utils.results import collected_provenance
from tests.made_results import about, write_pairing
from tests.tiny_notebooks import RESULTS


def test_published_numbers():
    expected = """
        CIFAR-10       0.8449  0.8682  0.7946
        CIFAR-100      0.6502  0.7710  0.5053
        STL-10         0.8276  0.8818  0.7594
        Tiny-ImageNet  0.6823  0.8178  0.5227
    """
    found = [(row.title, row.acc, row.nmi, row.ari) for row in PUBLISHED]
    assert found == [(name, *map(float, scores)) for name, *scores in map(str.split, expected.split("\n")[1:-1])]
    assert {row.dataset for row in PUBLISHED} <= set(DATASETS)


@pytest.mark.parametrize(("backbone", "changes", "label", "why"), [
    ("dinov2_vitb14", {}, None, None),
    ("dinov2_vitb14", {"source": "an origin in other words"}, None, None),
    ("dinov2_vitb14", {"hub": "https://mirror.example.org"}, "weights not checked", "https://mirror.example.org"),
    ("dinov2_vitb14", {"hub": "http://127.0.0.1:80/x"}, "other weights", "http://127.0.0.1"),
    ("dinov2_vitb14", {"hub": "http://localhost:80"}, "other weights", "http://localhost"),
    ("dinov2_vitb14", {"kind": "local", "source": "local file w.pth"}, "weights not checked", "w.pth"),
    ("dinov2_vitb14", {"kind": "random", "hub": "https://x.org", "source": "random"}, "other weights", "random"),
    ("dinov2_vitb14", {"kind": None}, "weights not checked", "do not record"),
    ("demo", {}, "other weights", "no published checkpoint"),
    ("vit_base_patch16_224.mae", {}, None, None),
    ("vit_base_patch16_224.mae", {"kind": "local", "source": "local file w.pth"}, "weights not checked", "w.pth"),
])
def test_weights_are_judged_by_their_kind_and_server(backbone, changes, label, why):
    recorded = about(backbone, "cifar10", **changes)["backbone"]
    caveat = judge_weights({name: value for name, value in recorded.items() if value is not None})
    assert (caveat is None) if why is None else (caveat[0] == label and why in caveat[1])


@pytest.mark.parametrize(("dataset", "changes", "why"), [
    ("cifar10", {}, None), ("tiny-imagenet", {}, None),
    ("cifar10", {"size": 300, "split": "300 of test (10,000)"}, "300 images (300 of test (10,000)) instead of 10,000"),
    ("stl10", {"classes": 3}, "3 classes instead of 10"),
])
def test_images_are_judged_by_name_and_size(dataset, changes, why):
    caveat = judge_images(about("demo", dataset, **changes)["dataset"])
    assert (caveat is None) if why is None else (caveat[0] == "other images" and why in caveat[1])


def test_all_pairings_of_a_folder_are_found(tmp_path):
    write_pairing(tmp_path / "a" / "x", "demo", "digits")
    write_pairing(tmp_path / "dinov2_vitb14-cifar10", "dinov2_vitb14", "cifar10")
    pairings, left_out = collect(tmp_path)
    assert [pairing.title for pairing in pairings] == ["dinov2_vitb14 on cifar10", "demo on digits"]
    assert left_out == []
    assert pairings[0].caveats() == {}
    assert pairings[1].caveats() == {}, "digits are not compared with published numbers"
    assert pairings[1].folders["02"] == tmp_path / "a" / "x" / "02_itae_ablation"


@pytest.mark.parametrize("inside", [".", "03_clustering"])
def test_a_report_without_a_grid_is_one_pairing(tmp_path, monkeypatch, inside):
    write_pairing(tmp_path, "demo", "digits", notebooks=("03",))
    monkeypatch.chdir(tmp_path / inside)
    pairings, left_out = collect(".")
    assert [pairing.title for pairing in pairings] == ["demo on digits"]
    assert left_out == []


def test_reasons_name_the_results_left_out(tmp_path):
    write_pairing(tmp_path / "old", "demo", "digits", date="2026-01-01T00:00:00+00:00")
    write_pairing(tmp_path / "new", "demo", "digits", date="2026-02-01T00:00:00+00:00")
    write_pairing(tmp_path / "half", "demo", "stl10", notebooks=("01",))
    old = tmp_path / "old" / "03_clustering" / "results.json"
    results = json.loads(old.read_text(encoding="utf-8"))
    results["parameters"] |= {"seed": 7, "output_dir": "elsewhere",
                              "options": {"n_init": 10, "normalize": False, "kmeans_seed": 4}}
    write_json(old, results)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "results.json").write_text("{", encoding="utf-8")
    pairings, left_out = collect(tmp_path)
    assert [pairing.folder.name for pairing in pairings] == ["new"]
    torn, half, old = sorted(left_out)
    assert half.startswith("half ")
    assert old.startswith("old ")
    assert "demo on digits than new" in old
    assert "seed=7 instead of 0, normalize=False instead of True" in old
    assert "elsewhere" not in old
    assert str(tmp_path / "torn" / "results.json") in torn


def test_two_runs_of_one_notebook_in_a_folder(tmp_path):
    write_pairing(tmp_path, "demo", "digits", notebooks=("03",), date="2026-01-01T00:00:00+00:00")
    (tmp_path / "03_clustering").rename(tmp_path / "a_copy")
    write_pairing(tmp_path, "demo", "digits", notebooks=("01", "03"), date="2026-02-01T00:00:00+00:00")
    (pairing,), (reason,) = collect(tmp_path)
    assert pairing.folders["03"].name == "03_clustering"
    assert "a_copy" in reason


@pytest.mark.parametrize(("changes", "values"), [
    ({"backbone": "dinov2_vitb14"}, ("dinov2_vitb14", "demo")),
    ({"dataset": "cifar10"}, ("cifar10", "digits")),
    ({"weights_sha256": "cd" * 32}, ("cd" * 6, "ab" * 6)),
    ({"fingerprint": "cd" * 32}, ("cd" * 6, "12" * 6)),
    ({"fingerprint": None}, ("not recorded", "12" * 6)),
])
def test_results_of_other_weights_or_images_do_not_count(tmp_path, changes, values):
    same = {"backbone": "demo", "dataset": "digits", "weights_sha256": "ab" * 32, "fingerprint": "12" * 32}
    write_pairing(tmp_path / "x", notebooks=("02", "03"), **same)
    write_pairing(tmp_path / "x", notebooks=("01",), **same | changes)
    (pairing,), (reason,) = collect(tmp_path)
    assert set(pairing.results) == {"02", "03"}
    assert saved_figure(pairing, "01", "attention_maps") is None
    assert "x/01_artifact_discovery" in reason
    assert "x/03_clustering" in reason
    for value in values:
        assert value in reason


def test_collections_are_not_collected(tmp_path):
    write_pairing(tmp_path / "a", "demo", "digits")
    pairings, _ = collect(tmp_path)
    provenance = collected_provenance(collection.sources(pairings, tmp_path))
    collected = RESULTS | {"notebook": "04_x", "provenance": provenance}
    (tmp_path / "04_x").mkdir()
    write_json(tmp_path / "04_x" / "results.json", collected)
    again, left_out = collect(tmp_path)
    assert [pairing.title for pairing in again] == ["demo on digits"]
    assert left_out == []
    assert [entry["path"] for entry in provenance["collected"]] == [
        f"a/{name}/results.json" for name in ("01_artifact_discovery", "02_itae_ablation", "03_clustering")]


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ItaeError, match="nowhere"):
        collect(tmp_path / "nowhere")
    assert collect(tmp_path) == ([], [])


def test_saved_figures(tmp_path):
    write_pairing(tmp_path, "demo", "digits", notebooks=("01", "03"))
    ((pairing,), _) = collect(tmp_path)
    assert saved_figure(pairing, "01", "attention_maps") == (
        tmp_path / "01_artifact_discovery" / "figures" / "attention_maps.png")
    assert saved_figure(pairing, "01", "unknown") is None
    assert saved_figure(pairing, "02", "ablation_grid") is None
    (tmp_path / "03_clustering" / "figures" / "tsne.png").unlink()
    assert saved_figure(pairing, "03", "tsne") is None


def test_figures_are_shown_with_links(tmp_path, shown):
    write_pairing(tmp_path / "a b", "demo", "digits")
    write_pairing(tmp_path / "c", "demo", "stl10", notebooks=("03",))
    pairings, _ = collect(tmp_path)
    show_figures(pairings, "01", "attention_maps", tmp_path / "04_x")
    text, image, missing = shown
    page = markdown2html(text.data)
    for link in ("01_artifact_discovery.html", "figures/attention_maps.pdf"):
        assert f'href="../a%20b/01_artifact_discovery/{link}"' in page
    assert image.alt == "attention maps of demo on digits"
    assert "demo on stl10" in missing.data
