"""The published results of ITAE, with where they come from and what our sources leave open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

SOURCE = (
    "Nakamura, Nozawa, Lin, Nakata, Ng: Improving Image Clustering with Artifacts Attenuation via Inference-Time "
    "Attention Engineering. ACCV 2024, arXiv 2410.04801. k-means on the test split; backbones as a public leaderboard "
    "lists them."
)

NOT_IN_SOURCES = "not in our sources"

# What our sources don't say of the paper's runs; every report says what was used instead.
UNKNOWN_SETTINGS = {
    "source": "the source P (query, key or value) of each row",
    "threshold": "the threshold θ of each row",
    "image_size": "image size",
    "preprocess": "resize and crop rule",
    "normalize": "whether features are normalised or reduced before k-means",
    "k-means": "k-means initialisation and restarts",
    "backbone": "the backbone of the Tiny-ImageNet row",
    "baseline": "the paper's own baseline numbers",
}


@dataclass(frozen=True)
class PublishedRow:
    """One published ITAE result; `dataset` is `load_dataset`'s name, `backbone` is None where none is listed."""

    dataset: str
    title: str
    acc: float
    nmi: float
    ari: float
    backbone: str | None


PUBLISHED = (
    PublishedRow("cifar10", "CIFAR-10", 0.8449, 0.8682, 0.7946, "DINOv2 ViT-B/14"),
    PublishedRow("cifar100", "CIFAR-100", 0.6502, 0.7710, 0.5053, "DINOv2 ViT-B/14"),
    PublishedRow("stl10", "STL-10", 0.8276, 0.8818, 0.7594, "DINOv2 ViT-B/14"),
    PublishedRow("tiny-imagenet", "Tiny-ImageNet", 0.6823, 0.8178, 0.5227, None),
)


def published_table() -> pd.DataFrame:
    """`PUBLISHED` as a table indexed by `load_dataset`'s names; cells that our sources leave open say so in words.

    Columns: title, backbone, acc, nmi, ari (of ITAE), baseline_acc, baseline_nmi, baseline_ari.
    """
    import pandas as pd

    table = pd.DataFrame(PUBLISHED).set_index("dataset")
    table["backbone"] = table["backbone"].fillna(NOT_IN_SOURCES)
    baseline = {f"baseline_{metric}": NOT_IN_SOURCES for metric in ("acc", "nmi", "ari")}
    return table[["title", "backbone", "acc", "nmi", "ari"]].assign(**baseline)
