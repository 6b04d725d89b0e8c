import math
import re
from pathlib import Path

import pytest

from itae_utils.errors import ItaeError
from itae_utils.report.parameters import Profile, find_notebooks, fits, parse_value, read_profile, resolve, select
from tests.tiny_notebooks import PARAMETERS, write_notebook, write_notebooks


def defaults_of(folder: Path, cell: str) -> dict:
    write_notebook(folder, "01_odd", parameters=cell)
    return find_notebooks(folder)[0].defaults


def test_literals_of_all_kinds_are_read(tmp_path):
    """Papermill's own inspection fails on most of these."""
    literals = {
        "colour": ('"#fff"  # a sign in a string', "#fff"), "text": ("'k=v'", "k=v"), "minus": ("-1.5e-3", -0.0015),
        "big": ("1_000", 1000), "several": ("[\n    1,\n    2,\n]", [1, 2]), "pair": ('(1, "two")', (1, "two")),
        "table": ('{"a": {"b": None}}', {"a": {"b": None}}), "sure": ("True", True), "joined": ('"a" "b"', "ab"),
        "typed: float | None": ("None", None), "empty": ('""', ""),
    }
    cell = "# a comment\n" + "".join(f"{name} = {text}\n" for name, (text, _) in literals.items())
    assert defaults_of(tmp_path, cell) == {name.partition(":")[0]: value for name, (_, value) in literals.items()}


@pytest.mark.parametrize("cell", [
    "import os", "a = dict(k=1)", "a = b = 1", "a, b = 1, 2", "a = [x for x in ()]", "a += 1", "a: int", "%matplotlib",
])
def test_other_cells_are_refused(tmp_path, cell):
    with pytest.raises(ItaeError, match=r"01_odd\.ipynb"):
        defaults_of(tmp_path, "fine = 1\n" + cell)


def test_a_notebook_needs_a_parameters_cell(tmp_path):
    path = write_notebook(tmp_path, "01_none")
    path.write_text(path.read_text(encoding="utf-8").replace('"parameters"', '"other"'), encoding="utf-8")
    with pytest.raises(ItaeError, match=r"01_none\.ipynb"):
        find_notebooks(tmp_path)


def test_notebooks_are_found_in_reading_order_and_selected_by_number(tmp_path):
    notebooks = find_notebooks(write_notebooks(tmp_path / "nb"))
    assert [(notebook.key, notebook.name) for notebook in notebooks] == [
        ("01", "01_first"), ("02", "02_fails"), ("03", "03_scores")]
    assert (notebooks[2].title, notebooks[2].lead) == ("Title of 03_scores", "What it *shows*.")
    assert select(notebooks, ["03", "01"]) == [notebooks[0], notebooks[2]]
    assert select(notebooks, None) == notebooks
    with pytest.raises(ItaeError, match=r"'04'.* 01, 02, 03"):
        select(notebooks, ["04"])
    with pytest.raises(ItaeError, match=str(tmp_path)):
        find_notebooks(tmp_path)


