"""The clusters of two runs side by side: scores, and their differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from itae_utils.analysis.metrics import METRICS, describe_difference, paired_bootstrap, score_runs, unpaired_bootstrap
from itae_utils.data.fingerprint import image_hashes
from itae_utils.files import make_folder, replacing

COMPARED = ("baseline", "itae")


def save_clusters(output_dir: str | Path, dataset: Dataset, targets: np.ndarray, labels: Mapping[str, np.ndarray]
                  ) -> None:
    """Write `output_dir/clusters.npz`, from which two runs can be compared image by image.

    It holds targets (n,), the cluster labels (seeds, n) of "baseline" and "itae", the hashes of the images (n,), and
    the names of their files (n,) if they have any.
    """
    arrays = {"targets": targets, "images": np.array(image_hashes(dataset))} | {name: labels[name] for name in COMPARED}
    if getattr(dataset, "names", None) is not None:
        arrays["names"] = np.array(dataset.names)
    with replacing(make_folder(output_dir) / "clusters.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)


def compare_clusters(clusters: Mapping[str, tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]], *,
                     draws: int = 1000) -> tuple[list[dict[str, object]], list[str]]:
    """Compare the scores of two runs of the same notebooks.

    Args:
        clusters: what `save_clusters` wrote, before and after, by run.
        draws: resamples of the intervals.

    Returns:
        Rows of run, variant, score, before, after, difference, low, high, words; and a sentence for each run that says
        if its intervals are paired: they are if both have the same images.
    """
    rows, notes = [], []
    for run, (old, new) in clusters.items():
        same = np.array_equal(old["images"], new["images"]) and np.array_equal(old["targets"], new["targets"])
        notes.append(f"{run}: " + (
            "both have the same images, so the intervals are paired: each resample holds the same images of both."
            if same else "the images differ, so the intervals are unpaired: each side is resampled by itself."))
        for variant in COMPARED:
            sides = [(each["targets"], each[variant]) for each in (old, new)]
            table = (paired_bootstrap(sides[0][0], sides[0][1], sides[1][1], draws=draws) if same
                     else unpaired_bootstrap(*sides, draws=draws))
            before, after = (score_runs(*side).mean() for side in sides)
            rows += [{"run": run, "variant": variant, "score": metric.upper(), "before": before[metric],
                      "after": after[metric], **table.loc[metric], "words": describe_difference(table.loc[metric])}
                     for metric in METRICS]
    return rows, [*notes, "No interval includes the spread between the seeds of k-means."] if rows else []


def runs_that_fell(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the runs in which ACC with ITAE fell by more than its interval."""
    return [str(row["run"]) for row in rows if (row["variant"], row["score"]) == ("itae", "ACC") and row["high"] < 0]
