import html
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from itae_utils.figures.explorer.page import explorer_html
from itae_utils.report.pages import index_page, notebook_page
from itae_utils.report.runs import Report
from itae_utils.report.single import single_file
from tests.browser import open_chromium
from tests.report.test_pages import NOTEBOOKS, PIXEL, PNG, external_references, run_of

ROWS = "".join(f"<tr><td>{number}</td></tr>" for number in range(9))
LONG = f"<table><thead><tr><th>n</th></tr></thead><tbody>{ROWS}</tbody></table>"


@pytest.fixture
def report(tmp_path) -> Report:
    """A report of two notebooks with pages: figures, the explorer, a long table, and links between them."""
    runs = [run_of(each) for each in NOTEBOOKS[1:3]]
    for run in runs:
        folder = tmp_path / run.folder
        (folder / "figures").mkdir(parents=True)
        (folder / "figures" / "cover.png").write_bytes(PIXEL.getvalue())
        shown = [new_output("display_data", {"text/html": each}) for each in (explorer_html("{}"), LONG)]
        figure = new_output("display_data", {"image/png": PNG})
        cells = [new_markdown_cell("# Title\n\n## 1. A part\n\n[numbers](results.json), [paper](https://x.org)"),
                 new_code_cell("show()", outputs=[*shown, figure])]
        nbformat.write(new_notebook(cells=cells), (tmp_path / run.page).with_suffix(".ipynb"))
        notebook_page(run, NOTEBOOKS, tmp_path)
    index_page(report := Report(tmp_path, "demo", "A text.", tuple(runs)))
    return report


def test_one_file_holds_all_pages_and_loads_nothing(report):
    path = single_file(report)
    page = path.read_text(encoding="utf-8")
    assert path == report.folder / "report.html"
    assert not external_references(page)
    assert not re.findall(r'src="(?!data:)', page)
    assert page.count("<h1") == 3
    assert "default-src 'none'; script-src 'sha256-" in html.unescape(page)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)


def test_links_lead_inside_and_those_to_other_files_are_text(report):
    page = single_file(report).read_text(encoding="utf-8")
    links = re.findall(r'<a\b[^>]*href="([^"]*)"', page)
    inside = {link.removeprefix("#") for link in links if link.startswith("#")}
    assert inside <= set(re.findall(r'\sid="([^"]+)"', page))
    assert {"run-1", "run-2", "run-1-section-1", "run-2-section-1"} <= inside
    assert {link for link in links if not link.startswith("#")} == {"https://x.org"}
    assert "numbers</a>" in page


def test_long_tables_sort_by_a_click_and_by_keyboard(report):
    with open_chromium() as browser:
        page = browser.new_page()
        page.goto(single_file(report).as_uri())
        table = page.locator("table.sortable").first
        button = table.get_by_role("button", name="n")

        def column() -> list[int]:
            return [int(text) for text in table.locator("tbody td").all_inner_texts()]

        button.click()
        assert column() == list(range(8, -1, -1))
        button.press("Enter")
        assert column() == list(range(9))
        assert table.locator("th").get_attribute("aria-sort") == "ascending"
        button.click()
        assert table.locator("th").get_attribute("aria-sort") is None


def test_a_run_without_a_page_is_left_out(report):
    (report.folder / report.runs[0].page).unlink()
    page = single_file(report).read_text(encoding="utf-8")
    assert page.count("<h1") == 2
    assert Path(report.index).is_file()
