"""θ without labels: the valley between two modes of a statistic of the patches, or the reason why there is none.

The test uses the histogram of the data, not a likelihood: BIC, AIC and likelihood ratios prefer two normals on any
skewed unimodal sample. The constants below were chosen on synthetic mixtures only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter1d

from itae_utils.errors import ItaeError
from itae_utils.method.setting import ITAE, NORMS, SIDES, SOURCES, TAILS, WHERE, beyond, threshold_rule

MIN_PATCHES = 2000          # with fewer, a rare mode cannot be distinguished from a tail
TAIL_STARTS = (0.001, 0.003, 0.01, 0.05)  # shares of the patches that EM starts with as the rare mode
MIN_SEPARATION = 3.0        # Ashman's D = √2·Δμ/√(σ₁² + σ₂²)
MAX_VALLEY = 0.10           # height of the valley as a share of the rare mode's peak
SHARE_RANGE = (0.0005, 0.25)  # share of the rare mode: artifacts are a minority …
MIN_RARE_PATCHES = 10        # … but more than a handful of stray patches
HISTOGRAM_BINS = 4096
EM_STEPS = 500


@dataclass(frozen=True)
class ThresholdFit:
    """Result of fitting θ to a statistic in one block, on one side.

    Attributes:
        threshold: θ, the valley between the modes, in the unit of the values; None if there are no two modes.
        share: share of the patches in the fitted mode on this side, accepted or not; NaN if nothing was fitted.
        separation: Ashman's D of the two fitted modes; NaN if nothing was fitted.
        reason: the verdict in words.
        values: the values, any shape.
        side: "low" if artifacts lie at or below θ, "high" if they lie at or above it.
    """

    threshold: float | None
    share: float
    separation: float
    reason: str
    values: np.ndarray = field(repr=False, compare=False)
    side: Literal["low", "high"] = "low"

    @property
    def is_tested(self) -> bool:
        """Return whether there were enough patches to look for two modes."""
        return self.values.size >= MIN_PATCHES

    def is_given(self, threshold: float | None) -> bool:
        """Return whether `threshold` is a number that comes from elsewhere, not from this fit."""
        return threshold is not None and threshold != self.threshold

    def beyond(self, threshold: float | None) -> np.ndarray:
        """Return which of the values lie on this side of a threshold, bool of their shape; none if it is None."""
        return beyond(self.values, threshold, self.side)

    def quantile(self, share: float) -> float:
        """Return the threshold on whose side this share of the patches lies."""
        return float(np.quantile(self.values, share if self.side == "low" else 1 - share))

    def apply(self, threshold: float | str) -> float | None:
        """Return the number that a rule for θ ("auto", "share:2%", "sd:3") becomes here; a number stays."""
        if not isinstance(threshold, str):
            return threshold
        kind, number = threshold_rule(threshold)
        if kind == "auto":
            return self.threshold
        if kind == "share":
            return self.quantile(number)
        values = self.values.astype(np.float64)
        away = number * values.std()
        return float(max(0, values.mean() + (away if self.side == "high" else -away)))


class Thresholds(Mapping[tuple, ThresholdFit]):
    """Fits by (block, source), each computed when it is first read.

    `fits[-1, "key"]` is the fit of the last block's keys, on the side where its artifacts usually lie, and
    `fits[-1, "key", "high"]` that on the other side. A negative block counts from the end in `[…]`, `in` and `get`;
    iteration yields (block, source), blocks counted from the front.

    Args:
        values: a statistic by (block, source).
        seconds: time spent on measuring it.
        rank: number of singular directions that "direction" was measured with.
        drawn: "sample" and "seed" of the images.

    Attributes:
        seconds: time spent on measuring and on the fits made so far.
        num_blocks: number of blocks of the model.
        rank: as given.
        drawn: as given.
    """

    def __init__(self, values: Mapping[tuple[int, str], np.ndarray], seconds: float = 0.0, rank: int = 1,
                 drawn: Mapping[str, int] | None = None) -> None:
        self.seconds, self.rank, self.drawn = seconds, rank, dict(drawn or {})
        self._values, self._fits = values, {}
        self.num_blocks = 1 + max(block for block, _ in values)

    def _full(self, key: object) -> tuple[int, str, str] | None:
        """Return (block from the front, source, side) of a key, or None if it has no values."""
        if not (isinstance(key, tuple) and len(key) in (2, 3) and isinstance(key[0], Integral) and key[1] in SIDES):
            return None
        block, source, side = *key[:2], key[2] if len(key) == 3 else SIDES[key[1]]
        block = block + self.num_blocks if block < 0 else block
        one_sided = source not in NORMS and side != SIDES[source]
        return None if (block, source) not in self._values or side not in TAILS or one_sided else (block, source, side)

    def __getitem__(self, key: tuple[int, str] | tuple[int, str, str]) -> ThresholdFit:
        full = self._full(key)
        if full is None:
            has = dict.fromkeys(source for _, source in self._values)
            raise ItaeError(f"there is no fit for {key}: blocks are 0 to {self.num_blocks - 1} (or negative), sources "
                            f"are {', '.join(has)}" + (" ('direction' from block 1 on)" if "direction" in has else ""))
        if full not in self._fits:
            start, (block, source, side) = time.perf_counter(), full
            self._fits[full] = fit_threshold(self._values[block, source], side=side, source=source)
            self.seconds += time.perf_counter() - start
        return self._fits[full]

    def __contains__(self, key: object) -> bool:
        return self._full(key) is not None

    def get(self, key: tuple, default: ThresholdFit | None = None) -> ThresholdFit | None:
        """Return the fit of a key, or `default` if there is no such block or source."""
        full = self._full(key)
        return default if full is None else self[full]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def of_block(self, itae: ITAE, block: int = -1) -> dict[str, ThresholdFit]:
        """Return the fits of one block by source, that of the setting's source on the setting's side."""
        return {source: self[block, source, itae.side] if source == itae.source else self[block, source]
                for source in SOURCES if (block, source) in self}

    def measured(self, block: int, source: str) -> np.ndarray:
        """Return the values of a statistic in one block, counted from the front, without a fit."""
        return self._values[block, source]

    def of(self, itae: ITAE) -> list[ThresholdFit]:
        """Return the fits of a setting's blocks, in block order, on its side.

        Raises:
            ItaeError: there are none, or they are of another rank.
        """
        if itae.source == "direction" and itae.rank != self.rank:
            raise ItaeError(f"rank={itae.rank}, but the thresholds were fitted with rank={self.rank}: "
                            "fit_thresholds(backbone, dataset, rank=…)")
        return [self[block, itae.source, itae.side] for block in range(-itae.blocks, 0)]


def fit_threshold(values: np.ndarray, *, side: Literal["low", "high"] = "low", source: str = "key") -> ThresholdFit:
    """Fit two normals to a statistic and return the valley between them as θ, or the reason why there is none.

    Norms are fitted on their logarithm, other statistics as they are. θ is accepted only if the modes are separated
    (D ≥ 3), if the histogram has a valley between them that is no higher than 10 % of the peak of the mode on this
    side, and if this mode holds 0.05 to 25 % of the patches and at least 10 of them.

    Args:
        values: L2 norms or another statistic of patches, any shape. At least 2,000 are needed for a fit.
        side: "low" looks for rare small values, "high" for rare large ones.
        source: what the values are, see `ITAE.source`.

    Raises:
        ItaeError: values that are NaN, infinite, negative or not numbers, or an unknown side or source.
    """
    for name, value, allowed in (("side", side, TAILS), ("source", source, SOURCES)):
        if value not in allowed:
            raise ItaeError(f"{name}={value!r} is not known: use one of {', '.join(allowed)}")
    try:
        flat = np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise ItaeError(f"values are a {type(values).__name__}: pass an array of numbers, such as qkv_norms(model, "
                        "images)['key']") from error
    if not (np.isfinite(flat).all() and (flat >= 0).all()):
        wrong = flat[~(np.isfinite(flat) & (flat >= 0))][0]
        raise ItaeError(f"values hold {wrong}, but must be finite and at least 0: check the model's weights and "
                        "precision")
    verdict = ThresholdFit(None, np.nan, np.nan, "", np.asarray(values), side)
    if flat.size < MIN_PATCHES:
        return replace(verdict, reason=f"{flat.size:,} patches are too few to fit: at least {MIN_PATCHES:,} are needed")
    if source in NORMS:
        x, back, unit = np.log(np.maximum(flat, np.finfo(np.float32).tiny)), np.exp, 1.0
    else:
        x, back, unit = flat, float, flat.max()
    if np.ptp(x) <= 1e-6 * unit:
        return replace(verdict, reason="all values are equal")
    verdict = _fit_side(verdict, x, back)
    if verdict.threshold is None:
        other = TAILS[side == "low"]
        if source in NORMS and _fit_side(replace(verdict, side=other), x, back).threshold is not None:
            verdict = replace(verdict, reason=f"{verdict.reason}; but there is a rare {other} mode: set "
                                              f"tail={other!r} to look there")
        return verdict
    found = verdict.beyond(verdict.threshold).mean()
    return replace(verdict, reason=f"two modes: {found:.2%} of the patches lie {WHERE[side]} θ = "
                                   f"{verdict.threshold:.4g} (separation {verdict.separation:.1f})")


def _fit_side(verdict: ThresholdFit, x: np.ndarray, back: Callable[[float], float]) -> ThresholdFit:
    """Return the verdict on one side; `back` turns a value of x into one of the statistic."""
    sign = 1 if verdict.side == "low" else -1  # the high side is the low one of the mirrored values
    counts, edges = np.histogram(sign * x, bins=HISTOGRAM_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    # The likeliest fit may split a skewed bulk. So the other fits are judged, too, likeliest first.
    verdicts = [_judge(verdict, centres, counts, x.size, lambda valley: float(back(sign * valley)), *fit)
                for fit in _fit_two_normals(centres, counts)]
    return next((each for each in verdicts if each.threshold is not None), verdicts[0])


def _judge(verdict: ThresholdFit, x: np.ndarray, counts: np.ndarray, size: int, back: Callable[[float], float],
           shares: np.ndarray, means: np.ndarray, sigmas: np.ndarray) -> ThresholdFit:
    """Return θ if the two fitted normals are two modes of the data, or the first test that they fail."""
    side, share = verdict.side, float(shares[0])
    separation = float(np.sqrt(2) * (means[1] - means[0]) / np.hypot(*sigmas))
    verdict = replace(verdict, share=share, separation=separation)
    if share < SHARE_RANGE[0]:  # tested first, because the separation of a mode without patches means nothing
        reason = f"no {side} mode: the {side}er fitted mode holds less than {SHARE_RANGE[0]:.2%} of the patches"
    elif separation < MIN_SEPARATION:
        rounded = np.floor(separation * 100) / 100  # down, so that it reads as less than the bound
        reason = f"one mode: the two fitted modes overlap (separation {rounded:.2f} < {MIN_SEPARATION:.0f})"
    elif share > SHARE_RANGE[1]:
        reason = f"no minority: the {side} mode holds {share:.0%} of the patches (at most {SHARE_RANGE[1]:.0%})"
    elif share * size < MIN_RARE_PATCHES:
        reason = f"the {side} mode holds about {share * size:.0f} patches, fewer than {MIN_RARE_PATCHES}"
    else:
        valley, height = _valley(x, counts, share, means, sigmas)
        if height <= MAX_VALLEY:
            return replace(verdict, threshold=back(valley))
        reason = (f"no valley: between the fitted modes the histogram stays at {height:.0%} of the {side} mode's peak "
                  f"(at most {MAX_VALLEY:.0%})")
    return replace(verdict, reason=reason)


def _fit_two_normals(x: np.ndarray, weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Fit two normals to a histogram by EM from several starts, the likeliest fit first.

    Each fit is (shares, means, standard deviations), with the low mode first.
    """
    occupied = weights > 0
    x, weights = x[occupied], weights[occupied] / weights.sum()
    min_sigma = (x[-1] - x[0]) / HISTOGRAM_BINS  # a histogram cannot resolve a mode narrower than a bin
    below = np.cumsum(weights)
    fits = []
    for start in TAIL_STARTS:
        low = below <= max(start, below[0])
        responsibility = np.stack([low, ~low]).astype(float)
        previous = -np.inf
        for _ in range(EM_STEPS):
            mass = responsibility * weights
            shares = np.maximum(mass.sum(axis=1), 1e-12)
            means = mass @ x / shares
            sigmas = np.maximum(np.sqrt((mass * (x - means[:, None]) ** 2).sum(axis=1) / shares), min_sigma)
            log_density = (np.log(shares / sigmas)[:, None] - 0.5 * ((x - means[:, None]) / sigmas[:, None]) ** 2)
            total = np.logaddexp(*log_density)
            responsibility = np.exp(log_density - total)
            likelihood = float(weights @ total)
            if likelihood - previous < 1e-9:
                break
            previous = likelihood
        order = np.argsort(means)
        fits.append((likelihood, (shares[order], means[order], sigmas[order])))
    return [fit for _, fit in sorted(fits, key=lambda fit: -fit[0])]


def _valley(x: np.ndarray, counts: np.ndarray, share: float, means: np.ndarray,
            sigmas: np.ndarray) -> tuple[float, float]:
    """Return the lowest point of the histogram between the two modes, and its height over the low mode's peak.

    The histogram is smoothed with a normal kernel, so that empty bins of a rare mode do not count as valleys. Its width
    follows Silverman's rule for the low mode.
    """
    in_low_mode = max(share * counts.sum(), 1)
    bandwidth = 1.06 * sigmas[0] * in_low_mode ** -0.2
    density = gaussian_filter1d(counts.astype(float), bandwidth / (x[1] - x[0]), mode="constant")
    peak = density[(x >= means[0] - 2 * sigmas[0]) & (x <= means[0] + sigmas[0])].max(initial=0)
    between = np.flatnonzero((x > means[0]) & (x < means[1]))
    if not peak or not between.size:
        return float("nan"), float("inf")
    heights = density[between]
    # A wide, empty valley is flat at the bottom: take its middle.
    bottom = between[heights <= heights.min() + 0.01 * peak]
    return float(x[bottom].mean()), float(heights.min() / peak)
