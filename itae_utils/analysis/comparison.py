"""Measured scores beside the published ones: tables for the page, as CSV and as LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from urllib.parse import quote

import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from pandas.io.formats.style import Styler

from itae_utils.analysis.collection import BY_DATASET, OTHER_IMAGES, UNKNOWN, Pairing
from itae_utils.analysis.metrics import METRICS, describe_difference
from itae_utils.analysis.words import SETTING_COLUMNS, describe_kmeans, escape
from itae_utils.files import make_folder, replacing
from itae_utils.latex import as_latex
from itae_utils.results import values_of

NOT_RUN, NOT_RECORDED = "not run", "not in these results"
ABLATION = "02"  # the notebook that measures the grid of settings
NUMBERS = ["dataset", "backbone", "variant", "metric", "n", "seeds", "mean", "sd", "published", "minus_published",
           "minus_baseline", "low", "high", "normalize", "n_init", "fitted_on", "weights", "images"]
VARIANTS = {"baseline": "baseline", "random control": "random control", "itae": "ITAE"}
NBSP = "\N{NO-BREAK SPACE}"  # keeps a number on one line in a narrow table
# Column widths, equal in the tables of all data sets, narrow enough for three scores on a page.
LAYOUT = [{"selector": "tbody th", "props": "white-space: normal; width: 9.5em; min-width: 9.5em; padding-right: .8em"},
          {"selector": "td", "props": "width: 13.4em; min-width: 13.4em; padding-right: .8em"}]


def difference_rows(differences: pd.DataFrame, *, backbone: str, dataset: str, n: int) -> list[dict[str, object]]:
    """Return rows for `results.json` from `difference_table`: the leads of ITAE and its control, and their intervals.

    The metrics are acc_difference, acc_difference_low, acc_difference_high, and the same for nmi and ari.
    """
    return [
        {"backbone": backbone, "dataset": dataset, "n": n, "variant": variant, "seed": None,
         "metric": f"{metric}_difference{end}", "value": float(row[name])}
        for (variant, metric), row in differences.iterrows() if variant in VARIANTS
        for name, end in (("difference", ""), ("low", "_low"), ("high", "_high"))
    ]


def score_values(pairing: Pairing, variant: str, metric: str) -> list[float]:
    """Return the values of a variant of the pairing's own backbone, one per seed."""
    return values_of(pairing.scores, variant, metric)


def has_scores(pairing: Pairing) -> bool:
    """Return whether the images had labels to score against."""
    return bool(score_values(pairing, "baseline", "acc"))


def dataset_title(dataset: str) -> str:
    """Return a data set's name as the paper writes it, or the last part of a folder's path."""
    return BY_DATASET[dataset].title if dataset in BY_DATASET else dataset.rpartition("/")[2]


def concerns_paper(pairings: Sequence[Pairing]) -> bool:
    """Return whether any of the data sets that were run is one of the paper's; True if nothing was run."""
    return not pairings or any(pairing.dataset in BY_DATASET for pairing in pairings)


def labelled_titles(pairing: Pairing) -> list[str]:
    """Return the titles of data set and backbone, with the label of their caveat if any: "CIFAR-10 (other images)"."""
    caveats, titles = pairing.caveats(), {"dataset": dataset_title(pairing.dataset), "backbone": pairing.backbone}
    return [f"{title} ({caveats[part][0]})" if part in caveats else title for part, title in titles.items()]


def title_of_backbone(pairing: Pairing) -> str:
    """Return the backbone's name with the label of its caveat, and the number of images if they are not the paper's."""
    images = f", {OTHER_IMAGES}: {pairing.scores['provenance']['dataset']['size']:,}"
    return labelled_titles(pairing)[1] + (images if "dataset" in pairing.caveats() else "")


def fitted_on(pairing: Pairing) -> str:
    """Return the split that k-means was fitted on, such as "train (50,000)"."""
    about = pairing.scores["provenance"]
    return about.get("fitted_on", about["dataset"])["split"]


