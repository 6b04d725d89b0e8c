import copy
import json

import pytest

from itae_utils.errors import ItaeError
from itae_utils.report.runs import Report, Run, differences, make_record, plan_again, read_record
from tests.report.test_pages import NOTEBOOKS
from tests.tiny_notebooks import PARAMETERS, PROVENANCE, RESULTS, write_grid, write_notebook


def results_with(fingerprint: str | None = "cd" * 32) -> dict:
    results = copy.deepcopy(RESULTS)
    results["provenance"]["dataset"]["fingerprint"] = fingerprint
    return results


def record_of(tmp_path, *runs: Run) -> dict:
    return make_record(Report(tmp_path, "demo", "Words.", runs))


def run_of(results: dict | None, **given) -> Run:
    parameters = {"backbone": "demo", "dataset": "digits", "output_dir": "/x"} | given
    return Run(NOTEBOOKS[0], parameters, 1.0, None, results)


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
    (None, "can't be read"), ("{", "not JSON"), ("[]", "schema None"), ('{"schema": 2}', "schema 2, but 3")])
def test_other_records_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(ItaeError, match=message) as refused:
        read_record(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_record_names_reused_runs(tmp_path):
    reused = Run(NOTEBOOKS[0], {}, 1.0, None, None, reused=True)
    assert [entry["reused"] for entry in record_of(tmp_path, run_of(None), reused)["notebooks"]] == [False, True]


@pytest.fixture
def recorded(tmp_path):
    folder = write_grid(tmp_path / "nb")
    entry = {"notebook": "01_first", "pairing": "demo-digits", "weights": "a", "images": "b",
             "parameters": {"backbone": "demo", "dataset": "digits", "limit": 5, "seed": 2}}
    last = {"notebook": "04_collects", "pairing": "", "weights": None, "images": None, "parameters": {}}
    return folder, {
        "profile": "grid", "description": "Both.", "grid": {"backbone": ["demo"]}, "notebooks": [entry, last]}


def test_the_same_is_planned_again(recorded):
    folder, record = recorded
    plan = plan_again(json.loads(json.dumps(record)), folder, {})
    assert [step.folder for step in plan.steps] == ["demo-digits/01_first", "04_collects"]
    assert plan.steps[0].given == record["notebooks"][0]["parameters"]
    assert plan.steps[1].given == {}
    assert (plan.profile, plan.description, plan.grid) == ("grid", "Both.", {"backbone": ["demo"]})


def test_a_record_can_be_planned_with_other_options(recorded):
    folder, record = recorded
    write_notebook(folder, "01_first", parameters=PARAMETERS + "options = {}\n")
    record["notebooks"][0]["parameters"]["options"] = {"image_size": 56}
    step = plan_again(record, folder, {"store": "none"}).steps[0]
    assert step.given["options"] == {"image_size": 56, "store": "none"}


@pytest.mark.parametrize(("path", "value", "message"), [
    (("notebook",), "09_gone", "'09_gone'"),
    (("parameters", "gone"), 1, "no parameter 'gone'"),
    (("parameters", "dataset"), "gone", "'gone'"),
])
def test_names_that_no_longer_exist_are_refused(recorded, path, value, message):
    folder, record = recorded
    place = record["notebooks"][0]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ItaeError, match=message):
        plan_again(record, folder, {})


def test_a_whole_record_is_read(recorded, tmp_path):
    record = json.loads(json.dumps({"schema": 3, **recorded[1]}))
    (tmp_path / "report.json").write_text(json.dumps(record), encoding="utf-8")
    assert read_record(tmp_path) == record
    assert read_record(tmp_path)["notebooks"][0].pop("weights")


@pytest.mark.parametrize(("path", "value"), [
    (("profile",), None), (("description",), 3), (("grid",), []), (("grid", "backbone"), "demo"), (("notebooks",), {}),
    (("notebooks",), []), (("notebooks", 0), "01_first"), (("notebooks", 0, "notebook"), None),
    (("notebooks", 0, "parameters"), []), (("notebooks", 0, "pairing"), 3), (("notebooks", 0, "pairing"), ".."),
    (("notebooks", 0, "pairing"), "../elsewhere"), (("notebooks", 0, "pairing"), "/etc"),
])
def test_a_damaged_record_is_refused(recorded, tmp_path, path, value):
    record = json.loads(json.dumps({"schema": 3, **recorded[1]}))
    place = record
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ItaeError, match=r"report\.json is damaged"):
        read_record(tmp_path)


def test_differences_are_listed_once_each(tmp_path):
    before = record_of(tmp_path, run_of(results_with()), run_of(results_with()))
    assert differences(before, before) == ["weights and images are those of the record"]
    changed = results_with("ef" * 32)
    changed["provenance"]["backbone"]["weights_sha256"] = "01" * 32
    after = record_of(tmp_path, run_of(changed), run_of(changed))
    assert differences(before, after) == [
        "demo: its weights have changed (abababababab in the record, 010101010101 now)",
        "digits: its images have changed (cdcdcdcdcdcd in the record, efefefefefef now)",
    ]
    nothing = record_of(tmp_path, run_of(None), run_of(None))
    assert differences(before, nothing) == ["the record names no weights or images to compare"]
    for entry in before["notebooks"]:
        del entry["weights"], entry["images"]
    assert differences(before, after) == ["the record names no weights or images to compare"]
