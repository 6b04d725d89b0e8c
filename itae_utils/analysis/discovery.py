"""Tables, sentences and headline facts of notebook 01, which looks for artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from itae_utils.analysis.words import condition, percent, statistic_name, symbol
from itae_utils.extraction.observation import Observation
from itae_utils.files import make_folder, replacing
from itae_utils.method.artifacts import precision_recall
from itae_utils.method.setting import beyond
from itae_utils.method.thresholds import ThresholdFit

USUAL_SHARE = 10  # times the mean weight of a patch: one with more has taken the attention over


def threshold_table(fits: Mapping[str, ThresholdFit]) -> pd.DataFrame:
    """Return one row per source: its side, θ, the share of patches beyond it, the modes' separation and the verdict."""
    return pd.DataFrame(
        [{
            "statistic": symbol(source),
            "artifacts are": fit.side,
            "θ": "none" if fit.threshold is None else f"{fit.threshold:.4g}",
            "patches": "–" if fit.threshold is None else percent(fit.beyond(fit.threshold).mean()),
            "separation": "–" if np.isnan(fit.separation) else f"{fit.separation:.1f}",
            "verdict": fit.reason,
        } for source, fit in fits.items()], index=pd.Index(fits, name="source"),
    )


def found_patches(
    seen: Observation, fits: Mapping[str, ThresholdFit], thresholds: Mapping[str, float | None]
) -> dict[str, np.ndarray]:
    """Return the patches (n, N) that each source calls artifacts with its θ; none without θ."""
    return {source: beyond(seen.statistics[source], theta, fits[source].side)
            for source, theta in thresholds.items() if source in seen.statistics}


def detection_table(found: Mapping[str, np.ndarray], thresholds: Mapping[str, float | None], truth: np.ndarray
                    ) -> pd.DataFrame:
    """Return precision and recall of each source against the planted truth; without θ the precision is NaN.

    `found` is from `found_patches`.
    """
    rows = []
    for source, mask in found.items():
        precision, recall = precision_recall(mask, truth)
        rows.append({"source": source, "θ": np.nan if thresholds[source] is None else thresholds[source],
                     "found": int(mask.sum()), "true": int(truth.sum()), "precision": precision, "recall": recall})
    return pd.DataFrame(rows).set_index("source")


def jaccard_table(found: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return how far each two sources agree: the patches that both call artifacts, as a share of those that any does.

    NaN where neither finds any.
    """
    def jaccard(one: np.ndarray, other: np.ndarray) -> float:
        either = np.count_nonzero(one | other)
        return np.count_nonzero(one & other) / either if either else np.nan

    return pd.DataFrame({column: {row: jaccard(found[row], found[column]) for row in found} for column in found})


def takeover(seen: Observation, found: Mapping[str, np.ndarray], source: str) -> dict[str, float]:
    """Return how often a normal patch takes the attention over after the edit.

    A patch has taken it over if it holds more than 10 times the mean share of the attention that goes to patches.

    Returns:
        "images": the share of the images with artifacts in which a normal patch has, after the edit.
        "usual": the same share among the images without artifacts; NaN if there are none.
        "suspects": the share of these patches that another source calls artifacts; NaN if there are none.
    """
    usual = seen.attention_after.mean(axis=1, keepdims=True)
    over = (seen.attention_after > USUAL_SHARE * usual) & ~seen.artifacts
    have = seen.artifacts.any(axis=1)
    others = np.logical_or.reduce([mask for name, mask in found.items() if name != source] or [np.zeros_like(over)])
    after = over[have]

    def share(mask: np.ndarray) -> float:
        return float(mask.mean()) if mask.size else np.nan

    return {"images": share(after.any(axis=1)), "usual": share(over[~have].any(axis=1)),
            "suspects": share(others[have][after])}


def describe_takeover(shares: Mapping[str, float]) -> str:
    """Return Markdown for the result of `takeover`."""
    usual = ("no image is without artifacts to compare with" if np.isnan(shares["usual"])
             else f"in images without artifacts it is {percent(shares['usual'])}")
    suspects = ("" if np.isnan(shares["suspects"]) else
                f" Another statistic calls {percent(shares['suspects'])} of these patches artifacts.")
    return (f"After the edit, one normal patch holds more than {USUAL_SHARE} times its mean share of the attention in "
            f"{percent(shares['images'])} of the images with artifacts; {usual}.{suspects}")


def save_maps(
    output_dir: str | Path, seen: Observation, chosen: Sequence[int], source: str, names: Sequence[str] | None
) -> str:
    """Write the maps of some images to `output_dir/attention.npz`, and return Markdown that links to it.

    Args:
        output_dir: created if it does not exist.
        seen: from `observe`.
        chosen: places in `seen` of the k images.
        source: the statistic that is written.
        names: the files of the data set's images; None for images without files.

    The arrays are before, after, statistic and artifacts, each (k, rows, columns) of the patch grid; index (k,), the
    numbers of the images in the data set; and names (k,), their files, if they have any.
    """
    maps = {"before": seen.attention, "after": seen.attention_after, "statistic": seen.statistics[source],
            "artifacts": seen.artifacts}
    arrays = {name: values[chosen].reshape(-1, *seen.patch_grid) for name, values in maps.items()}
    arrays["index"] = seen.indices[chosen]
    if names is not None:
        arrays["names"] = np.array([names[index] for index in arrays["index"]])
    with replacing(make_folder(output_dir) / "attention.npz") as part, part.open("wb") as file:
        np.savez(file, **arrays)
    return f"These maps as arrays ({', '.join(arrays)}): [attention.npz](attention.npz)."


def describe_concentration(seen: Observation) -> str:
    """Return Markdown that says how unevenly `[CLS]` spreads its attention if no artifacts were found."""
    busiest = max(1, round(0.1 * seen.attention.shape[1]))
    share = np.sort(seen.attention, axis=1)[:, -busiest:].sum(axis=1).mean()
    return (f"No patch is an artifact, so there is no share to measure. For comparison: the {busiest} most attended of "
            f"an image's {seen.attention.shape[1]:,} patches take {percent(share)} of the `[CLS]` attention.")


def discovery_headline(
    seen: Observation, source: str, threshold: float | None, fit: ThresholdFit, detection: pd.DataFrame | None
) -> list[dict[str, str]]:
    """Return the headline facts about artifacts: the attention they take, and precision and recall of their detection.

    `threshold` is the θ in use for `source`, or None; `fit` is the source's fit in the last block; `detection` is from
    `detection_table`, or None if the truth is unknown.
    """
    given, last_block = fit.is_given(threshold), f"{statistic_name(source)}, last block"
    if not seen.artifacts.any():
        why = f"no patch has {condition(source, fit.side, threshold)}" if given else fit.reason
        return [{"label": "Artifacts", "value": "none found" if given or fit.is_tested else "not tested",
                 "note": f"{last_block}: {why}"}]
    before, after = (percent((weights * seen.artifacts).sum(axis=1).mean())
                     for weights in (seen.attention, seen.attention_after))
    by = f"{'the given ' * given}{condition(source, fit.side, threshold)}"
    facts = [{"label": "[CLS] attention on artifacts", "value": f"{before} → {after}",
              "note": f"before → after ITAE, mean over all images; {percent(seen.artifacts.mean())} of the patches, "
                      f"those with {by}"}]
    if detection is not None:
        precision, recall = detection.loc[source, ["precision", "recall"]]
        facts.append({"label": "Detection", "value": f"{precision:.4f} / {recall:.4f}",
                      "note": f"precision / recall of {condition(source, fit.side, threshold)} against the planted "
                              "truth"})
    return facts
