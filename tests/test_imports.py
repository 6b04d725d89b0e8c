"""Imports of the package run one way, without a circle; few of them hide inside functions."""

import ast
import graphlib
import subprocess
import sys

import pytest

from itae_utils.files import PACKAGE

# A module imports only from parts that stand before its own. Parts in one set do not know each other, and reports do not
# know the analysis, which belongs to the notebooks.
ORDER = [{"lazy"}, {"errors"}, {"environment"}, {"files"}, {"machine"}, {"method", "data"}, {"models"}, {"store"},
         {"extraction"}, {"results"}, {"analysis"}, {"figures"}, {"report"}, {"cli"}]
PLACE = {part: place for place, parts in enumerate(ORDER) for part in parts}
MOST_INSIDE_FUNCTIONS = 40
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
           for path in PACKAGE.rglob("*.py")}


def imported(name):
    """The modules of the package that a module imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative imports hide where they lead"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                      for alias in node.names}
    return (found & set(MODULES)) - {"itae_utils"}


def part(name):
    return name.split(".")[1]


def test_every_part_has_its_place():
    assert {part(name) for name in MODULES if name != "itae_utils"} == set(PLACE)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"itae_utils"}))
def test_imports_follow_the_order_of_the_parts(name):
    for other in imported(name):
        assert part(other) == part(name) or PLACE[part(other)] < PLACE[part(name)], other


def test_reports_do_not_know_the_analysis():
    assert not [name for name in MODULES if name.startswith("itae_utils.report.")
                and any(part(other) == "analysis" for other in imported(name))]


def test_there_is_no_circle():
    list(graphlib.TopologicalSorter({name: imported(name) for name in MODULES}).static_order())


def inside_functions(tree):
    return {node.lineno for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))}


def test_few_imports_are_inside_functions():
    lines = {f"{name}:{line}" for name, path in MODULES.items()
             for line in inside_functions(ast.parse(path.read_text(encoding="utf-8")))}
    assert len(lines) <= MOST_INSIDE_FUNCTIONS, sorted(lines)


def test_nothing_is_imported_for_types_alone():
    """Such an import would be an arrow that the running program does not show."""
    assert not [name for name, path in MODULES.items() if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("code", [
    "import itae_utils",
    "from itae_utils.cli import main; main(['--help'], standalone_mode=False)",
    *(f"import {name}" for name, path in MODULES.items() if path.name == "__init__.py" and not name.endswith("demo")),
    "import itae_utils.method.setting, itae_utils.models.registry",
])
def test_what_only_names_things_imports_nothing_heavy(code):
    heavy = ("torch", "timm", "sklearn", "matplotlib", "pandas", "zarr", "papermill")
    asked = f"import sys\n{code}\nprint('HEAVY', [name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
