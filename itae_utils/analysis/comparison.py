"""Measured scores beside the published ones: the tables of the comparison, on the page, as CSV and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd

from itae_utils.analysis.collection import NOT_IN_SOURCES, PUBLISHED, STAND_IN, UNKNOWN_SETTINGS, Cell, PublishedRow
from itae_utils.analysis.metrics import METRICS, describe_difference
from itae_utils.files import make_folder, replacing
from itae_utils.method.setting import SOURCES

NOT_RUN = "not run"
VARIANTS = {"baseline": "baseline", "random control": "random control", "itae": "ITAE"}
BY_DATASET = {row.dataset: row for row in PUBLISHED}
NBSP = "\N{NO-BREAK SPACE}"  # keeps a number together where a table is narrow
LATEX = {NBSP: "~", "−": "$-$", "±": r"$\pm$", "θ": r"$\theta$", "‖": r"$\Vert$", "–": "--", "×": r"$\times$",
         "“": "``", "”": "''"}
# Column widths, equal in the tables of all data sets, so narrow that three scores fit on a page.
LAYOUT = [{"selector": "tbody th", "props": "white-space: normal; width: 9.5em; min-width: 9.5em; padding-right: .8em"},
          {"selector": "td", "props": "width: 13.4em; min-width: 13.4em; padding-right: .8em"}]


def difference_rows(differences: pd.DataFrame, *, backbone: str, dataset: str, n: int) -> list[dict[str, object]]:
    """Rows for `results.json` from `difference_table`: what ITAE and its control differ by, and the interval.

    Their metrics are `acc_difference`, `acc_difference_low`, `acc_difference_high`, and the same of nmi and ari.
    """
    return [
        {"backbone": backbone, "dataset": dataset, "n": n, "variant": variant, "seed": None,
         "metric": f"{metric}_difference{end}", "value": float(row[name])}
        for (variant, metric), row in differences.iterrows() if variant in VARIANTS
        for name, end in (("difference", ""), ("low", "_low"), ("high", "_high"))
    ]


def score_values(cell: Cell, variant: str, metric: str) -> list[float]:
    """What was measured of a variant of the cell's own backbone, a number a seed."""
    return [row["value"] for row in cell.scores["rows"]
            if (row["variant"], row["metric"], row["backbone"]) == (variant, metric, cell.backbone)]


def interval(cell: Cell, metric: str) -> dict[str, float] | None:
    """ITAE minus baseline: difference, low and high; None where the results don't hold it."""
    found = [score_values(cell, "itae", f"{metric}_difference{end}") for end in ("", "_low", "_high")]
    if not all(found):
        return None
    return dict(zip(("difference", "low", "high"), (values[0] for values in found), strict=True))


def has_scores(cell: Cell) -> bool:
    """Whether there were labels to score against."""
    return bool(score_values(cell, "baseline", "acc"))


def found_artifacts(cell: Cell) -> bool:
    """Whether there was a θ, so that ITAE could change anything."""
    return any(theta is not None for theta in cell.scores["thresholds"].values())


def dataset_title(dataset: str) -> str:
    """A data set's name as the paper writes it."""
    return BY_DATASET[dataset].title if dataset in BY_DATASET else dataset.rpartition("/")[2]


def marked(name: str, mark: tuple[str, str] | None) -> str:
    """A name with what it must be called: "cifar10 (stand-in)"."""
    return f"{name} ({mark[0]})" if mark else name


def comparison_table(cells: Sequence[Cell], expected: Sequence[str]) -> pd.DataFrame:
    """The published numbers of every data set, then what was measured, as text; what is missing says why.

    Args:
        cells: from `collect`.
        expected: backbones that have a line in each of the paper's data sets, run or not.

    Returns:
        Index (data set, backbone, row); columns ACC, NMI, ARI.
    """
    by_dataset: dict[str, dict[str, Cell]] = {dataset: dict.fromkeys(expected) for dataset in BY_DATASET}
    for cell in cells:
        by_dataset.setdefault(cell.dataset, {})[cell.backbone] = cell
    lines = []
    for dataset, found in by_dataset.items():
        published = BY_DATASET.get(dataset)
        if published:
            about = f"published: {published.backbone or 'backbone ' + NOT_IN_SOURCES}"
            lines += [(dataset_title(dataset), about, "baseline", *[NOT_IN_SOURCES] * 3),
                      (dataset_title(dataset), about, "ITAE", *(f"{getattr(published, name):.4f}" for name in METRICS))]
        for backbone, cell in found.items():
            if cell is None:
                lines.append((dataset_title(dataset), backbone, NOT_RUN, *[NOT_RUN] * 3))
                continue
            name = dataset_title(dataset) if published else marked(dataset_title(dataset), cell.marks().get("dataset"))
            lines += [(name, _who(cell), *line) for line in _lines(cell, published)]
    columns = ["data set", "backbone", "row", *(metric.upper() for metric in METRICS)]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:3])


