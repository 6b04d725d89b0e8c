"""Imports of the package run one way, without a circle; few of them are inside functions."""

import ast
import graphlib
import subprocess
import sys

import pytest

from itae_utils.files import PACKAGE

# A module imports only from parts that stand before its own, so parts in one set do not know each other.
ORDER = [{"lazy"}, {"errors"}, {"environment"}, {"files"}, {"machine", "latex"}, {"method", "data"}, {"models"},
         {"store"}, {"extraction"}, {"results"}, {"analysis"}, {"figures"}, {"report"}, {"cli"}]
PLACE = {part: place for place, parts in enumerate(ORDER) for part in parts}
MOST_INSIDE_FUNCTIONS = 40
HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "pandas", "zarr", "papermill", "nbconvert"}
PATHS = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
         for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
FOLDERS = [name for name, path in PATHS.items() if path.name == "__init__.py" and not name.endswith("demo")]


def imports_in(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imported(name: str) -> set[str]:
    """Return the modules of the package that a module imports, at the top or inside functions."""
    found = set()
    for node in imports_in(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert not node.level, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in PATHS else node.module
                      for alias in node.names}
    return (found & set(PATHS)) - {"itae_utils"}


IMPORTED = {name: imported(name) for name in PATHS}


def part(name: str) -> str:
    return name.split(".")[1]


def follows_the_order(name: str, other: str) -> bool:
    if (part(name), part(other)) == ("report", "analysis"):
        return False  # the analysis belongs to the notebooks
    return part(name) == part(other) or PLACE[part(name)] > PLACE[part(other)]


def test_imports_follow_the_order_of_the_parts():
    modules = set(PATHS) - {"itae_utils"}
    assert {part(name) for name in modules} == set(PLACE)
    assert not [(name, other) for name in modules for other in IMPORTED[name] if not follows_the_order(name, other)]


def test_there_is_no_circle():
    graphlib.TopologicalSorter(IMPORTED).prepare()


def test_few_imports_are_inside_functions_and_none_is_for_types_alone():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {f"{name}:{node.lineno}" for name, tree in TREES.items() for function in ast.walk(tree)
              if isinstance(function, functions) for node in imports_in(function)}
    assert len(inside) <= MOST_INSIDE_FUNCTIONS, sorted(inside)
    assert not [name for name, path in PATHS.items() if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("code", [
    f"import {', '.join(FOLDERS)}, itae_utils.method.setting, itae_utils.models.registry",
    *(f"from itae_utils.cli import main; main({arguments}, standalone_mode=False)"
      for arguments in (["--help"], ["report", "--help"], ["datasets"], ["backbones"])),
])
def test_names_and_help_import_nothing_heavy(code):
    code += f"\nimport sys\nprint('HEAVY', *sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"
