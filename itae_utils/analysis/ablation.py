"""The ablation's grid of settings (source × attenuation × θ, and controls), and sentences about its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

import numpy as np
import pandas as pd

from itae_utils.analysis.words import describe_runs, symbol
from itae_utils.errors import ItaeError
from itae_utils.extraction.features import Features
from itae_utils.method.setting import ATTENUATIONS, ITAE
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
    tails: Mapping[str, str | None] | None = None,
) -> pd.DataFrame:
    """Return every last-block setting that the ablation compares, one row per variant, indexed by its name.

    `fits` are from `fit_thresholds`; a source without θ has no "auto" setting. `percents` are θ as the share of patches
    beyond it, distinct in their first six digits. `control` is the attenuation of the random control, which uses
    `seed`, and of the oracle, for which the true artifacts must be known. `tails` gives some sources the other side.
    The other arguments are as for `ITAE`.

    Returns:
        Columns kind ("baseline", "itae", "random", "oracle"), source, attenuation (only for kind "itae"), theta
        ("auto" or "5 %"), share (of the patches in the fit's sample that lie beyond θ), and setting (an `ITAE`, or
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
        tail = (tails or {}).get(source)
        fit = fits.of(ITAE(source, tail=tail, rank=fits.rank if source == "direction" else 1))[-1]
        thresholds = [(_percent_name(each), fit.quantile(each / 100), each / 100) for each in percents]
        if fit.threshold is not None:
            thresholds.append((AUTO, fit.threshold, float(fit.beyond(fit.threshold).mean())))
        for theta, threshold, share in thresholds:
            about = {"source": source, "theta": theta, "share": share}
            setting = {"source": source, "threshold": threshold, "alpha": alpha, "tail": tail, "rank": fits.rank}
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


def edit_settings(itae: ITAE, fits: Thresholds) -> dict[str, ITAE]:
    """Return a setting with every edit and θ "auto", as "edit min" and so on; none if `fits` have no θ for it."""
    if fits.of(itae)[-1].threshold is None:
        return {}
    return {f"edit {attenuation}": replace(itae, attenuation=attenuation) for attenuation in ATTENUATIONS}


def deep_settings(num_blocks: int, *, attenuation: str, alpha: float, **identified: object) -> dict[str, ITAE]:
    """Return settings of the last one to three blocks by variant name, on the `[CLS]` row and on all rows.

    In the last block alone, both give the same `[CLS]` output, so this setting is listed once. `identified` are the
    arguments of `ITAE` that identify artifacts. "direction" has nothing to measure in the first block.
    """
    settings = {}
    most = num_blocks - (identified.get("source") == "direction")
    for blocks in range(1, min(3, most) + 1):
        for rows in ("cls", "all") if blocks > 1 else ("cls",):
            name = f"{blocks} block{'s' if blocks > 1 else ''}, {rows} rows"
            settings[name] = ITAE(attenuation=attenuation, alpha=alpha, blocks=blocks, rows=rows, **identified)
    return settings


def ablation_thresholds(grid: pd.DataFrame, deep: Mapping[str, Sequence[float | None]], source: str
                        ) -> dict[str, object]:
    """Return every θ of the grid and of `deep_settings` once, by what it is compared with, for `results.json`.

    Args:
        grid: from `ablation_grid`.
        deep: the θ of each block of the deep settings, by name.
        source: of the deep settings.
    """
    thresholds: dict[str, object] = {}
    for row in grid[grid.kind == "itae"].itertuples():
        name = f"{symbol(row.source)}, last block" + ("" if row.theta == AUTO else f", {row.theta}")
        thresholds[name] = row.setting.threshold
    for values in deep.values():
        if len(values) > 1:
            thresholds[f"{symbol(source)}, last {len(values)} blocks"] = list(values)
    return thresholds


def describe_extraction(features: Features, fit_seconds: float) -> str:
    """Return Markdown: how many variants ran on how many images in what time, and how many came from the store."""
    computed = {variant: features.computed[name] for name, variant in features.stored.items()}  # equal ones once
    run = [count for count in computed.values() if count]
    total, took, fitted = len(computed), f"{features.seconds:.1f} s", f"Fitting θ took {fit_seconds:.1f} s."
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
    """Return the ablation's headline facts: number of settings, time, and the score with θ found without labels.

    `seeds` and `n_init` are those of the k-means runs behind `scores`.
    """
    settings = scores.index.unique()
    stored = sum(not features.computed[name] for name in settings)
    note = (f"with baseline and controls; {stored} were stored by earlier runs" if stored
            else f"with baseline and controls, computed together in {features.seconds:.1f} s")
    facts = [{"label": "Settings compared", "value": f"{len(settings)}", "note": note}]
    if measure != "acc":
        return facts
    auto = scores[(scores.kind == "itae") & (scores.theta == AUTO)]
    note = f"baseline ACC {mean(scores[scores.kind == 'baseline'][measure]):.3f}; {describe_runs(seeds, n_init)}"
    if auto.empty:
        return [*facts, {"label": "θ found without labels", "value": "none", "note": note}]
    means = auto.groupby(level="variant")[measure].agg(mean)
    facts.append({"label": "ACC with θ found without labels", "value": f"{means.min():.3f} to {means.max():.3f}",
                  "note": f"over {len(means)} settings; {note}"})
    return facts
