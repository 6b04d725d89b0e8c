import pytest
from PIL import Image

from itae_utils.errors import ItaeError
from itae_utils.report.plan import check_backbone, check_dataset, make_plan, safe_name
from tests.tiny_notebooks import PARAMETERS, write_grid, write_notebook


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
    assert plan.steps[2].given == {"seed": 3, "dataset": "digits", "backbone": "demo-clean"}
    assert plan.steps[2].parameters["limit"] is None
    assert plan.steps[-1].given == {}
    assert (plan.name, plan.description) == ("grid", "Both.")


def test_what_is_given_replaces_its_axis(folder):
    plan = make_plan(folder, "grid", ["03", "04"], {"dataset": "cifar10", "backbone": "demo", "seed": 7})
    assert folders(plan) == ["demo-cifar10/03_scores", "04_collects"]
    assert plan.steps[0].given == {"seed": 7, "dataset": "cifar10", "backbone": "demo"}
    assert plan.name == "grid-demo-cifar10"
    assert plan.grid == {"dataset": ["cifar10"], "backbone": ["demo"]}
    several = make_plan(folder, "grid", ["03"], {"dataset": ["stl10", "cifar10"]})
    assert folders(several)[::2] == ["demo-stl10/03_scores", "demo-cifar10/03_scores"]
    assert several.name == "grid-stl10-cifar10"


def test_collecting_alone_needs_a_folder(folder, tmp_path):
    (tmp_path / "old").mkdir()
    for profile in ("demo", "grid"):
        with pytest.raises(ItaeError, match=r"04_collects.*results_dir"):
            make_plan(folder, profile, ["04"], {})
        plan = make_plan(folder, profile, ["04"], {"results_dir": "old"})
        assert [step.given for step in plan.steps] == [{"results_dir": str(tmp_path / "old")}]
        assert plan.name == "04_collects-old"
    assert folders(make_plan(folder, "demo", None, {"results_dir": "old"}))[-1] == "04_collects"
    with pytest.raises(ItaeError, match="nowhere"):
        make_plan(folder, "demo", ["04"], {"results_dir": "nowhere"})


def test_a_profile_can_name_what_is_collected(folder, tmp_path):
    (folder / "profiles" / "again.yaml").write_text(f"'04': {{results_dir: {tmp_path}}}\n", encoding="utf-8")
    assert folders(make_plan(folder, "again", None, {})) == ["01_first", "03_scores", "04_collects"]


def test_runs_that_would_share_a_folder_are_refused(folder, tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "cats").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / parent / "cats" / "1.png")
    sets = [f"imagefolder:{tmp_path / parent / 'cats'}" for parent in "ab"]
    with pytest.raises(ItaeError, match="demo-imagefolder-cats"):
        make_plan(folder, "grid", None, {"dataset": sets})


def test_every_cell_is_checked(folder):
    with pytest.raises(ItaeError, match="'cifar11'"):
        make_plan(folder, "grid", None, {"dataset": ["cifar10", "cifar11"]})
    with pytest.raises(ItaeError, match="backbone=3"):
        make_plan(folder, "grid", None, {"backbone": [3]})


def test_a_grid_of_one_axis(folder):
    (folder / "profiles" / "sets.yaml").write_text(
        "common: {backbone: demo}\ngrid: {dataset: [digits, stl10]}\n", encoding="utf-8")
    plan = make_plan(folder, "sets", ["01"], {})
    assert folders(plan) == ["demo-digits/01_first", "demo-stl10/01_first"]
    assert make_plan(folder, "sets", ["01"], {"backbone": "demo-clean"}).steps[0].pairing == "demo-clean-digits"


def test_notebooks_without_axes_have_a_name_too(tmp_path):
    folder = write_grid(tmp_path / "nb")
    write_notebook(folder, "02_other", parameters="output_dir = 'x'\nbackbone = 'demo'\n", measure=False)
    assert make_plan(folder, "demo", ["02"], {}).name == "demo-demo"


@pytest.mark.parametrize(("words", "name"), [
    (("demo", "tiny", "digits"), "demo-tiny-digits"), (("a b", "my cats/x"), "a-b-my-cats-x"), (("x", ".."), "x-..")])
def test_names_are_one_safe_folder(words, name):
    assert safe_name(*words) == name


def pictures(folder, count):
    for number in range(count):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
    return f"imagefolder:{folder}"


def clustering(folder, **parameters):
    write_notebook(folder, "05_clusters", measure=False, parameters=PARAMETERS + "clusters = None\n")
    return make_plan(folder, "demo", ["05"], parameters)


def test_clusters_are_no_more_than_images(folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    few = pictures(tmp_path / "pictures", 5)
    for dataset, limit, images in [("digits", None, 1797), ("digits", 20, 20), (few, None, 5), (few, 4, 4)]:
        clustering(folder, dataset=dataset, limit=limit, clusters=images)
        with pytest.raises(ItaeError, match=f"clusters={images + 1}.* {images:,}"):
            clustering(folder, dataset=dataset, limit=limit, clusters=images + 1)


def test_fewer_than_four_images_are_too_few_to_cluster(folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    dataset = pictures(tmp_path / "pictures", 4)
    clustering(folder, dataset=dataset)
    with pytest.raises(ItaeError, match="3 images"):
        clustering(folder, dataset=dataset, limit=3)
    with pytest.raises(ItaeError, match="1 images"):
        clustering(folder, limit=1)
    make_plan(folder, "demo", ["01"], {"limit": 1})


def test_data_sets(tmp_path):
    check_dataset("digits")
    (tmp_path / "a.png").touch()
    for name, message in [
        ("digit", "'digit': did you mean digits"), ("imagefolder:", "'imagefolder:'"),
        ("imagefolder:" + "a" * 5000, "aaa"), (f"imagefolder:{tmp_path}", r"a\.png")]:
        with pytest.raises(ItaeError, match=message):
            check_dataset(name)
    check_dataset(f"imagefolder:{tmp_path}", "skip")
    pictures(tmp_path, 1)
    (tmp_path / "a.png").unlink()
    check_dataset(f"imagefolder:{tmp_path}")


def test_backbones(tmp_path):
    weights = tmp_path / "weights.pth"
    weights.touch()
    check_backbone("demo", None, 32)
    check_backbone("dinov2_vits14", str(weights), 518)
    check_backbone("vit_tiny_patch16_224", str(tmp_path), None)
    for arguments, message in [
        (("demmo", None, None), "'demmo': did you mean demo"),
        (("resnet18", None, None), "ResNet"),
        (("demo", str(weights), None), r"demo .*weights\.pth"),
        (("dinov2_vits14", str(tmp_path / "none.pth"), None), r"none\.pth"),
        (("demo", None, 13), "13.*12 or 16"),
        (("vit_tiny_patch16_224", None, 100), "100.*16"),
    ]:
        with pytest.raises(ItaeError, match=message):
            check_backbone(*arguments)


def test_a_store_that_can_t_be_opened_is_refused_before_anything_runs(folder):
    write_notebook(folder, "01_first", measure=False, parameters=PARAMETERS + "options = {}\n")
    with pytest.raises(ItaeError, match="nonsense://x"):
        make_plan(folder, "demo", ["01"], {"store": "nonsense://x"})
