"""What a notebook measured and with what: `results.json`, described by `results.schema.json`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from torch.utils.data import Dataset

from itae_utils.data.fingerprint import fingerprint
from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE, make_folder, write_json
from itae_utils.models.backbones import Backbone

SCHEMA_VERSION = 1
PACKAGES = ("itae-utils", "torch", "torchvision", "timm", "scikit-learn", "scipy", "numpy", "papermill", "nbconvert")
PROVENANCE_KEYS = ("versions", "python", "platform", "date", "git", "backbone", "dataset", "device", "precision")
BACKBONE_KEYS = ("name", "source", "weights_sha256", "dim", "num_blocks", "patch_grid", "image_size", "preprocess",
                 "pos_embed")
DATASET_KEYS = ("name", "split", "source", "size", "classes")
COLLECTION_KEYS = ("versions", "python", "platform", "date", "git", "collected")  # of a notebook that only collects
ROW_TYPES = {"backbone": (str,), "dataset": (str,), "n": (int,), "variant": (str,), "seed": (int, type(None)),
             "metric": (str,), "value": (int, float)}
HEADLINE_TYPES = {"label": (str,), "value": (str, int, float), "note": (str,)}


def write_results(
    output_dir: str | Path,
    *,
    notebook: str,
    parameters: Mapping[str, object],
    provenance: Mapping[str, object],
    thresholds: Mapping[str, float | Sequence[float | None] | None],
    rows: Sequence[Mapping[str, object]],
    figures: Sequence[str],
    headline: Sequence[Mapping[str, object]],
) -> Path:
    """Write `output_dir/results.json` in one step: it is there whole or not at all.

    Args:
        output_dir: made where it is missing.
        notebook: the notebook's name, such as "03_clustering".
        parameters: what it ran with, by name.
        provenance: from `provenance()`.
        thresholds: resolved θ by name; None where none was found, a sequence where there is one a block.
        rows: one measured number each: backbone, dataset, n (images), variant, seed (None where nothing was drawn),
            metric, value.
        figures: names of the saved figures in order; the first is the cover.
        headline: the facts worth knowing first, each a label, a value and a note.

    Raises:
        ItaeError: something is missing, of the wrong type, or not a finite number; or the folder can't be made.
    """
    results = _plain({
        "schema": SCHEMA_VERSION, "notebook": notebook, "provenance": provenance, "parameters": parameters,
        "thresholds": thresholds, "rows": rows, "figures": figures, "headline": headline,
    })
    check_results(results)
    path = make_folder(output_dir) / "results.json"
    write_json(path, results)
    return path


def read_results(path: str | Path) -> dict:
    """Read and check one `results.json`.

    Raises:
        ItaeError: missing, not JSON, or not what the schema says.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ItaeError(f"{path} can't be read as results ({type(error).__name__}): run its notebook again") from error
    check_results(results)
    return results


def add_seconds(path: Path, seconds: float) -> dict:
    """Note in `results.json` how long its notebook took, which the notebook itself can't know; returns the results."""
    results = read_results(path)
    results["provenance"]["seconds"] = round(seconds, 1)
    write_json(path, results)
    return results


