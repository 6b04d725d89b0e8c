"""The grid of settings that the ablation runs in one pass (source × attenuation × θ, and controls), in words too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

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

    Args:
        fits: from `fit_thresholds`; a source without θ has no "auto" setting.
        sources: "query", "key" or "value", each at most once.
        attenuations: as for `ITAE`, each at most once.
        percents: θ as the share of patches at or below it, in percent; distinct in their first six digits.
        control: the attenuation of the random and oracle controls.
        oracle: whether the true artifacts are known.
        alpha: factor of attenuation "scale".
        seed: of the random control.

    Returns:
        Columns kind ("baseline", "itae", "random", "oracle"), source, attenuation (of kind "itae" only), theta ("auto"
        or "5 %"), share (of the patches in the fit's sample, at or below θ), setting (an `ITAE`, or None for the
        baseline).

    Raises:
        ItaeError: a percentage outside (0, 100), a value that is listed twice, or a value that `ITAE` refuses.
    """
    for percentage in percents:
        if not 0 < percentage < 100:
            raise ItaeError(f"percents holds {percentage!r}: give shares of the patches above 0 and below 100")
    for name, values in (("sources", sources), ("attenuations", attenuations),
                         ("percents", [_percent_name(percentage) for percentage in percents])):
        for value, count in Counter(values).items():
            if count > 1:
                raise ItaeError(f"{name} holds {value!r} {count} times: list each value once")
    rows = [{"variant": "baseline", "kind": "baseline"}]
    for source in sources:
        for theta, threshold, share in _thresholds(fits, source, percents):
            about = {"source": source, "theta": theta, "share": share}
            setting = {"source": source, "threshold": threshold, "alpha": alpha}
            rows += [{"variant": f"{source} {attenuation} {theta}", "kind": "itae", "attenuation": attenuation, **about,
                      "setting": ITAE(attenuation=attenuation, **setting)} for attenuation in attenuations]
            rows.append({"variant": f"random like {source} {theta}", "kind": "random", **about,
                         "setting": ITAE(attenuation=control, select="random", seed=seed, **setting)})
    if oracle:
        rows.append({"variant": "oracle", "kind": "oracle",
                     "setting": ITAE(attenuation=control, select="oracle", alpha=alpha)})
    grid = pd.DataFrame(rows).set_index("variant").astype({"setting": object})
    return grid.assign(setting=[setting if isinstance(setting, ITAE) else None for setting in grid.setting])


def _percent_name(percentage: float) -> str:
    """Return a percentage with up to six significant digits, never in exponent form: "2.5 %", "0.00001 %"."""
    return f"{np.format_float_positional(percentage, precision=6, fractional=False, trim='-')} %"


def _thresholds(fits: Thresholds, source: str, percents: Sequence[float]) -> list[tuple[str, float, float]]:
    """Return name, θ and share of patches for each column of the grid."""
    fit = fits[-1, source]
    columns = [(_percent_name(percentage), fit.quantile(percentage / 100), percentage / 100) for percentage in percents]
    if fit.threshold is not None:
        columns.append((AUTO, fit.threshold, float((fit.norms <= fit.threshold).mean())))
    return columns


def deep_settings(num_blocks: int, *, source: str, attenuation: str, alpha: float) -> dict[str, ITAE]:
    """Return settings of the last one to three blocks by variant name, on the `[CLS]` row and on all rows.

    In the last block alone both rows give the same `[CLS]` output, so that setting is listed once.
    """
    settings = {}
    for blocks in range(1, min(3, num_blocks) + 1):
        for rows in ("cls", "all") if blocks > 1 else ("cls",):
            name = f"{blocks} block{'s' if blocks > 1 else ''}, {rows} rows"
            settings[name] = ITAE(source, "auto", attenuation, alpha, blocks, rows)
    return settings


def describe_extraction(features: Features, fit_seconds: float) -> str:
    """Return Markdown: how many variants ran on how many images in what time, and how many came from the store."""
    run = [count for count in features.computed.values() if count]
    total, took, images = len(features), f"{features.seconds:.1f} s", max(run, default=0)
    fitted = f"Fitting θ took {fit_seconds:.1f} s."
    if not run:
        return f"**All {total} variants were read from the feature store** in {took}. {fitted}"
    which = f"{total} variants" if len(run) == total else f"{len(run)} of {total} variants"
    stored = "" if len(run) == total else " The other variants were read from the feature store."
    return (f"**{which} ran in one pass** over {images:,} images in {took} "
            f"({images / features.seconds:,.0f} images per second). {fitted}{stored}")


def ablation_headline(scores: pd.DataFrame, measure: str, features: Features) -> list[dict[str, str]]:
    """Return the ablation's headline facts: number of settings, time, and the score with θ from the norms alone."""
    run = sum(count > 0 for count in features.computed.values())
    note = f"in {features.seconds:.1f} s" if run == len(features) else f"{len(features) - run} of them from the store"
    facts = [{"label": "One pass", "value": f"{len(features)} variants", "note": note}]
    auto = scores[(scores.kind == "itae") & (scores.theta == AUTO)]
    if measure != "acc":
        return facts
    baseline = scores[scores.kind == "baseline"][measure].mean()
    if auto.empty:
        return [*facts, {"label": "θ from the norms alone", "value": "none", "note": f"baseline ACC {baseline:.3f}"}]
    means = auto.groupby(level="variant")[measure].mean()
    facts.append({"label": "ACC with θ from the norms alone", "value": f"{means.min():.3f} to {means.max():.3f}",
                  "note": f"over {len(means)} settings; baseline {baseline:.3f} (means over seeds)"})
    return facts
