"""Two reports side by side: what differs in how they were made, in their scores, and in their figures."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from itae_utils.errors import ItaeError
from itae_utils.files import make_folder
from itae_utils.report.pages import POLICY, shown_value, write_page
from itae_utils.report.runs import read_record
from itae_utils.results import is_collection, read_results

CLUSTERS = "clusters.npz"  # what notebook 03 writes beside its results
Clusters = Mapping[str, np.ndarray]
MOST_IMAGES = 3  # that are named


@dataclass(frozen=True)
class Written:
    """A report on disk: its folder, its record, and the results of each run by its folder below the report's."""

    folder: Path
    record: dict[str, object]
    results: dict[str, dict]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def date(self) -> str:
        """Date and time (UTC) of its first result."""
        return min((each["provenance"]["date"] for each in self.results.values()), default="")[:16].replace("T", " ")

    def clusters(self, run: str) -> Clusters | None:
        """Return the cluster labels that a run of notebook 03 wrote, or None if it wrote none."""
        path = self.folder / run / CLUSTERS
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except (OSError, ValueError, BadZipFile) as error:
            raise ItaeError(f"{path} can't be read ({type(error).__name__}): run its notebook again") from error


@dataclass(frozen=True)
class Pair:
    """Two reports that have notebooks in common.

    Attributes:
        before: the first report.
        after: the second.
        runs: the folders of the runs that both have.
    """

    before: Written
    after: Written
    runs: list[str]

    @cached_property
    def clusters(self) -> dict[str, tuple[Clusters, Clusters]]:
        """The cluster labels of the runs of which both reports have some."""
        found = {run: (self.before.clusters(run), self.after.clusters(run)) for run in self.runs}
        return {run: both for run, both in found.items() if None not in both}


def read_report(folder: Path) -> Written:
    """Read a report's record and results.

    Raises:
        ItaeError: the folder holds no report, one of another schema, or results that can't be read.
    """
    if not (folder / "report.json").is_file():
        raise ItaeError(f"{str(folder)!r} holds no report.json: give the folder of a report")
    record = read_record(folder)
    runs = [Path(entry["page"]).parent.as_posix() for entry in record["notebooks"] if entry.get("results")]
    return Written(folder, record, {run: read_results(folder / run / "results.json") for run in runs})


def read_pair(one: str | Path, other: str | Path) -> Pair:
    """Read two reports to compare.

    Raises:
        ItaeError: as `read_report`; both are the same folder, or they have no run in common.
    """
    folders = [Path(folder).expanduser() for folder in (one, other)]
    if folders[0].resolve() == folders[1].resolve():
        raise ItaeError(f"{str(one)!r} is given twice: give two reports")
    before, after = map(read_report, folders)
    common = [run for run in before.results if run in after.results]
    if not common:
        raise ItaeError(f"{str(one)!r} and {str(other)!r} have no notebook in common: they hold "
                        f"{', '.join(before.results) or 'none'} and {', '.join(after.results) or 'none'}")
    return Pair(before, after, common)


def page_beside(before: Path, after: Path) -> Path:
    """Return the page, in a report's folder, that compares it with an earlier report."""
    return after / f"beside-{before.resolve().name}.html"


def compare_page(pair: Pair, scores: Sequence[Mapping[str, object]], notes: Sequence[str], path: Path) -> None:
    """Write a page with all that differs between two reports, and their figures side by side.

    Args:
        pair: from `read_pair`.
        scores: rows of run, variant, score, before, after, words.
        notes: sentences on how the scores were compared.
        path: of the page, which holds the figures and loads nothing.

    Raises:
        ItaeError: a figure is missing.
    """
    figures = [(run, name, *(base64.b64encode(png).decode() for png in pngs))
               for run in pair.runs for name, *pngs in _figures(pair, run)]
    make_folder(path.parent)
    links = [Path(os.path.relpath(report.folder.resolve() / "index.html", path.parent.resolve())).as_posix()
             for report in (pair.before, pair.after)]
    write_page(path, "compare.html.j2", pair=pair, links=links, changes=list(_changes(pair)), same=_same(pair),
               scores=scores, notes=notes, figures=figures, policy=POLICY)


def _changes(pair: Pair) -> Iterator[tuple[str, str, str]]:
    """Yield what differs in how two reports were made; what differs alike in several runs is named once."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    before, after = pair.before, pair.after
    for run in dict.fromkeys([*before.results, *after.results]):
        old, new = (_settings(report.results.get(run)) for report in (before, after))
        if not old or not new:
            seen[f"notebook {run}", "run" if old else "not run", "run" if new else "not run"] = []
            continue
        for name in dict.fromkeys([*old, *new]):
            values = tuple(shown_value(each.get(name, "not set")) for each in (old, new))
            if values[0] != values[1]:
                seen.setdefault((name, *values), []).append(run)
        if run in pair.clusters and (words := _images(*pair.clusters[run])):
            seen[words] = []
    for (name, *values), runs in seen.items():
        some = f" ({', '.join(runs)})" if 0 < len(runs) < len(before.results) else ""
        yield f"{name}{some}", *values


def _same(pair: Pair) -> list[str]:
    """Return the settings, beside parameters, that are the same in all runs of both reports."""
    settings = [_settings(report.results[run]) for report in (pair.before, pair.after) for run in pair.runs]
    return [name for name, value in settings[0].items()
            if not name.startswith(("parameter ", "θ of ")) and all(each.get(name) == value for each in settings)]


def _settings(results: Mapping | None) -> dict[str, object]:
    """Return what decided the results of a run, by name."""
    if results is None:
        return {}
    parameters, about = dict(results["parameters"]), results["provenance"]
    options = parameters.pop("options", {})
    settings = {f"parameter {name}": value for name, value in {**parameters, **options}.items()
                if name not in ("output_dir", "results_dir")}
    settings |= {f"version of {name}": version for name, version in about["versions"].items()}
    settings |= {"Python": about["python"], "system": about["platform"], "commit": (about["git"] or {}).get("commit")}
    if not is_collection(results):
        settings |= {"weights": about["backbone"]["weights_sha256"][:12], "device": about["device"],
                     "precision": about["precision"], "images": (about["dataset"].get("fingerprint") or "unknown")[:12],
                     "number of images": about["dataset"]["size"]}
    return settings | {f"θ of {name}": value for name, value in results["thresholds"].items()}


def _images(old: Clusters, new: Clusters) -> tuple[str, str, str] | None:
    """Return which images one run has and the other has not, in words; None if there are none."""
    gone, come = (np.flatnonzero(~np.isin(one["images"], other["images"])) for one, other in ((old, new), (new, old)))
    if not gone.size and not come.size:
        return None

    def words(places: np.ndarray, arrays: Clusters) -> str:
        names = arrays["names"] if "names" in arrays else np.arange(len(arrays["images"]))
        more = f" and {len(places) - MOST_IMAGES:,} more" if len(places) > MOST_IMAGES else ""
        return f"{', '.join(str(name) for name in names[places[:MOST_IMAGES]])}{more}" or "none"

    return "images that only one has", words(gone, old), words(come, new)


def _figures(pair: Pair, run: str) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield name and PNG of each figure that both reports have of a run."""
    for name in pair.before.results[run]["figures"]:
        if name not in pair.after.results[run]["figures"]:
            continue
        paths = [report.folder / run / "figures" / f"{name}.png" for report in (pair.before, pair.after)]
        for path in paths:
            if not path.is_file():
                raise ItaeError(f"the figure {path} is missing: run the report again")
        yield name, *(path.read_bytes() for path in paths)
