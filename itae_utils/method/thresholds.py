"""θ without labels: find the valley between two modes of the patch norms, or give the reason why there is none.

The test uses the histogram of the data, not a likelihood: BIC, AIC and likelihood ratios prefer two normals on any
skewed unimodal sample. The constants below were chosen on synthetic mixtures only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import gaussian_filter1d

from itae_utils.errors import ItaeError
from itae_utils.method.setting import SOURCES

MIN_PATCHES = 2000          # with fewer, a rare mode cannot be distinguished from a tail
LOW_TAIL_STARTS = (0.001, 0.003, 0.01, 0.05)  # shares of the patches that EM starts with as the low mode
MIN_SEPARATION = 3.0        # Ashman's D = √2·Δμ/√(σ₁² + σ₂²)
MAX_VALLEY = 0.10           # height of the valley as a share of the low mode's peak
SHARE_RANGE = (0.0005, 0.25)  # share of the low mode: artifacts are a minority …
MIN_LOW_PATCHES = 10        # … but more than a handful of stray patches
HISTOGRAM_BINS = 4096
EM_STEPS = 500


@dataclass(frozen=True)
class ThresholdFit:
    """Result of fitting θ to the norms of one (block, source).

    Attributes:
        threshold: θ, the valley between the modes, in the unit of the norms; None if there are no two modes.
        share: share of the patches in the fitted low mode, accepted or not; NaN if nothing was fitted.
        separation: Ashman's D of the two fitted modes; NaN if nothing was fitted.
        reason: the verdict in words.
        norms: the norms, any shape.
    """

    threshold: float | None
    share: float
    separation: float
    reason: str
    norms: np.ndarray = field(repr=False, compare=False)

    @property
    def is_tested(self) -> bool:
        """Return whether there were enough patches to look for two modes."""
        return self.norms.size >= MIN_PATCHES

    def is_given(self, threshold: float | None) -> bool:
        """Return whether `threshold` is a number that comes from elsewhere, not from this fit."""
        return threshold is not None and threshold != self.threshold

    def quantile(self, share: float) -> float:
        """Return the threshold at or below which this share of the patches lies."""
        return float(np.quantile(self.norms, share))


class Thresholds(Mapping[tuple[int, str], ThresholdFit]):
    """Fits by (block, source), each computed when it is first read.

    `fits[-1, "key"]` is the fit of the last block's keys. A negative block counts from the end in `[…]`, `in` and
    `get`; iteration yields blocks counted from the front.

    Attributes:
        seconds: time spent on measuring the norms and on the fits made so far.
        num_blocks: number of blocks of the model.
    """

    def __init__(self, norms: Mapping[tuple[int, str], np.ndarray], seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._norms, self._fits = norms, {}
        self.num_blocks = 1 + max(block for block, _ in norms)
        self._keys = {(named, source): (block, source) for block, source in norms
                      for named in (block, block - self.num_blocks)}

    def __getitem__(self, key: tuple[int, str]) -> ThresholdFit:
        if key not in self._keys:
            raise ItaeError(f"there is no fit for {key}: blocks are 0 to {self.num_blocks - 1} (or negative), sources "
                            f"are {', '.join(SOURCES)}")
        key = self._keys[key]
        if key not in self._fits:
            start = time.perf_counter()
            self._fits[key] = fit_threshold(self._norms[key])
            self.seconds += time.perf_counter() - start
        return self._fits[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def get(self, key: tuple[int, str], default: ThresholdFit | None = None) -> ThresholdFit | None:
        """Return the fit of a key, or `default` if there is no such block or source."""
        return self[key] if key in self._keys else default

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._norms)

    def __len__(self) -> int:
        return len(self._norms)


def fit_threshold(norms: np.ndarray) -> ThresholdFit:
    """Fit two normals to the log norms and return the valley between them as θ, or the reason why there is none.

    θ is accepted only if the modes are separated (D ≥ 3), if the histogram has a valley between them that is no higher
    than 10 % of the low mode's peak, and if the low mode holds 0.05 to 25 % of the patches and at least 10 of them.

    Args:
        norms: L2 norms of patches, any shape. At least 2,000 are needed for a fit.

    Raises:
        ItaeError: norms that are NaN, infinite, negative or not numbers.
    """
    try:
        flat = np.asarray(norms, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise ItaeError(f"norms are a {type(norms).__name__}: pass an array of numbers, such as qkv_norms(model, "
                        "images)['key']") from error
    if not (np.isfinite(flat).all() and (flat >= 0).all()):
        wrong = flat[~(np.isfinite(flat) & (flat >= 0))][0]
        raise ItaeError(f"norms hold {wrong}, but must be finite and at least 0: check the model's weights and "
                        "precision")
    verdict = ThresholdFit(None, np.nan, np.nan, "", np.asarray(norms))
    if flat.size < MIN_PATCHES:
        return replace(verdict, reason=f"{flat.size:,} patches are too few to fit: at least {MIN_PATCHES:,} are needed")
    logs = np.log(np.maximum(flat, np.finfo(np.float32).tiny))
    if np.ptp(logs) < 1e-6:
        return replace(verdict, reason="all norms are equal")
    counts, edges = np.histogram(logs, bins=HISTOGRAM_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    # The likeliest fit may split a skewed bulk. So the other fits are judged, too, likeliest first.
    verdicts = [_judge(verdict, centres, counts, flat.size, *fit) for fit in _fit_two_normals(centres, counts)]
    verdict = next((each for each in verdicts if each.threshold is not None), verdicts[0])
    if verdict.threshold is None:
        return verdict
    found = np.count_nonzero(flat <= verdict.threshold) / flat.size
    return replace(verdict, reason=f"two modes: {found:.2%} of the patches lie at or below θ = {verdict.threshold:.4g} "
                                   f"(separation {verdict.separation:.1f})")


def _judge(verdict: ThresholdFit, x: np.ndarray, counts: np.ndarray, size: int, shares: np.ndarray, means: np.ndarray,
           sigmas: np.ndarray) -> ThresholdFit:
    """Return θ if the two fitted normals are two modes of the data, or the first test that they fail."""
    share, separation = float(shares[0]), float(np.sqrt(2) * (means[1] - means[0]) / np.hypot(*sigmas))
    verdict = replace(verdict, share=share, separation=separation)
    if share < SHARE_RANGE[0]:  # tested first, because the separation of a mode without patches means nothing
        reason = f"no low mode: the lower fitted mode holds less than {SHARE_RANGE[0]:.2%} of the patches"
    elif separation < MIN_SEPARATION:
        reason = f"one mode: the two fitted modes overlap (separation {separation:.1f} < {MIN_SEPARATION:.0f})"
    elif share > SHARE_RANGE[1]:
        reason = f"no minority: the low mode holds {share:.0%} of the patches (at most {SHARE_RANGE[1]:.0%})"
    elif share * size < MIN_LOW_PATCHES:
        reason = f"the low mode holds about {share * size:.0f} patches, fewer than {MIN_LOW_PATCHES}"
    else:
        valley, height = _valley(x, counts, share, means, sigmas)
        if height <= MAX_VALLEY:
            return replace(verdict, threshold=float(np.exp(valley)))
        reason = (f"no valley: between the fitted modes the histogram stays at {height:.0%} of the low mode's peak "
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
    for start in LOW_TAIL_STARTS:
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