def describe_protocols(pairings: Sequence[Pairing]) -> str:
    """Return Markdown on how features were clustered, each way with its pairings if there are several."""
    return "\n\n".join(escape(text) for text in _different(pairings, lambda pairing: describe_kmeans(
        pairing.settings, pairing.scores["provenance"]["dataset"]["split"], fitted_on(pairing))))


def _different(pairings: Sequence[Pairing], describe: Callable[[Pairing], str]) -> list[str]:
    """Return the different texts about the pairings; if there are several, each with the titles of its pairings."""
    titles: dict[str, list[str]] = {}
    for pairing in pairings:
        titles.setdefault(describe(pairing), []).append(pairing.title)
    return [f"{text} ({', '.join(names)})" for text, names in titles.items()] if len(titles) > 1 else [*titles]


def describe_collection(pairings: Sequence[Pairing], left_out: Sequence[str]) -> str:
    """Return Markdown that lists the pairings, what is not the paper's in them, and the results that were left out."""
    names = ", ".join(escape(pairing.title) for pairing in pairings) or "nothing"
    none = "" if concerns_paper(pairings) else " No data set is the paper's, so none has published numbers."
    lines = "\n\n".join([f"Run: {names}.{none}", *caveat_lines(pairings)])
    return lines + "".join(f"\n- left out: {escape(reason)}" for reason in left_out)


def comparison_table(pairings: Sequence[Pairing], expected: Sequence[str]) -> pd.DataFrame:
    """Return the published and the measured numbers of every data set as text, with the reason for missing numbers.

    The index is (data set, backbone, row); the columns are ACC, NMI and ARI. The backbones `expected` have a row in
    each of the paper's data sets even if they were not run. The paper's data sets are left out if none of them was run.
    """
    by_dataset: dict[str, dict[str, Pairing | None]] = {dataset: dict.fromkeys(expected)
                                                        for dataset in BY_DATASET if concerns_paper(pairings)}
    for pairing in pairings:
        by_dataset.setdefault(pairing.dataset, {})[pairing.backbone] = pairing
    lines, same = [], Counter(map(dataset_title, by_dataset))
    for dataset, found in by_dataset.items():
        published, title = BY_DATASET.get(dataset), dataset_title(dataset)
        title = title if same[title] == 1 else dataset  # two folders of one name
        if published:
            about = f"published: {published.backbone or 'backbone ' + UNKNOWN}"
            lines += [(title, about, "baseline", *[UNKNOWN] * 3),
                      (title, about, "ITAE", *(f"{getattr(published, metric):.4f}" for metric in METRICS))]
        for backbone, pairing in found.items():
            if pairing is None:
                lines.append((title, backbone, NOT_RUN, *[NOT_RUN] * 3))
                continue
            lines += [(title, title_of_backbone(pairing), *line) for line in _lines(pairing)]
    columns = ["data set", "backbone", "row", *(metric.upper() for metric in METRICS)]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:3])


def _lines(pairing: Pairing) -> list[tuple[str, ...]]:
    """Return the rows of one pairing, each a name and a text for every metric."""
    if not has_scores(pairing):
        return [("no labels", *["not measured"] * 3)]
    numbers = {(row["variant"], row["metric"]): row for row in _numbers(pairing)}

    def line(name: str, variant: str, describe: Callable[[Mapping[str, object]], str]) -> tuple[str, ...]:
        rows = [numbers.get((variant, metric)) for metric in METRICS]
        return (name, *(describe(row) if row else NOT_RECORDED for row in rows))

    names = dict(VARIANTS)
    if pairing.backbone.endswith("_reg"):
        names["baseline"] = "baseline, with trained registers"
    if all(theta is None for theta in pairing.scores["thresholds"].values()):
        names["itae"] = "ITAE, no artifacts found"
    lines = [line(name, variant, _mean_and_sd) for variant, name in names.items()]
    if pairing.dataset in BY_DATASET:
        lines.append(line("ITAE − published", "itae", lambda row: f"{row['minus_published']:+.4f}"))
    return [*lines, line("ITAE − baseline [95 %]", "itae", _difference)]


