"""Cluster labels, hits of probes and t-SNE of features, computed once and cached in the feature store.

The cache key is the features' bytes, the settings and the code here, not the features' origin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize as unit_rows

from itae_utils.analysis.kmeans import SMALL, cluster_seeds
from itae_utils.analysis.probes import probe_hits
from itae_utils.analysis.threads import side_by_side
from itae_utils.files import PACKAGE
from itae_utils.store.store import Store, code_digest, open_store

# Modules of this package that can change clusters, hits and maps.
DECIDING = ("centres", "kmeans", "lloyd", "plus_plus", "probes", "remembered", "rows", "threads")


def clusters(
    features: np.ndarray, k: int, *, seeds: Sequence[int], n_init: int = 10, normalize: bool = True,
    algorithm: str = "exact", store: str | Path | Store | None = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """Return `cluster_seeds` of features (n, dim), cached: labels (seeds, n) and inertias (seeds,).

    Args:
        features: as for `cluster_seeds`.
        k: number of clusters.
        seeds: of k-means, one run each.
        n_init: k-means starts per run.
        normalize: whether rows are scaled to length 1 first.
        algorithm: as for `cluster_seeds`.
        store: as for `extract_features`.
    """
    settings = {"k": int(k), "seeds": [int(seed) for seed in seeds], "n_init": n_init, "normalize": bool(normalize),
                "algorithm": algorithm}

    def compute() -> dict[str, np.ndarray]:
        labels, inertias = cluster_seeds(features, **settings)
        return {"labels": labels, "inertias": inertias}

    found = _remembered("clusters", features, settings, compute, store)
    return found["labels"], found["inertias"]


def clusters_of_all(
    features: Mapping[str, np.ndarray], k: int, *, seeds: Sequence[int], n_init: int = 10, **settings: object
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return `clusters` of several features (n, dim) by name, in less time than one by one if they are small."""
    def compute(name: str) -> tuple[np.ndarray, np.ndarray]:
        return clusters(features[name], k, seeds=seeds, n_init=n_init, **settings)

    n = len(next(iter(features.values()), ()))
    run = side_by_side if n * k * len(seeds) * n_init < SMALL else map
    return dict(zip(features, run(compute, features), strict=True))


def hits(features: np.ndarray, targets: np.ndarray, *, seed: int = 0, store: str | Path | Store | None = "auto"
         ) -> Mapping[str, np.ndarray]:
    """Return `probe_hits` of features (n, dim) and classes (n,), cached; `store` is as for `extract_features`."""
    settings = {"targets": np.unique(targets, return_inverse=True)[1].tolist(), "seed": int(seed)}
    return _remembered("hits", features, settings, lambda: probe_hits(features, targets, seed=seed), store)


def tsne(features: np.ndarray, *, perplexity: float, seed: int, normalize: bool = True,
         start: np.ndarray | None = None, store: str | Path | Store | None = "auto") -> np.ndarray:
    """Return scikit-learn's t-SNE of features (n, dim) in two dimensions, (n, 2), cached.

    Args:
        features: of at least a few images.
        perplexity: effective number of neighbours; below n.
        seed: of scikit-learn's random numbers.
        normalize: whether rows are scaled to length 1 first.
        start: a map (n, 2) of the same images, such as that of other features, where the points start. They are not
            drawn together at first ("early exaggeration"), so what lies elsewhere in the result has moved.
        store: as for `extract_features`.
    """
    def compute() -> dict[str, np.ndarray]:
        rows = unit_rows(features) if normalize else features
        chosen = {} if start is None else {"init": start, "early_exaggeration": 1.0}
        return {"points": TSNE(perplexity=perplexity, random_state=seed, **chosen).fit_transform(rows)}

    settings = {"perplexity": float(perplexity), "seed": int(seed), "normalize": bool(normalize)}
    if start is not None:
        settings["start"] = hashlib.sha256(np.ascontiguousarray(start)).hexdigest()
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
    versions = {name: metadata.version(name) for name in ("torch", "scikit-learn", "numpy")}
    return place.remembered(kind, {**about, **settings, "versions": versions, "code": deciding_code()}, compute)


@cache
def deciding_code() -> str:
    """Return the hash of the code that can change clusters and maps; computed once per process."""
    return code_digest([PACKAGE / f"analysis/{name}.py" for name in DECIDING])
