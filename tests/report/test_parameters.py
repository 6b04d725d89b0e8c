import math
import re
from pathlib import Path

import pytest

from itae_utils.errors import ItaeError
from itae_utils.report.parameters import Profile, find_notebooks, fits, parse_value, read_profile, resolve, select
from tests.tiny_notebooks import PARAMETERS, write_notebook, write_notebooks


def defaults_of(folder: Path, cell: str) -> dict:
    folder.mkdir(exist_ok=True)
    write_notebook(folder, "01_odd", parameters=cell)
    return find_notebooks(folder)[0].defaults


def test_odd_literals_are_read(tmp_path):
    cell = '''\
# everything papermill's own inspection stumbles over
colour = "#fff"  # a sign in a string
text = 'k=v'
minus = -1.5e-3
big = 1_000
several = [
    1,
    2,
]
pair = (1, "two")
table = {"a": {"b": None}}
nothing = None
sure = True
typed: float | None = None
joined = "a" "b"
empty = ""
'''
    assert defaults_of(tmp_path, cell) == {
        "colour": "#fff", "text": "k=v", "minus": -0.0015, "big": 1000, "several": [1, 2], "pair": (1, "two"),
        "table": {"a": {"b": None}}, "nothing": None, "sure": True, "typed": None, "joined": "ab", "empty": "",
    }


@pytest.mark.parametrize("cell", [
    "import os", "a = dict(k=1)", "a = b = 1", "a, b = 1, 2", "a = [x for x in ()]", "a += 1", "a: int", "%matplotlib",
])
def test_other_cells_are_refused(tmp_path, cell):
    with pytest.raises(ItaeError, match=r"parameters cell of 01_odd\.ipynb"):
        defaults_of(tmp_path, "fine = 1\n" + cell)


def test_exactly_one_parameters_cell(tmp_path):
    path = write_notebook(tmp_path, "01_none")
    path.write_text(path.read_text(encoding="utf-8").replace('"parameters"', '"other"'), encoding="utf-8")
    with pytest.raises(ItaeError, match="0 cells tagged 'parameters'"):
        find_notebooks(tmp_path)


def test_notebooks_come_in_reading_order_with_title_and_lead(tmp_path):
    notebooks = find_notebooks(write_notebooks(tmp_path / "nb"))
    assert [notebook.key for notebook in notebooks] == ["01", "02", "03"]
    assert (notebooks[2].name, notebooks[2].title, notebooks[2].lead) == (
        "03_scores", "Title of 03_scores", "What it *shows*.")
    with pytest.raises(ItaeError, match="no notebooks"):
        find_notebooks(tmp_path)


def test_select(tmp_path):
    notebooks = find_notebooks(write_notebooks(tmp_path / "nb"))
    assert [notebook.key for notebook in select(notebooks, ["03", "01"])] == ["01", "03"]
    assert select(notebooks, None) == notebooks
    with pytest.raises(ItaeError, match="no notebook '04': choose from 01, 02, 03"):
        select(notebooks, ["04"])


