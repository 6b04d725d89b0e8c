"""Results as notebooks 01 to 03 would leave them, for the tests of what collects them."""

import copy
from pathlib import Path

from PIL import Image

from itae_utils.analysis.collection import Cell, collect
from itae_utils.data.datasets import DATASETS
from itae_utils.files import make_folder, write_json
from itae_utils.models.registry import BACKBONES
from tests.tiny_notebooks import PROVENANCE

SCORES = {"baseline": 0.70, "random control": 0.69, "itae": 0.80}


def about(backbone: str, dataset: str, **changes: object) -> dict:
    """A provenance of the real things, but for `changes` such as source="x", size=3, classes=2, hub="http://x"."""
    made, entry, info = copy.deepcopy(PROVENANCE), BACKBONES.get(backbone), DATASETS.get(dataset)
    made["backbone"] |= {"name": backbone, "source": entry.origin if entry else f"{backbone}, through timm"}
    made["dataset"] |= {"name": dataset, "split": "test (10,000)", "source": info.origin if info else "a folder",
                        "size": info.images if info else 30, "classes": info.classes if info else 3}
    for name, value in changes.items():
        part = "dataset" if name in ("size", "classes", "split", "fingerprint") else "backbone"
        (made if name == "date" else made[part])[name] = value
    return made


def score_rows(backbone: str, dataset: str, scores: dict = SCORES, interval: tuple | None = (0.1, 0.05, 0.15)) -> list:
    """Three seeds of every score, and ITAE's difference to the baseline with its interval where there is one."""
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


def write_cell(
    folder: Path, backbone: str, dataset: str, *, theta: float | None = 2.5, rows: list | None = None,
    notebooks: tuple[str, ...] = ("01", "02", "03"), **changes: object,
) -> Path:
    """A folder with the results, and the figures, of notebooks 01 to 03."""
    provenance = about(backbone, dataset, **changes)
    rows = score_rows(backbone, dataset) if rows is None else rows
    ablation = [{**rows[0], "variant": variant, "metric": "acc", "seed": 0, "value": value} for variant, value in (
        ("baseline", 0.7), ("key min 5 %", 0.6), ("key min auto", 0.8), ("query min 5 %", 0.5))] if rows else []
    parts = {
        "01": ("01_artifact_discovery", [], ["attention_maps", "norm_distributions"]),
        "02": ("02_itae_ablation", ablation, ["ablation_grid"]),
        "03": ("03_clustering", rows, ["scores", "tsne"]),
    }
    for name, own_rows, figures in (parts[key] for key in notebooks):
        results = {
            "schema": 1, "notebook": name, "provenance": provenance, "figures": figures, "headline": [],
            "rows": own_rows, "thresholds": {"‖key‖, last block": theta},
            "parameters": {"backbone": backbone, "dataset": dataset, "source": "key", "threshold": "auto", "seeds": 3,
                           "n_init": 10, "normalize": True, "seed": 0},
        }
        for figure in figures:
            make_folder(folder / name / "figures")
            Image.new("RGB", (2, 2)).save(folder / name / "figures" / f"{figure}.png")
        write_json(make_folder(folder / name) / "results.json", results)
    return folder


def cell_of(tmp_path: Path, backbone: str, dataset: str, **options) -> Cell:
    write_cell(tmp_path / "cell", backbone, dataset, **options)
    ((cell,), _) = collect(tmp_path / "cell")
    return cell
