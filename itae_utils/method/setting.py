"""The settings of the method, and the words they may take; nothing here needs torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from itae_utils.errors import ItaeError

SOURCES = ("query", "key", "value")  # in the order in which a fused projection holds them

ATTENUATIONS = ("min", "mask", "mean", "scale")
ROWS = ("cls", "all")
SELECTIONS = ("threshold", "random", "oracle")


@dataclass(frozen=True)
class ITAE:
    """One setting of Inference-Time Attention Engineering (paper, method section).

    Attributes:
        source: whose norm tells artifacts, "query", "key" or "value": they are the patches with ‖P_i‖₂ ≤ threshold.
        threshold: θ. A number, one a block in block order (with `blocks` > 1), or "auto" (fitted without labels).
        attenuation: what an artifact's logit becomes. "min": the smallest logit of the row over the patches (the
            paper's); "mask": −∞; "mean": the mean over the row's normal patches; "scale": its weight times `alpha`.
        alpha: factor of "scale" on the weight after the softmax, before the row is renormalised; in (0, 1).
        blocks: the method is applied in the last this many blocks. The paper's is 1.
        rows: the query rows that are edited: "cls" (the paper's) or "all". In the last block alone the two give the
            same `[CLS]` output, so "all" with one block is resolved to "cls".
        select: "threshold" (the method), or a control: "random" (as many patches as the threshold finds, drawn at
            random) or "oracle" (the true artifacts, where they are known; the threshold is not used).
        seed: seed of select="random".

    Raises:
        ItaeError: any value that isn't one of these.
    """

    source: Literal["query", "key", "value"] = "key"
    threshold: float | Literal["auto"] | tuple[float | None, ...] = "auto"
    attenuation: Literal["min", "mask", "mean", "scale"] = "min"
    alpha: float = 0.1
    blocks: int = 1
    rows: Literal["cls", "all"] = "cls"
    select: Literal["threshold", "random", "oracle"] = "threshold"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in [("source", SOURCES), ("attenuation", ATTENUATIONS), ("rows", ROWS),
                              ("select", SELECTIONS)]:
            if getattr(self, name) not in allowed:
                raise ItaeError(f"{name}={getattr(self, name)!r} is not known: use one of {', '.join(allowed)}")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise ItaeError(f"blocks={self.blocks!r} must be a whole number of at least 1 (the last so many blocks)")
        if not 0 < self.alpha < 1:
            raise ItaeError(f"alpha={self.alpha!r} must lie between 0 and 1, both excluded (use 'mask' for 0)")
        if isinstance(self.threshold, list):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        self._check_threshold()
        if self.blocks == 1 and self.rows == "all":
            object.__setattr__(self, "rows", "cls")

    def _check_threshold(self) -> None:
        if self.threshold == "auto":
            return
        if isinstance(self.threshold, tuple) and len(self.threshold) != self.blocks:
            raise ItaeError(f"threshold has {len(self.threshold)} numbers for blocks={self.blocks}: give one a block")
        for value in self.thresholds:
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (number and value >= 0):
                raise ItaeError(f"threshold={value!r} must be a number of at least 0, as norms are, or 'auto'")

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """θ of each of the last `blocks` blocks; None where nothing is attenuated."""
        if self.threshold == "auto":
            raise ItaeError("threshold='auto' is not a number yet: "
                            "fit_thresholds(backbone, dataset)[block, source].threshold gives one")
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * self.blocks
