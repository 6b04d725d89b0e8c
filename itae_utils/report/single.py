"""A report in one file, to be mailed: its first page and those of all notebooks, with all figures inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path

from itae_utils.report.pages import write_single
from itae_utils.report.runs import Report, Run


def single_file(report: Report) -> Path:
    """Write `report.html` beside `index.html`, from the pages that are there, and return its path."""
    index = report.index.read_text(encoding="utf-8")
    places = {run.page: f"run-{number}" for number, run in enumerate(report.runs, start=1)}
    first = _with_pictures(_header(index) + _main(index), report.folder)
    pages = [(places[run.page], run.notebook.title, _own_ids(_page(report, run), places[run.page]))
             for run in report.runs if (report.folder / run.page).is_file()]
    path = report.folder / "report.html"
    write_single(path, _inside(first, places), [(place, title, _inside(page, places)) for place, title, page in pages])
    return path


def _page(report: Report, run: Run) -> str:
    return _main((report.folder / run.page).read_text(encoding="utf-8"))


def _header(page: str) -> str:
    return page[page.index("<header"):page.index("</header>") + len("</header>")]


def _main(page: str) -> str:
    return page[page.index("<main>") + len("<main>"):page.rindex("</main>")]


def _with_pictures(page: str, folder: Path) -> str:
    """Put the pictures that lie beside a page into it."""
    def inline(match: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    return re.sub(r'src="([^":]+\.png)"', inline, page)


def _own_ids(page: str, place: str) -> str:
    """Make the section numbers of a page its own."""
    return re.sub(r'(id="|href="#)(section-\d+|error)"', rf'\1{place}-\2"', page).replace(
        'aria-label="Contents"', f'aria-label="Contents of {place}"')


def _inside(page: str, places: Mapping[str, str]) -> str:
    """Let links to other pages lead to their places; those to files that are not in the page become plain text."""
    def link(match: re.Match[str]) -> str:
        target = match[2]
        if target in places:
            return f'{match[1]}href="#{places[target]}"'
        return match[0] if target.startswith(("#", "http")) else match[1].rstrip()

    return re.sub(r'(<a\b[^>]*?\s)href="([^"]*)"', link, page)
