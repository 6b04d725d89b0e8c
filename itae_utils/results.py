"""The results of one notebook and how they were measured: `results.json`, described by `results.schema.json`."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from torch.utils.data import Dataset

from itae_utils.data.fingerprint import fingerprint
from itae_utils.environment import hub_server
from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE, make_folder, write_json
from itae_utils.models.backbones import Backbone

SCHEMA_VERSION = 1
PACKAGES = ("itae-utils", "torch", "torchvision", "timm", "scikit-learn", "scipy", "numpy", "papermill", "nbconvert")
BACKBONE_KEYS = ("name", "kind", "source", "weights_sha256", "dim", "num_blocks", "patch_grid", "image_size",
                 "preprocess", "pos_embed")


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
    """Write `output_dir/results.json` in one step.

    Args:
        output_dir: created if it does not exist.
        notebook: the notebook's name, such as "03_clustering".
        parameters: the parameters it ran with, by name.
        provenance: from `provenance()`.
        thresholds: resolved θ by name; None if none was found, a sequence with one θ per block.
        rows: one measured number each: backbone, dataset, n (images), variant, seed (None if nothing was drawn),
            metric, value; for settings of the ablation also source, attenuation and theta.
        figures: names of the saved figures in order; the first is the cover.
        headline: the main results, each a label, a value and a note.

    Raises:
        ItaeError: a part is missing, of the wrong type, or a number is not finite; or the folder can't be created.
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
    """Read and validate one `results.json`.

    Raises:
        ItaeError: it does not exist, is not JSON, or does not match the schema.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ItaeError(f"{path} can't be read as results ({type(error).__name__}): run its notebook again") from error
    try:
        check_results(results)
    except ItaeError as error:
        raise ItaeError(f"{path}: {error}") from error
    return results


def add_seconds(path: Path, seconds: float) -> dict:
    """Add the notebook's duration, which it can't measure itself, to its `results.json`; return the results."""
    results = read_results(path)
    results["provenance"]["seconds"] = round(seconds, 1)
    write_json(path, results)
    return results


def check_results(results: object) -> None:
    """Validate results against `results.schema.json`; numbers must be finite.

    Raises:
        ItaeError: names the first part that is wrong, and its problem.
    """
    if error := best_match(_schema().iter_errors(results)):
        raise ItaeError(f"{error.json_path.removeprefix('$.')} in the results: {textwrap.shorten(error.message, 200)}")
    _plain(results)


@cache
def _schema() -> Draft202012Validator:
    return Draft202012Validator(json.loads((PACKAGE / "results.schema.json").read_text(encoding="utf-8")))


def values_of(results: Mapping, variant: str, metric: str) -> list[float]:
    """Return the values of a variant of the results' own backbone, one per seed."""
    own = results["provenance"]["backbone"]["name"]
    return [row["value"] for row in results["rows"]
            if (row["variant"], row["metric"], row["backbone"]) == (variant, metric, own)]


def is_collection(results: Mapping[str, object]) -> bool:
    """Return whether these are the results of a notebook that measures nothing itself but collects other results."""
    about = results.get("provenance")
    return isinstance(about, dict) and "collected" in about


def _plain(value: object, where: str = "results") -> object:
    """Convert to JSON's own types: NumPy scalars and arrays to numbers and lists, paths and devices to text.

    Raises:
        ItaeError: a number is not finite.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{where}.{key}") for key, each in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{where}[{index}]") for index, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ItaeError(f"{where} is {value}: leave out numbers that could not be measured")
    return value if isinstance(value, (str, bool, int, float, type(None))) else str(value)


def provenance(backbone: Backbone, dataset: Dataset, **more: object) -> dict[str, object]:
    """Return how something was measured: versions, date (UTC), commit, weights, device and images.

    Args:
        backbone: from `load_backbone`; its `hub` is the server of weights, if the environment names another than usual.
        dataset: from `load_dataset`; its `fingerprint` is the one in the feature store's key.
        more: further entries.
    """
    return _plain({
        **_system(),
        "backbone": {name: getattr(backbone, name) for name in BACKBONE_KEYS} | {"hub": hub_server()},
        "dataset": images_provenance(dataset),
        "device": _device_name(backbone.device),
        "precision": backbone.precision,
        **more,
    })


def images_provenance(dataset: Dataset) -> dict[str, object]:
    """Return what identifies the images of a data set."""
    return {
        "name": dataset.name, "split": dataset.split, "source": dataset.source,
        "size": len(dataset), "classes": len(dataset.classes or ()), "fingerprint": fingerprint(dataset),
        "notes": getattr(dataset, "notes", ()),
    }


def collected_provenance(results: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Return the provenance of a notebook that collects other results, which are given by their path."""
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
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git_state(PACKAGE.parent),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide results, as far as they are installed."""
    return {name: version for name in PACKAGES if (version := version_of(name))}


def version_of(package: str) -> str | None:
    """Return an installed package's version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: object) -> str:
    if not str(device).startswith("cuda"):
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _git_state(root: Path) -> dict[str, object] | None:
    """Return commit and cleanness of the checkout at `root`; None without checkout, commit or git."""
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
