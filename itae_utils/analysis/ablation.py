"""The grid of settings that the ablation runs in one pass: source × attenuation × θ, and the controls."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Every setting of the last block that the ablation compares, a row each, by the variant's name.

    Args:
        fits: from `fit_thresholds`; a source without θ has no "auto" setting.
        sources: of the norms.
        attenuations: what becomes of an artifact's logit.
        percents: θ as the share of patches at or below it, in percent.
        control: the attenuation of the random and oracle controls.
        oracle: whether the true artifacts are known.
        alpha: of attenuation "scale".
        seed: of the random control.

    Returns:
        Columns kind ("baseline", "itae", "random", "oracle"), source, attenuation, theta ("auto" or "5 %"), share (of
        the patches in the fit's sample, at or below θ), setting (an `ITAE`, or None for the baseline).

    Raises:
        ItaeError: a percentage outside (0, 100), and what `ITAE` refuses.
    """
    for percentage in percents:
        if not 0 < percentage < 100:
            raise ItaeError(f"percents holds {percentage!r}: give shares of the patches above 0 and below 100")
    rows = [{"variant": "baseline", "kind": "baseline"}]
    for source in sources:
        for theta, threshold, share in _thresholds(fits, source, percents):
            about = {"source": source, "theta": theta, "share": share}
            setting = {"source": source, "threshold": threshold, "alpha": alpha}
            rows += [{"variant": f"{source} {attenuation} {theta}", "kind": "itae", "attenuation": attenuation, **about,
                      "setting": ITAE(attenuation=attenuation, **setting)} for attenuation in attenuations]
            rows.append({"variant": f"random like {source} {theta}", "kind": "random", "attenuation": control, **about,
                         "setting": ITAE(attenuation=control, select="random", seed=seed, **setting)})
    if oracle:
        rows.append({"variant": "oracle", "kind": "oracle", "attenuation": control,
                     "setting": ITAE(attenuation=control, select="oracle", alpha=alpha)})
    grid = pd.DataFrame(rows).set_index("variant").astype({"setting": object})
    return grid.assign(setting=[setting if isinstance(setting, ITAE) else None for setting in grid.setting])


def _thresholds(fits: Thresholds, source: str, percents: Sequence[float]) -> list[tuple[str, float, float]]:
    """Name, θ and share of patches of each column of the grid."""
    fit = fits[-1, source]
    columns = [(f"{percentage:g} %", fit.quantile(percentage / 100), percentage / 100) for percentage in percents]
    if fit.threshold is not None:
        columns.append((AUTO, fit.threshold, float((fit.norms <= fit.threshold).mean())))
    return columns


def describe_extraction(features: Features, fit_seconds: float) -> str:
    """Markdown: how many variants were run, on how many images, in what time, and how many the store already held."""
    run = [count for count in features.computed.values() if count]
    total, took, images = len(features), f"{features.seconds:.1f} s", max(run, default=0)
    if not run:
        return (f"**All {total} variants were found in the feature store**, where an earlier run left them; looking "
                f"took {took}, after {fit_seconds:.1f} s for θ.")
    which = f"{total} variants" if len(run) == total else f"{len(run)} of {total} variants"
    stored = "" if len(run) == total else "; the others were found in the feature store"
    return (f"**{which} ran in one pass** over {images:,} images, which took {took} "
            f"({images / features.seconds:,.0f} images a second), after {fit_seconds:.1f} s for θ{stored}.")


def ablation_headline(scores: pd.DataFrame, measure: str, features: Features) -> list[dict[str, str]]:
    """What to know first about the ablation: how many settings in what time, and what θ from the norms alone gives."""
    run = sum(count > 0 for count in features.computed.values())
    note = f"in {features.seconds:.1f} s" if run == len(features) else f"{len(features) - run} of them from the store"
    facts = [{"label": "One pass", "value": f"{len(features)} variants", "note": note}]
    auto = scores[(scores.kind == "itae") & (scores.theta == "auto")]
    if measure != "acc":
        return facts
    baseline = scores[scores.kind == "baseline"][measure].mean()
    if auto.empty:
        return [*facts, {"label": "θ from the norms alone", "value": "none", "note": f"baseline ACC {baseline:.3f}"}]
    means = auto.groupby(level="variant")[measure].mean()
    facts.append({"label": "ACC with θ from the norms alone", "value": f"{means.min():.3f} to {means.max():.3f}",
                  "note": f"over {len(means)} settings; baseline {baseline:.3f} (means over seeds)"})
    return facts
