"""A page that lists the reports in a folder, the newest first, with links to compare each with the one before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from itae_utils.errors import ItaeError
from itae_utils.report.compare import Written, page_beside, read_report
from itae_utils.report.pages import POLICY, write_page
from itae_utils.results import is_collection, values_of


@dataclass(frozen=True)
class Entry:
    """One backbone on one data set in a report; `acc` is that of the baseline and of ITAE, None without labels."""

    report: Written
    date: str
    backbone: str
    dataset: str
    acc: tuple[float, float] | None


def list_reports(folder: Path) -> tuple[list[Entry], list[str]]:
    """Return what the reports in a folder hold, the newest first, and why some are left out.

    Raises:
        ItaeError: there is no such folder, or no report in it.
    """
    if not folder.is_dir():
        raise ItaeError(f"{str(folder)!r} is not a folder: give one that holds reports")
    entries, left_out = [], []
    for place in sorted(path.parent for path in folder.glob("*/report.json")):
        try:
            entries += _entries(read_report(place))
        except ItaeError as error:
            left_out.append(str(error))
    if not entries:
        raise ItaeError(f"{str(folder)!r} holds no report that can be read" + "".join(f": {each}" for each in left_out))
    return sorted(entries, key=lambda entry: entry.date, reverse=True), left_out


def previous_of(entry: Entry, entries: list[Entry]) -> Entry | None:
    """Return the latest earlier report of the same backbone and data set with a notebook in common, or None."""
    earlier = [other for other in entries if other.date < entry.date and other.report != entry.report
               and (other.backbone, other.dataset) == (entry.backbone, entry.dataset)
               and set(other.report.results) & set(entry.report.results)]
    return max(earlier, key=lambda other: other.date, default=None)


def is_newer(page: Path, *reports: Path) -> bool:
    """Return whether a page was written after the last run of some reports."""
    return page.is_file() and all(
        page.stat().st_mtime_ns > (report / "report.json").stat().st_mtime_ns for report in reports)


def overview_page(folder: Path, entries: list[Entry], left_out: list[str]) -> Path:
    """Write `folder/index.html`, with links to the comparisons by `page_beside`."""
    rows = [(entry, page_beside(before.report.folder, entry.report.folder).relative_to(folder).as_posix()
             if (before := previous_of(entry, entries)) else None) for entry in entries]
    path = folder / "index.html"
    write_page(path, "overview.html.j2", rows=rows, left_out=left_out, policy=POLICY)
    return path


def _entries(report: Written) -> list[Entry]:
    """Return an entry for each backbone and data set, from the notebook that has ACC, else from any."""
    found: dict[tuple[str, str], Entry] = {}
    for results in report.results.values():
        if is_collection(results):
            continue
        about = results["provenance"]
        key = about["backbone"]["name"], about["dataset"]["name"]
        values = [values_of(results, variant, "acc") for variant in ("baseline", "itae")]
        acc = tuple(map(mean, values)) if all(values) else None
        if key not in found or (acc and results["notebook"].startswith("03")):
            found[key] = Entry(report, about["date"], *key, acc)
    return list(found.values())