def _mean_and_sd(row: Mapping[str, object]) -> str:
    return f"{row['mean']:.4f}" + ("" if row["sd"] is None else f"{NBSP}±{NBSP}{row['sd']:.4f}")


def _difference(row: Mapping[str, object]) -> str:
    if row["minus_baseline"] is None:
        return NOT_RECORDED
    numbers, colon, words = describe_difference(row | {"difference": row["minus_baseline"]}).partition(":")
    return numbers.replace(" ", NBSP) + colon + words


def styled(table: pd.DataFrame) -> Styler:
    """Return a table of texts for display; HTML in its texts and names is shown literally."""
    return table.style.format(escape="html").format_index(escape="html")


def show_comparison(table: pd.DataFrame) -> None:
    """Display `comparison_table` as one table per data set; call it in a notebook."""
    for name, part in table.groupby(level="data set", sort=False):
        display(Markdown(f"### {escape(name)}"), styled(part.droplevel("data set")).set_table_styles(LAYOUT))


def comparison_numbers(pairings: Sequence[Pairing]) -> pd.DataFrame:
    """Return all measured and published numbers, one row for each backbone, data set, variant and metric.

    n counts images; low and high are the 95 % interval of minus_baseline; weights and images state why they are not the
    published ones, if so.
    """
    return pd.DataFrame([row for pairing in pairings for row in _numbers(pairing)], columns=NUMBERS)


def _numbers(pairing: Pairing) -> list[dict[str, object]]:
    caveats = {part: ": ".join(caveat) for part, caveat in pairing.caveats().items()}
    rows = []
    for variant, metric in product(VARIANTS, METRICS):
        values = score_values(pairing, variant, metric)
        if not values:
            continue
        published, (difference, low, high) = None, [None] * 3
        if variant == "itae":
            published = getattr(BY_DATASET.get(pairing.dataset), metric, None)
            interval = [score_values(pairing, "itae", f"{metric}_difference{end}") for end in ("", "_low", "_high")]
            if all(interval):
                (difference,), (low,), (high,) = interval
        rows.append({
            "dataset": pairing.dataset, "backbone": pairing.backbone, "variant": variant, "metric": metric,
            "n": pairing.scores["provenance"]["dataset"]["size"], "seeds": len(values), "mean": mean(values),
            "sd": stdev(values) if len(values) > 1 else None, "published": published,
            "minus_published": None if published is None else mean(values) - published, "minus_baseline": difference,
            "low": low, "high": high, "normalize": pairing.settings.get("normalize"),
            "n_init": pairing.settings.get("n_init"), "fitted_on": fitted_on(pairing),
            "weights": caveats.get("backbone"), "images": caveats.get("dataset"),
        })
    return rows


def ablation_table(pairing: Pairing) -> pd.DataFrame | None:
    """Return the mean ACC of the grid's settings, (source, attenuation) by θ; None if the results hold no such scores.

    Baseline, controls and deeper settings do not belong to the grid.
    """
    rows = [(*(row[name] for name in SETTING_COLUMNS), row["value"])
            for row in pairing.results.get(ABLATION, {}).get("rows", ())
            if row["metric"] == "acc" and all(row.get(name) for name in SETTING_COLUMNS)]
    if not rows:
        return None
    table = pd.DataFrame(rows, columns=["source", "attenuation", "θ", "acc"])
    means = table.groupby(["source", "attenuation", "θ"], sort=False).acc.agg(mean).unstack("θ", sort=False)
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
    """Return every setting of the paper's runs that is unknown to us, with the value used here."""
    def used(describe: Callable[[Pairing], str]) -> str:
        return "; ".join(_different(pairings, describe)) or NOT_RUN

    tiny = ", ".join(each.backbone for each in pairings if each.dataset == "tiny-imagenet")
    here = {
        "the source P (query, key or value) of each row": used(lambda pairing: str(_setting(pairing, "source"))),
        "the threshold θ of each row": used(_thresholds_used),
        "image size": used(lambda pairing: f"{pairing.scores['provenance']['backbone']['image_size']} px"),
        "resize and crop rule": used(lambda pairing: str(pairing.scores["provenance"]["backbone"]["preprocess"])),
        "whether features are normalised or reduced before k-means": used(
            lambda pairing: "scaled to length 1, not reduced" if _setting(pairing, "normalize")
            else "neither normalised nor reduced"),
        "k-means initialisation and restarts": used(_kmeans_used),
    }
    if concerns_paper(pairings):
        here |= {"the backbone of the Tiny-ImageNet row": tiny or NOT_RUN,
                 "the paper's own baseline numbers":
                     "measured here, in the rows “baseline”" if any(map(has_scores, pairings)) else NOT_RUN}
    return pd.DataFrame({UNKNOWN: here.keys(), "used here": here.values()}).set_index(UNKNOWN)


