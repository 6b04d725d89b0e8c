"""Measured scores beside the published ones: tables for the page, as CSV and as LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from urllib.parse import quote

import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from pandas.io.formats.style import Styler

from itae_utils.analysis.collection import NOT_IN_SOURCES, PUBLISHED, STAND_IN, UNKNOWN_SETTINGS, Pairing, PublishedRow
from itae_utils.analysis.metrics import METRICS, describe_difference
from itae_utils.analysis.words import SETTING_COLUMNS, escape
from itae_utils.files import make_folder, replacing

NOT_RUN, NOT_RECORDED = "not run", "not in these results"
ABLATION = "02"  # the notebook that measures the grid of settings
VARIANTS = {"baseline": "baseline", "random control": "random control", "itae": "ITAE"}
BY_DATASET = {row.dataset: row for row in PUBLISHED}
NBSP = "\N{NO-BREAK SPACE}"  # keeps a number on one line in a narrow table
LATEX = {NBSP: "~", "−": "$-$", "±": r"$\pm$", "θ": r"$\theta$", "‖": r"$\Vert$", "–": "--", "×": r"$\times$",
         "“": "``", "”": "''"}
# Column widths, equal in the tables of all data sets, narrow enough for three scores on a page.
LAYOUT = [{"selector": "tbody th", "props": "white-space: normal; width: 9.5em; min-width: 9.5em; padding-right: .8em"},
          {"selector": "td", "props": "width: 13.4em; min-width: 13.4em; padding-right: .8em"}]


def difference_rows(differences: pd.DataFrame, *, backbone: str, dataset: str, n: int) -> list[dict[str, object]]:
    """Return rows for `results.json` from `difference_table`: differences of ITAE and its control, with intervals.

    Their metrics are `acc_difference`, `acc_difference_low`, `acc_difference_high`, and the same for nmi and ari.
    """
    return [
        {"backbone": backbone, "dataset": dataset, "n": n, "variant": variant, "seed": None,
         "metric": f"{metric}_difference{end}", "value": float(row[name])}
        for (variant, metric), row in differences.iterrows() if variant in VARIANTS
        for name, end in (("difference", ""), ("low", "_low"), ("high", "_high"))
    ]


def score_values(pairing: Pairing, variant: str, metric: str) -> list[float]:
    """Return the values of a variant of the pairing's own backbone, one per seed."""
    return [row["value"] for row in pairing.scores["rows"]
            if (row["variant"], row["metric"], row["backbone"]) == (variant, metric, pairing.backbone)]


def interval(pairing: Pairing, metric: str) -> dict[str, float] | None:
    """Return ITAE minus baseline as difference, low and high; None if the results lack it."""
    found = [score_values(pairing, "itae", f"{metric}_difference{end}") for end in ("", "_low", "_high")]
    if not all(found):
        return None
    return dict(zip(("difference", "low", "high"), (values[0] for values in found), strict=True))


def has_scores(pairing: Pairing) -> bool:
    """Return whether there were labels to score against."""
    return bool(score_values(pairing, "baseline", "acc"))


def found_artifacts(pairing: Pairing) -> bool:
    """Return whether there was a θ, so that ITAE could change anything."""
    return any(theta is not None for theta in pairing.scores["thresholds"].values())


def dataset_title(dataset: str) -> str:
    """Return a data set's name as the paper writes it, or the last part of a folder's path."""
    return BY_DATASET[dataset].title if dataset in BY_DATASET else dataset.rpartition("/")[2]


def labelled(name: str, caveat: tuple[str, str] | None) -> str:
    """Return a name with the label of its caveat, if it has one: "cifar10 (stand-in)"."""
    return f"{name} ({caveat[0]})" if caveat else name


def describe_collection(pairings: Sequence[Pairing], left_out: Sequence[str]) -> str:
    """Return Markdown that names the pairings, those that are not the published thing, and the results left out."""
    names = ", ".join(escape(pairing.title) for pairing in pairings) or "nothing"
    lines = "\n\n".join([f"Run: {names}.", *stand_in_lines(pairings)])
    return lines + "".join(f"\n- left out: {escape(reason)}" for reason in left_out)


