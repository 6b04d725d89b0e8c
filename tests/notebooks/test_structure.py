"""What every notebook keeps to, so that papermill, the report and readers can rely on it."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from itae_utils.report.parameters import find_notebooks
from itae_utils.report.rules import RULES

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MOST_LINES = 15
MOST_PARAMETERS = 10


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture
def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def test_valid_with_cell_ids_and_the_python3_kernel(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.kernelspec.name == "python3"


def test_no_outputs_are_stored(code):
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_opens_with_a_title_and_what_one_will_see(notebook):
    first = notebook.cells[0]
    title, blank, lead = first.source.split("\n", 2)
    assert first.cell_type == "markdown"
    assert re.match(r"# \w", title)
    assert not blank
    assert len(lead) > 100


def test_sections_are_numbered(notebook):
    headings = [line for cell in notebook.cells if cell.cell_type == "markdown"
                for line in re.findall(r"^## .*", cell.source, re.MULTILINE)]
    assert [heading.split(".")[0] for heading in headings] == [f"## {place}" for place in range(1, len(headings) + 1)]


def test_one_cell_of_plain_parameters_with_words(path, code):
    cell, = filter(is_parameters, code)
    for line in cell.source.splitlines():
        assignment, comment = line.split("  # ")
        statement, = ast.parse(assignment).body
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
        assert comment
    found = {each.path: each for each in find_notebooks(FOLDER)}[path]
    assert found.defaults["output_dir"] == f"../reports/interactive/{path.stem}"
    assert found.collects or {"backbone", "dataset", "limit", "seed"} <= set(found.defaults)


def test_values_are_derived_after_the_parameters(code):
    """Papermill injects its cell after the tagged one: what is derived before stays stale."""
    names = {line.split(" = ")[0] for cell in code if is_parameters(cell) for line in cell.source.splitlines()}
    for cell in code[:[is_parameters(cell) for cell in code].index(True)]:
        assert not {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)} & names


def test_every_parameter_is_used(code):
    """`run` has the loading options, the seed and the output folder; the others must be read by name."""
    cell, = filter(is_parameters, code)
    names = {line.split(" = ")[0] for line in cell.source.splitlines()}
    rest = ast.parse("\n".join(each.source for each in code if each is not cell))
    read = {node.id for node in ast.walk(rest) if isinstance(node, ast.Name)}
    loaded = {"backbone", "dataset", "limit", "seed", "output_dir", "options"}
    assert names - loaded <= read
    own = ast.literal_eval(next((line.split(" = ")[1].split("  #")[0] for line in cell.source.splitlines()
                                 if line.startswith("options = ")), "{}"))
    text = "\n".join(each.source for each in code)
    assert all(f'run.options["{name}"]' in text for name in own)


def test_no_cell_takes_the_name_of_a_parameter(code):
    """Run again in JupyterLab, `start` would read it as a parameter."""
    for cell in code:
        if not is_parameters(cell):
            stored = {node.id for node in ast.walk(ast.parse(cell.source))
                      if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            assert not stored & set(RULES), cell.source


def test_cells_are_short_and_define_no_functions(code):
    for cell in code:
        assert len(cell.source.splitlines()) <= (MOST_PARAMETERS if is_parameters(cell) else MOST_LINES), cell.source
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source)))


def test_no_formula_needs_a_script(notebook):
    assert not any("$" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_starts_by_its_own_name_and_ends_by_writing_results(path, code):
    assert sum(f'notebook.start("{path.stem}", globals())' in cell.source for cell in code) == 1
    assert code[-1].source.startswith("run.write(")
