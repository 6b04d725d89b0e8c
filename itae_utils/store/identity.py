"""What decides features besides files and settings: the model as it is now, and code of the user's own.

Features are stored only if all that decides them is known by its value. A transform is known by its pickle; a lambda
has none. A data set's own `__getitem__` is known by the pictures that it returns for a few items.
"""

from __future__ import annotations

import hashlib
import pickle
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from itae_utils.data.datasets import ImageDataset
from itae_utils.data.fingerprint import fingerprint
from itae_utils.data.items import read_item
from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line
from itae_utils.models.backbones import Backbone
from itae_utils.models.preprocessing import Preprocessing

SAMPLED = 16  # items of a data set of the user's own that are compared
ASIDE = ("images", "targets", "target_transform")  # attributes that are known otherwise, or don't change features


class Unidentified(ItaeError):
    """Features can't be stored, because something that decides them is not known by its value."""


def model_identity(backbone: Backbone) -> dict[str, object]:
    """Return the structure and the weights of a backbone's model as they are now, and hooks and replaced methods.

    Raises:
        Unidentified: the model is in training mode, or a hook or a replaced method can't be pickled.
    """
    model, own = backbone.model, []
    in_key = [name for name, is_in in [("forward", backbone.compiled), ("_pos_embed", backbone.pos_embed != "timm")]
              if is_in]  # methods that load_backbone replaces
    for module in model.modules():
        if module.training:
            raise _unidentified("the model is in training mode", "call model.eval()")
        own += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        own += [value for name, value in vars(module).items()
                if callable(value) and hasattr(type(module), name) and name not in in_key]
    structure = f"{type(model).__module__} {' '.join(repr(model).split())}"
    return {"structure": hashlib.sha256(structure.encode()).hexdigest(), "weights": _weights_now(model),
            "hooks": [_by_value("a hook or a replaced method of the model", each) for each in own]}


def _weights_now(model: nn.Module) -> str:
    """Return a hash of all weights and buffers as they are now: of the sums of their bits over rows and columns.

    The weights are read for each extraction, because an edit of `.data` leaves no trace in torch's version counters. A
    SHA-256 over all of them takes three times as long.
    """
    sums = []
    for tensor in [*model.parameters(), *model.buffers()]:
        rows = tensor.detach().reshape(len(tensor) if tensor.ndim > 1 else 1, -1).contiguous()
        whole_words = rows.shape[1] * rows.element_size() % 8 == 0
        bits = rows.view(torch.int64) if whole_words else rows.view(torch.uint8).long()
        sums += [bits.sum(0), bits.sum(1)]
    return hashlib.sha256(torch.cat(sums).cpu().numpy()).hexdigest()


def images_identity(backbone: Backbone, dataset: Dataset) -> dict[str, object]:
    """Return what identifies the preprocessed images of a data set.

    Raises:
        Unidentified: the data set has no `.images`, or they are not one per item, neither paths nor arrays, or can't be
            read; a transform can't be pickled; or items change from one reading to the next.
    """
    name = getattr(dataset, "name", type(dataset).__name__)
    try:
        images = fingerprint(dataset)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _unidentified(f"the .images of data set {name!r} identify nothing ({in_one_line(error)})",
                            "give one path or array per item") from error
    if images is None:
        raise _unidentified(f"data set {name!r} has no .images, which would identify it", "give it paths or arrays")
    if len(dataset.images) != len(dataset):
        raise _unidentified(f"a data set of {len(dataset):,} items has {len(dataset.images):,} .images",
                            "give it as many")
    known = {"images": images, "preprocessing": " ".join(repr(backbone.transform).split())}
    if type(dataset) is ImageDataset and type(backbone.transform) is Preprocessing:
        return known
    if type(backbone.transform) is not Preprocessing:
        known["preprocessing"] = _by_value("the backbone's transform", backbone.transform)
    if type(dataset) is not ImageDataset:
        known["class"] = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        known["attributes"] = {field: _by_value(f"{field} of data set {name!r}", value)
                               for field, value in getattr(dataset, "__dict__", {}).items()
                               if field not in ASIDE and _is_code(value)}
    known["sample"], again = _sample(backbone, dataset), _sample(backbone, dataset)
    if known["sample"] != again:
        raise _unidentified(f"items of data set {name!r} or the transform change from one reading to the next",
                            "take the random part out")
    return known


def _sample(backbone: Backbone, dataset: Dataset) -> str:
    """Return a hash of a few items, spread over the data set, as the model gets them."""
    digest = hashlib.sha256()
    for index in np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLED)).astype(int).tolist():
        picture, _ = read_item(dataset, index)
        digest.update(repr(picture.size).encode() + picture.tobytes())
        if type(backbone.transform) is not Preprocessing:
            digest.update(_by_value("what the backbone's transform returns", backbone.transform(picture)).encode())
    return digest.hexdigest()


def _is_code(value: object) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return callable(value) or any(map(callable, parts))


def _by_value(name: str, thing: object) -> str:
    """Return a hash of a function or an object with its fields: of its pickle."""
    digest = hashlib.sha256()
    try:
        _Pickler(SimpleNamespace(write=digest.update)).dump(thing)
    except Exception as error:  # pickle raises errors of many types
        raise _unidentified(f"{name} can't be told from another by its value ({in_one_line(error)})",
                            "use an object or a function of a module") from error
    return digest.hexdigest()


class _Pickler(pickle.Pickler):
    """Pickles tensors by their values; torch would write their addresses."""

    def reducer_override(self, thing: object) -> object:
        return (torch.as_tensor, (thing.numpy(force=True),)) if isinstance(thing, torch.Tensor) else NotImplemented


def _unidentified(what: str, remedy: str) -> Unidentified:
    return Unidentified(f"features can't be stored because {what}: {remedy}, or use store=None")
