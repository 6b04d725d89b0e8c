"""Tables of the report's pages: they scroll by keyboard, long ones can be sorted, and each can be copied.

A cell that ends with ★ is the best of its column and of the class `best`, in the first page's own table, too.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import pandas as pd
from bs4 import BeautifulSoup
from bs4.element import Tag

from itae_utils.latex import as_latex

SORTED_FROM = 8  # rows; shorter tables are read at a glance
SORTING = (Path(__file__).parent / "templates/sort.js").read_text(encoding="utf-8")  # a script


def measured_tables(page: str) -> str:
    """Return HTML with one row of headers per table, as `plain_tables`, and below each table its CSV and LaTeX."""
    def copied(match: re.Match[str]) -> str:
        table = BeautifulSoup(match[0], "html.parser").table
        _join_headers(table)
        frame = table_frame(table)
        for cell in table.find_all("td", string=re.compile(r"★\s*$")):
            cell["class"] = [*cell.get("class", []), "best"]
        if len(frame) >= SORTED_FROM:
            table["class"] = [*table.get("class", []), "sortable"]
        texts = {"CSV": frame.to_csv(index=False), "LaTeX": as_latex(frame, index=False)}
        return str(table) + "".join(
            f'<details class="copy"><summary>{name}</summary><pre tabindex="0">{html.escape(text)}</pre></details>'
            for name, text in texts.items())

    return plain_tables(re.sub(r"<table\b.*?</table>", copied, page, flags=re.DOTALL))


def plain_tables(page: str) -> str:
    """Let wide tables scroll by keyboard, too, and make header cells without words plain ones."""
    page = page.replace("<table", '<table tabindex="0"')
    return re.sub(r"<th\b([^>]*)>(?:\s|&nbsp;|\xa0)*</th>", r"<td\1></td>", page)


def table_frame(table: Tag) -> pd.DataFrame:
    """Return a table as texts; its header rows are joined, and the text of a cell over several places is repeated."""
    heads, bodies = ([row for part in table.find_all(name) for row in part.find_all("tr")]
                     for name in ("thead", "tbody"))
    names = [" ".join(dict.fromkeys(filter(None, column))) for column in zip(*_texts(heads), strict=True)]
    return pd.DataFrame(_texts(bodies), columns=names or None)


def _join_headers(table: Tag) -> None:
    """Put the name of the index, which pandas writes into a second row, into the first row of headers."""
    rows = table.thead.find_all("tr") if table.thead else []
    cells = [row.find_all(["th", "td"]) for row in rows]
    if len(cells) == 2 and len(cells[0]) == len(cells[1]) and not table.thead.find(colspan=re.compile("[^1]")):
        for first, second in zip(*cells, strict=True):
            if name := second.get_text(" ", strip=True):  # of the index, above which is the name of the columns
                first.string = name
        rows[1].decompose()


def _texts(rows: list[Tag]) -> list[list[str]]:
    found: list[dict[int, str]] = [{} for _ in rows]
    for place, row in enumerate(rows):
        column = 0
        for cell in row.find_all(["th", "td"]):
            while column in found[place]:
                column += 1
            across, down = (int(cell.get(name, 1)) for name in ("colspan", "rowspan"))
            for each in found[place:place + down]:
                each.update(dict.fromkeys(range(column, column + across), cell.get_text(" ", strip=True)))
            column += across
    return [[each[column] for column in sorted(each)] for each in found]
