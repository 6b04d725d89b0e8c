"""What decides features to the bit: the keys under which they are kept."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING

from itae_utils.errors import ItaeError
from itae_utils.fingerprint import fingerprint

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from itae_utils.artifacts import FiringRule
    from itae_utils.attention import ITAE
    from itae_utils.backbones import Backbone

METHOD = 2  # raise it when a change of the code changes what is computed
DECIDING = ("torch", "torchvision", "timm", "pillow")  # packages whose releases may change the last bits


def entry_key(backbone: Backbone, dataset: Dataset, batch_size: int) -> dict[str, object] | None:
    """Everything beside the variant that decides features; None where the data set says nothing of its images.

    The number of threads, and which of two cards of one kind, are not in it: they can change the last bits.

    Raises:
        ItaeError: `.images` that can't be those of the data set.
    """
    images = fingerprint(dataset, in_order=True)
    if images and len(dataset) != len(dataset.images):
        raise ItaeError(f"a data set of {len(dataset):,} items has {len(dataset.images):,} .images: give it as many")
    return images and {
        "method": METHOD,
        "versions": {name: metadata.version(name) for name in DECIDING},
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "heads": backbone.model.blocks[0].attn.num_heads,  # which no weight's shape tells
        "preprocessing": " ".join(repr(backbone.transform).split()),
        "resize": backbone.resize,
        "pos_embed": backbone.pos_embed,
        "images": images,
        "device": backbone.device.type,
        "precision": backbone.precision,
        "compiled": backbone.compiled,
        "batch_size": batch_size,
    }


def setting_key(itae: ITAE | None, truth: FiringRule | None = None) -> dict[str, object]:
    """A variant with numeric thresholds, without what doesn't act in it; the model as it is has an empty key."""
    if itae is None:
        return {}
    key = asdict(itae)
    if itae.attenuation != "scale":
        del key["alpha"]
    if itae.select != "random":
        del key["seed"]
    if itae.select == "oracle":
        del key["source"], key["threshold"]
        return key | {"truth": asdict(truth)}
    return key | {"threshold": [None if value is None else float(value) for value in itae.thresholds]}
