"""θ without labels: find the valley between the two modes of the patch norms, or say why there is none.

The test is on the data's own histogram, not on a likelihood: BIC, AIC and likelihood ratios prefer two normals on any
skewed unimodal sample. The constants below were chosen on synthetic mixtures only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import gaussian_filter1d

from itae_utils.errors import ItaeError
from itae_utils.method.setting import SOURCES

MIN_PATCHES = 2000          # fewer are too few to tell a rare mode from a tail
LOW_TAIL_STARTS = (0.001, 0.003, 0.01, 0.05)  # EM starts with this share of the patches as the low mode
MIN_SEPARATION = 3.0        # Ashman's D = √2·Δμ/√(σ₁² + σ₂²)
MAX_VALLEY = 0.10           # height of the valley, as a share of the low mode's peak
SHARE_RANGE = (0.0005, 0.25)  # artifacts are a minority …
MIN_LOW_PATCHES = 10        # … but not a handful of stray patches
HISTOGRAM_BINS = 4096
EM_STEPS = 500


@dataclass(frozen=True)
class ThresholdFit:
    """What the norms of one (block, source) say.

    Attributes:
        threshold: θ, the valley between the modes, in the norm's own unit; None where there are no two modes.
        share: of the patches in the fitted low mode, whether it was accepted or not; NaN where nothing was fitted.
        separation: Ashman's D of the two fitted modes; NaN where nothing was fitted.
        reason: the verdict in words.
        norms: the norms it was fitted on, any shape.
    """

    threshold: float | None
    share: float
    separation: float
    reason: str
    norms: np.ndarray = field(repr=False, compare=False)

    @property
    def is_tested(self) -> bool:
        """Whether there were enough patches to look for two modes."""
        return self.norms.size >= MIN_PATCHES

    def is_given(self, threshold: float | None) -> bool:
        """Whether a θ in use was not found by this fit."""
        return threshold is not None and threshold != self.threshold

    def quantile(self, share: float) -> float:
        """The threshold under which this share of the patches lies."""
        return float(np.quantile(self.norms, share))


class Thresholds(dict):
    """Fits by (block, source); a negative block counts from the end. `.seconds` is what they took."""

    def __init__(self, fits: dict[tuple[int, str], ThresholdFit], num_blocks: int, seconds: float) -> None:
        super().__init__(fits)
        self.num_blocks, self.seconds = num_blocks, seconds

    def __missing__(self, key: tuple[int, str]) -> ThresholdFit:
        block, source = key
        if source in SOURCES and -self.num_blocks <= block < 0:
            return self[block + self.num_blocks, source]
        raise ItaeError(f"no fit for {key}: blocks are 0 to {self.num_blocks - 1} (or negative), "
                        f"sources {', '.join(SOURCES)}")


def fit_threshold(norms: np.ndarray) -> ThresholdFit:
    """Fit two normals to the log norms and take the valley between them as θ, if there is one.

    Accepted only if the modes are separated (D ≥ 3), the data's histogram has a valley between them no higher than 10 %
    of the low mode's peak, and the low mode holds 0.05 to 25 % of the patches and at least 10 of them.

    Args:
        norms: L2 norms of any number of patches, any shape; at least 2,000 are needed for a fit.

    Raises:
        ItaeError: NaN, infinite or negative norms.
    """
    flat = np.asarray(norms, dtype=np.float64).ravel()
    if not (np.isfinite(flat).all() and (flat >= 0).all()):
        raise ItaeError("norms must be finite and not negative: the model's activations hold NaN or infinity")
    verdict = ThresholdFit(None, float("nan"), float("nan"), "", np.asarray(norms))
    if flat.size < MIN_PATCHES:
        return replace(verdict, reason=f"{flat.size:,} patches are too few to fit: at least {MIN_PATCHES:,} are needed")
    logs = np.log(np.maximum(flat, np.finfo(np.float32).tiny))
    if np.ptp(logs) < 1e-6:
        return replace(verdict, reason="all norms are equal")
    counts, edges = np.histogram(logs, bins=HISTOGRAM_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    # Under a skewed bulk the likeliest fit may split the bulk: the others are asked too, likeliest first.
    verdicts = [_judge(verdict, centres, counts, flat.size, *fit) for fit in _fit_two_normals(centres, counts)]
    verdict = next((each for each in verdicts if each.threshold is not None), verdicts[0])
    if verdict.threshold is None:
        return verdict
    found = np.count_nonzero(flat <= verdict.threshold) / flat.size
    return replace(verdict, reason=f"two modes: {found:.2%} of the patches lie at or below θ = {verdict.threshold:.4g} "
                                   f"(separation {verdict.separation:.1f})")


def _judge(verdict: ThresholdFit, x: np.ndarray, counts: np.ndarray, size: int, shares: np.ndarray, means: np.ndarray,
           sigmas: np.ndarray) -> ThresholdFit:
    """Whether two fitted normals are two modes of the data: θ, or the first test they fail in words."""
    share, separation = float(shares[0]), float(np.sqrt(2) * (means[1] - means[0]) / np.hypot(*sigmas))
    verdict = replace(verdict, share=share, separation=separation)
    if share < SHARE_RANGE[0]:  # first: where the fit found no low mode at all, its separation tells nothing
        return replace(verdict, reason="no low mode: the lower of the two fitted ones holds less than "
                                       f"{SHARE_RANGE[0]:.2%} of the patches")
    if separation < MIN_SEPARATION:
        return replace(verdict, reason=f"one mode: the two fitted ones overlap (separation {separation:.1f} < "
                                       f"{MIN_SEPARATION:.0f})")
    if share > SHARE_RANGE[1]:
        return replace(verdict, reason=f"no minority: the low mode holds {share:.0%} of the patches (at most "
                                       f"{SHARE_RANGE[1]:.0%})")
    if share * size < MIN_LOW_PATCHES:
        return replace(verdict, reason=f"the low mode holds about {share * size:.0f} patches: at least "
                                       f"{MIN_LOW_PATCHES} are needed")
    valley, depth = _valley(x, counts, share, means, sigmas)
    if depth > MAX_VALLEY:
        return replace(verdict, reason=f"no valley: between the fitted modes the histogram stays at {depth:.0%} of the "
                                       f"low mode's peak (at most {MAX_VALLEY:.0%})")
    return replace(verdict, threshold=float(np.exp(valley)))


def _fit_two_normals(x: np.ndarray, weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Shares, means and standard deviations of two normals, low one first: EM on a histogram, likeliest fit first."""
    occupied = weights > 0
    x, weights = x[occupied], weights[occupied] / weights.sum()
    floor = (x[-1] - x[0]) / HISTOGRAM_BINS  # a mode can't be known to be narrower than a bin
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
            sigmas = np.maximum(np.sqrt((mass * (x - means[:, None]) ** 2).sum(axis=1) / shares), floor)
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


def _valley(x, counts, share, means, sigmas) -> tuple[float, float]:
    """Place of the lowest point of the histogram between the two modes, and its height over the low mode's peak.

    The histogram is smoothed by a normal kernel, as wide as Silverman's rule makes it for the low mode, so that a rare
    mode's empty bins are not taken for valleys.
    """
    in_low_mode = max(share * counts.sum(), 1)
    bandwidth = 1.06 * sigmas[0] * in_low_mode ** -0.2
    density = gaussian_filter1d(counts.astype(float), bandwidth / (x[1] - x[0]), mode="constant")
    peak = density[(x >= means[0] - 2 * sigmas[0]) & (x <= means[0] + sigmas[0])].max(initial=0)
    between = np.flatnonzero((x > means[0]) & (x < means[1]))
    if not peak or not between.size:
        return float("nan"), float("inf")
    heights = density[between]
    # The floor of a wide, empty valley is flat: take its middle.
    floor = between[heights <= heights.min() + 0.01 * peak]
    return float(x[floor].mean()), float(heights.min() / peak)
