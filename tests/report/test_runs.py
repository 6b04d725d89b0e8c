import copy
import json

import pytest

from itae_utils.errors import ItaeError
from itae_utils.report.runs import Report, Run, differences, make_record, plan_again, read_record
from tests.report.test_pages import NOTEBOOKS
from tests.tiny_notebooks import PROVENANCE, RESULTS, write_grid


def results_with(fingerprint: str | None = "cd" * 32) -> dict:
    results = copy.deepcopy(RESULTS)
    results["provenance"]["dataset"]["fingerprint"] = fingerprint
    return results


def record_of(tmp_path, *runs: Run) -> dict:
    return make_record(Report(tmp_path, "demo", "Words.", runs))


def run_of(results: dict | None, **parameters) -> Run:
    told = {"backbone": "demo", "dataset": "digits", "output_dir": "/x"} | parameters
    return Run(NOTEBOOKS[0], told, 1.0, None, results)


def test_a_record_names_weights_and_images_and_no_place(tmp_path):
    (entry,) = record_of(tmp_path, run_of(results_with(), results_dir=str(tmp_path)))["notebooks"]
    assert (entry["weights"], entry["images"]) == ("ab" * 32, "cd" * 32)
    assert entry["parameters"] == {"backbone": "demo", "dataset": "digits"}
    (elsewhere,) = record_of(tmp_path, run_of(None, results_dir="/other"))["notebooks"]
    assert elsewhere["parameters"]["results_dir"] == "/other"
    assert elsewhere["weights"] is None


def test_a_collection_has_no_weights(tmp_path):
    collected = {**RESULTS, "provenance": {**PROVENANCE, "collected": []}}
    (entry,) = record_of(tmp_path, run_of(collected))["notebooks"]
    assert (entry["weights"], entry["images"]) == (None, None)


@pytest.mark.parametrize(("text", "message"), [
    (None, "can't be read"), ("{", "no JSON"), ("[]", "schema None"), ('{"schema": 1}', "schema 1, but 2 is needed")])
def test_other_records_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(ItaeError, match=message) as refused:
        read_record(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_record_says_what_was_kept(tmp_path):
    kept = Run(NOTEBOOKS[0], {}, 1.0, None, None, kept=True)
    assert [entry["kept"] for entry in record_of(tmp_path, run_of(None), kept)["notebooks"]] == [False, True]


@pytest.fixture
def recorded(tmp_path):
    folder = write_grid(tmp_path / "nb")
    entry = {"notebook": "01_first", "cell": "demo-digits", "weights": "a", "images": "b",
             "parameters": {"backbone": "demo", "dataset": "digits", "limit": 5, "seed": 2}}
    last = {"notebook": "04_collects", "cell": "", "weights": None, "images": None, "parameters": {}}
    return folder, {
        "profile": "grid", "description": "Both.", "grid": {"backbone": ["demo"]}, "notebooks": [entry, last]}


def test_the_same_is_planned_again(recorded):
    folder, record = recorded
    plan = plan_again(json.loads(json.dumps(record)), folder)
    assert [step.folder for step in plan.steps] == ["demo-digits/01_first", "04_collects"]
    assert plan.steps[0].told == record["notebooks"][0]["parameters"]
    assert plan.steps[1].told == {}
    assert (plan.profile, plan.description, plan.grid) == ("grid", "Both.", {"backbone": ["demo"]})


@pytest.mark.parametrize(("path", "value", "message"), [
    (("notebook",), "09_gone", "notebook '09_gone' is no more"),
    (("parameters", "gone"), 1, "no parameter 'gone'"),
    (("parameters", "dataset"), "gone", "unknown data set"),
])
def test_what_is_no_more_is_refused(recorded, path, value, message):
    folder, record = recorded
    place = record["notebooks"][0]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ItaeError, match=message):
        plan_again(record, folder)


def test_a_whole_record_is_read(recorded, tmp_path):
    record = json.loads(json.dumps({"schema": 2, **recorded[1]}))
    (tmp_path / "report.json").write_text(json.dumps(record), encoding="utf-8")
    assert read_record(tmp_path) == record
    assert read_record(tmp_path)["notebooks"][0].pop("weights")


@pytest.mark.parametrize(("path", "value"), [
    (("profile",), None), (("description",), 3), (("grid",), []), (("grid", "backbone"), "demo"), (("notebooks",), {}),
    (("notebooks",), []), (("notebooks", 0), "01_first"), (("notebooks", 0, "notebook"), None),
    (("notebooks", 0, "parameters"), []), (("notebooks", 0, "cell"), 3), (("notebooks", 0, "cell"), ".."),
    (("notebooks", 0, "cell"), "../elsewhere"), (("notebooks", 0, "cell"), "/etc"),
])
def test_a_damaged_record_is_refused(recorded, tmp_path, path, value):
    record = json.loads(json.dumps({"schema": 2, **recorded[1]}))
    place = record
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ItaeError, match=r"report\.json is damaged"):
        read_record(tmp_path)


def test_differences_are_told_once_each(tmp_path):
    before = record_of(tmp_path, run_of(results_with()), run_of(results_with()))
    assert differences(before, before) == ["weights and images are those of the record"]
    changed = results_with("ef" * 32)
    changed["provenance"]["backbone"]["weights_sha256"] = "01" * 32
    after = record_of(tmp_path, run_of(changed), run_of(changed))
    assert differences(before, after) == [
        "demo: its weights differ from the record's (abababababab then, 010101010101 now)",
        "digits: its images differ from the record's (cdcdcdcdcdcd then, efefefefefef now)",
    ]
    nothing = record_of(tmp_path, run_of(None), run_of(None))
    assert differences(before, nothing) == ["the record names no weights or images to compare"]
    for entry in before["notebooks"]:
        del entry["weights"], entry["images"]
    assert differences(before, after) == ["the record names no weights or images to compare"]