def _who(cell: Cell) -> str:
    """The backbone, and on how many images, where these are not those that the published numbers are of."""
    marks = cell.marks()
    size, kind = cell.scores["provenance"]["dataset"]["size"], f" {STAND_IN}" * (cell.dataset in BY_DATASET)
    return marked(cell.backbone, marks.get("backbone")) + (f", {size:,}{kind} images" if "dataset" in marks else "")


def _lines(cell: Cell, published: PublishedRow | None) -> list[tuple[str, ...]]:
    """The rows of one cell: a name and a text for each metric."""
    if not has_scores(cell):
        return [("no labels", *["not measured"] * 3)]
    lines = []
    for variant, name in VARIANTS.items():
        if variant == "baseline" and cell.backbone.endswith("_reg"):
            name = "baseline, with trained registers"
        if variant == "itae" and not found_artifacts(cell):
            name = "ITAE, no artifacts found"
        lines.append((name, *(_spread(score_values(cell, variant, metric)) for metric in METRICS)))
    if published:
        lines.append(("ITAE − published", *(_gap(cell, published, metric) for metric in METRICS)))
    intervals = {metric: interval(cell, metric) for metric in METRICS}
    lines.append(("ITAE − baseline [95 %]", *(
        _difference(intervals[metric]) if intervals[metric] else "not in these results" for metric in METRICS)))
    return lines


def _difference(bounds: Mapping[str, float]) -> str:
    numbers, colon, words = describe_difference(bounds).partition(":")
    return numbers.replace(" ", NBSP) + colon + words


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "not in these results"
    return f"{mean(values):.4f}" + (f"{NBSP}±{NBSP}{stdev(values):.4f}" if len(values) > 1 else "")


def _gap(cell: Cell, published: PublishedRow, metric: str) -> str:
    values = score_values(cell, "itae", metric)
    return f"{mean(values) - getattr(published, metric):+.4f}" if values else "not in these results"


def comparison_numbers(cells: Sequence[Cell]) -> pd.DataFrame:
    """Everything that was measured and published as numbers, a row for each backbone, data set, variant and metric.

    Columns: dataset, backbone, variant, metric, n (images), seeds, mean, sd, published, minus_published,
    minus_baseline, low, high (of ITAE's 95 % interval), weights, images ("stand-in" or "unverified", with the reason).
    """
    lines = []
    for cell in cells:
        marks = {part: ": ".join(mark) for part, mark in cell.marks().items()}
        for variant in VARIANTS:
            for metric in METRICS:
                values = score_values(cell, variant, metric)
                if not values:
                    continue
                published = getattr(BY_DATASET.get(cell.dataset), metric, None) if variant == "itae" else None
                bounds = (interval(cell, metric) if variant == "itae" else None) or {}
                lines.append({
                    "dataset": cell.dataset, "backbone": cell.backbone, "variant": variant, "metric": metric,
                    "n": cell.scores["provenance"]["dataset"]["size"], "seeds": len(values), "mean": mean(values),
                    "sd": stdev(values) if len(values) > 1 else None, "published": published,
                    "minus_published": mean(values) - published if published is not None else None,
                    "minus_baseline": bounds.get("difference"), "low": bounds.get("low"), "high": bounds.get("high"),
                    "weights": marks.get("backbone"), "images": marks.get("dataset"),
                })
    return pd.DataFrame(lines, columns=[
        "dataset", "backbone", "variant", "metric", "n", "seeds", "mean", "sd", "published", "minus_published",
        "minus_baseline", "low", "high", "weights", "images"])


def ablation_table(cell: Cell) -> pd.DataFrame | None:
    """Mean ACC of the ablation's settings: (source, attenuation) by θ; None where it has not run or had no labels.

    The variants that are no cell of the grid (baseline, controls, deeper settings) are not in it.
    """
    pattern = re.compile(rf"({'|'.join(SOURCES)}) (\w+) (auto|[\d.]+ %)")
    rows = [(*match.groups(), row["value"]) for row in cell.results.get("02", {}).get("rows", ())
            if row["metric"] == "acc" and (match := pattern.fullmatch(row["variant"]))]
    if not rows:
        return None
    table = pd.DataFrame(rows, columns=["source", "attenuation", "θ", "acc"])
    means = table.groupby(["source", "attenuation", "θ"], sort=False).acc.mean().unstack("θ", sort=False)
    return means.map(lambda value: "no θ found" if np.isnan(value) else f"{value:.4f}")


