import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from itae_utils.report.pages import index_page, notebook_page, mean_scores
from itae_utils.report.parameters import Notebook
from itae_utils.report.runs import Report, Run
from tests.tiny_notebooks import PROVENANCE, RESULTS, ROWS

PIXEL = io.BytesIO()
Image.new("RGB", (2, 2)).save(PIXEL, "png")
PNG = base64.b64encode(PIXEL.getvalue()).decode() + "\n"


def external_references(page: str) -> list[str]:
    """Everything a browser would load from elsewhere to show this page, or any script at all."""
    found = re.findall(r"<script\b[^>]*>|@import[^;]*|url\(\s*['\"]?(?:https?:)?//[^)]*", page, re.IGNORECASE)

    class Loads(HTMLParser):
        def handle_starttag(self, tag, attributes):
            for name, value in attributes:
                loads = name in ("src", "srcset", "data", "poster") or (name == "href" and tag == "link")
                if loads and re.match(r"\s*(https?:)?//", value or ""):
                    found.append(value)

    Loads().feed(page)
    return found


def notebook_at(key: str) -> Notebook:
    return Notebook(Path(f"{key}_part.ipynb"), {"backbone": "demo", "seed": 0}, f"Title <{key}>", "It *shows*.")


NOTEBOOKS = [notebook_at(key) for key in ("01", "02", "03")]


def run_of(notebook: Notebook, error: str | None = None, results: dict | None = RESULTS) -> Run:
    parameters = {"backbone": "demo", "dataset": "digits", "seed": 3, "output_dir": "/x"}
    return Run(notebook, parameters, 1.25, error, results)


def rendered(folder: Path, *cells, run: Run | None = None) -> str:
    run = run or run_of(NOTEBOOKS[1])
    (folder / run.notebook.name).mkdir()
    nbformat.write(new_notebook(cells=list(cells)), folder / run.notebook.name / f"{run.notebook.name}.ipynb")
    path = notebook_page(run, NOTEBOOKS, folder)
    assert path == folder / run.notebook.name / f"{run.notebook.name}.html"
    return path.read_text(encoding="utf-8")


def code(*outputs, source: str = "run(1)", **more) -> nbformat.NotebookNode:
    return new_code_cell(source, outputs=list(outputs), **more)


def stderr(text: str) -> nbformat.NotebookNode:
    return new_output("stream", name="stderr", text=text)


def test_the_grep_finds_what_it_must():
    for page in ('<script src="//x/y.js">', "<link href='https://x'>", "<style>@import 'x'</style>", "<img src=http://x>",
                 "<style>a{background:url( 'https://x/y.png')}</style>", "<script>1</script>"):
        assert external_references(page), page
    assert not external_references('<a href="https://x">x</a><img src="data:image/png;base64,//8="><img src="a/b.png">')


def test_page_shows_outputs_and_hides_code_without_any_script(tmp_path):
    page = rendered(
        tmp_path,
        new_markdown_cell("# Norms\n\nWhat one *sees*: ‖K‖ ≤ θ."),
        code(new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})),
        code(new_output("execute_result", {"text/html": "<table><td>0.5</td></table>", "text/plain": "x"}),
             new_output("stream", name="stdout", text="printed <b>\n")),
        code(new_output("display_data", {"text/markdown": "It was **found**."}), source="value = 'a<b'"),
    )
    assert "<em>sees</em>" in page
    assert "‖K‖ ≤ θ" in page
    assert re.search(r'<img alt="Figure: Norms" src="data:image/png;base64,[\w+/=]+"/>', page)
    assert "&lt;Figure&gt;" not in page
    assert "0.5" in page
    assert "printed &lt;b&gt;" in page
    assert "<strong>found</strong>" in page
    assert page.count('<div class="code">') == 3
    assert ".code { display: none; }" in page
    assert "#show-code:checked ~ main .code { display: block; }" in page
    assert '<label class="toggle" for="show-code">' in page
    assert 'name="viewport"' in page
    assert not external_references(page)


def test_page_links_to_its_neighbours_and_the_index(tmp_path):
    page = rendered(tmp_path, new_markdown_cell("# A"))
    assert page.count('href="../index.html"') == 2
    assert page.count('href="../01_part/01_part.html"') == 2
    assert page.count('href="../03_part/03_part.html"') == 2
    assert "Title &lt;03&gt;" in page
    first = rendered(tmp_path, new_markdown_cell("# A"), run=run_of(NOTEBOOKS[0]))
    assert 'rel="prev"' not in first
    assert 'rel="next"' in first


def test_what_cells_wrote_to_stderr_is_left_out(tmp_path):
    page = rendered(tmp_path, code(stderr("MURMUR"), new_output("stream", name="stdout", text="SAID")))
    assert "MURMUR" not in page
    assert "SAID" in page


def test_scripts_and_widgets_of_outputs_are_left_out(tmp_path):
    page = rendered(tmp_path, code(
        new_output("display_data", {"application/javascript": "alert(1)", "text/plain": "PLAIN"}),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "BAR"})))
    assert "alert(1)" not in page
    assert "PLAIN" in page
    assert not external_references(page)


