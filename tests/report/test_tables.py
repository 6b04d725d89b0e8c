import io

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from itae_utils.report.pages import TEMPLATES
from itae_utils.report.tables import SORTED_FROM, measured_tables, plain_tables, table_frame

WIDE = pd.DataFrame({"a": ["1"]}, index=pd.Index(["x"], name="variant"), columns=pd.Index(["a"], name="metric"))
SCORES = pd.DataFrame({"ACC": ["0.66 ± 0.02", "0.92"], "θ & <b>": ["−1", "2"]},
                      index=pd.Index(["base, line", "itae_2"], name="variant"))


def frames(table: pd.DataFrame) -> list[str]:
    """Return a table as HTML, plain and styled."""
    return [table.to_html(), table.style.format(escape="html").format_index(escape="html", axis=1).to_html()]


def copies(page: str) -> list[str]:
    return [pre.get_text() for pre in BeautifulSoup(page, "html.parser").select("details.copy pre")]


@pytest.mark.parametrize("page", frames(SCORES))
def test_a_table_is_followed_by_its_csv_and_latex(page):
    shown = measured_tables(f"<p>before</p>{page}<p>after</p>")
    csv, latex = copies(shown)
    assert pd.read_csv(io.StringIO(csv), dtype=str).set_index("variant").equals(SCORES)
    for line in (r"variant & ACC & $\theta$ \& $<$b$>$ \\", r"base, line & 0.66 $\pm$ 0.02 & $-$1 \\",
                 r"itae\_2 & 0.92 & 2 \\"):
        assert line in latex
    assert shown.startswith("<p>before</p>")
    assert shown.endswith("<p>after</p>")


@pytest.mark.parametrize("page", frames(SCORES))
def test_headers_are_one_row_and_reachable(page):
    table = BeautifulSoup(measured_tables(page), "html.parser").table
    assert [[cell.get_text(strip=True) for cell in row.find_all("th")] for row in table.thead.find_all("tr")] == [
        ["variant", "ACC", "θ & <b>"]]
    assert table["tabindex"] == "0"


@pytest.mark.parametrize("page", frames(WIDE))
def test_the_first_header_is_the_name_of_the_rows_not_of_the_columns(page):
    assert copies(measured_tables(page))[0] == "variant,a\nx,1\n"


@pytest.mark.parametrize("page", frames(pd.DataFrame(
    np.arange(8).reshape(4, 2), index=pd.MultiIndex.from_product([["a", "b"], ["x", "y"]], names=["one", "two"]),
    columns=pd.MultiIndex.from_product([["mean"], ["before", "after"]]))))
def test_cells_over_several_places_are_repeated(page):
    csv, _ = copies(measured_tables(page))
    found = pd.read_csv(io.StringIO(csv))
    assert list(found) == ["one", "two", "mean before", "mean after"]
    assert found["one"].tolist() == ["a", "a", "b", "b"]
    assert found["mean after"].tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("count", [SORTED_FROM - 1, SORTED_FROM])
def test_long_tables_can_be_sorted(count):
    table = BeautifulSoup(measured_tables(pd.DataFrame({"a": range(count)}).to_html()), "html.parser").table
    assert ("sortable" in table["class"]) == (count == SORTED_FROM)


def test_a_table_without_headers_or_rows_stays():
    for table in ("<table><tr><td>1</td></tr></table>", "<table><tbody></tbody></table>"):
        assert table.removeprefix("<table") in measured_tables(table)
        assert table_frame(BeautifulSoup(table, "html.parser").table).empty


@pytest.mark.parametrize("page", frames(SCORES.assign(NMI=["0.91 ± 0.02 ★", "0.8"])))
def test_best_cells_are_bold(page):
    table = BeautifulSoup(measured_tables(page), "html.parser").table
    assert [cell.get_text(strip=True) for cell in table.select(".best")] == ["0.91 ± 0.02 ★"]
    assert ".best { font-weight: 700; }" in (TEMPLATES / "style.css").read_text(encoding="utf-8")


def test_tables_of_prose_are_not_copied():
    assert plain_tables("<table><th> </th><th>a</th></table>") == '<table tabindex="0"><td></td><th>a</th></table>'
