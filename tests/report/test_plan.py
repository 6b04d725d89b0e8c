import re

import pytest
import timm
import torch
from PIL import Image

from itae_utils.errors import ItaeError
from itae_utils.report.plan import check_backbone, check_dataset, make_plan, safe_name
from tests.tiny_notebooks import PARAMETERS, write_grid, write_notebook, write_profile


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_grid(tmp_path / "nb")


def folders(plan) -> list[str]:
    return [step.folder for step in plan.steps]


def image_folder(folder, count: int) -> str:
    """Write images and return the name of their data set."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
    return f"imagefolder:{folder}"


def test_without_a_grid_notebooks_that_collect_do_not_run(folder):
    plan = make_plan(folder, "demo", None, {})
    assert folders(plan) == ["01_first", "03_scores"]
    assert (plan.name, plan.grid) == ("demo-demo-digits", {})


def test_a_grid_runs_every_pairing_and_then_collects(folder):
    plan = make_plan(folder, "grid", None, {})
    assert folders(plan) == ["demo-digits/01_first", "demo-digits/03_scores", "demo-clean-digits/01_first",
                             "demo-clean-digits/03_scores", "04_collects"]
    assert plan.steps[2].given == {"seed": 3, "dataset": "digits", "backbone": "demo-clean"}
    assert plan.steps[2].parameters["limit"] is None
    assert plan.steps[-1].given == {}
    assert (plan.name, plan.description) == ("grid", "Both.")


def test_a_given_value_replaces_its_axis(folder):
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
    for notebook in ("01_first", "03_scores"):
        (folder / f"{notebook}.ipynb").rename(tmp_path / notebook)
    with pytest.raises(ItaeError, match=r"04_collects.*results_dir"):
        make_plan(folder, "demo", None, {})
    for notebook in ("01_first", "03_scores"):
        (tmp_path / notebook).rename(folder / f"{notebook}.ipynb")
    write_profile(folder, "again", f"'04': {{results_dir: {tmp_path}}}\n")
    assert folders(make_plan(folder, "again", None, {})) == ["01_first", "03_scores", "04_collects"]


@pytest.mark.parametrize(("given", "message"), [
    ({"results_dir": "nowhere"}, "nowhere"), ({"dataset": ["cifar10", "cifar11"]}, "'cifar11'"),
    ({"backbone": [3]}, "backbone=3"), ({"dataset": ["stl10", "STL-10"]}, "demo-stl10"),
])
def test_every_run_is_validated(folder, given, message):
    """The last case names one data set twice, whose runs would share a folder."""
    with pytest.raises(ItaeError, match=message):
        make_plan(folder, "grid", None, given)


def test_folders_of_one_name_in_a_grid_have_runs_of_their_own(folder, tmp_path):
    for parent in ("a", "b", "c-d"):
        image_folder(tmp_path / parent / "cats", 1)
    plan = make_plan(folder, "grid", ["01"], {"backbone": "demo", "dataset": ["a/cats", "imagefolder:b/cats", "stl10"]})
    first, second, third = (step.pairing for step in plan.steps)
    assert first != second
    assert all(re.fullmatch(r"demo-imagefolder-cats-[0-9a-f]{6}", pairing) for pairing in (first, second))
    assert third == "demo-stl10"
    again = make_plan(folder, "grid", ["01"], {"dataset": [f"imagefolder:{tmp_path}/c-d/cats", "a/cats"]})
    assert first in [step.pairing for step in again.steps]


@pytest.mark.parametrize(("name", "canonical"), [
    ("STL-10", "stl10"), ("Tiny ImageNet", "tiny-imagenet"), ("cats", "imagefolder:{}/cats"),
    ("~/cats", "imagefolder:{}/cats"), ("imagefolder:~/cats", "imagefolder:{}/cats")])
def test_a_data_set_has_one_name(folder, tmp_path, monkeypatch, name, canonical):
    monkeypatch.setenv("HOME", str(tmp_path))
    image_folder(tmp_path / "cats", 1)
    plan = make_plan(folder, "demo", ["01"], {"dataset": name})
    assert plan.datasets == {canonical.format(tmp_path)}
    assert make_plan(folder, "grid", ["01"], {"dataset": name}).grid["dataset"] == [canonical.format(tmp_path)]


@pytest.mark.parametrize(("given", "message"), [
    ({"dataset": "digits", "split": "train"}, "split='train'"), ({"dataset": "digits", "label_column": "y"}, "'y'"),
    ({"dataset": "cats", "split": "train"}, "split='train'"), ({"dataset": "cats", "image_column": "x"}, "'x'")])
def test_a_part_of_a_data_set_that_is_not_there_is_refused(folder, tmp_path, given, message):
    image_folder(tmp_path / "cats", 1)
    write_notebook(folder, "01_first", measure=False, parameters=PARAMETERS + "options = {}\n")
    with pytest.raises(ItaeError, match=message):
        make_plan(folder, "demo", ["01"], given)


def test_a_checkpoint_is_that_of_one_backbone(folder, tmp_path):
    write_notebook(folder, "01_first", measure=False, parameters=PARAMETERS + "options = {}\n")
    weights = {"checkpoint": write_weights(tmp_path / "weights.pth", "vit_tiny_patch16_224")}
    same = ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"]
    assert len(make_plan(folder, "grid", ["01"], weights | {"backbone": same}).steps) == 2
    for backbones in (["vit_tiny_patch16_224", "vit_small_patch16_224"], ["vit_tiny_patch16_224", "dinov2_vits14"]):
        with pytest.raises(ItaeError, match=f"checkpoint=.*weights.pth.*{' and '.join(backbones)}"):
            make_plan(folder, "grid", ["01"], weights | {"backbone": backbones})


def test_a_store_that_cannot_be_opened_is_refused(folder):
    write_notebook(folder, "01_first", measure=False, parameters=PARAMETERS + "options = {}\n")
    with pytest.raises(ItaeError, match="nonsense://x"):
        make_plan(folder, "demo", ["01"], {"store": "nonsense://x"})


def test_a_grid_of_one_axis(folder):
    write_profile(folder, "sets", "common: {backbone: demo}\ngrid: {dataset: [digits, stl10]}\n")
    assert folders(make_plan(folder, "sets", ["01"], {})) == ["demo-digits/01_first", "demo-stl10/01_first"]
    assert make_plan(folder, "sets", ["01"], {"backbone": "demo-clean"}).steps[0].pairing == "demo-clean-digits"


def test_a_grid_of_rules_of_the_position_embedding(folder):
    write_notebook(folder, "03_scores", parameters=PARAMETERS + "options = {}\n")
    write_profile(folder, "rules", "only: ['03', '04']\ngrid: {backbone: [demo], pos_embed: [meta, timm]}\n")
    plan = make_plan(folder, "rules", None, {})
    assert folders(plan) == ["demo-digits-meta/03_scores", "demo-digits-timm/03_scores", "04_collects"]
    assert [step.setting("pos_embed") for step in plan.steps[:2]] == ["meta", "timm"]
    one = make_plan(folder, "rules", ["03"], {"pos_embed": "transformers"})
    assert (folders(one), one.name) == (["demo-digits-transformers/03_scores"], "rules-transformers")
    with pytest.raises(ItaeError, match="pos_embed='hf'"):
        make_plan(folder, "rules", None, {"pos_embed": ["hf"]})
    write_profile(folder, "wrong", "only: ['07']\n")
    with pytest.raises(ItaeError, match="'07'"):
        make_plan(folder, "wrong", None, {})


class TestFitSplit:
    def plan(self, folder, **given):
        write_notebook(folder, "05_clusters", measure=False,
                       parameters=PARAMETERS + "clusters = None\noptions = {'fit_split': None}\n")
        return make_plan(folder, "demo", ["05"], given)

    def test_both_parts_are_known(self, folder):
        (step,) = self.plan(folder, dataset="cifar10", fit_split="train").steps
        assert [part["split"] for part in step.parts] == [None, "train"]
        (step,) = self.plan(folder, dataset="cifar10").steps
        assert [part["split"] for part in step.parts] == [None]

    @pytest.mark.parametrize(("dataset", "split"), [("digits", "train"), ("cifar10", "dev"), ("cats", "train"),
                                                    ("hf:user/cats:test", "train")])
    def test_a_split_that_is_not_there_is_refused_by_name(self, folder, tmp_path, dataset, split):
        image_folder(tmp_path / "cats", 5)
        with pytest.raises(ItaeError, match=f"fit_split='{split}'.*split='{split}'") as refused:
            self.plan(folder, dataset=dataset, fit_split=split)
        assert "\n" not in str(refused.value)

    def test_there_are_no_more_clusters_than_images_to_fit(self, folder, tmp_path):
        for part, count in (("train", 5), ("test", 9)):
            image_folder(tmp_path / "split" / part, count)
        self.plan(folder, dataset="split", clusters=9)
        self.plan(folder, dataset="split", fit_split="train", clusters=5)
        with pytest.raises(ItaeError, match=r"clusters=6.* 5\b"):
            self.plan(folder, dataset="split", fit_split="train", clusters=6)


def test_a_notebook_without_a_data_set_has_a_name_too(folder):
    write_notebook(folder, "02_other", parameters="output_dir = 'x'\nbackbone = 'demo'\n", measure=False)
    assert make_plan(folder, "demo", ["02"], {}).name == "demo-demo"


@pytest.mark.parametrize(("words", "name"), [
    (("demo", "tiny", "digits"), "demo-tiny-digits"), (("a b", "my cats/x"), "a-b-my-cats-x"), (("x", ".."), "x-..")])
def test_names_are_one_safe_folder(words, name):
    assert safe_name(*words) == name


class TestClusters:
    def plan(self, folder, **parameters):
        write_notebook(folder, "05_clusters", measure=False, parameters=PARAMETERS + "clusters = None\n")
        return make_plan(folder, "demo", ["05"], parameters)

    def test_there_are_no_more_than_images(self, folder, tmp_path):
        few = image_folder(tmp_path / "few", 5)
        for dataset, limit, count in [("digits", None, 1797), ("digits", 20, 20), (few, None, 5), (few, 4, 4)]:
            self.plan(folder, dataset=dataset, limit=limit, clusters=count)
            with pytest.raises(ItaeError, match=f"clusters={count + 1}.* {count:,}"):
                self.plan(folder, dataset=dataset, limit=limit, clusters=count + 1)

    def test_fewer_than_four_images_are_too_few(self, folder, tmp_path):
        dataset = image_folder(tmp_path / "few", 4)
        self.plan(folder, dataset=dataset)
        for given in ({"dataset": dataset, "limit": 3}, {"limit": 1}):
            with pytest.raises(ItaeError, match=f"images: {given['limit']} "):
                self.plan(folder, **given)
        make_plan(folder, "demo", ["01"], {"limit": 1})


def test_data_sets(tmp_path):
    check_dataset("digits")
    folder = image_folder(tmp_path / "images", 1)
    check_dataset(folder)
    (tmp_path / "images" / "a.png").touch()
    check_dataset(folder, "skip")
    for name, message in [("digit", "'digit'.* digits"), ("imagefolder:", "'imagefolder:'"), (folder, r"a\.png"),
                          ("imagefolder:" + "a" * 5000, "aaa")]:
        with pytest.raises(ItaeError, match=message):
            check_dataset(name)


def write_weights(path, name: str) -> str:
    """Write a checkpoint with the names and shapes of a model's tensors, each a single number."""
    with torch.device("meta"):
        shapes = timm.create_model(name, num_classes=0).state_dict()
    torch.save({name: torch.zeros(1).expand(tensor.shape) for name, tensor in shapes.items()}, path)
    return str(path)


def test_backbones(tmp_path):
    weights = write_weights(tmp_path / "weights.pth", "vit_tiny_patch16_224")
    check_backbone("demo", None, 32)
    check_backbone("vit_tiny_patch16_224", weights, 96)
    for arguments, message in [
        (("demmo", None, None), "'demmo'.* demo"),
        (("resnet18", None, None), "ResNet"),
        (("demo", weights, None), r"demo .*weights\.pth"), (("vit_small_patch16_224", weights, None), r"weights\.pth"),
        (("dinov2_vits14", str(tmp_path / "none.pth"), None), r"none\.pth"),
        (("demo", None, 13), "13.*12 or 16"),
        (("vit_tiny_patch16_224", None, 100), "100.*16"),
    ]:
        with pytest.raises(ItaeError, match=message):
            check_backbone(*arguments)
