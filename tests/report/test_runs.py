import json

import pytest

from itae_utils.errors import ItaeError
from itae_utils.report.runs import Report, Run, differences, make_record, plan_again, read_record
from tests.report.test_pages import NOTEBOOKS, run_of
from tests.tiny_notebooks import PARAMETERS, RESULTS, changed, write_grid, write_notebook

MEASURED = changed(RESULTS, "provenance.dataset.fingerprint", "cd" * 32)


def record_of(folder, *runs: Run) -> dict:
    return make_record(Report(folder, "demo", "Words.", runs))


def test_a_record_has_the_hashes_of_weights_and_images_but_no_folder(tmp_path):
    (entry,) = record_of(tmp_path, run_of(NOTEBOOKS[0], None, MEASURED, results_dir=str(tmp_path)))["notebooks"]
    assert (entry["weights"], entry["images"], entry["reused"]) == ("ab" * 32, "cd" * 32, False)
    assert entry["parameters"] == {"backbone": "demo", "dataset": "digits", "seed": 3}
    collected = changed(RESULTS, "provenance.collected", [])
    for results in (None, collected):
        (entry,) = record_of(tmp_path, run_of(NOTEBOOKS[0], None, results, results_dir="/other"))["notebooks"]
        assert entry["parameters"]["results_dir"] == "/other"
        assert (entry["weights"], entry["images"]) == (None, None)


def test_a_record_marks_reused_runs(tmp_path):
    runs = [Run(NOTEBOOKS[0], {}, 1.0, None, None, reused=reused) for reused in (False, True)]
    assert [entry["reused"] for entry in record_of(tmp_path, *runs)["notebooks"]] == [False, True]


@pytest.fixture
def folder(tmp_path):
    return write_grid(tmp_path / "nb")


ENTRY = {"notebook": "01_first", "pairing": "demo-digits", "weights": "a", "images": "b",
         "parameters": {"backbone": "demo", "dataset": "digits", "limit": 5, "seed": 2}}
RECORD = {"schema": 3, "profile": "grid", "description": "Both.", "grid": {"backbone": ["demo"]}, "notebooks": [
    ENTRY, {"notebook": "04_collects", "pairing": "", "weights": None, "images": None, "parameters": {}}]}


def test_a_record_is_planned_again(folder):
    plan = plan_again(RECORD, folder, {})
    assert [step.folder for step in plan.steps] == ["demo-digits/01_first", "04_collects"]
    assert [step.given for step in plan.steps] == [ENTRY["parameters"], {}]
    assert (plan.profile, plan.description, plan.grid) == ("grid", "Both.", {"backbone": ["demo"]})


def test_a_record_can_be_planned_with_other_options(folder):
    write_notebook(folder, "01_first", parameters=PARAMETERS + "options = {}\n")
    record = changed(RECORD, "notebooks.0.parameters.options", {"image_size": 56})
    step = plan_again(record, folder, {"store": "none"}).steps[0]
    assert step.given["options"] == {"image_size": 56, "store": "none"}


@pytest.mark.parametrize(("place", "value", "message"), [
    ("notebook", "09_gone", "'09_gone'"), ("parameters.gone", 1, "'gone'"), ("parameters.dataset", "gone", "'gone'")])
def test_names_that_no_longer_exist_are_refused(folder, place, value, message):
    with pytest.raises(ItaeError, match=message):
        plan_again(changed(RECORD, f"notebooks.0.{place}", value), folder, {})


def write_record(folder, text: str):
    (folder / "report.json").write_text(text, encoding="utf-8")
    return folder


def test_a_complete_record_is_read(tmp_path):
    assert read_record(write_record(tmp_path, json.dumps(RECORD))) == RECORD


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema": 2}', *(
    json.dumps(changed(RECORD, place, value)) for place, value in [
        ("profile", None), ("description", 3), ("grid", []), ("grid.backbone", "demo"), ("notebooks", {}),
        ("notebooks", []), ("notebooks.0", "01_first"), ("notebooks.0.notebook", None), ("notebooks.0.parameters", []),
        ("notebooks.0.pairing", 3), ("notebooks.0.pairing", ".."), ("notebooks.0.pairing", "../elsewhere"),
        ("notebooks.0.pairing", "/etc")])])
def test_a_missing_or_damaged_record_is_refused(tmp_path, text):
    if text is not None:
        write_record(tmp_path, text)
    with pytest.raises(ItaeError, match=f"{tmp_path}/report.json") as refused:
        read_record(tmp_path)
    assert "\n" not in str(refused.value)


def test_differences_are_listed_once_each(tmp_path):
    other = changed(changed(MEASURED, "provenance.dataset.fingerprint", "ef" * 32),
                    "provenance.backbone.weights_sha256", "01" * 32)
    before, after, unknown = (record_of(tmp_path, *[run_of(NOTEBOOKS[0], None, results)] * 2)
                              for results in (MEASURED, other, None))
    weights, images = differences(before, after)
    assert all(part in weights for part in ("demo", "weights", "ab" * 6, "01" * 6))
    assert all(part in images for part in ("digits", "images", "cd" * 6, "ef" * 6))
    (same,), (nothing,) = differences(before, before), differences(before, unknown)
    assert same != nothing
    for entry in before["notebooks"]:
        del entry["weights"], entry["images"]
    assert differences(before, after) == [nothing]
