"""All that the explorer shows of a backbone and a data set: θ by statistic, the map of the features, and the data."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import Dataset

from itae_utils.analysis.clustering import FEWEST, number_of_clusters, scorable
from itae_utils.analysis.feature_map import FeatureMap, feature_map
from itae_utils.data.items import targets_of
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_setting, fit_thresholds
from itae_utils.figures.explorer.data import explorer_data
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import ThresholdFit
from itae_utils.models.backbones import Backbone


@dataclass(frozen=True)
class Exploration:
    """What `prepare` found: the setting with a number for θ, the fits by source, the map, and the view's data."""

    setting: ITAE
    fits: dict[str, ThresholdFit]
    found: FeatureMap
    data: dict[str, object]


def prepare(backbone: Backbone, dataset: Dataset, itae: ITAE | None = None, *, clusters: int | None = None,
            sample: int = 800, seed: int = 0, **reading: object) -> Exploration:
    """Fit θ, extract features, map them, and return the explorer's data, as notebook `00_explore` does.

    Fewer than 4 images have no map.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        itae: the setting; by default the keys, θ by "auto", and "min".
        clusters: k; by default the number of classes, or without labels 10, or half of the images.
        sample: number of images on the map, at most 2,000.
        seed: of all samples and of k-means.
        reading: batch_size, num_workers (0 by default) and store, as for `extract_features`.
    """
    reading.setdefault("num_workers", 0)
    itae = ITAE() if itae is None else itae
    fits = fit_thresholds(backbone, dataset, seed=seed, rank=itae.rank, **reading)
    setting = fit_setting(backbone, dataset, itae, thresholds=fits, **reading)
    last_fits = fits.of_block(setting)
    features = extract_features(backbone, dataset, {"baseline": None, "itae": setting}, **reading)
    n, targets = len(dataset), scorable(targets_of(dataset))
    k = None if n < FEWEST else number_of_clusters(clusters, targets, n)
    found = feature_map(features, k, sample=sample, seed=seed, kmeans_seed=seed, store=reading.get("store", "auto"))
    data = explorer_data(backbone, dataset, setting, last_fits, found, seed=seed, **reading)
    return Exploration(setting, last_fits, found, data)
