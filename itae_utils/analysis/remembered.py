"""Results that take time and follow from the features alone: cluster labels and t-SNE, kept beside them in the store.

They are found by what the features are, not by where they came from: equal bytes, equal settings, equal result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize as unit_rows

from itae_utils.analysis.kmeans import cluster_seeds
from itae_utils.store.store import Store, open_store


def clusters(
    features: np.ndarray, k: int, *, seeds: Sequence[int], n_init: int = 10, normalize: bool = True,
    store: str | Path | Store | None = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """`cluster_seeds`, computed once for the same features (n, dim) and settings: labels (seeds, n), inertias (seeds,).

    Args:
        features: as for `cluster_seeds`.
        k: number of clusters.
        seeds: of k-means, a run each.
        n_init: k-means starts a run.
        normalize: whether rows are brought to length 1 first.
        store: as for `extract_features`.
    """
    settings = {"k": int(k), "seeds": [int(seed) for seed in seeds], "n_init": n_init, "normalize": bool(normalize)}

    def compute() -> dict[str, np.ndarray]:
        labels, inertias = cluster_seeds(features, **settings)
        return {"labels": labels, "inertias": inertias}

    found = _remembered("clusters", features, settings, compute, store)
    return found["labels"], found["inertias"]


def tsne(features: np.ndarray, *, perplexity: float, seed: int, normalize: bool = True,
         store: str | Path | Store | None = "auto") -> np.ndarray:
    """scikit-learn's t-SNE of features (n, dim) in two dimensions, (n, 2), computed once for the same ones.

    Args:
        features: of at least a few images.
        perplexity: about how many neighbours count; below n.
        seed: of its random start.
        normalize: whether rows are brought to length 1 first.
        store: as for `extract_features`.
    """
    def compute() -> dict[str, np.ndarray]:
        rows = unit_rows(features) if normalize else features
        return {"points": TSNE(perplexity=perplexity, random_state=seed).fit_transform(rows)}

    settings = {"perplexity": float(perplexity), "seed": int(seed), "normalize": bool(normalize)}
    return _remembered("tsne", features, settings, compute, store)["points"]


def _remembered(kind: str, features: np.ndarray, settings: Mapping[str, object],
                compute: Callable[[], Mapping[str, np.ndarray]], store: str | Path | Store | None,
                ) -> Mapping[str, np.ndarray]:
    place = open_store(store)
    if place is None:
        return compute()
    features = np.ascontiguousarray(features)
    about = {"features": hashlib.sha256(features).hexdigest(), "shape": list(features.shape),
             "dtype": str(features.dtype)}
    versions = {name: metadata.version(name) for name in ("scikit-learn", "numpy")}
    return place.remembered(kind, {**about, **settings, "versions": versions}, compute)
