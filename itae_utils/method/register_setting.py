"""`TestTimeRegisters`, the settings of test-time registers. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from itae_utils.errors import ItaeError, whole_number
from itae_utils.method.setting import ITAE, is_number

PRESETS = {  # the paper's numbers, with depth and width of the model that they are for
    "dinov2_vitl14": {"threshold": 150.0, "top_layer": 17, "top_k": 45, "shape": (24, 1024)},
    "openclip_vitb16": {"threshold": 75.0, "top_layer": 5, "top_k": 10, "shape": (12, 768)},
}


@dataclass(frozen=True)
class TestTimeRegisters:
    """One setting of test-time registers (Jiang et al., arXiv 2506.08010, algorithms 1 and 2).

    Attributes:
        neurons: hidden units of the MLPs by block, such as {3: (5, 9)}, kept as (block, units) pairs. "auto" finds them
            on a sample. Without neurons, nothing is done.
        threshold: τ for "auto" neurons: patches with a larger norm after the second to last block are outliers. "auto"
            takes the valley between two modes of these norms.
        top_layer: last block that is searched; "auto" is the first block after which there are outliers.
        top_k: number of neurons; "auto" is the smallest that leaves fewer than 1 % of the outliers.
        form: "token" moves the neurons' activations to an extra token (the paper's choice). "bias" silences them, and
            gives every attention one more key and value (section 6 of the paper). "zero" only silences them (its
            control).
        insert: where the extra token enters, at the "start" (the paper's choice) or "late", at the first block with
            neurons. The results differ, since a late token takes no part in the attention of the blocks before.
        then: an edit of the last block on top, whose statistics are those of the new tokens.
        means: for "bias", the token (C,) after each block's first norm whose key and value are added, the register's
            mean over a sample. `find_register_neurons` fills them in.
        shape: depth and width of the model that the numbers are for; None fits all.
        reason: what the search found, in words.
    """

    __test__ = False  # pytest would collect a class of this name

    neurons: Mapping[int, tuple[int, ...]] | tuple[tuple[int, tuple[int, ...]], ...] | Literal["auto"] = "auto"
    threshold: float | Literal["auto"] = "auto"
    top_layer: int | Literal["auto"] = "auto"
    top_k: int | Literal["auto"] = "auto"
    form: Literal["token", "bias", "zero"] = "token"
    insert: Literal["start", "late"] = "start"
    then: ITAE | None = None
    means: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False)
    shape: tuple[int, int] | None = None
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name, allowed in (("form", ("token", "bias", "zero")), ("insert", ("start", "late"))):
            if getattr(self, name) not in allowed:
                raise ItaeError(f"{name}={getattr(self, name)!r} is not known: use one of {', '.join(allowed)}")
        if self.threshold != "auto" and not (is_number(self.threshold) and self.threshold > 0):
            raise ItaeError(f"threshold={self.threshold!r} must be a number above 0, or 'auto'")
        for name, least in (("top_layer", 0), ("top_k", 1)):
            if getattr(self, name) != "auto":
                whole_number(name, getattr(self, name), least)
        if not isinstance(self.then, ITAE | None) or (self.then and self.then.blocks > 1):
            raise ItaeError(f"then={self.then!r} must be an ITAE(…) with blocks=1, or None")
        if self.neurons != "auto":
            try:
                pairs = {whole_number("block", block, 0): sorted({whole_number("neuron", each, 0) for each in units})
                         for block, units in dict(self.neurons).items()}
            except (TypeError, ValueError) as error:
                raise ItaeError(f"neurons={self.neurons!r} must be 'auto', or units by block: {{3: (5, 9)}}") from error
            object.__setattr__(self, "neurons", tuple((key, tuple(pairs[key])) for key in sorted(pairs) if pairs[key]))
        if self.form != "token":
            object.__setattr__(self, "insert", "start")

    @classmethod
    def preset(cls, name: str, **options: object) -> TestTimeRegisters:
        """Return the paper's numbers for "dinov2_vitl14" or "openclip_vitb16", with other settings on top."""
        if name not in PRESETS:
            raise ItaeError(f"preset {name!r} is not known: use one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | options)

    @property
    def first_block(self) -> int:
        """Return the first block that differs from the unmodified model's."""
        return self.neurons[0][0] if self.form == "zero" or self.insert == "late" else 0


Variant = ITAE | TestTimeRegisters | None


def parted(variant: Variant) -> tuple[TestTimeRegisters | None, ITAE | None]:
    """Return the registers of a variant, None without neurons, and its edit of the last blocks."""
    if not isinstance(variant, TestTimeRegisters):
        return None, variant
    return replace(variant, then=None) if variant.neurons else None, variant.then
