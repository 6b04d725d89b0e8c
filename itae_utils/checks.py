"""Which values a notebook's parameters may have, so that a wrong one is told before several notebooks fail on it.

Their names and types are checked when a plan is made; what only the images or the weights themselves can tell shows
when a notebook runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from itae_utils.attention import ATTENUATIONS, ITAE
from itae_utils.backbones import BACKBONES, PRECISIONS, PREPROCESSING, stock_model
from itae_utils.datasets import DATASETS, check_header, image_folder, read_folder
from itae_utils.errors import ItaeError, unknown_name
from itae_utils.estimate import image_count
from itae_utils.layers import SOURCES
from itae_utils.pos_embed import POS_EMBEDS
from itae_utils.vit import patches_along

CHOICES = {"preprocess": PREPROCESSING, "precision": ("auto", *PRECISIONS), "pos_embed": POS_EMBEDS,
           "on_error": ("raise", "skip")}
LISTS = {"sources": SOURCES, "attenuations": ATTENUATIONS}
LOWEST = {"limit": 1, "sample": 1, "examples": 1, "clusters": 2, "seeds": 1, "n_init": 1,
          "batch_size": 1, "seed": 0}
HIGHEST = {"examples": 24}  # more pictures in a row can't be seen
OPTIONAL = {"limit": (None,), "clusters": (None,), "batch_size": ("auto",)}  # what else they may be
NULL = "null"  # how the command line writes None
HEADERS = 1000  # of files that are looked at; notebooks look at all
LARGEST = 2**31 - 1  # more is no seed, and no number of anything
METHOD = ("source", "threshold", "attenuation", "alpha")  # parameters that are ITAE's own


def check_values(parameters: Mapping[str, object]) -> None:
    """Refuse the parameters of a notebook that it could not run with, defaults included; unknown names are let pass.

    Raises:
        ItaeError: names the parameter and what it may be.
    """
    for name, value in parameters.items():
        check_text(name, value)
    for name, allowed in CHOICES.items():
        _require(name not in parameters or parameters[name] in allowed, name, parameters, _one_of(allowed))
    for name, allowed in LISTS.items():
        values = parameters.get(name, allowed)
        _require(values and all(value in allowed for value in values), name, parameters, f"a list: {_one_of(allowed)}")
    for name, lowest in LOWEST.items():
        value, highest = parameters.get(name, lowest), HIGHEST.get(name, LARGEST)
        others = OPTIONAL.get(name, ())
        _require(value in others or _is_whole(value, lowest, highest), name, parameters,
                 f"a whole number from {lowest} to {highest:,}{''.join(f', or {other or NULL}' for other in others)}")
    for value in parameters.get("percents", ()):
        _require(_is_number(value) and 0 < value < 100, "percents", parameters, "numbers between 0 and 100")
    for value in parameters.get("backbones", ()):
        _require(isinstance(value, str), "backbones", parameters, "a list of names")
    _require(parameters.get("threshold", "auto") is not None, "threshold", parameters, "a number or auto")
    ITAE(**{name: parameters[name] for name in METHOD if name in parameters})


def check_text(name: str, value: object) -> None:
    """Refuse text that no notebook can hold: the name of a file may have bytes that are none of UTF-8."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise ItaeError(f"{name}={value!r} is not UTF-8: give such a file or folder another name") from error


def check_dataset(name: str, on_error: str = "raise") -> None:
    """Refuse an unknown data set, and a folder without images, with images on two levels, or with damaged ones.

    Damage is seen where a header tells, among the first thousand files, and doesn't matter with on_error="skip".
    """
    if folder := image_folder(name):
        if not os.path.isdir(folder):  # unlike pathlib's, it takes any text
            raise ItaeError(f"data set {name!r}: there is no such folder")
        paths, _, _ = read_folder(folder)
        for path in paths[:HEADERS] if on_error == "raise" else ():
            check_header(path)
    elif name not in DATASETS:
        raise unknown_name("data set", name, DATASETS, "`itae datasets`")


def check_backbone(name: str, checkpoint: str | None, image_size: int | None) -> None:
    """Refuse an unknown backbone, one the method can't handle, and weights or a size that don't go with it."""
    entry = BACKBONES.get(name)
    patch = entry.patch if entry else stock_model(name).patch_embed.patch_size[0]
    if checkpoint is not None and entry and entry.timm_name is None:
        raise ItaeError(f"{name} carries its weights: checkpoint={checkpoint!r} goes with a timm name")
    if checkpoint is not None and not os.path.exists(str(checkpoint)):
        raise ItaeError(f"checkpoint {checkpoint!r}: there is no such file or folder")
    if image_size is not None:
        about = {"image_size": image_size}
        _require(_is_whole(image_size, 1), "image_size", about, f"a whole number of pixels, of at most {LARGEST:,}")
        patches_along(image_size, patch)


def check_clusters(parameters: Mapping[str, object]) -> None:
    """Refuse more clusters than there are images in a data set that can be read."""
    clusters = parameters.get("clusters")
    if clusters and clusters > (images := image_count(parameters)):
        raise ItaeError(f"clusters={clusters} is more than there are images, {images:,}: use fewer, or more images")


def _require(holds: object, name: str, parameters: Mapping[str, object], what: str) -> None:
    if not holds:
        raise ItaeError(f"{name}={parameters[name]!r} is not possible: it must be {what}")


def _one_of(allowed: tuple[str, ...]) -> str:
    return f"{', '.join(allowed[:-1])} or {allowed[-1]}"


def _is_whole(value: object, lowest: int, highest: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
