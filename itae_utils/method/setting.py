"""`ITAE`, the settings of the method, and the values they may take. Nothing here imports torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, TypeVar

from itae_utils.errors import ItaeError, whole_number

PROJECTIONS = ("query", "key", "value")  # in the order of a fused qkv projection
NORMS = (*PROJECTIONS, "token")
SIDES = dict.fromkeys(PROJECTIONS, "low") | dict.fromkeys(("token", "direction", "attention"), "high")
SOURCES = tuple(SIDES)
TAILS = ("low", "high")
WHERE = {"low": "at or below", "high": "at or above"}  # θ
ATTENUATIONS = ("min", "mask", "mean", "scale", "spread", "clip", "substitute")
ROWS = ("cls", "all")
SELECTIONS = ("threshold", "random", "oracle")


@dataclass(frozen=True)
class ITAE:
    """One setting of Inference-Time Attention Engineering (paper, method section).

    Attributes:
        source: the statistic that identifies artifacts. "query", "key" and "value" are the L2 norms ‖P_i‖ of these
            projections (the paper's). "token" is the norm of the token that enters the block, "direction" the share of
            that token's length along the `rank` leading singular directions of the blocks before (SINDER,
            arXiv 2407.16826), and "attention" the patch's share of the `[CLS]` row, the mean over the heads.
        threshold: θ. A number, one number per edited block in block order (None leaves that block unedited), or a rule
            that is applied to a sample without labels: "auto" takes the valley between two modes, "share:2%" the
            extreme 2 % of the patches, and "sd:3" those beyond the mean by 3 standard deviations.
        tail: the side of θ on which the artifacts lie, "low" (P_i ≤ θ) or "high" (P_i ≥ θ). None is low for "query",
            "key" and "value" (the paper's choice), and high for the others. "direction" and "attention" are never low.
        rank: number of singular directions, for "direction".
        attenuation: the edit. "min" sets the artifacts' logits to the smallest logit of the row over the patches (the
            paper's choice), "mask" to −∞, "mean" to the mean logit of the row over the normal patches. "scale"
            multiplies their attention weights by `alpha`, "spread" shares their weights evenly among the normal
            patches, and "clip" cuts their logits at the row's largest logit of a normal patch. "substitute" keeps the
            weights, and replaces the artifacts' values by their mean over a sample.
        alpha: factor on the weights for "scale", in (0, 1). The row is renormalised afterwards.
        blocks: number of blocks that are edited, counted from the last. The paper edits one.
        rows: the query rows that are edited, "cls" (the paper's choice) or "all". With one block both give the same
            `[CLS]` output, and "all" is replaced by "cls".
        select: "threshold" is the method. Two controls replace its patches: "random" draws as many patches as the
            threshold finds, and "oracle" takes the true artifacts, if they are known, and ignores source and threshold.
        seed: seed of the random control.
        substitutes: for "substitute", the token (C,) after the block's first norm whose value replaces those of the
            artifacts, one per edited block; None where there is no artifact. `fit_setting` fills them in.

    Raises:
        ItaeError: a value is not one of these.
    """

    source: Literal["query", "key", "value", "token", "direction", "attention"] = "key"
    threshold: float | str | tuple[float | None, ...] = "auto"
    attenuation: Literal["min", "mask", "mean", "scale", "spread", "clip", "substitute"] = "min"
    alpha: float = 0.1
    blocks: int = 1
    rows: Literal["cls", "all"] = "cls"
    select: Literal["threshold", "random", "oracle"] = "threshold"
    seed: int = 0
    tail: Literal["low", "high"] | None = None
    rank: int = 1
    substitutes: tuple[tuple[float, ...] | None, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, allowed in [("source", SOURCES), ("attenuation", ATTENUATIONS), ("rows", ROWS),
                              ("select", SELECTIONS)]:
            if getattr(self, name) not in allowed:
                raise ItaeError(f"{name}={getattr(self, name)!r} is not known: use one of {', '.join(allowed)}")
        if self.tail is not None and self.tail not in TAILS:
            raise ItaeError(f"tail={self.tail!r} is not known: use low, high or None")
        if self.tail == "low" and self.source not in NORMS:
            raise ItaeError(f"tail='low' with source={self.source!r}: its artifacts are high, leave tail out")
        for name, least in [("blocks", 1), ("seed", 0), ("rank", 1)]:
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if not (is_number(self.alpha) and 0 < self.alpha < 1):
            raise ItaeError(f"alpha={self.alpha!r} must be a number between 0 and 1, both excluded (use 'mask' for 0)")
        object.__setattr__(self, "alpha", float(self.alpha))
        if isinstance(self.threshold, list):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        self._check_threshold()
        if self.select == "oracle":  # nothing is measured
            for name, usual in (("source", "key"), ("tail", None), ("rank", 1)):
                object.__setattr__(self, name, usual)
        if self.blocks == 1 and self.rows == "all":
            object.__setattr__(self, "rows", "cls")

    def _check_threshold(self) -> None:
        if isinstance(self.threshold, str):
            threshold_rule(self.threshold)
            return
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if isinstance(self.threshold, tuple) and len(values) != self.blocks:
            raise ItaeError(f"threshold={self.threshold!r} has {len(values)} numbers for blocks={self.blocks}: "
                            "give one number per block")
        for value in values:
            if value is not None and not (is_number(value) and value >= 0):
                raise ItaeError(f"threshold={value!r} must be a number of at least 0, or {RULE_WORDS}")

    @property
    def side(self) -> Literal["low", "high"]:
        """Return the side of θ on which the artifacts lie."""
        return self.tail or SIDES[self.source]

    @property
    def needs_threshold(self) -> bool:
        """Return whether θ is still a rule, which `fit_setting` turns into numbers."""
        return isinstance(self.threshold, str) and self.select != "oracle"

    @property
    def needs_substitutes(self) -> bool:
        """Return whether the edit needs vectors, which `fit_setting` measures."""
        return self.attenuation == "substitute" and self.substitutes is None

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """Return θ of each edited block, in block order; None where no patch is selected by it.

        Raises:
            ItaeError: the threshold is still a rule.
        """
        if self.select == "oracle":
            return (None,) * self.blocks
        if isinstance(self.threshold, str):
            raise ItaeError(f"threshold={self.threshold!r} is not a number yet: "
                            "use the setting that fit_setting(backbone, dataset, setting) returns")
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * self.blocks


Values = TypeVar("Values")  # a tensor or an array
RULE_WORDS = "'auto', 'share:2%' or 'sd:3'"


def threshold_rule(text: str) -> tuple[str, float]:
    """Return the kind of a rule for θ and its number: "auto" → ("auto", 0), "share:2%" → ("share", 0.02), "sd:3".

    Raises:
        ItaeError: another text, a share outside (0 %, 50 %), or a number of standard deviations that is not above 0.
    """
    if text == "auto":
        return "auto", 0.0
    if found := re.fullmatch(r"share:\s*([\d.e+-]+)\s*%", text):
        number = _number(found[1])
        if number is not None and 0 < number < 50:
            return "share", number / 100
        raise ItaeError(f"threshold={text!r}: use a share above 0 % and below 50 %, such as 'share:2%'")
    if found := re.fullmatch(r"sd:\s*([\d.e+-]+)", text):
        number = _number(found[1])
        if number is not None and number > 0:
            return "sd", number
        raise ItaeError(f"threshold={text!r}: use a number of standard deviations above 0, such as 'sd:3'")
    raise ItaeError(f"threshold={text!r} is not known: use a number of at least 0, or {RULE_WORDS}")


def beyond(values: Values, threshold: float | None, side: str) -> Values:
    """Return which values of a tensor or array lie on a side of θ, "low" (≤) or "high" (≥); none if θ is None."""
    if side == "low":
        return values <= (-math.inf if threshold is None else threshold)
    return values >= (math.inf if threshold is None else threshold)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
