import copy
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from itae_utils import files, results
from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE
from tests.tiny_notebooks import RESULTS

SCHEMA = json.loads((PACKAGE / "results.schema.json").read_text(encoding="utf-8"))


def changed(path: str, value: object = None, *, delete: bool = False) -> dict:
    document = copy.deepcopy(RESULTS)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = document
    for part in parents:
        place = place[part]
    if delete:
        del place[last]
    else:
        place[last] = value
    return document


def written(folder: Path, document: dict = RESULTS) -> Path:
    return results.write_results(folder, **{key: value for key, value in document.items() if key != "schema"})


def test_schema_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("document", [
    changed("schema", 2),
    *(changed(part, delete=True) for part in RESULTS),
    changed("notebook", ""),
    changed("provenance.versions", delete=True),
    changed("provenance.backbone", None),
    changed("provenance.backbone.source", delete=True),
    changed("provenance.dataset.size", delete=True),
    changed("parameters", []),
    changed("thresholds", {"itae": "auto"}),
    changed("thresholds", {"itae": [1.0, "auto"]}),
    changed("rows", {}),
    changed("rows.0", "acc"),
    changed("rows.0.variant", delete=True),
    changed("rows.0.extra", 1),
    changed("rows.0.n", 1.5),
    changed("rows.0.n", -1),
    changed("rows.0.n", True),
    changed("rows.0.seed", "0"),
    changed("rows.0.value", None),
    changed("rows.0.value", "0.5"),
    changed("figures", "cover"),
    changed("figures.0", 1),
    changed("headline.0.note", delete=True),
    changed("headline.0.value", None),
    changed("provenance.backbone.kind", "stolen"),
])
def test_invalid_results_are_refused_in_one_line(document):
    with pytest.raises(ItaeError) as refused:
        results.check_results(document)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("document", [
    changed("rows", []), changed("rows.0.seed", None), changed("rows.0.value", 1), changed("thresholds", {}),
    changed("headline.0.value", "3 of 4"), changed("provenance.seconds", 1.5), changed("figures", []),
    changed("rows.0", {**RESULTS["rows"][0], "source": "key", "attenuation": "min", "theta": "5 %"}),
    changed("rows.0", {**RESULTS["rows"][0], "source": None, "attenuation": None, "theta": None}),
    changed("provenance.backbone.kind", "local"),
])
def test_valid_results_are_accepted(document):
    results.check_results(document)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("nan")])
@pytest.mark.parametrize("place", ["rows.0.value", "parameters.k", "thresholds.itae", "headline.0.value"])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, place, number):
    with pytest.raises(ItaeError, match=f"{re.escape(place.replace('.0.', '[0].'))} is"):
        written(tmp_path / "out", changed(place, number))
    assert not (tmp_path / "out").exists()


def test_the_wrong_row_is_named():
    with pytest.raises(ItaeError, match=r"rows\[3\]\.n.*'many'"):
        results.check_results(changed("rows.3.n", "many"))


def test_written_results_are_read_back(tmp_path):
    path = written(tmp_path / "deep" / "er")
    assert path == tmp_path / "deep" / "er" / "results.json"
    assert results.read_results(path) == RESULTS
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]


def test_numpy_tuples_and_paths_become_json(tmp_path):
    document = changed("thresholds", {"itae": (np.float32(1.5), None)})
    document["rows"][0] |= {"n": np.int64(7), "value": np.float64(0.25)}
    document["parameters"] = {"folder": tmp_path, "shares": np.array([1, 2])}
    got = results.read_results(written(tmp_path, document))
    assert got["thresholds"] == {"itae": [1.5, None]}
    assert (got["rows"][0]["n"], got["rows"][0]["value"]) == (7, 0.25)
    assert got["parameters"] == {"folder": str(tmp_path), "shares": [1, 2]}


def test_seconds_are_added(tmp_path):
    path = written(tmp_path)
    assert results.add_seconds(path, 12.34)["provenance"]["seconds"] == 12.3


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_unreadable_results_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(ItaeError):
        results.read_results(tmp_path / "results.json")


def test_missing_results_are_refused(tmp_path):
    with pytest.raises(ItaeError, match=r"results\.json can't be read"):
        results.read_results(tmp_path / "results.json")


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ItaeError, match="can't be made"):
        written(tmp_path / "file" / "out")


def test_a_broken_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old", encoding="utf-8")

    def write_half():
        with files.replacing(path) as part:
            part.write_text("ne", encoding="utf-8")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_half()
    assert [(each.name, each.read_text(encoding="utf-8")) for each in tmp_path.iterdir()] == [("kept.txt", "old")]


class TinyDataset(list):
    name, split, source, classes = "tiny", "test (3)", "made here", ("a", "b")


def test_provenance_fits_the_schema(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    backbone = SimpleNamespace(
        name="demo", kind="local", source="made here", weights_sha256="0" * 64, dim=8, num_blocks=2, patch_grid=(7, 7),
        image_size=28, preprocess="resize", pos_embed="timm", device="cpu", precision="fp32")
    provenance = results.provenance(backbone, TinyDataset([1, 2, 3]), fit_seconds=np.float32(0.5))
    jsonschema.validate(provenance, SCHEMA["properties"]["provenance"], format_checker=jsonschema.FormatChecker())
    results.check_results(changed("provenance", provenance))
    assert provenance["backbone"]["patch_grid"] == [7, 7]
    assert provenance["dataset"] == {
        "name": "tiny", "split": "test (3)", "source": "made here", "size": 3, "classes": 2, "fingerprint": None}
    assert {"torch", "timm", "itae-utils"} <= set(provenance["versions"])
    assert provenance["fit_seconds"] == 0.5
    assert provenance["backbone"]["hub"] == "http://mirror"


def test_collected_provenance_fits_the_schema():
    about = results.collected_provenance({"a/results.json": RESULTS})
    assert about["collected"] == [{
        "path": "a/results.json", "notebook": "03_scores", "date": "2026-01-02T03:04:05+00:00",
        "weights_sha256": "ab" * 32, "fingerprint": None}]
    made = changed("provenance", about)
    results.check_results(made)
    assert results.is_collection(made)
    assert not results.is_collection(RESULTS)
    with pytest.raises(ItaeError, match="provenance"):
        results.check_results(changed("provenance", {"collected": []}))


@pytest.mark.slow
def test_provenance_of_the_real_things():
    import itae_utils as itae

    provenance = results.provenance(itae.load_backbone("demo"), itae.load_dataset("digits"))
    results.check_results(changed("provenance", provenance))
    assert provenance["dataset"]["size"] == 1797
    assert len(provenance["dataset"]["fingerprint"]) == 64
    assert provenance["backbone"]["patch_grid"] == [7, 7]


def test_git_state(tmp_path):
    def git(*command: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True)

    assert results._git_state(tmp_path) is None
    git("init")
    assert results._git_state(tmp_path) is None, "no commit yet"
    git("commit", "--allow-empty", "-m", "first")
    state = results._git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["clean"]
    (tmp_path / "new").write_text("", encoding="utf-8")
    assert not results._git_state(tmp_path)["clean"]
