"""What the project's own files promise: environments that agree, light imports, a README whose example runs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import itae_utils

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bounds(requirements) -> dict[str, str]:
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in requirements)


def test_environment_yml_names_what_pyproject_names():
    conda = [entry for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
             if isinstance(entry, str) and entry != "pip"]
    ours = {CONDA_NAMES.get(name, name): bound for name, bound in bounds(project()["dependencies"]).items()}
    assert bounds(conda) == ours | {"python": project()["requires-python"].removeprefix(">=")}


def test_the_lock_pins_every_direct_dependency_within_its_bound():
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines()
                if not line.startswith("#"))
    lock = {name.lower().replace("_", "-"): version for name, version in lock.items()}
    as_numbers = lambda version: [int(part) for part in re.findall(r"\d+", version)][:3]  # noqa: E731
    extras = project()["optional-dependencies"]["dev"]
    for name, bound in bounds(project()["dependencies"] + extras).items():
        assert as_numbers(lock[name]) >= as_numbers(bound), name


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert itae_utils.__version__ == project()["version"] == citation["version"]


def test_every_public_name_can_be_had_and_is_documented():
    for name in itae_utils.__all__:
        assert getattr(itae_utils, name).__doc__, name
    assert set(itae_utils.__all__) <= set(dir(itae_utils))
    with pytest.raises(AttributeError, match="no attribute 'attenuat'"):
        _ = itae_utils.attenuat


def test_the_readme_s_python_examples_run_one_after_the_other(tmp_path):
    """What is marked `py` instead needs a cluster."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    code = "".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
