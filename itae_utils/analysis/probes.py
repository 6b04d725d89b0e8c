"""Probes of frozen features: which images their neighbours and a linear classifier get right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import mode
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from itae_utils.analysis.metrics import bootstrap
from itae_utils.analysis.rows import all_rows, as_matrix
from itae_utils.errors import ItaeError

NEIGHBOURS, FOLDS = 20, 5


def probe_hits(features: np.ndarray, targets: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return whether each image's class is predicted from the features (n, dim) and classes (n,) of others: (n,) bool.

    "knn" is a vote of the 20 nearest other images by cosine distance; the first of equal classes wins. "probe" is ridge
    regression in 5 stratified folds, or as many as the largest class has images, drawn with `seed`; features are
    standardised inside each. An image that is alone in its class is never right, and a single class is an `ItaeError`.
    """
    rows, (found, classes) = all_rows(as_matrix(features), normalize=False), np.unique(targets, return_inverse=True)
    if len(classes) != len(rows) or not 1 < len(found) < len(rows):
        raise ItaeError(f"{len(classes):,} targets of {len(found):,} classes can't be predicted from {len(rows):,} "
                        "rows of features: give a target per row, two classes or more, and several images of one")
    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(rows) - 1), metric="cosine").fit(rows)
    nearest = neighbours.kneighbors(return_distance=False)  # without an argument, each image itself is left out
    folds = StratifiedKFold(min(FOLDS, np.bincount(classes).max()), shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), RidgeClassifier())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # which some folds lack
        predicted = cross_val_predict(model, rows.astype(np.float64), classes, cv=folds)
    return {"knn": mode(classes[nearest], axis=1).mode == classes, "probe": predicted == classes}


def paired_gain(baseline: Mapping[str, np.ndarray], hits: Mapping[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Return the lead of `probe_hits` over the baseline's, in a row for each probe, as `paired_bootstrap` does."""
    gains = np.stack([hits[name] - baseline[name].astype(int) for name in hits])
    return bootstrap(lambda images: gains[:, images].mean(axis=1), gains.shape[1], hits, seed=seed)