def test_page_of_a_failed_notebook(tmp_path):
    marks = new_markdown_cell("An Exception was encountered", metadata={"tags": ["papermill-error-cell-tag"]})
    error = new_output("error", ename="ValueError", evalue="<no>", traceback=["\x1b[31mValueError\x1b[0m: <no>"])
    page = rendered(tmp_path, marks, code(stderr("QUIET")), code(stderr("LAST WORDS"), error),
                    run=run_of(NOTEBOOKS[2], "ValueError: <no> (cell [2])"))
    assert "An Exception was encountered" not in page
    assert "QUIET" not in page
    assert "LAST WORDS" in page
    assert "ValueError: &lt;no&gt; (cell [2])" in page
    assert page.count('id="error"') == 1
    assert "\x1b" not in page


def index_of(folder: Path, *runs: Run) -> str:
    report = Report(folder, "demo", "What <this> is.", runs)
    assert index_page(report) == folder / "index.html"
    return (folder / "index.html").read_text(encoding="utf-8")


def test_index_says_what_was_run(tmp_path):
    page = index_of(tmp_path, *(run_of(notebook) for notebook in NOTEBOOKS))
    for text in (
        "What &lt;this&gt; is.", "a tiny ViT in which artifacts were planted.", "ab" * 32,
        "digits · 1,797 images · all",
        "cpu · fp32", "Python 3.11.2", "2026-01-02 03:04 UTC", "torch 2.9.0", "3.8 s for 3 notebooks", "1.2 s",
        "ACC with ITAE", "0.805", "of 1", "<td>1.25</td>", "<td>none found</td>", "<td>none, 1.5</td>",
        "Title &lt;01&gt;", "It <em>shows</em>.", 'src="02_part/figures/cover.png"', 'href="03_part/03_part.html"',
        'href="01_part/results.json"',
    ):
        assert text in page, text
    assert "failed" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)
    assert "output_dir" not in page
    assert not external_references(page)


def test_index_is_titled_by_a_folder_s_name_not_its_path(tmp_path):
    run = run_of(NOTEBOOKS[0])
    run.parameters["dataset"] = "imagefolder:/a/long/path/to/photos"
    heading = re.search(r"<h1>(.*?)</h1>", index_of(tmp_path, run), flags=re.DOTALL)[1]
    assert "<em>photos</em>" in heading
    assert "/long" not in heading


def test_index_with_failures(tmp_path):
    page = index_of(tmp_path, run_of(NOTEBOOKS[0]), run_of(NOTEBOOKS[1], "ValueError: <no> (cell [2])", None))
    assert "1 of 2 notebooks failed." in page
    assert "<pre>ValueError: &lt;no&gt; (cell [2])</pre>" in page
    assert "no figure" in page
    assert "Clustering scores" not in page, "scores come from 03 alone"


def test_index_tells_a_failure_of_several_notebooks_once(tmp_path):
    page = index_of(tmp_path, *(run_of(notebook, "ValueError: no", None) for notebook in NOTEBOOKS))
    assert page.count("<pre>ValueError: no</pre>") == 1
    aside = page.partition("<pre>")[0].rpartition("<aside")[2]
    assert all(f">{notebook.name}</a>" in aside for notebook in NOTEBOOKS)


@pytest.mark.parametrize(("seeds", "metric", "text"), [
    (2, "acc", "Mean ± standard deviation"), (1, "acc", "The bar under a number"), (1, "agreement", "no labels")])
def test_index_explains_the_scores_that_it_shows(tmp_path, seeds, metric, text):
    rows = [{**ROWS[0], "metric": metric, "seed": seed, "value": 0.5 + seed / 10} for seed in range(seeds)]
    page = index_of(tmp_path, run_of(NOTEBOOKS[-1], results={**RESULTS, "rows": rows}))
    assert text in page
    assert ("standard deviation" in page) == (seeds > 1)


def test_index_where_nothing_ran_through(tmp_path):
    page = index_of(tmp_path, run_of(NOTEBOOKS[0], "ValueError: no", None))
    assert "1 of 1 notebooks failed." in page
    assert "<td>3</td>" in page, "what it was to run with is shown all the same"


def test_index_tells_which_notebook_differs(tmp_path):
    small = {**RESULTS, "provenance": {**PROVENANCE, "dataset": {**PROVENANCE["dataset"], "size": 500}}}
    page = index_of(tmp_path, run_of(NOTEBOOKS[0], results=small), *(run_of(notebook) for notebook in NOTEBOOKS[1:]))
    assert "digits · 500 images · all (01)" in page
    assert "digits · 1,797 images · all (02, 03)" in page


def test_mean_scores_is_mean_and_spread_over_seeds():
    table = mean_scores(ROWS)
    assert table["metrics"] == ["acc", "nmi", "ari"]
    assert [row["variant"] for row in table["rows"]] == ["raw pixels", "baseline", "itae"]
    average, spread, seeds = table["rows"][2]["cells"][0]
    assert (average, spread, seeds) == (pytest.approx(0.805), pytest.approx(0.005 * 2**0.5), 2)
    assert table["rows"][0]["backbone"] is None
    assert table["unit"]


def test_mean_scores_of_odd_rows():
    assert mean_scores([]) is None
    one = {**ROWS[0], "seed": None}
    assert mean_scores([one])["rows"][0]["cells"] == [(0.7, None, 1)]
    agreement = mean_scores([{**one, "metric": "agreement", "value": 3.0}])
    assert (agreement["metrics"], agreement["unit"]) == (["agreement"], False)
    gaps = mean_scores([one, {**one, "variant": "other", "metric": "nmi", "backbone": "clean"}])
    assert [row["cells"] for row in gaps["rows"]] == [[(0.7, None, 1), None], [None, (0.7, None, 1)]]
    assert [row["backbone"] for row in gaps["rows"]] == ["demo", "clean"]
