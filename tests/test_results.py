import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from itae_utils import results
from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE
from tests.tiny_notebooks import DELETED, RESULTS, changed

SCHEMA = json.loads((PACKAGE / "results.schema.json").read_text(encoding="utf-8"))
ROW = RESULTS["rows"][0]


def write(folder: Path, document: dict = RESULTS) -> Path:
    return results.write_results(folder, **{key: value for key, value in document.items() if key != "schema"})


def test_the_schema_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(("place", "value"), [
    *((part, DELETED) for part in RESULTS), ("schema", 2), ("notebook", ""), ("parameters", []), ("rows", {}),
    ("provenance.versions", DELETED), ("provenance.backbone", None), ("provenance.backbone.source", DELETED),
    ("provenance.backbone.kind", "stolen"), ("provenance.dataset.size", DELETED), ("thresholds", {"itae": "auto"}),
    ("thresholds", {"itae": [1.0, "auto"]}), ("rows.0", "acc"), ("rows.0.variant", DELETED), ("rows.0.extra", 1),
    ("rows.0.n", 1.5), ("rows.0.n", -1), ("rows.0.n", True), ("rows.0.seed", "0"), ("rows.0.value", None),
    ("rows.0.value", "0.5"), ("figures", "cover"), ("figures.0", 1), ("headline.0.note", DELETED),
    ("headline.0.value", None), ("provenance", {"collected": []}),
])
def test_invalid_results_are_refused_in_one_line(place, value):
    with pytest.raises(ItaeError) as refused:
        results.check_results(changed(RESULTS, place, value))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(("place", "value"), [
    ("rows", []), ("rows.0.seed", None), ("rows.0.value", 1), ("thresholds", {}), ("headline.0.value", "3 of 4"),
    ("provenance.seconds", 1.5), ("figures", []), ("provenance.backbone.kind", "local"),
    ("rows.0", {**ROW, "source": "key", "attenuation": "min", "theta": "5 %"}),
    ("rows.0", {**ROW, "source": None, "attenuation": None, "theta": None}),
])
def test_valid_results_are_accepted(place, value):
    results.check_results(changed(RESULTS, place, value))


def test_the_message_names_the_place_and_the_value():
    with pytest.raises(ItaeError, match=r"rows\[3\]\.n.*'many'"):
        results.check_results(changed(RESULTS, "rows.3.n", "many"))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("nan")])
@pytest.mark.parametrize("place", ["rows.0.value", "parameters.k", "thresholds.itae", "headline.0.value"])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, place, number):
    with pytest.raises(ItaeError, match=re.escape(f"{place.replace('.0.', '[0].')} is {float(number)}")):
        write(tmp_path / "out", changed(RESULTS, place, number))
    assert not (tmp_path / "out").exists()


def test_results_are_written_and_read_back(tmp_path):
    path = write(tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "results.json"
    assert results.read_results(path) == RESULTS
    assert results.add_seconds(path, 12.34)["provenance"]["seconds"] == 12.3
    assert results.read_results(path) == changed(RESULTS, "provenance.seconds", 12.3)


def test_numpy_tuples_and_paths_become_json(tmp_path):
    document = changed(RESULTS, "thresholds", {"itae": (np.float32(1.5), None)})
    document["rows"][0] |= {"n": np.int64(7), "value": np.float64(0.25)}
    document["parameters"] = {"folder": tmp_path, "shares": np.array([1, 2])}
    got = results.read_results(write(tmp_path, document))
    assert got["thresholds"] == {"itae": [1.5, None]}
    assert (got["rows"][0]["n"], got["rows"][0]["value"]) == (7, 0.25)
    assert got["parameters"] == {"folder": str(tmp_path), "shares": [1, 2]}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", None])
def test_unreadable_and_missing_files_are_refused(tmp_path, text):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ItaeError, match=re.escape(str(path))):
        results.read_results(path)


class TinyDataset(list):
    name, split, source, classes = "tiny", "test (3)", "made here", ("a", "b")


def test_provenance_fits_the_schema(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    backbone = SimpleNamespace(
        name="demo", kind="local", source="made here", weights_sha256="0" * 64, dim=8, num_blocks=2, patch_grid=(7, 7),
        image_size=28, preprocess="resize", pos_embed="timm", device="cpu", precision="fp32")
    provenance = results.provenance(backbone, TinyDataset([1, 2, 3]), fit_seconds=np.float32(0.5))
    jsonschema.validate(provenance, SCHEMA["properties"]["provenance"], format_checker=jsonschema.FormatChecker())
    results.check_results(changed(RESULTS, "provenance", provenance))
    assert provenance["backbone"]["patch_grid"] == [7, 7]
    assert provenance["dataset"] == {
        "name": "tiny", "split": "test (3)", "source": "made here", "size": 3, "classes": 2, "fingerprint": None,
        "notes": []}
    assert {"torch", "timm", "itae-utils"} <= set(provenance["versions"])
    assert provenance["fit_seconds"] == 0.5
    assert provenance["backbone"]["hub"] == "http://mirror"


def test_provenance_of_a_collection_fits_the_schema():
    about = results.collected_provenance({"a/results.json": RESULTS})
    assert about["collected"] == [{
        "path": "a/results.json", "notebook": "03_scores", "date": "2026-01-02T03:04:05+00:00",
        "weights_sha256": "ab" * 32, "fingerprint": None}]
    collection = changed(RESULTS, "provenance", about)
    results.check_results(collection)
    assert [results.is_collection(each) for each in (collection, RESULTS)] == [True, False]


def test_git_state(tmp_path):
    def git(*command: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True)

    assert results._git_state(tmp_path) is None
    git("init")
    assert results._git_state(tmp_path) is None, "no commit yet"
    git("commit", "--allow-empty", "-m", "first")
    state = results._git_state(tmp_path)
    assert (len(state["commit"]), state["clean"]) == (40, True)
    (tmp_path / "new").touch()
    assert not results._git_state(tmp_path)["clean"]