@pytest.mark.parametrize(("text", "value"), [
    ("3", 3), ("-3", -3), ("1e-3", 0.001), ("1E5", 100000), ("1e3", 1000), ("2.5e-1", 0.25), ("2.5", 2.5),
    (".5", 0.5), ("-.inf", -math.inf), ("true", True), ("null", None), ("~", None),
    ("auto", "auto"), ("'3'", "3"), ("[1, 2]", [1, 2]), ("imagefolder:/a b", "imagefolder:/a b"), ("1e", "1e"),
    # what YAML 1.1 reads otherwise: 64, 90, False, a date
    ("0100", "0100"), ("010", "010"), ("1:30", "1:30"), ("no", "no"), ("on", "on"),
    ("2024-01-02", "2024-01-02"), ("0o7", "0o7"),
])
def test_values_are_yaml(text, value):
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", ["[1", "a: b: c", "9" * 5000, "[" * 5000, "!!python/name:os.system x"])
def test_value_that_is_no_yaml(text):
    with pytest.raises(ItaeError, match="can't be read as a value") as refused:
        parse_value(text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 5000, "a: \x00"])
def test_profile_that_is_no_yaml(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ItaeError, match="profile"):
        read_profile("odd", tmp_path)


@pytest.mark.parametrize(("value", "default", "right"), [
    (1, 0, True), (1.5, 0, False), (True, 0, False), ("1", 0, False), (None, 0, False),
    (1, 0.5, True), (1.5, 0.5, True), (True, 0.5, False), ("a", 0.5, False),
    (True, False, True), (0, False, False),
    ("a", "b", True), (1, "b", False),
    (1, None, True), ("a", None, True), (0.5, None, True), (True, None, True), (None, None, True), ([1], None, False),
    (0.5, "auto", True), ("auto", "auto", True), (None, "auto", True), ({}, "auto", False),
    ([1], [2], True), ([1], (2,), True), (1, [2], False), ({"a": 1}, {}, True), ([1], {}, False),
])
def test_fits(value, default, right):
    assert fits(value, default) == right


def profile_of(tmp_path: Path, text: str) -> Profile:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return read_profile(str(tmp_path / "mine.yaml"), tmp_path / "none")


def test_profiles_by_name_and_by_file(tmp_path):
    folder = write_notebooks(tmp_path / "nb") / "profiles"
    named = read_profile("demo", folder)
    assert named == Profile("demo", "Tiny.", {"backbone": "demo", "dataset": "digits"}, {"01": {"alpha": 0.25}})
    assert read_profile(str(folder / "demo.yaml"), tmp_path) == named
    assert profile_of(tmp_path, "01: {alpha: 1e-3}").of_notebook == {"01": {"alpha": 0.001}}
    assert profile_of(tmp_path, "").common == {}


@pytest.mark.parametrize(("profile", "message"), [
    ("demmo", "'demmo'.*demo"), ("none.yaml", r"none\.yaml")])
def test_missing_profiles_are_refused(tmp_path, profile, message):
    with pytest.raises(ItaeError, match=message):
        read_profile(profile, write_notebooks(tmp_path / "nb") / "profiles")


def test_a_profile_may_have_a_grid(tmp_path):
    grid = profile_of(tmp_path, "grid: {dataset: [digits, stl10], backbone: [demo]}").grid
    assert list(grid.items()) == [("dataset", ["digits", "stl10"]), ("backbone", ["demo"])]


@pytest.mark.parametrize("grid", ["{dataset: digits}", "{dataset: []}", "{seed: [1, 2]}"])
def test_grids_of_another_shape_are_refused(tmp_path, grid):
    with pytest.raises(ItaeError, match="grid"):
        profile_of(tmp_path, f"grid: {grid}")


@pytest.mark.parametrize("text", ["- a", "common: 3", "a: [", "just words", "common: [x]"])
def test_profiles_of_another_shape_are_refused(tmp_path, text):
    with pytest.raises(ItaeError, match="profile"):
        profile_of(tmp_path, text)


@pytest.fixture
def notebooks(tmp_path):
    return find_notebooks(write_notebooks(tmp_path / "nb"))


NONE = Profile("none", "", {}, {})


def test_later_values_win_and_each_notebook_gets_its_own(notebooks):
    profile = Profile("p", "", {"seed": 1, "limit": 10, "backbone": "x"}, {"01": {"seed": 2, "alpha": 0.5}})
    given = resolve(notebooks, [notebooks[0], notebooks[2]], profile, {"backbone": "y", "k": 5})
    assert given == {
        "01": {"seed": 2, "limit": 10, "backbone": "y", "alpha": 0.5},
        "03": {"seed": 1, "limit": 10, "backbone": "y", "k": 5},
    }


@pytest.mark.parametrize(("given", "message"), [
    ({"sed": 1}, "-p: no parameter 'sed' in notebook 01, 02, 03: did you mean seed"),
    ({"seed": 1.5}, "-p: seed=1.5"),
    ({"seed": True}, "seed=True"),
    ({"alpha": "x"}, "alpha='x'"), ({"k": [1]}, "k=[1]"),
    ({"limit": [1]}, "limit=[1]"),
    ({"output_dir": "x"}, "use --output"),
])
def test_unknown_and_mistyped_parameters_are_refused(notebooks, given, message):
    with pytest.raises(ItaeError, match=re.escape(message)) as refused:
        resolve(notebooks, notebooks, NONE, given)
    assert "\n" not in str(refused.value)


def test_a_given_name_must_be_in_a_selected_notebook(notebooks):
    resolve(notebooks, notebooks, NONE, {"alpha": 0.3})
    with pytest.raises(ItaeError, match="no parameter 'alpha' in notebook 03"):
        resolve(notebooks, notebooks[2:], NONE, {"alpha": 0.3})


@pytest.mark.parametrize("profile", [
    Profile("p", "", {"alhpa": 1}, {}), Profile("p", "", {}, {"03": {"alpha": 0.3}}), Profile("p", "", {}, {"07": {}}),
    Profile("p", "", {}, {"01": {"alpha": "x"}}),
])
def test_a_profile_is_checked_against_all_notebooks(notebooks, profile):
    with pytest.raises(ItaeError):
        resolve(notebooks, notebooks[1:2], profile, {})


def test_a_profile_may_speak_of_notebooks_that_are_not_selected(notebooks):
    profile = Profile("p", "", {"k": 3}, {"01": {"alpha": 0.3}})
    assert resolve(notebooks, notebooks[1:2], profile, {}) == {"02": {}}


def test_paths_are_taken_from_the_working_directory(notebooks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = resolve(notebooks, notebooks[:1], NONE, {"data_dir": "data/../d", "dataset": "imagefolder:../x"})
    assert given["01"] == {"data_dir": str(tmp_path / "d"), "dataset": f"imagefolder:{tmp_path.parent / 'x'}"}
    assert resolve(notebooks, notebooks[:1], NONE, {"dataset": "digits"})["01"] == {"dataset": "digits"}
    assert resolve(notebooks, notebooks[:1], NONE, {"data_dir": "~nobody-of-this-name/x"})["01"] == {
        "data_dir": str(tmp_path / "~nobody-of-this-name/x")}


def test_a_checkpoint_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path, "01_first", parameters="checkpoint = None\n")
    notebooks = find_notebooks(tmp_path)
    assert resolve(notebooks, notebooks, NONE, {"checkpoint": "w.pth"})["01"] == {"checkpoint": str(tmp_path / "w.pth")}
    assert resolve(notebooks, notebooks, NONE, {"checkpoint": None})["01"] == {"checkpoint": None}


def test_text_that_is_not_a_path_is_refused(notebooks):
    for given in ({"data_dir": "a\0b"}, {"dataset": "imagefolder:a\0b"}):
        with pytest.raises(ItaeError, match=r"a.*b"):
            resolve(notebooks, notebooks[:1], NONE, given)


@pytest.fixture
def with_options(tmp_path):
    write_notebook(tmp_path, "01_first", parameters=PARAMETERS + "options = {'alpha': 0.1, 'n_init': 1}\n")
    write_notebook(tmp_path, "02_second", parameters=PARAMETERS + "alpha = 0.5\n")
    return find_notebooks(tmp_path)


def test_names_of_options_go_to_the_options(with_options):
    given = resolve(with_options, with_options, NONE, {"alpha": 0.3, "image_size": 56, "seed": 2})
    assert given == {"01": {"seed": 2, "options": {"alpha": 0.3, "n_init": 1, "image_size": 56}},
                     "02": {"seed": 2, "alpha": 0.3}}


def test_options_of_all_layers_are_merged_and_later_ones_win(with_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = Profile("p", "", {"options": {"image_size": 28, "device": "cpu"}}, {"01": {"n_init": 4}})
    given = resolve(with_options, with_options[:1], profile, {"options": {"image_size": 56}, "checkpoint": "w.pth"})
    assert given["01"]["options"] == {"alpha": 0.1, "n_init": 4, "image_size": 56, "device": "cpu",
                                      "checkpoint": str(tmp_path / "w.pth")}


@pytest.mark.parametrize(("given", "message"), [
    ({"options": {"image_sise": 3}}, "'image_sise'.* image_size"),
    ({"options": {"image_size": 2.5}}, "image_size=2.5"),
    ({"image_size": "big"}, "image_size='big'"),
    ({"options": {"seed": 1}}, "'seed'"),
    ({"options": 3}, "options=3"),
    ({"clusters": 3}, "'clusters'"),
])
def test_bad_options_are_refused(with_options, given, message):
    with pytest.raises(ItaeError, match=message) as refused:
        resolve(with_options, with_options[:1], NONE, given)
    assert str(refused.value).startswith("-p: ")


@pytest.mark.parametrize(("store", "absolute"), [
    ("none", "none"), ("auto", "auto"), ("s3://bucket/x", "s3://bucket/x"), ("features", None), (None, None)])
def test_a_folder_as_store_is_taken_from_the_working_directory(with_options, tmp_path, monkeypatch, store, absolute):
    monkeypatch.chdir(tmp_path)
    found = resolve(with_options, with_options[:1], NONE, {"store": store})["01"]["options"]["store"]
    assert found == (str(tmp_path / "features") if store == "features" else absolute)
