import pytest
from PIL import Image

from itae_utils.errors import ItaeError
from itae_utils.report.plan import make_plan, safe_name
from tests.tiny_notebooks import write_grid, write_notebook


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_grid(tmp_path / "nb")


def folders(plan) -> list[str]:
    return [step.folder for step in plan.steps]


def test_without_a_grid_what_collects_is_not_run(folder):
    plan = make_plan(folder, "demo", None, {})
    assert folders(plan) == ["01_first", "03_scores"]
    assert (plan.name, plan.grid) == ("demo-demo-digits", {})


def test_a_grid_runs_every_cell_and_then_what_collects(folder):
    plan = make_plan(folder, "grid", None, {})
    assert folders(plan) == ["demo-digits/01_first", "demo-digits/03_scores", "demo-clean-digits/01_first",
                             "demo-clean-digits/03_scores", "04_collects"]
    assert plan.steps[2].told == {"seed": 3, "dataset": "digits", "backbone": "demo-clean"}
    assert plan.steps[2].parameters["limit"] is None
    assert plan.steps[-1].told == {}
    assert (plan.name, plan.description) == ("grid", "Both.")


def test_what_is_given_replaces_its_axis(folder):
    plan = make_plan(folder, "grid", ["03", "04"], {"dataset": "cifar10", "backbone": "demo", "seed": 7})
    assert folders(plan) == ["demo-cifar10/03_scores", "04_collects"]
    assert plan.steps[0].told == {"seed": 7, "dataset": "cifar10", "backbone": "demo"}
    assert plan.name == "grid-demo-cifar10"
    assert plan.grid == {"dataset": ["cifar10"], "backbone": ["demo"]}
    several = make_plan(folder, "grid", ["03"], {"dataset": ["stl10", "cifar10"]})
    assert folders(several)[::2] == ["demo-stl10/03_scores", "demo-cifar10/03_scores"]
    assert several.name == "grid-stl10-cifar10"


def test_collecting_alone_needs_a_folder(folder, tmp_path):
    (tmp_path / "old").mkdir()
    for profile in ("demo", "grid"):
        with pytest.raises(ItaeError, match="04_collects collects the results of a report: name its folder with -p"):
            make_plan(folder, profile, ["04"], {})
        plan = make_plan(folder, profile, ["04"], {"results_dir": "old"})
        assert [step.told for step in plan.steps] == [{"results_dir": str(tmp_path / "old")}]
        assert plan.name == "04_collects-old"
    assert folders(make_plan(folder, "demo", None, {"results_dir": "old"}))[-1] == "04_collects"
    with pytest.raises(ItaeError, match="no such folder"):
        make_plan(folder, "demo", ["04"], {"results_dir": "nowhere"})


def test_a_profile_can_name_what_is_collected(folder, tmp_path):
    (folder / "profiles" / "again.yaml").write_text(f"'04': {{results_dir: {tmp_path}}}\n", encoding="utf-8")
    assert folders(make_plan(folder, "again", None, {})) == ["01_first", "03_scores", "04_collects"]


def test_runs_that_would_share_a_folder_are_refused(folder, tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "cats").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / parent / "cats" / "1.png")
    sets = [f"imagefolder:{tmp_path / parent / 'cats'}" for parent in "ab"]
    with pytest.raises(ItaeError, match="2 runs would write to the same folder demo-imagefolder-cats"):
        make_plan(folder, "grid", None, {"dataset": sets})


def test_every_cell_is_checked(folder):
    with pytest.raises(ItaeError, match="unknown data set 'cifar11'"):
        make_plan(folder, "grid", None, {"dataset": ["cifar10", "cifar11"]})
    with pytest.raises(ItaeError, match="backbone=3"):
        make_plan(folder, "grid", None, {"backbone": [3]})


def test_a_grid_of_one_axis(folder):
    (folder / "profiles" / "sets.yaml").write_text(
        "common: {backbone: demo}\ngrid: {dataset: [digits, stl10]}\n", encoding="utf-8")
    plan = make_plan(folder, "sets", ["01"], {})
    assert folders(plan) == ["demo-digits/01_first", "demo-stl10/01_first"]
    assert make_plan(folder, "sets", ["01"], {"backbone": "demo-clean"}).steps[0].cell == "demo-clean-digits"


def test_notebooks_without_axes_have_a_name_too(tmp_path):
    folder = write_grid(tmp_path / "nb")
    write_notebook(folder, "02_other", parameters="output_dir = 'x'\nbackbone = 'demo'\n", measure=False)
    assert make_plan(folder, "demo", ["02"], {}).name == "demo-demo"


@pytest.mark.parametrize(("words", "name"), [
    (("demo", "tiny", "digits"), "demo-tiny-digits"), (("a b", "my cats/x"), "a-b-my-cats-x"), (("x", ".."), "x-..")])
def test_names_are_one_safe_folder(words, name):
    assert safe_name(*words) == name