def settings_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """Every setting of the paper that our sources leave open, with what was used here instead."""
    def used(tell: Callable[[Cell], str]) -> str:
        told: dict[str, list[str]] = {}
        for cell in cells:
            told.setdefault(tell(cell), []).append(f"{cell.backbone} on {cell.dataset}")
        if len(told) <= 1:
            return next(iter(told), NOT_RUN)
        return "; ".join(f"{text} ({', '.join(names)})" for text, names in told.items())

    here = {
        "source": used(lambda cell: str(_setting(cell, "source"))),
        "threshold": used(_thresholds_used),
        "image_size": used(lambda cell: f"{cell.scores['provenance']['backbone']['image_size']} px"),
        "preprocess": used(lambda cell: str(cell.scores["provenance"]["backbone"]["preprocess"])),
        "normalize": used(lambda cell: "brought to length 1, not reduced" if _setting(cell, "normalize")
                          else "as they are"),
        "k-means": used(lambda cell: f"k-means++, best of {_setting(cell, 'n_init')} starts, "
                                     f"{_setting(cell, 'seeds')} seeds from {_setting(cell, 'seed')}"),
        "backbone": ", ".join(cell.backbone for cell in cells if cell.dataset == "tiny-imagenet") or NOT_RUN,
        "baseline": "measured here, the rows “baseline”" if any(map(has_scores, cells)) else NOT_RUN,
    }
    return pd.DataFrame({"not in our sources": UNKNOWN_SETTINGS.values(),
                         "used here": [here[name] for name in UNKNOWN_SETTINGS]}).set_index("not in our sources")


def _setting(cell: Cell, name: str) -> object:
    return cell.scores["parameters"].get(name, "not recorded")


def _thresholds_used(cell: Cell) -> str:
    how = "given" if isinstance(_setting(cell, "threshold"), float | int) else "from the norms alone"
    return ", ".join(f"θ = {theta:.4g} on {name} ({how})" if isinstance(theta, float | int) else f"no θ found on {name}"
                     for name, theta in cell.scores["thresholds"].items())


def stand_in_lines(cells: Sequence[Cell]) -> list[str]:
    """A sentence for each backbone and data set that is not, or not known to be, the real thing."""
    lines = {f"**{getattr(cell, part)}** is {'a stand-in' if mark == 'stand-in' else 'unverified'}: {why}.": None
             for cell in cells for part, (mark, why) in cell.marks().items()}
    return list(lines)


def comparison_headline(cells: Sequence[Cell], expected: Sequence[str]) -> list[dict[str, str]]:
    """What to know first: how much of the comparison was run with the real things, and ACC beside the published."""
    scored = [cell for cell in cells if has_scores(cell)]
    real = [cell for cell in scored if cell.dataset in BY_DATASET and cell.backbone in expected and not cell.marks()]
    facts = [{"label": "Cells of the comparison", "value": f"{len(real)} of {len(BY_DATASET) * len(expected)}",
              "note": "were run with the real images and weights"}]
    for cell in scored:
        before, after = (mean(score_values(cell, name, "acc")) for name in ("baseline", "itae"))
        marks, published = cell.marks(), BY_DATASET.get(cell.dataset)
        facts.append({
            "label": f"ACC, {marked(dataset_title(cell.dataset), marks.get('dataset'))}",
            "value": f"{before:.3f} → {after:.3f}",
            "note": f"baseline → ITAE on {marked(cell.backbone, marks.get('backbone'))}"
                    + (f"; published {published.acc:.4f}" if published else ""),
        })
    return facts


def comparison_rows(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """Rows for `results.json`: the distance of ITAE's mean from the published number."""
    numbers = comparison_numbers(cells)
    return [
        {"backbone": row["backbone"], "dataset": row["dataset"], "n": row["n"], "variant": row["variant"], "seed": None,
         "metric": f"{row['metric']}_minus_published", "value": float(row["minus_published"])}
        for row in numbers[numbers.minus_published.notna()].to_dict("records")
    ]


def save_table(table: pd.DataFrame, output_dir: str | Path, name: str, *, csv: pd.DataFrame | None = None) -> str:
    """Write `output_dir/tables/name.csv` and `.tex` (booktabs); returns Markdown links to them.

    Args:
        table: as it is shown.
        output_dir: of the notebook.
        name: of the files.
        csv: what the CSV holds instead, such as the plain numbers behind a table of texts.
    """
    folder = make_folder(Path(output_dir) / "tables")
    texts = {"tex": latex(table), "csv": table.to_csv() if csv is None else csv.to_csv(index=False)}
    for suffix, text in texts.items():
        with replacing(folder / f"{name}.{suffix}") as part:
            part.write_text(text, encoding="utf-8")
    return f"[CSV](tables/{name}.csv) · [LaTeX](tables/{name}.tex)"


def latex(table: pd.DataFrame) -> str:
    r"""A table in LaTeX with booktabs' rules, in signs that every engine knows; needs \usepackage{booktabs}."""
    text = table.to_latex(escape=True, multirow=False)
    for sign, command in LATEX.items():
        text = text.replace(sign, command)
    return text
