"""The project's own files agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import itae_utils
from itae_utils.report.rules import RULES

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bounds(requirements) -> dict[str, str]:
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in requirements)


def test_environment_yml_and_pyproject_have_the_same_bounds():
    conda = [entry for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
             if isinstance(entry, str) and entry != "pip"]
    ours = {CONDA_NAMES.get(name, name): bound for name, bound in bounds(project()["dependencies"]).items()}
    assert bounds(conda) == ours | {"python": project()["requires-python"].removeprefix(">=")}


def test_the_lock_pins_every_direct_dependency_within_its_bound():
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines()
                if not line.startswith("#"))
    lock = {name.lower().replace("_", "-"): version for name, version in lock.items()}
    extras = project()["optional-dependencies"]["dev"]
    for name, bound in bounds(project()["dependencies"] + extras).items():
        assert Version(lock[name]) >= Version(bound), name


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert itae_utils.__version__ == project()["version"] == citation["version"]


def test_every_public_name_exists_and_is_documented():
    for name in itae_utils.__all__:
        assert getattr(itae_utils, name).__doc__, name
    assert set(itae_utils.__all__) <= set(dir(itae_utils))
    with pytest.raises(AttributeError, match="'attenuat'"):
        _ = itae_utils.attenuat


def test_only_one_module_reads_environment_variables():
    readers = {path.name for path in (ROOT / "itae_utils").rglob("*.py")
               if re.search(r"os\.(environ|getenv)", path.read_text(encoding="utf-8"))}
    assert readers == {"environment.py"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_parameter_and_option_is_documented():
    text = (ROOT / "docs/reference/parameters.md").read_text(encoding="utf-8")
    first_column = "\n".join(line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", first_column)) == set(RULES)
