"""`ITAE`, the settings of the method, and the values they may take. Nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from itae_utils.errors import ItaeError, whole_number

SOURCES = ("query", "key", "value")  # in the order of a fused qkv projection
ATTENUATIONS = ("min", "mask", "mean", "scale")
ROWS = ("cls", "all")
SELECTIONS = ("threshold", "random", "oracle")


@dataclass(frozen=True)
class ITAE:
    """One setting of Inference-Time Attention Engineering (paper, method section).

    Attributes:
        source: the projection P whose norms identify artifacts: the patches with ‖P_i‖₂ ≤ θ.
        threshold: θ. A number, one number per edited block in block order (None leaves that block unedited), or "auto",
            which is fitted without labels.
        attenuation: the new logit of an artifact. "min" is the smallest logit of the row over the patches (the paper's
            choice), "mask" is −∞, "mean" is the mean logit of the row over the normal patches, and "scale" multiplies
            the attention weight by `alpha`.
        alpha: factor on the weights for "scale", in (0, 1). The row is renormalised afterwards.
        blocks: number of blocks that are edited, counted from the last. The paper edits one.
        rows: the query rows that are edited, "cls" (the paper's choice) or "all". With one block both give the same
            `[CLS]` output, and "all" is replaced by "cls".
        select: "threshold" is the method. Two controls replace its patches: "random" draws as many patches as the
            threshold finds, and "oracle" takes the true artifacts, if they are known, and ignores the threshold.
        seed: seed of the random control.

    Raises:
        ItaeError: a value is not one of these.
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
        for name, least in [("blocks", 1), ("seed", 0)]:
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if not (_is_number(self.alpha) and 0 < self.alpha < 1):
            raise ItaeError(f"alpha={self.alpha!r} must be a number between 0 and 1, both excluded (use 'mask' for 0)")
        object.__setattr__(self, "alpha", float(self.alpha))
        if isinstance(self.threshold, list):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        self._check_threshold()
        if self.blocks == 1 and self.rows == "all":
            object.__setattr__(self, "rows", "cls")

    def _check_threshold(self) -> None:
        if isinstance(self.threshold, str) and self.threshold == "auto":
            return
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if isinstance(self.threshold, tuple) and len(values) != self.blocks:
            raise ItaeError(f"threshold={self.threshold!r} has {len(values)} numbers for blocks={self.blocks}: "
                            "give one number per block")
        for value in values:
            if value is not None and not (_is_number(value) and value >= 0):
                raise ItaeError(f"threshold={value!r} must be a number of at least 0, or 'auto'")

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """Return θ of each edited block, in block order; None where no patch is selected by its norm.

        Raises:
            ItaeError: the threshold is still "auto".
        """
        if self.select == "oracle":
            return (None,) * self.blocks
        if self.threshold == "auto":
            raise ItaeError("threshold='auto' is not a number yet: "
                            "fit_thresholds(backbone, dataset)[block, source].threshold gives one")
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * self.blocks


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
