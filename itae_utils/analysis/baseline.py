"""The baseline, k-means on plain DINOv2, beside the scores that MTEB, an independent benchmark, published for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pandas as pd
from IPython.display import Markdown, display

from itae_utils.analysis.collection import BY_DATASET, MTEB, MTEB_BACKBONES, MTEB_SOURCE, Pairing
from itae_utils.analysis.comparison import (
    NBSP,
    concerns_paper,
    dataset_title,
    describe_protocols,
    has_scores,
    save_table,
    score_values,
    show_comparison,
    title_of_backbone,
)
from itae_utils.analysis.metrics import METRICS

NUMBERS = ["dataset", "backbone", "pos_embed", "metric", "n", "seeds", "mean", "lowest", "highest", "mteb", "weights",
           "images"]
HOW = ("`itae report --profile mteb` makes such runs. `itae report --only 04 -p results_dir FOLDER` shows them beside "
       "others, if FOLDER holds both reports.")


def baseline_numbers(pairings: Sequence[Pairing]) -> pd.DataFrame:
    """Return the baseline's mean, lowest and highest score over seeds, beside MTEB's (NaN if it has none).

    `pairings` are runs by MTEB's protocol. There is one row for each of them and each metric; weights and images state
    why they are not the published ones, if so.
    """
    rows = []
    for pairing in filter(has_scores, pairings):
        about, caveats = pairing.scores["provenance"], pairing.caveats()
        for metric in METRICS:
            values = score_values(pairing, "baseline", metric)
            published = MTEB.get((pairing.dataset, pairing.backbone), {}).get(metric)
            rows.append([pairing.dataset, pairing.backbone, pairing.mteb_rule, metric, about["dataset"]["size"],
                         len(values), mean(values), min(values), max(values), published,
                         *(": ".join(caveats[part]) if part in caveats else None for part in ("backbone", "dataset"))])
    return pd.DataFrame(rows, columns=NUMBERS)


def baseline_table(pairings: Sequence[Pairing]) -> pd.DataFrame:
    """Return MTEB's scores and ours as text, and whether theirs lie within the range of our seeds.

    The index is (data set, backbone, row); the columns are ACC, NMI and ARI.
    """
    lines = []
    for dataset, backbone in dict.fromkeys([*MTEB, *((each.dataset, each.backbone) for each in pairings)]):
        title = dataset_title(dataset)
        if published := MTEB.get((dataset, backbone)):
            lines.append((title, backbone, "MTEB", *(f"{published[metric]:.4f}" for metric in METRICS)))
        for pairing in pairings:
            if (pairing.dataset, pairing.backbone) == (dataset, backbone):
                numbers = baseline_numbers([pairing]).to_dict("records")
                lines.append((title, title_of_backbone(pairing), f"here, pos_embed={pairing.mteb_rule}",
                              *(map(_beside, numbers) if numbers else ["not measured"] * len(METRICS))))
    columns = ["data set", "backbone", "row", *(metric.upper() for metric in METRICS)]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:3])


def _beside(row: dict[str, object]) -> str:
    text = f"{row['mean']:.4f}{NBSP}[{row['lowest']:.4f},{NBSP}{row['highest']:.4f}]"
    if pd.isna(row["mteb"]):
        return text
    if _is_within(row):
        return f"{text}: theirs is within"
    return f"{text}: theirs is {'lower' if row['mteb'] < row['lowest'] else 'higher'}"


def _is_within(row: dict[str, object]) -> bool:
    return row["lowest"] <= row["mteb"] <= row["highest"]


def _count_within(pairings: Sequence[Pairing]) -> tuple[int, int]:
    """Return how many of MTEB's scores lie within the range of our seeds, and of how many measured as published."""
    rows = [row for row in baseline_numbers([each for each in pairings if not each.caveats()]).to_dict("records")
            if not pd.isna(row["mteb"])]
    return sum(map(_is_within, rows)), len(rows)


def describe_baseline(pairings: Sequence[Pairing]) -> str:
    """Return Markdown on whether MTEB's scores lie within the range of ours, or on how to find out."""
    if not pairings:
        return f"**No run here follows MTEB's protocol**, so the baseline was not compared. {HOW}"
    within, total = _count_within(pairings)
    answer = (f"**{within} of {total} scores of MTEB lie within the range of our seeds.**" if total else
              "**None of these runs has MTEB's images and weights**, so they do not answer the question.")
    return f"{answer}\n\nHere: {describe_protocols(pairings)}"


def describe_published() -> str:
    """Return Markdown on what the published numbers of ITAE and of MTEB say when they are laid side by side."""
    sentences = []
    for dataset, row in BY_DATASET.items():
        same = next((name for name, title in MTEB_BACKBONES.items() if title == row.backbone), None)
        for metric, value in MTEB.get((dataset, same), {}).items():
            if (itae := getattr(row, metric)) < value:
                sentences.append(f"On {row.title} the published {metric.upper()} of ITAE, {itae:.4f}, is below that of "
                                 f"MTEB's plain baseline on the same backbone, {value:.4f}.")
    for dataset in dict.fromkeys(dataset for dataset, _ in MTEB):
        values = [MTEB[dataset, backbone]["acc"] for backbone in MTEB_BACKBONES]
        if values == sorted(values, reverse=True):
            sentences.append(f"On {dataset_title(dataset)} the ACC of the plain baseline falls as the model grows: "
                             f"{', '.join(f'{value:.4f}' for value in values)} ({', '.join(MTEB_BACKBONES)}).")
    return "What the published numbers say by themselves:\n\n" + "\n".join(f"- {each}" for each in sentences)


def show_baseline(pairings: Sequence[Pairing], others: Sequence[Pairing], output_dir: str | Path) -> None:
    """Display and save `baseline_table` of the runs by MTEB's protocol; call it in a notebook.

    If there are none, and no data set of the `others` is the paper's either, only a sentence is shown.
    """
    display(Markdown(describe_baseline(pairings)))
    if not pairings and not concerns_paper(others):
        return
    table = baseline_table(pairings)
    files = save_table(table, output_dir, "baseline", csv=baseline_numbers(pairings))
    show_comparison(table)
    display(Markdown(f"The whole table: {files}\n\n{describe_published()}\n\nMTEB: {MTEB_SOURCE}"))


def baseline_rows(pairings: Sequence[Pairing]) -> list[dict[str, object]]:
    """Return rows for `results.json`: the mean of our baseline minus MTEB's score."""
    return [{"backbone": row["backbone"], "dataset": row["dataset"], "n": row["n"], "seed": None,
             "variant": f"baseline, pos_embed={row['pos_embed']}", "metric": f"{row['metric']}_minus_mteb",
             "value": float(row["mean"] - row["mteb"])}
            for row in baseline_numbers(pairings).dropna(subset="mteb").to_dict("records")]


def baseline_headline(pairings: Sequence[Pairing]) -> list[dict[str, str]]:
    """Return the headline fact: how many of MTEB's scores lie within the range of our seeds; empty if unknown."""
    within, total = _count_within(pairings)
    return [{"label": "Baseline as MTEB measures it", "value": f"{within} of {total}",
             "note": "scores of MTEB for plain DINOv2 lie within the range of our seeds"}] if total else []
