"""The rules for parameters and options: one table, used by `itae report` and by a notebook that runs in JupyterLab."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from itae_utils.errors import ItaeError
from itae_utils.method.setting import ATTENUATIONS, NORMS, SOURCES, TAILS, threshold_rule
from itae_utils.models.registry import POS_EMBEDS, PRECISIONS, PREPROCESSING

LARGEST = 2**31 - 1  # upper limit of every seed and count
MOST_EXAMPLES = 24   # more pictures in a row are too small to see


@dataclass(frozen=True)
class Rule:
    """Which values are valid, as a test and in words."""

    allows: Callable[[object], bool]
    words: str


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_threshold(value: object) -> bool:
    if not isinstance(value, str):
        return _is_number(value) and value >= 0
    try:
        threshold_rule(value)
    except ItaeError:
        return False
    return True


def _is_list(value: object) -> bool:
    """Whether it is a list or tuple of different values."""
    return isinstance(value, (list, tuple)) and len({repr(each) for each in value}) == len(value)


def _whole(lowest: int, *others: object, highest: int = LARGEST) -> Rule:
    words = "".join(f", or {'null' if other is None else other}" for other in others)
    # True and False are instances of int, but not whole numbers.
    return Rule(lambda value: value in others or (type(value) is int and lowest <= value <= highest),
                f"a whole number from {lowest} to {highest:,}{words}")


def _one_of(choices: Sequence[str]) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in choices,
                f"{', '.join(choices[:-1])} or {choices[-1]}")


def _some_of(choices: Sequence[str]) -> Rule:
    return Rule(lambda value: _is_list(value) and len(value) > 0 and all(each in choices for each in value),
                f"a list of different values out of {', '.join(choices)}")


TEXT = Rule(lambda value: isinstance(value, str) and value.strip() != "", "text that is not empty")
TEXT_OR_NULL = Rule(lambda value: value is None or TEXT.allows(value), f"{TEXT.words}, or null")
TEXTS = Rule(lambda value: _is_list(value) and all(isinstance(each, str) for each in value), "a list of names")
FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
SEED_OR_NULL = _whole(0, None)
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
CLUSTER = re.compile(r"local:[1-9]\d*|(?!local:).+")

RULES: dict[str, Rule] = {
    "backbone": TEXT,
    "dataset": TEXT,
    "limit": _whole(1, None),
    "source": _one_of(SOURCES),
    "sources": _some_of(SOURCES),
    "threshold": Rule(_is_threshold, "a number of at least 0, auto, a share of the patches above 0 % and below 50 % "
                                     "such as share:2%, or standard deviations above 0 such as sd:3"),
    "tail": Rule(lambda value: value in (*TAILS, None), "low, high or null"),
    "rank": _whole(1),
    "attenuation": _one_of(ATTENUATIONS),
    "attenuations": _some_of(ATTENUATIONS),
    "alpha": Rule(lambda value: _is_number(value) and 0 < value < 1, "a number between 0 and 1, both excluded"),
    "percents": Rule(lambda value: _is_list(value) and all(_is_number(each) and 0 < each < 100 for each in value)
                     and len(set(value)) == len(value), "a list of different numbers between 0 and 100, both excluded"),
    "sample": _whole(1),
    "examples": _whole(1, highest=MOST_EXAMPLES),
    "clusters": _whole(2, None),
    "seeds": _whole(1),
    "seed": _whole(0),
    "n_init": _whole(1),
    "normalize": FLAG,
    "algorithm": _one_of(("exact", "scikit-learn", "mini-batch")),  # of `analysis.kmeans`
    "fit_split": TEXT_OR_NULL,
    "results_dir": TEXT,
    "backbones": TEXTS,
    "options": Rule(lambda value: isinstance(value, Mapping) and all(isinstance(each, str) for each in value),
                    "a mapping from names to values"),
    "output_dir": TEXT,
    "checkpoint": TEXT_OR_NULL,
    "image_size": _whole(1, None),
    "preprocess": _one_of(PREPROCESSING),
    "pos_embed": _one_of(POS_EMBEDS),
    "precision": _one_of(("auto", *PRECISIONS)),
    "device": Rule(lambda value: isinstance(value, str) and DEVICE.fullmatch(value) is not None,
                   "auto, cpu, cuda, cuda:1 or the like, or mps"),
    "on_error": _one_of(("raise", "skip")),
    "split": TEXT_OR_NULL,
    "image_column": TEXT_OR_NULL,
    "label_column": TEXT_OR_NULL,
    "batch_size": _whole(1, "auto"),
    "num_workers": _whole(0, "auto"),
    "store": TEXT_OR_NULL,
    "format": _one_of(("screen", "paper")),
    "dask": Rule(lambda value: value is None or (isinstance(value, str) and CLUSTER.fullmatch(value) is not None),
                 "a scheduler's address, local:2 or the like, auto, or null"),
    "subset_seed": SEED_OR_NULL,
    "threshold_seed": SEED_OR_NULL,
    "control_seed": SEED_OR_NULL,
    "kmeans_seed": SEED_OR_NULL,
}

# Options of every notebook that loads images, with their defaults. A seed that is None is the parameter `seed`.
OPTIONS: dict[str, object] = {
    "checkpoint": None,       # local weights instead of a download
    "image_size": None,       # pixels per side; None is the backbone's default
    "preprocess": "resize",   # "meta-eval": short side to 8/7 of the size, centre crop; "pad": whole image, padded
    "pos_embed": "auto",      # how the position embedding is resized: "meta", "transformers", "timm"; auto by the model
    "precision": "auto",      # "fp32" or "bf16"
    "device": "auto",         # "cpu", "cuda" or "cuda:1"
    "on_error": "raise",      # "skip" leaves out unreadable files of a folder
    "split": None,            # part of the data set; None is the test part, or all
    "image_column": None,     # of a Hugging Face data set; None is found by its type
    "label_column": None,
    "batch_size": "auto",     # images per batch
    "num_workers": "auto",    # processes that load images
    "tail": None,             # side of θ on which artifacts lie, "low" or "high"; None is the usual one of the source
    "rank": 1,                # number of singular directions, for the source "direction"
    "algorithm": "exact",     # of k-means, also "scikit-learn" or "mini-batch"
    "store": "auto",          # where features are stored: a folder, a URL, or "none"
    "dask": "auto",           # a scheduler's address, or "local:N" for N processes
    "format": "screen",       # of figures; "paper" has serif letters, column width and no titles
    "subset_seed": None,      # seed of the subset that `limit` selects
    "threshold_seed": None,   # seed of the sample that θ is fitted on
    "control_seed": None,     # seed of the random control
    "kmeans_seed": None,      # the first seed of k-means
}
MODEL_OPTIONS = ("image_size", "preprocess", "pos_embed", "precision", "device")  # of `load_backbone`
DATASET_OPTIONS = ("on_error", "split", "image_column", "label_column")  # of `load_dataset`
# These change where and how fast things are computed, not the results: they are not recorded.
UNRECORDED = ("store", "dask", "num_workers")


def check_values(parameters: Mapping[str, object], origin: str = "") -> None:
    """Validate parameters and the options in `parameters["options"]`; names without a rule take any value.

    Args:
        parameters: values by name.
        origin: where they come from, such as "profile paper"; put before the message.

    Raises:
        ItaeError: a value is not valid; the message names the parameter, the value and the valid values.
    """
    prefix, values = f"{origin}: " if origin else "", {**parameters, **_options(parameters)}
    for name, value in values.items():
        if name in RULES and not RULES[name].allows(value):
            raise ItaeError(f"{prefix}{name}={value!r} is not valid: use {RULES[name].words}")
        check_encoding(name, value)
    if values.get("tail") == "low" and (source := values.get("source", NORMS[0])) not in NORMS:
        raise ItaeError(f"{prefix}tail='low' is not valid with source={source!r}, whose artifacts are high: leave it "
                        "out")


def check_options(options: Mapping[str, object], known: Mapping[str, object], origin: str = "options") -> None:
    """Refuse options that do not exist.

    Raises:
        ItaeError: an option does not exist; the message suggests similar names.
    """
    for name in options:
        if name not in known:
            raise ItaeError(f"{origin}: there is no option {name!r}: did you mean {closest(name, known)}?")


def closest(name: object, known: Iterable[str], otherwise: Iterable[str] | None = None) -> str:
    """Return the known names that are similar to `name`, or else `otherwise`, by default all, as text."""
    known = list(known)
    return (" or ".join(difflib.get_close_matches(str(name), known, n=3))
            or ", ".join(sorted(known if otherwise is None else otherwise)))


def check_encoding(name: str, value: object) -> None:
    """Refuse text that can't be encoded as UTF-8, such as some file names: a notebook can't store it."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise ItaeError(f"{name}={value!r} can't be encoded as UTF-8: rename the file or folder") from error


def recorded(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters that decide results: all but the options in `UNRECORDED`."""
    options = {name: value for name, value in _options(parameters).items() if name not in UNRECORDED}
    return {**parameters, "options": options} if "options" in parameters else dict(parameters)


def _options(parameters: Mapping[str, object]) -> Mapping[str, object]:
    options = parameters.get("options")
    return options if isinstance(options, Mapping) else {}
