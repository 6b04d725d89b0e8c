"""The methods paragraph of a report, ready to paste, and what to cite; every number is from the run's own results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from statistics import mean

from itae_utils.method.setting import SIDES, WHERE
from itae_utils.results import values_of

EDITS = {  # what becomes of the artifacts in the `[CLS]` row of each head
    "min": "their logits became the smallest patch logit of the row", "mask": "their logits became −∞",
    "mean": "their logits became the mean logit of the normal patches",
    "clip": "their logits became at most the largest logit of the normal patches",
    "scale": "their weights were multiplied by α", "spread": "their weights were shared among the normal patches",
    "substitute": "their values became the mean value of the artifacts in a sample",
}
CITATIONS = """\
@inproceedings{{nakamura2024itae,
  title     = {{Improving Image Clustering with Artifacts Attenuation via Inference-Time Attention Engineering}},
  author    = {{Nakamura and Nozawa and Lin and Nakata and Ng}},
  booktitle = {{Asian Conference on Computer Vision (ACCV)}},
  year      = {{2024}},
  note      = {{arXiv:2410.04801}}
}}
@software{{itae_utils,
  title   = {{itae-utils: attention artifacts of Vision Transformers, seen, attenuated and measured}},
  author  = {{{{The itae-utils authors}}}},
  version = {{{version}}},
  note    = {{run {run}}}
}}
"""


def run_hash(results: Mapping[str, Mapping]) -> str:
    """Return a hash of what a report measured and from what, in 12 characters: of its results without times and dates.

    `results` are by the label of the run. Two runs of the same code on the same inputs have the same hash.
    """
    kept = {label: {"rows": each["rows"], "thresholds": each["thresholds"], "versions": each["provenance"]["versions"],
                    "weights": each["provenance"].get("backbone", {}).get("weights_sha256"),
                    "images": each["provenance"].get("dataset", {}).get("fingerprint")}
            for label, each in results.items()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def citations(results: Mapping[str, Mapping]) -> str:
    """Return BibTeX entries of the paper and of the software, with the run's hash."""
    version = next(iter(results.values()))["provenance"]["versions"].get("itae-utils", "unknown")
    return CITATIONS.format(version=version, run=run_hash(results))


def methods_paragraph(results: Mapping) -> str:
    """Return how one run of notebook 03 was made and what it found, as a paragraph for a paper."""
    about, parameters = results["provenance"], results["parameters"]
    backbone, dataset, options = about["backbone"], about["dataset"], parameters.get("options", {})
    rows, columns = backbone["patch_grid"]
    sentences = [
        f"We extracted the [CLS] features of {backbone['name']} ({backbone['source']}; weights SHA-256 "
        f"{backbone['weights_sha256'][:12]}; "
        f"{backbone['num_blocks']} blocks, width {backbone['dim']}) for {dataset['size']:,} images of "
        f"{dataset['name']}, {dataset['split']}, at {backbone['image_size']} px ({backbone['preprocess']}; "
        f"{rows} × {columns} patches), in {about['precision']} on {about['device']}.",
        _setting(results), _clustering(parameters, options, about)]
    if scores := _scores(results):
        sentences.append(scores)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return " ".join([*sentences, f"Versions: Python {about['python']}, {versions}."])


def _setting(results: Mapping) -> str:
    parameters, options = results["parameters"], results["parameters"].get("options", {})
    (name, theta), rule = next(iter(results["thresholds"].items())), parameters["threshold"]
    name = name.removesuffix(", last block")
    if theta is None:
        return f"No threshold was found on {name} without labels, so no patch was attenuated."
    side = options.get("tail") or SIDES[parameters["source"]]
    origin = {"auto": "the valley between two modes, found without labels"}.get(rule, f"from the rule {rule}"
                                                                              if isinstance(rule, str) else "given")
    alpha = f" = {options['alpha']:g}" if options["attenuation"] == "scale" else ""
    return (f"Inference-Time Attention Engineering (ITAE) attenuated, in the last block, the patches whose "
            f"{name} lies {WHERE[side]} θ = {theta:.4g} ({origin}), by the edit {options['attenuation']}: "
            f"{EDITS[options['attenuation']]}{alpha}.")


def _clustering(parameters: Mapping, options: Mapping, about: Mapping) -> str:
    fitted = about.get("fitted_on", about["dataset"])["split"]
    where = "" if fitted == about["dataset"]["split"] else f"; fitted on {fitted}"
    rows = "scaled to length 1" if options["normalize"] else "not normalised"
    return (f"The features, {rows}, were clustered by k-means ({options['algorithm']}; "
            + (f"k = {parameters['clusters']}" if parameters["clusters"] else "k = the number of classes")
            + f"; {parameters['seeds']} seeds, best of {options['n_init']} starts each{where}).")


def _scores(results: Mapping) -> str | None:
    """Return ACC before and after with the interval of its difference, or None without labels."""
    difference = [values_of(results, "itae", f"acc_difference{end}") for end in ("", "_low", "_high")]
    if not all(difference):
        return None
    lead, low, high = (each[0] for each in difference)
    before, after = (mean(values_of(results, variant, "acc")) for variant in ("baseline", "itae"))
    return (f"ACC is {before:.3f} without and {after:.3f} with ITAE; the difference is {lead:+.3f} with a 95 % paired "
            f"bootstrap interval over the images of [{low:+.3f}, {high:+.3f}].")