def check_results(results: Mapping[str, object]) -> None:
    """Refuse what `results.schema.json` refuses in the parts that notebooks fill in, and numbers that aren't finite.

    Raises:
        ItaeError: names the part that is wrong and what it must be.
    """
    _require(isinstance(results, dict) and results.get("schema") == SCHEMA_VERSION, "schema", f"{SCHEMA_VERSION}")
    _require(isinstance(results.get("notebook"), str) and results["notebook"], "notebook", "its name")
    if is_collection(results):
        _require_keys(results["provenance"], COLLECTION_KEYS, "provenance")
    else:
        _require_keys(results.get("provenance"), PROVENANCE_KEYS, "provenance")
        _require_keys(results["provenance"]["backbone"], BACKBONE_KEYS, "provenance.backbone")
        _require_keys(results["provenance"]["dataset"], DATASET_KEYS, "provenance.dataset")
    _require(isinstance(results.get("parameters"), dict), "parameters", "an object")
    _require(isinstance(results.get("thresholds"), dict), "thresholds", "an object")
    for name, value in results["thresholds"].items():
        numbers = value if isinstance(value, list) else [value]
        _require(all(_is(number, (int, float, type(None))) for number in numbers), f"thresholds[{name!r}]",
                 "a number, null, or a list of these")
    for part, types in (("rows", ROW_TYPES), ("headline", HEADLINE_TYPES)):
        _require(isinstance(results.get(part), list), part, "a list")
        for index, entry in enumerate(results[part]):
            _check_entry(entry, types, f"{part}[{index}]")
    figures = results.get("figures")
    _require(isinstance(figures, list) and all(isinstance(name, str) for name in figures), "figures", "a list of names")
    try:
        json.dumps(results, allow_nan=False)
    except ValueError as error:
        raise ItaeError("results hold a number that is not finite: leave out what could not be measured") from error


def is_collection(results: Mapping[str, object]) -> bool:
    """Whether these are of a notebook that measured nothing of its own, but collected the results of others."""
    about = results.get("provenance")
    return isinstance(about, dict) and "collected" in about


def _require_keys(value: object, keys: Sequence[str], where: str) -> None:
    _require(isinstance(value, dict) and set(keys) <= set(value), where, f"an object with {', '.join(keys)}")


def _check_entry(entry: object, types: Mapping[str, tuple[type, ...]], where: str) -> None:
    _require(isinstance(entry, dict) and set(entry) == set(types), where, f"an object of just {', '.join(types)}")
    for name, allowed in types.items():
        value, names = entry[name], " or ".join(each.__name__ for each in allowed)
        _require(_is(value, allowed), f"{where}.{name}", f"{names}, not {value!r}")
        if isinstance(value, float):
            _require(value - value == 0, f"{where}.{name}", f"finite, not {value}")
    _require(entry.get("n", 0) >= 0, f"{where}.n", "at least 0")


def _is(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _require(holds: object, where: str, what: str) -> None:
    if not holds:
        raise ItaeError(f"{where} in the results must be {what}")


def _plain(value: object) -> object:
    """`value` in JSON's own types: NumPy scalars and arrays become numbers and lists, paths and devices text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, bool, int, float, type(None))) else str(value)


def provenance(backbone: Backbone, dataset: Dataset, **more: object) -> dict[str, object]:
    """What was run on what: versions, date (UTC), commit, weights, device, data; `more` is added as it is.

    `backbone.hub` is the server that weights were to come from where the environment names another than the usual one;
    `dataset.fingerprint` is `fingerprint(dataset)`.
    """
    return _plain({
        **_system(),
        "backbone": {name: getattr(backbone, name) for name in BACKBONE_KEYS} | {"hub": os.environ.get("HF_ENDPOINT")},
        "dataset": {
            "name": dataset.name, "split": dataset.split, "source": dataset.source,
            "size": len(dataset), "classes": len(dataset.classes or ()), "fingerprint": fingerprint(dataset),
        },
        "device": _device_name(backbone.device),
        "precision": backbone.precision,
        **more,
    })


def collected_provenance(results: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """The provenance of a notebook that collects others' results, by the path they were read from."""
    return _plain({
        **_system(),
        "collected": [
            {"path": path, "notebook": each["notebook"], "date": each["provenance"]["date"],
             "weights_sha256": each["provenance"]["backbone"]["weights_sha256"],
             "fingerprint": each["provenance"]["dataset"].get("fingerprint")}
            for path, each in results.items()
        ],
    })


def _system() -> dict[str, object]:
    return {
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git_state(PACKAGE.parent),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: object) -> str:
    if not str(device).startswith("cuda"):
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _git_state(root: Path) -> dict[str, object] | None:
    """Commit and cleanness of the checkout at `root`; None where there is none, or no commit, or no git."""
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "clean": not changes}