def comparison_table(pairings: Sequence[Pairing], expected: Sequence[str]) -> pd.DataFrame:
    """Return the published numbers of every data set and the measured ones as text; missing numbers say why.

    Args:
        pairings: from `collect`.
        expected: backbones that have a row in each of the paper's data sets even if they were not run.

    Returns:
        Index (data set, backbone, row); columns ACC, NMI, ARI.
    """
    by_dataset: dict[str, dict[str, Pairing | None]] = {dataset: dict.fromkeys(expected) for dataset in BY_DATASET}
    for pairing in pairings:
        by_dataset.setdefault(pairing.dataset, {})[pairing.backbone] = pairing
    lines = []
    for dataset, found in by_dataset.items():
        published, title = BY_DATASET.get(dataset), dataset_title(dataset)
        if published:
            about = f"published: {published.backbone or 'backbone ' + NOT_IN_SOURCES}"
            lines += [(title, about, "baseline", *[NOT_IN_SOURCES] * 3),
                      (title, about, "ITAE", *(f"{getattr(published, name):.4f}" for name in METRICS))]
        for backbone, pairing in found.items():
            if pairing is None:
                lines.append((title, backbone, NOT_RUN, *[NOT_RUN] * 3))
                continue
            name = title if published else labelled(title, pairing.caveats().get("dataset"))
            lines += [(name, _backbone_title(pairing), *line) for line in _lines(pairing, published)]
    columns = ["data set", "backbone", "row", *(metric.upper() for metric in METRICS)]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:3])


def _backbone_title(pairing: Pairing) -> str:
    """Return the labelled backbone, and the number of images if they are not the published ones."""
    caveats, size = pairing.caveats(), pairing.scores["provenance"]["dataset"]["size"]
    title = labelled(pairing.backbone, caveats.get("backbone"))
    if "dataset" not in caveats:
        return title
    return f"{title}, {size:,} {f'{STAND_IN} ' if pairing.dataset in BY_DATASET else ''}images"


def _lines(pairing: Pairing, published: PublishedRow | None) -> list[tuple[str, ...]]:
    """Return the rows of one pairing: a name and a text for each metric."""
    if not has_scores(pairing):
        return [("no labels", *["not measured"] * 3)]
    lines = []
    for variant, name in VARIANTS.items():
        if variant == "baseline" and pairing.backbone.endswith("_reg"):
            name = "baseline, with trained registers"
        if variant == "itae" and not found_artifacts(pairing):
            name = "ITAE, no artifacts found"
        lines.append((name, *(_mean_and_sd(score_values(pairing, variant, metric)) for metric in METRICS)))
    if published:
        lines.append(("ITAE − published", *(_gap(pairing, published, metric) for metric in METRICS)))
    intervals = [interval(pairing, metric) for metric in METRICS]
    lines.append(("ITAE − baseline [95 %]", *(_difference(each) if each else NOT_RECORDED for each in intervals)))
    return lines


def _difference(bounds: Mapping[str, float]) -> str:
    numbers, colon, words = describe_difference(bounds).partition(":")
    return numbers.replace(" ", NBSP) + colon + words


def _mean_and_sd(values: Sequence[float]) -> str:
    if not values:
        return NOT_RECORDED
    return f"{mean(values):.4f}" + (f"{NBSP}±{NBSP}{stdev(values):.4f}" if len(values) > 1 else "")


def _gap(pairing: Pairing, published: PublishedRow, metric: str) -> str:
    values = score_values(pairing, "itae", metric)
    return f"{mean(values) - getattr(published, metric):+.4f}" if values else NOT_RECORDED


def styled(table: pd.DataFrame) -> Styler:
    """Return a table of texts for display; HTML in its texts and names is shown literally."""
    return table.style.format(escape="html").format_index(escape="html")


def show_comparison(table: pd.DataFrame) -> None:
    """Display `comparison_table`, one table per data set under its name; call it in a notebook."""
    for name, part in table.groupby(level="data set", sort=False):
        display(Markdown(f"### {escape(name)}"), styled(part.droplevel("data set")).set_table_styles(LAYOUT))


