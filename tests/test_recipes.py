"""The recipes of CONTRIBUTING.md work: each is followed, as it stands there, in a copy of the project."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COPIED = ("itae_utils", "notebooks", "tests", "benchmarks", "pyproject.toml")
MOST_LINES = 10
STEP = re.compile(r"# (\S+), (after|before|in place of) (.+)\n((?:(?!# ).*\n)+)")  # place, then the lines that go there
RECIPES = {title: re.search(r"```text\n(.*?)```", body, re.DOTALL)[1]
           for title, body in re.findall(r"^### Add an? (.*)\n((?:(?!###).*\n)+)", TEXT, re.MULTILINE)}


class Project:
    """A copy of the project in which a recipe is followed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        self.environment = os.environ | {
            "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "ITAE_DATA": str(folder / "data"),
            "ITAE_STORE": str(folder / "store")}

    def follow(self, recipe: str) -> None:
        steps = STEP.findall(RECIPES[recipe])
        assert "".join(f"# {path}, {where} {anchor}\n{new}" for path, where, anchor, new in steps) == RECIPES[recipe]
        for path, where, anchor, new in steps:
            text = (self.folder / path).read_text(encoding="utf-8")
            assert text.count(anchor) == 1, (path, anchor)
            if where == "in place of":
                text = text.replace(anchor, new.removesuffix("\n"))
            else:
                line = next(line for line in text.splitlines(keepends=True) if anchor in line)
                text = text.replace(line, line + new if where == "after" else new + line)
            (self.folder / path).write_text(text, encoding="utf-8")

    def is_new(self, path: Path) -> bool:
        before = ROOT / path.relative_to(self.folder)
        return not before.exists() or before.read_bytes() != path.read_bytes()

    def run(self, *command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=self.folder, env=self.environment, text=True,
                              capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def itae(self, *arguments: str) -> str:
        return self.run("-c", "from itae_utils.cli import main; main()", *arguments)

    def check(self, *tests: str, only: str = "") -> None:
        """Run ruff on what is new, and tests of the copy."""
        changed = [path for path in self.folder.rglob("*") if path.suffix in (".py", ".ipynb") and self.is_new(path)]
        self.run("-m", "ruff", "check", "--quiet", *map(str, changed))
        ran = self.run("-m", "pytest", "-p", "no:cacheprovider", *tests, *(["-k", only] if only else []))
        assert " passed" in ran


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_there_are_five_short_recipes_in_a_short_page():
    assert set(RECIPES) == {"backbone", "data set", "edit", "statistic", "notebook"}
    for name, block in RECIPES.items():
        code = [line for line in block.splitlines() if line.strip() and not line.startswith("# ")]
        assert len(code) <= MOST_LINES, name
    assert len(TEXT.splitlines()) <= 140


@pytest.mark.slow
def test_a_backbone(project):
    project.follow("backbone")
    assert "dinov3_vits16 " in project.itae("backbones")
    project.check("tests/models/test_backbones.py::test_the_table_of_backbones_agrees_with_the_models")
    project.run("-c", """
import torch
import itae_utils as itae
backbone = itae.load_backbone("dinov3_vits16", pretrained=False)
assert itae.attention_map(backbone.model, torch.zeros(1, 3, 224, 224)).shape == (1, 14, 14)""")


def shapes_zip() -> bytes:
    """Return the archive of the recipe: 200 digits in class folders. Its bytes are the same everywhere."""
    file, digits = io.BytesIO(), load_digits()
    pixels = (digits.data * 16 - (digits.data > 0)).astype(np.uint8)
    with zipfile.ZipFile(file, "w") as archive:  # not compressed
        for number, label in enumerate(digits.target[:200]):
            member = zipfile.ZipInfo(f"shapes/{label}/{number:03}.pgm")
            archive.writestr(member, b"P5 8 8 255\n" + pixels[number].tobytes())
    return file.getvalue()


@pytest.mark.slow
def test_a_data_set(project):
    project.follow("data set")
    (project.folder / "data").mkdir()
    (project.folder / "data" / "shapes.zip").write_bytes(shapes_zip())
    assert "shapes " in project.itae("datasets")
    project.itae("extract", "--dataset", "shapes", "--output", "features.npz")
    features = np.load(project.folder / "features.npz")
    assert np.bincount(features["targets"]).tolist() == np.bincount(load_digits().target[:200]).tolist()
    assert features["itae"].shape == (200, 64)
    project.check("tests/data/test_datasets.py", only="not cifar")


EXTRACT = """
import itae_utils as itae
backbone, digits = itae.load_backbone("demo"), itae.load_dataset("digits", limit=60)
variants = {"baseline": None, "plain": itae.ITAE(threshold="share:5%"), "new": itae.ITAE(threshold="share:5%", NEW)}
features = itae.extract_features(backbone, digits, variants)
assert abs(features["new"] - features["baseline"]).max() > 1e-3
assert abs(features["new"] - features["plain"]).max() > 1e-3"""


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "setting", "tests", "only"), [
    ("edit", 'attenuation="halve"', ["method/test_attention.py", "method/test_one_pass.py", "figures/test_explorer.py"],
     "halve"),
    ("statistic", 'source="peak"', ["method/test_attention.py", "method/test_statistics.py", "analysis/test_words.py"],
     "peak and plain or definition or same_words")])
def test_an_edit_and_a_statistic(project, recipe, setting, tests, only):
    project.follow(recipe)
    project.run("-c", EXTRACT.replace("NEW", setting))
    project.check(*(f"tests/{name}" for name in tests), only=only)


@pytest.mark.slow
def test_a_notebook(project):
    path, target = re.search(r"Copy `(\S+)` to `(\S+)`", TEXT).groups()
    kept = re.findall(r"`(\w+)`", re.search(r"Of its parameters keep (.*?)\.", TEXT, re.DOTALL)[1])
    notebook = nbformat.read(project.folder / path, as_version=4)
    place, = (number for number, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    lines = notebook.cells[place].source.splitlines()
    parameters = [line for line in lines if line.partition(" = ")[0] in kept]
    assert len(parameters) == len(kept)
    notebook.cells[place].source = "\n".join(parameters).replace(Path(path).stem, Path(target).stem)
    first, last = RECIPES["notebook"].split("# the last cell\n")
    notebook.cells[place + 1:] = map(nbformat.v4.new_code_cell, (first.strip(), last.strip()))
    nbformat.write(notebook, project.folder / target)
    project.run("-m", "ruff", "check", "--fix", "--quiet", target)
    project.itae("report", "--only", "06", "-p", "limit", "60", "--output", "report")
    results = json.loads((project.folder / "report/06_share/results.json").read_text(encoding="utf-8"))
    assert [row["metric"] for row in results["rows"]] == ["artifact_share"]
    assert "06_share" in (project.folder / "report/index.html").read_text(encoding="utf-8")
    project.check("tests/notebooks/test_structure.py", only="06_share")