@pytest.mark.parametrize(("text", "value"), [
    ("3", 3), ("-3", -3), ("1e-3", 0.001), ("1E5", 100000), ("1e3", 1000), ("2.5e-1", 0.25), ("2.5", 2.5),
    (".5", 0.5), ("-.inf", -math.inf), ("true", True), ("null", None), ("~", None),
    ("auto", "auto"), ("'3'", "3"), ("[1, 2]", [1, 2]), ("imagefolder:/a b", "imagefolder:/a b"), ("1e", "1e"),
    # YAML 1.1 reads these as 64, 8, 90, False, True, a date
    ("0100", "0100"), ("010", "010"), ("1:30", "1:30"), ("no", "no"), ("on", "on"),
    ("2024-01-02", "2024-01-02"), ("0o7", "0o7"),
])
def test_values_are_yaml(text, value):
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", ["[1", "a: b: c", "9" * 5000, "[" * 2000, "!!python/name:os.system x"])
def test_text_that_is_no_yaml_is_refused(text):
    with pytest.raises(ItaeError, match=re.escape(repr(text))):
        parse_value(text)


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
    grid = profile_of(tmp_path, "grid: {dataset: [digits, stl10], backbone: [demo]}").grid
    assert list(grid.items()) == [("dataset", ["digits", "stl10"]), ("backbone", ["demo"])]
    assert profile_of(tmp_path, "only: ['03']\ngrid: {pos_embed: [meta]}").only == ["03"]


@pytest.mark.parametrize(("profile", "message"), [("demmo", "'demmo'.*demo"), ("none.yaml", r"none\.yaml")])
def test_missing_profiles_are_refused(tmp_path, profile, message):
    with pytest.raises(ItaeError, match=message):
        read_profile(profile, write_notebooks(tmp_path / "nb") / "profiles")


@pytest.mark.parametrize("text", [
    "- a", "common: 3", "a: [", "just words", "common: [x]", "[" * 2000, "a: \x00",
    "grid: {dataset: digits}", "grid: {dataset: []}", "grid: {seed: [1, 2]}", "only: 3",
    "only: [3]", "only: []", "only: '03'"])
def test_profiles_of_another_form_are_refused(tmp_path, text):
    with pytest.raises(ItaeError, match=r"mine\.yaml"):
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
    ({"sed": 1}, r"-p: .*'sed'.* 01, 02, 03.* seed"), ({"seed": 1.5}, r"-p: seed=1\.5"), ({"k": [1]}, r"k=\[1\]"),
    ({"output_dir": "x"}, "--output"), ({"data_dir": "a\0b"}, r"data_dir='a.*b'"),
    ({"dataset": "imagefolder:a\0b"}, r"dataset='.*a.*b'"),
])
def test_bad_values_are_refused_by_name(notebooks, given, message):
    with pytest.raises(ItaeError, match=message) as refused:
        resolve(notebooks, notebooks, NONE, given)
    assert "\n" not in str(refused.value)


def test_a_given_name_must_be_in_a_selected_notebook(notebooks):
    resolve(notebooks, notebooks, NONE, {"alpha": 0.3})
    with pytest.raises(ItaeError, match=r"'alpha'.* 03"):
        resolve(notebooks, notebooks[2:], NONE, {"alpha": 0.3})


@pytest.mark.parametrize("profile", [
    Profile("p", "", {"alhpa": 1}, {}), Profile("p", "", {}, {"03": {"alpha": 0.3}}), Profile("p", "", {}, {"07": {}}),
    Profile("p", "", {}, {"01": {"alpha": "x"}}),
])
def test_a_profile_is_validated_against_all_notebooks(notebooks, profile):
    with pytest.raises(ItaeError):
        resolve(notebooks, notebooks[1:2], profile, {})
    valid = Profile("p", "", {"k": 3}, {"01": {"alpha": 0.3}})
    assert resolve(notebooks, notebooks[1:2], valid, {}) == {"02": {}}


@pytest.mark.parametrize(("name", "value", "resolved"), [
    ("data_dir", "data/../d", "{}/d"), ("data_dir", "~nobody-of-this-name/x", "{}/~nobody-of-this-name/x"),
    ("dataset", "imagefolder:d", "imagefolder:{}/d"), ("dataset", "digits", "digits"),
    ("checkpoint", "w.pth", "{}/w.pth"), ("checkpoint", None, None),
    ("store", "features", "{}/features"), ("store", "s3://bucket/x", "s3://bucket/x"), ("store", "none", "none"),
    ("store", "auto", "auto"), ("store", None, None),
])
def test_paths_start_at_the_working_directory(tmp_path, monkeypatch, name, value, resolved):
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path, "01_first", parameters="data_dir = '.'\ndataset = ''\ncheckpoint = None\nstore = 'auto'\n")
    notebooks = find_notebooks(tmp_path)
    assert resolve(notebooks, notebooks, NONE, {name: value})["01"] == {
        name: resolved.format(tmp_path) if resolved else None}


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
    ({"options": {"image_sise": 3}}, "'image_sise'.* image_size"), ({"options": {"image_size": 2.5}}, "image_size=2.5"),
    ({"options": {"seed": 1}}, "'seed'"), ({"clusters": 3}, "'clusters'"),
])
def test_bad_options_are_refused_by_name(with_options, given, message):
    with pytest.raises(ItaeError, match=f"-p: .*{message}"):
        resolve(with_options, with_options[:1], NONE, given)
