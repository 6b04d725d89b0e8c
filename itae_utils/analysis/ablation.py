"""The ablation's grid of settings (source × attenuation × θ, and controls), and sentences about its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean

import numpy as np
import pandas as pd

from itae_utils.analysis.words import describe_runs
from itae_utils.errors import ItaeError
from itae_utils.extraction.features import Features
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import Thresholds

AUTO = "auto"


def ablation_grid(
    fits: Thresholds,
    *,
    sources: Sequence[str],
    attenuations: Sequence[str],
    percents: Sequence[float],
    control: str = "min",
    oracle: bool,
    alpha: float = 0.1,
    seed: int = 0,
) -> pd.DataFrame:
    """Return every last-block setting that the ablation compares, one row per variant, indexed by its name.

    `fits` are from `fit_thresholds`; a source without θ has no "auto" setting. `percents` are θ as the share of patches
    at or below it, distinct in their first six digits. `control` is the attenuation of the random control, which uses
    `seed`, and of the oracle, for which the true artifacts must be known. The other arguments are as for `ITAE`.

    Returns:
        Columns kind ("baseline", "itae", "random", "oracle"), source, attenuation (only for kind "itae"), theta
        ("auto" or "5 %"), share (of the patches in the fit's sample that lie at or below θ), and setting (an `ITAE`, or
        None for the baseline).

    Raises:
        ItaeError: a percentage outside (0, 100), a value listed twice, or a value that `ITAE` refuses.
    """
    for percentage in percents:
        if not 0 < percentage < 100:
            raise ItaeError(f"percents holds {percentage!r}: give shares of the patches above 0 and below 100")
    for name, values in (("sources", sources), ("attenuations", attenuations),
                         ("percents", [_percent_name(percentage) for percentage in percents])):
        for value, count in Counter(values).items():
            if count > 1:
                raise ItaeError(f"{name} holds {value!r} {count} times: list each value once")
    rows = [{"variant": "baseline", "kind": "baseline", "setting": None}]
    for source in sources:
        fit = fits[-1, source]
        thresholds = [(_percent_name(each), fit.quantile(each / 100), each / 100) for each in percents]
        if fit.threshold is not None:
            thresholds.append((AUTO, fit.threshold, float((fit.norms <= fit.threshold).mean())))
        for theta, threshold, share in thresholds:
            about = {"source": source, "theta": theta, "share": share}
            setting = {"source": source, "threshold": threshold, "alpha": alpha}
            rows += [{"variant": f"{source} {attenuation} {theta}", "kind": "itae", "attenuation": attenuation, **about,
                      "setting": ITAE(attenuation=attenuation, **setting)} for attenuation in attenuations]
            rows.append({"variant": f"random like {source} {theta}", "kind": "random", **about,
                         "setting": ITAE(attenuation=control, select="random", seed=seed, **setting)})
    if oracle:
        rows.append({"variant": "oracle", "kind": "oracle",
                     "setting": ITAE(attenuation=control, select="oracle", alpha=alpha)})
    return pd.DataFrame(rows).set_index("variant")


def _percent_name(percentage: float) -> str:
    """Return a percentage with up to six significant digits, never in exponent form: "2.5 %", "0.00001 %"."""
    return f"{np.format_float_positional(percentage, precision=6, fractional=False, trim='-')} %"


def deep_settings(num_blocks: int, *, source: str, attenuation: str, alpha: float) -> dict[str, ITAE]:
    """Return settings of the last one to three blocks by variant name, on the `[CLS]` row and on all rows.

    In the last block alone, both give the same `[CLS]` output, so this setting is listed once.
    """
    settings = {}
    for blocks in range(1, min(3, num_blocks) + 1):
        for rows in ("cls", "all") if blocks > 1 else ("cls",):
            name = f"{blocks} block{'s' if blocks > 1 else ''}, {rows} rows"
            settings[name] = ITAE(source, "auto", attenuation, alpha, blocks, rows)
    return settings


def ablation_thresholds(grid: pd.DataFrame, fits: Thresholds, num_blocks: int, source: str) -> dict[str, object]:
    """Return every θ of the grid and of `deep_settings` once, by the norm that it is compared with, for `results.json`.

    Args:
        grid: from `ablation_grid`.
        fits: from `fit_thresholds`.
        num_blocks: of the model.
        source: of the deep settings.
    """
    thresholds: dict[str, object] = {}
    for row in grid[grid.kind == "itae"].itertuples():
        name = f"‖{row.source}‖, last block" + ("" if row.theta == AUTO else f", {row.theta}")
        thresholds[name] = row.setting.threshold
    for blocks in range(2, min(3, num_blocks) + 1):
        thresholds[f"‖{source}‖, last {blocks} blocks"] = [fits[block, source].threshold for block in range(-blocks, 0)]
    return thresholds


def describe_extraction(features: Features, fit_seconds: float) -> str:
    """Return Markdown: how many variants ran on how many images in what time, and how many came from the store."""
    run = [count for count in features.computed.values() if count]
    total, took, fitted = len(features), f"{features.seconds:.1f} s", f"Fitting θ took {fit_seconds:.1f} s."
    if not run:
        return f"**All {total} variants were read from the feature store** in {took}. {fitted}"
    which, stored = f"{total} variants", ""
    if len(run) < total:
        which, stored = f"{len(run)} of {which}", " The other variants were read from the feature store."
    return (f"**{which} were computed together** for {max(run):,} images in {took} "
            f"({max(run) / features.seconds:,.0f} images per second). {fitted}{stored}")


def ablation_headline(
    scores: pd.DataFrame, measure: str, features: Features, *, seeds: int, n_init: int
) -> list[dict[str, str]]:
    """Return the ablation's headline facts: number of settings, time, and the score with θ from the norms alone.

    `seeds` and `n_init` are those of the k-means runs behind `scores`.
    """
    stored = sum(not count for count in features.computed.values())
    note = (f"with baseline and controls; {stored} were stored by earlier runs" if stored
            else f"with baseline and controls, computed together in {features.seconds:.1f} s")
    facts = [{"label": "Settings compared", "value": f"{len(features)}", "note": note}]
    if measure != "acc":
        return facts
    auto = scores[(scores.kind == "itae") & (scores.theta == AUTO)]
    note = f"baseline ACC {mean(scores[scores.kind == 'baseline'][measure]):.3f}; {describe_runs(seeds, n_init)}"
    if auto.empty:
        return [*facts, {"label": "θ from the norms alone", "value": "none", "note": note}]
    means = auto.groupby(level="variant")[measure].agg(mean)
    facts.append({"label": "ACC with θ from the norms alone", "value": f"{means.min():.3f} to {means.max():.3f}",
                  "note": f"over {len(means)} settings; {note}"})
    return facts