def comparison_numbers(pairings: Sequence[Pairing]) -> pd.DataFrame:
    """Return all measured and published numbers, one row for each backbone, data set, variant and metric.

    Columns: dataset, backbone, variant, metric, n (images), seeds, mean, sd, published, minus_published,
    minus_baseline, low, high (of ITAE's 95 % interval), weights, images ("stand-in" or "unverified", with the reason).
    """
    lines = []
    for pairing in pairings:
        caveats = {part: ": ".join(caveat) for part, caveat in pairing.caveats().items()}
        for variant in VARIANTS:
            for metric in METRICS:
                values = score_values(pairing, variant, metric)
                if not values:
                    continue
                published = getattr(BY_DATASET.get(pairing.dataset), metric, None) if variant == "itae" else None
                bounds = (interval(pairing, metric) if variant == "itae" else None) or {}
                lines.append({
                    "dataset": pairing.dataset, "backbone": pairing.backbone, "variant": variant, "metric": metric,
                    "n": pairing.scores["provenance"]["dataset"]["size"], "seeds": len(values), "mean": mean(values),
                    "sd": stdev(values) if len(values) > 1 else None, "published": published,
                    "minus_published": mean(values) - published if published is not None else None,
                    "minus_baseline": bounds.get("difference"), "low": bounds.get("low"), "high": bounds.get("high"),
                    "weights": caveats.get("backbone"), "images": caveats.get("dataset"),
                })
    return pd.DataFrame(lines, columns=[
        "dataset", "backbone", "variant", "metric", "n", "seeds", "mean", "sd", "published", "minus_published",
        "minus_baseline", "low", "high", "weights", "images"])


def ablation_table(pairing: Pairing) -> pd.DataFrame | None:
    """Return the mean ACC of the grid's settings, (source, attenuation) by θ; None if the results hold no such scores.

    Baseline, controls and deeper settings are not part of the grid.
    """
    rows = [(*(row[name] for name in SETTING_COLUMNS), row["value"])
            for row in pairing.results.get(ABLATION, {}).get("rows", ())
            if row["metric"] == "acc" and all(row.get(name) for name in SETTING_COLUMNS)]
    if not rows:
        return None
    table = pd.DataFrame(rows, columns=["source", "attenuation", "θ", "acc"])
    means = table.groupby(["source", "attenuation", "θ"], sort=False).acc.mean().unstack("θ", sort=False)
    return means.map(lambda value: "no θ found" if np.isnan(value) else f"{value:.4f}")


def show_ablations(pairings: Sequence[Pairing], output_dir: str | Path) -> None:
    """Display `ablation_table` of every pairing and save it, or say why there is none; call it in a notebook."""
    names = []
    for pairing in pairings:
        table, title = ablation_table(pairing), escape(pairing.title)
        if table is None:
            display(Markdown(f"No ablation table for {title}: {_why_no_ablation(pairing)}."))
            continue
        name = f"ablation_{pairing.folder.name}"
        names.append(f"{name}_{len(names)}" if name in names else name)
        display(Markdown(f"**{title}**: {save_table(table, output_dir, names[-1])}"), table)
    if not pairings:
        display(Markdown("Nothing was run."))


def _why_no_ablation(pairing: Pairing) -> str:
    if ABLATION not in pairing.results:
        return f"notebook {ABLATION} was not run"
    if not any(row["metric"] == "acc" for row in pairing.results[ABLATION]["rows"]):
        return "there are no labels to score against"
    return f"the results of notebook {ABLATION} are older and do not record the settings; run it again"


def settings_table(pairings: Sequence[Pairing]) -> pd.DataFrame:
    """Return every setting of the paper that our sources leave open, with the value used here."""
    def used(describe: Callable[[Pairing], str]) -> str:
        titles: dict[str, list[str]] = {}
        for pairing in pairings:
            titles.setdefault(describe(pairing), []).append(pairing.title)
        if len(titles) <= 1:
            return next(iter(titles), NOT_RUN)
        return "; ".join(f"{text} ({', '.join(names)})" for text, names in titles.items())

    here = {
        "source": used(lambda pairing: str(_setting(pairing, "source"))),
        "threshold": used(_thresholds_used),
        "image_size": used(lambda pairing: f"{pairing.scores['provenance']['backbone']['image_size']} px"),
        "preprocess": used(lambda pairing: str(pairing.scores["provenance"]["backbone"]["preprocess"])),
        "normalize": used(lambda pairing: "scaled to length 1, not reduced" if _setting(pairing, "normalize")
                          else "neither normalised nor reduced"),
        "k-means": used(_kmeans_used),
        "backbone": ", ".join(each.backbone for each in pairings if each.dataset == "tiny-imagenet") or NOT_RUN,
        "baseline": "measured here, in the rows “baseline”" if any(map(has_scores, pairings)) else NOT_RUN,
    }
    return pd.DataFrame({"not in our sources": UNKNOWN_SETTINGS.values(),
                         "used here": [here[name] for name in UNKNOWN_SETTINGS]}).set_index("not in our sources")


