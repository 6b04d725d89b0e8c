"""Tables, sentences and headline facts of notebook 01, which looks for artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from itae_utils.analysis.words import percent
from itae_utils.extraction.observation import Observation
from itae_utils.files import make_folder, replacing
from itae_utils.method.artifacts import precision_recall
from itae_utils.method.thresholds import ThresholdFit


def threshold_table(fits: Mapping[str, ThresholdFit]) -> pd.DataFrame:
    """Return one row per source: θ, the share of patches at or below it, the modes' separation and the verdict."""
    return pd.DataFrame(
        [{
            "source": source,
            "θ": "none" if fit.threshold is None else f"{fit.threshold:.4g}",
            "patches ≤ θ": "–" if fit.threshold is None else percent((fit.norms <= fit.threshold).mean()),
            "separation": "–" if np.isnan(fit.separation) else f"{fit.separation:.1f}",
            "verdict": fit.reason,
        } for source, fit in fits.items()]
    ).set_index("source")


def detection_table(seen: Observation, thresholds: Mapping[str, float | None]) -> pd.DataFrame:
    """Return precision and recall of each source's θ against the planted truth; without θ the precision is NaN."""
    rows = []
    for source, theta in thresholds.items():
        found = np.zeros_like(seen.truth) if theta is None else seen.norms[source] <= theta
        precision, recall = precision_recall(found, seen.truth)
        rows.append({"source": source, "θ": np.nan if theta is None else theta, "found": int(found.sum()),
                     "true": int(seen.truth.sum()), "precision": precision, "recall": recall})
    return pd.DataFrame(rows).set_index("source")


def save_maps(
    output_dir: str | Path, seen: Observation, chosen: Sequence[int], source: str, names: Sequence[str] | None
) -> str:
    """Write the maps of some images to `output_dir/attention.npz`, and return Markdown that links to it.

    Args:
        output_dir: created if it does not exist.
        seen: from `observe`.
        chosen: places in `seen` of the k images.
        source: whose norms are written.
        names: the files of the data set's images; None for images without files.

    The arrays are before, after, norms and artifacts, each (k, rows, columns) of the patch grid; index (k,), the
    numbers of the images in the data set; and names (k,), their files, if they have any.
    """
    maps = {"before": seen.attention, "after": seen.attention_after, "norms": seen.norms[source],
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
    given = fit.is_given(threshold)
    if not seen.artifacts.any():
        why = f"no patch lies at or below the given θ = {threshold:.4g}" if given else fit.reason
        return [{"label": "Artifacts", "value": "none found" if given or fit.is_tested else "not tested",
                 "note": f"{source} norms, last block: {why}"}]
    before, after = (percent((weights * seen.artifacts).sum(axis=1).mean())
                     for weights in (seen.attention, seen.attention_after))
    by = f"the given ‖{source}‖ ≤ {threshold:.4g}" if given else f"‖{source}‖"
    facts = [{"label": "[CLS] attention on artifacts", "value": f"{before} → {after}",
              "note": f"before → after ITAE, mean over all images; {percent(seen.artifacts.mean())} of the patches, "
                      f"identified by {by}"}]
    if detection is not None:
        precision, recall = detection.loc[source, ["precision", "recall"]]
        facts.append({"label": "Detection", "value": f"{precision:.4f} / {recall:.4f}",
                      "note": f"precision / recall of ‖{source}‖ ≤ {threshold:.4g} against the planted truth"})
    return facts
