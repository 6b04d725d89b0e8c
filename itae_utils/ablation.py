"""The grid of settings that the ablation runs in one pass: source × attenuation × θ, and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from itae_utils.attention import ITAE
from itae_utils.errors import ItaeError

if TYPE_CHECKING:
    import pandas as pd

    from itae_utils.thresholds import Thresholds

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
    import pandas as pd

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
