"""Results as notebooks 01 to 03 write them, for the tests of the comparison."""

import copy
from pathlib import Path

from PIL import Image

from itae_utils.analysis.collection import Pairing, collect
from itae_utils.data.published import DATASETS
from itae_utils.files import make_folder, write_json
from itae_utils.models.registry import BACKBONES
from tests.tiny_notebooks import PROVENANCE

SCORES = {"baseline": 0.70, "random control": 0.69, "itae": 0.80}


def about(backbone: str, dataset: str, **changes: object) -> dict:
    """Return a provenance of published weights and images, with `changes` such as kind="local", size=3, date="…"."""
    made, entry, info = copy.deepcopy(PROVENANCE), BACKBONES.get(backbone), DATASETS.get(dataset)
    made["backbone"] |= {"name": backbone, "kind": "embedded" if entry and entry.timm_name is None else "published",
                         "source": entry.origin if entry else f"{backbone}, through timm"}
    made["dataset"] |= {"name": dataset, "split": "test (10,000)", "source": info.origin if info else "a folder",
                        "size": info.images if info else 30, "classes": info.classes if info else 3}
    for name, value in changes.items():
        part = "dataset" if name in ("size", "classes", "split", "fingerprint") else "backbone"
        (made if name == "date" else made[part])[name] = value
    return made


def score_rows(backbone: str, dataset: str, scores: dict = SCORES, interval: tuple | None = (0.1, 0.05, 0.15)) -> list:
    """Return three seeds of every score, and ITAE's difference to the baseline if `interval` is given."""
    rows = [
        {"backbone": backbone, "dataset": dataset, "n": 30, "variant": variant, "seed": seed, "metric": metric,
         "value": value + (seed - 1) / 100}
        for variant, value in scores.items() for metric in ("acc", "nmi", "ari") for seed in range(3)
    ]
    rows += [
        {"backbone": backbone, "dataset": dataset, "n": 30, "variant": "itae", "seed": None,
         "metric": f"{metric}_difference{end}", "value": value}
        for metric in ("acc", "nmi", "ari") if interval
        for end, value in zip(("", "_low", "_high"), interval, strict=True)
    ]
    return rows


def ablation_rows(row: dict) -> list:
    """Return rows of a small ablation without θ for the query, as changes of a score row."""
    settings = [(None, None, None, 0.7), ("key", "min", "0.00001 %", 0.6), ("key", "min", "auto", 0.8),
                ("query", "min", "0.00001 %", 0.5)]
    return [{**row, "variant": f"{source} {attenuation} {theta}" if source else "baseline", "metric": "acc", "seed": 0,
             "value": value, "source": source, "attenuation": attenuation, "theta": theta}
            for source, attenuation, theta, value in settings]


def write_pairing(
    folder: Path, backbone: str, dataset: str, *, theta: float | None = 2.5, rows: list | None = None,
    notebooks: tuple[str, ...] = ("01", "02", "03"), options: dict | None = None, fitted_on: str | None = None,
    **changes: object,
) -> Path:
    """Make a folder with the results and figures of notebooks 01 to 03, and return it.

    `options` are added to those of the notebooks; `fitted_on` is the split that k-means was fitted on.
    """
    provenance = about(backbone, dataset, **changes)
    if fitted_on:
        provenance["fitted_on"] = provenance["dataset"] | {"split": fitted_on}
    rows = score_rows(backbone, dataset) if rows is None else rows
    parts = {
        "01": ("01_artifact_discovery", [], ["attention_maps", "statistics"]),
        "02": ("02_itae_ablation", ablation_rows(rows[0]) if rows else [], ["ablation_grid"]),
        "03": ("03_clustering", rows, ["scores", "tsne"]),
    }
    for name, own_rows, figures in (parts[key] for key in notebooks):
        results = {
            "schema": 1, "notebook": name, "provenance": provenance, "figures": figures, "headline": [],
            "rows": own_rows, "thresholds": {"‖key‖₂, last block": theta},
            "parameters": {"backbone": backbone, "dataset": dataset, "source": "key", "threshold": "auto", "seeds": 3,
                           "seed": 0, "clusters": None,
                           "options": {"n_init": 10, "normalize": True, "kmeans_seed": 4} | (options or {})},
        }
        for figure in figures:
            make_folder(folder / name / "figures")
            Image.new("RGB", (2, 2)).save(folder / name / "figures" / f"{figure}.png")
        write_json(make_folder(folder / name) / "results.json", results)
    return folder


def write_as_mteb(folder: Path, backbone: str, dataset: str, rule: str = "meta", **changes: object) -> Path:
    """Write a pairing that was measured by MTEB's protocol."""
    options = {"algorithm": "mini-batch", "n_init": 1, "normalize": False, "fit_split": None}
    return write_pairing(folder, backbone, dataset, notebooks=("03",), **{
        "options": options, "preprocess": "meta-eval", "image_size": 224, "pos_embed": rule} | changes)


def pairing_of(tmp_path: Path, backbone: str, dataset: str, **options) -> Pairing:
    write_pairing(tmp_path / "pairing", backbone, dataset, **options)
    ((pairing,), _) = collect(tmp_path / "pairing")
    return pairing