def _setting(pairing: Pairing, name: str) -> object:
    return pairing.settings.get(name, "not recorded")


def _kmeans_used(pairing: Pairing) -> str:
    first = pairing.settings.get("kmeans_seed")
    return (f"k-means++, best of {_setting(pairing, 'n_init')} starts, {_setting(pairing, 'seeds')} seeds from "
            f"{_setting(pairing, 'seed') if first is None else first}")


def _thresholds_used(pairing: Pairing) -> str:
    how = "given" if isinstance(_setting(pairing, "threshold"), float | int) else "from the norms alone"
    return ", ".join(f"θ = {theta:.4g} on {name} ({how})" if isinstance(theta, float | int) else f"no θ found on {name}"
                     for name, theta in pairing.scores["thresholds"].items())


def stand_in_lines(pairings: Sequence[Pairing]) -> list[str]:
    """Return a Markdown sentence for each backbone and data set that is not, or not known to be, the published one."""
    lines = {f"**{escape(getattr(pairing, part))}** is {'a stand-in' if label == STAND_IN else label}: "
             f"{escape(reason)}.": None
             for pairing in pairings for part, (label, reason) in pairing.caveats().items()}
    return list(lines)


def comparison_headline(pairings: Sequence[Pairing], expected: Sequence[str]) -> list[dict[str, str]]:
    """Return the headline facts: how much was run with the published images and weights, and ACC of every pairing."""
    scored = [pairing for pairing in pairings if has_scores(pairing)]
    real = [pairing for pairing in scored
            if pairing.dataset in BY_DATASET and pairing.backbone in expected and not pairing.caveats()]
    facts = [{"label": "Comparison with the paper", "value": f"{len(real)} of {len(BY_DATASET) * len(expected)}",
              "note": "pairs of backbone and data set were run with the published images and weights"}]
    for pairing in scored:
        before, after = (mean(score_values(pairing, name, "acc")) for name in ("baseline", "itae"))
        caveats, published = pairing.caveats(), BY_DATASET.get(pairing.dataset)
        facts.append({
            "label": f"ACC, {labelled(dataset_title(pairing.dataset), caveats.get('dataset'))}",
            "value": f"{before:.3f} → {after:.3f}",
            "note": f"baseline → ITAE on {labelled(pairing.backbone, caveats.get('backbone'))}"
                    + (f"; published {published.acc:.4f}" if published else ""),
        })
    return facts


def comparison_rows(pairings: Sequence[Pairing]) -> list[dict[str, object]]:
    """Return rows for `results.json`: ITAE's mean minus the published number."""
    numbers = comparison_numbers(pairings)
    return [
        {"backbone": row["backbone"], "dataset": row["dataset"], "n": row["n"], "variant": row["variant"], "seed": None,
         "metric": f"{row['metric']}_minus_published", "value": float(row["minus_published"])}
        for row in numbers[numbers.minus_published.notna()].to_dict("records")
    ]


def save_table(table: pd.DataFrame, output_dir: str | Path, name: str, *, csv: pd.DataFrame | None = None) -> str:
    """Write `output_dir/tables/name.csv` and `.tex` (booktabs) and return Markdown links to them.

    Args:
        table: as displayed.
        output_dir: of the notebook.
        name: of the files.
        csv: written to the CSV file in place of `table`, such as the numbers behind a table of texts.
    """
    folder = make_folder(Path(output_dir) / "tables")
    texts = {"tex": latex(table), "csv": table.to_csv() if csv is None else csv.to_csv(index=False)}
    for suffix, text in texts.items():
        with replacing(folder / f"{name}.{suffix}") as part:
            part.write_text(text, encoding="utf-8")
    return f"[CSV](tables/{quote(name)}.csv) · [LaTeX](tables/{quote(name)}.tex)"


def latex(table: pd.DataFrame) -> str:
    r"""Return a table in LaTeX, in characters that every engine knows; it needs \usepackage{booktabs}."""
    text = table.to_latex(escape=True, multirow=False)
    for sign, command in LATEX.items():
        text = text.replace(sign, command)
    return text