def _setting(pairing: Pairing, name: str) -> object:
    return pairing.settings.get(name, "not recorded")


def _kmeans_used(pairing: Pairing) -> str:
    first = pairing.settings.get("kmeans_seed")
    return (f"k-means++, best of {_setting(pairing, 'n_init')} starts, {_setting(pairing, 'seeds')} seeds from "
            f"{_setting(pairing, 'seed') if first is None else first}")


def _thresholds_used(pairing: Pairing) -> str:
    rule = _setting(pairing, "threshold")
    how = "given" if isinstance(rule, float | int) else "found without labels" if rule == "auto" else rule
    return ", ".join(f"θ = {theta:.4g} on {name} ({how})" if isinstance(theta, float | int) else f"no θ found on {name}"
                     for name, theta in pairing.scores["thresholds"].items())


def caveat_lines(pairings: Sequence[Pairing]) -> list[str]:
    """Return a Markdown sentence for each backbone and data set that is not, or not known to be, the published one."""
    lines = [f"**{escape(getattr(pairing, part))}**: {label}, {escape(reason)}."
             for pairing in pairings for part, (label, reason) in pairing.caveats().items()]
    return list(dict.fromkeys(lines))


def comparison_headline(pairings: Sequence[Pairing], expected: Sequence[str]) -> list[dict[str, str]]:
    """Return the headline facts: the number of runs with published images and weights, and the ACC of every pairing."""
    scored = [pairing for pairing in pairings if has_scores(pairing)]
    real = [pairing for pairing in scored
            if pairing.dataset in BY_DATASET and pairing.backbone in expected and not pairing.caveats()]
    facts, total = [], len(BY_DATASET) * len(expected)
    if concerns_paper(pairings):
        facts.append({"label": "Comparison with the paper", "value": f"{len(real)} of {total}",
                      "note": "pairs of backbone and data set were run with the published images and weights"})
    for pairing in scored:
        before, after = (mean(score_values(pairing, name, "acc")) for name in ("baseline", "itae"))
        (dataset, backbone), published = labelled_titles(pairing), BY_DATASET.get(pairing.dataset)
        note = f"baseline → ITAE on {backbone}" + (f"; published {published.acc:.4f}" if published else "")
        facts.append({"label": f"ACC, {dataset}", "value": f"{before:.3f} → {after:.3f}", "note": note})
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
    """Write `output_dir/tables/name.csv` and `.tex`, and return Markdown links to them.

    `csv` goes into the CSV file in place of `table`, such as the numbers behind a table of texts.
    """
    folder, text = make_folder(Path(output_dir) / "tables"), as_latex(table, multirow=False)
    for suffix, content in (("csv", table.to_csv() if csv is None else csv.to_csv(index=False)), ("tex", text)):
        with replacing(folder / f"{name}.{suffix}") as part:
            part.write_text(content, encoding="utf-8")
    return f"[CSV](tables/{quote(name)}.csv) · [LaTeX](tables/{quote(name)}.tex)"
