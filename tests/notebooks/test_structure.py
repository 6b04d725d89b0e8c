"""The form that every notebook has, so that papermill, the report and readers can rely on it."""

import ast
import re

import nbformat
import pytest

from itae_utils.report.parameters import notebooks_folder, read_notebook
from itae_utils.report.rules import RULES

PATHS = sorted(notebooks_folder().glob("*.ipynb"))
MOST_LINES = 15
MOST_PARAMETERS = 10
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
USED_BY_RUN = {"backbone", "dataset", "limit", "seed", "output_dir", "options"}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture
def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def text(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@pytest.fixture
def place(code):
    """The index of the parameters cell among the code cells."""
    place, = (number for number, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    return place


def names(source: str, context: type = ast.expr_context) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def test_the_file_is_valid_and_has_no_outputs(notebook, code):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_it_opens_with_title_and_lead_and_numbers_its_sections(notebook, text):
    assert notebook.cells[0].cell_type == "markdown"
    assert re.match(r"# \w.*\n\n.{100}", text[0])
    headings = [line for source in text for line in re.findall(r"^## .*", source, re.MULTILINE)]
    assert [heading.split(".")[0] for heading in headings] == [f"## {number + 1}" for number in range(len(headings))]


def test_formulas_need_no_script(text):
    assert not [source for source in text if "$" in source]


def test_parameters_are_literals_with_comments(path, code, place):
    for line in code[place].source.splitlines():
        assignment, comment = line.split("  # ")
        statement, = ast.parse(assignment).body
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
        assert comment
    found = read_notebook(path)
    assert found.defaults["output_dir"] == f"../reports/interactive/{path.stem}"
    assert found.collects or {"backbone", "dataset", "limit", "seed"} <= set(found.defaults)


def test_no_parameter_is_used_above_its_cell(path, code, place):
    """Papermill inserts the given values below that cell."""
    for cell in code[:place]:
        assert not names(cell.source) & set(read_notebook(path).defaults)


def test_every_parameter_is_used(path, code, place):
    found = read_notebook(path)
    rest = "\n".join(cell.source for cell in code[place + 1:])
    assert set(found.defaults) - USED_BY_RUN <= names(rest, ast.Load)
    by_setting = {"source", "attenuation", "alpha"} if "run.setting()" in rest else set()
    assert all(f'run.options["{name}"]' in rest for name in set(found.defaults.get("options", {})) - by_setting)


def test_no_other_cell_assigns_a_name_of_a_parameter(code, place):
    """If it did, `start` would take its value for a parameter when the notebook runs again in JupyterLab."""
    for cell in code[:place] + code[place + 1:]:
        assert not names(cell.source, ast.Store) & set(RULES), cell.source


def test_cells_are_short_and_define_nothing(code, place):
    for number, cell in enumerate(code):
        assert len(cell.source.splitlines()) <= (MOST_PARAMETERS if number == place else MOST_LINES), cell.source
        assert not any(isinstance(node, DEFINITIONS) for node in ast.walk(ast.parse(cell.source))), cell.source


def test_it_starts_by_its_own_name_and_ends_by_writing_results(path, code):
    assert sum(f'notebook.start("{path.stem}", globals())' in cell.source for cell in code) == 1
    assert code[-1].source.startswith("run.write(")
