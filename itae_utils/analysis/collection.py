"""The results that a report's runs left behind, by data set and backbone, and which of them are stand-ins."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
from IPython.display import Image, Markdown, display

from itae_utils.data.datasets import DATASETS
from itae_utils.errors import ItaeError
from itae_utils.models.registry import BACKBONES
from itae_utils.results import is_collection, read_results

SOURCE = (
    "Nakamura, Nozawa, Lin, Nakata, Ng: Improving Image Clustering with Artifacts Attenuation via Inference-Time "
    "Attention Engineering. ACCV 2024, arXiv 2410.04801. k-means on the test split; backbones as a public leaderboard "
    "lists them."
)

NOT_IN_SOURCES = "not in our sources"

# What our sources don't say of the paper's runs; every report says what was used instead.
UNKNOWN_SETTINGS = {
    "source": "the source P (query, key or value) of each row",
    "threshold": "the threshold θ of each row",
    "image_size": "image size",
    "preprocess": "resize and crop rule",
    "normalize": "whether features are normalised or reduced before k-means",
    "k-means": "k-means initialisation and restarts",
    "backbone": "the backbone of the Tiny-ImageNet row",
    "baseline": "the paper's own baseline numbers",
}


@dataclass(frozen=True)
class PublishedRow:
    """One published ITAE result; `dataset` is `load_dataset`'s name, `backbone` is None where none is listed."""

    dataset: str
    title: str
    acc: float
    nmi: float
    ari: float
    backbone: str | None


PUBLISHED = (
    PublishedRow("cifar10", "CIFAR-10", 0.8449, 0.8682, 0.7946, "DINOv2 ViT-B/14"),
    PublishedRow("cifar100", "CIFAR-100", 0.6502, 0.7710, 0.5053, "DINOv2 ViT-B/14"),
    PublishedRow("stl10", "STL-10", 0.8276, 0.8818, 0.7594, "DINOv2 ViT-B/14"),
    PublishedRow("tiny-imagenet", "Tiny-ImageNet", 0.6823, 0.8178, 0.5227, None),
)


def published_table() -> pd.DataFrame:
    """`PUBLISHED` as a table indexed by `load_dataset`'s names; cells that our sources leave open say so in words.

    Columns: title, backbone, acc, nmi, ari (of ITAE), baseline_acc, baseline_nmi, baseline_ari.
    """
    table = pd.DataFrame(PUBLISHED).set_index("dataset")
    table["backbone"] = table["backbone"].fillna(NOT_IN_SOURCES)
    baseline = {f"baseline_{metric}": NOT_IN_SOURCES for metric in ("acc", "nmi", "ari")}
    return table[["title", "backbone", "acc", "nmi", "ari"]].assign(**baseline)


SCORES = "03"  # the notebook that measures what is compared
STAND_IN, UNVERIFIED = "stand-in", "unverified"


@dataclass(frozen=True, eq=False)
class Cell:
    """One backbone on one data set.

    Attributes:
        folder: with a folder for each notebook in it.
        results: of each notebook that ran, by its number; there is always "03".
    """

    folder: Path
    results: Mapping[str, dict]

    @property
    def scores(self) -> dict:
        """The results of the notebook that measured the scores."""
        return self.results[SCORES]

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self.scores["provenance"]["backbone"]["name"]

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.scores["provenance"]["dataset"]["name"]

    @property
    def title(self) -> str:
        """What it is called in texts."""
        return f"{self.backbone} on {self.dataset}"

    def path(self, key: str) -> Path:
        """The folder of a notebook by its number."""
        return self.folder / self.results[key]["notebook"]

    def marks(self) -> dict[str, tuple[str, str]]:
        """What is not the real thing, "backbone" or "dataset": how it is to be called, and why."""
        about = self.scores["provenance"]
        found = {"backbone": judge_weights(about["backbone"]), "dataset": judge_images(about["dataset"])}
        return {part: mark for part, mark in found.items() if mark}


def judge_weights(about: Mapping[str, object]) -> tuple[str, str] | None:
    """How weights are to be called that are not, or not known to be, the published ones, and why; else None.

    Args:
        about: a backbone's provenance.
    """
    entry, source = BACKBONES.get(about["name"]), about["source"]
    if "random weights" in source:
        return STAND_IN, source
    if entry and entry.timm_name is None:
        return STAND_IN, f"{source}; no published checkpoint"
    if source.startswith("local ") or (entry and not source.startswith(entry.origin)):
        return UNVERIFIED, f"weights from a {source}, which nothing here compares with the published ones"
    if hub := about.get("hub"):
        host = urlsplit(hub).hostname or hub
        local = host == "localhost" or host == "::1" or host.startswith("127.")
        return (STAND_IN if local else UNVERIFIED), f"weights served by {hub} instead of the usual server"
    return None


def judge_images(about: Mapping[str, object]) -> tuple[str, str] | None:
    """How images are to be called that are not those of one of the paper's data sets, and why; else None.

    Args:
        about: a data set's provenance.
    """
    if about["name"] not in [row.dataset for row in PUBLISHED]:
        return STAND_IN, f"{about['source']}; none of the paper's data sets"
    info = DATASETS[about["name"]]
    if about["size"] != info.images:
        return STAND_IN, f"{about['size']:,} images ({about['split']}) instead of {info.images:,}"
    if about["classes"] != info.classes:
        return STAND_IN, f"{about['classes']:,} classes instead of {info.classes:,}"
    return None


def collect(folder: str | Path) -> tuple[list[Cell], list[str]]:
    """All cells below `folder`, however deep, the paper's data sets first, and what was left out and why, in words.

    Of several runs of one backbone on one data set the latest counts.

    Raises:
        ItaeError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ItaeError(f"results_dir {str(folder)!r} is no folder: name a report, or make one by "
                        "`itae report --profile paper`")
    groups: dict[Path, dict[str, dict]] = defaultdict(dict)
    left_out = []
    for path in sorted(folder.rglob("results.json")):
        try:
            results = read_results(path)
        except ItaeError as error:
            left_out.append(str(error))
            continue
        if not is_collection(results):
            groups[path.parents[1]][results["notebook"].partition("_")[0]] = results
    cells: dict[tuple[str, str], Cell] = {}
    for place, results in groups.items():
        name = os.path.relpath(place, folder)
        if SCORES not in results:
            left_out.append(f"{name} has no results of notebook {SCORES}")
            continue
        cell = Cell(place, results)
        other = cells.get((cell.dataset, cell.backbone))
        if other:
            older, cell = sorted([other, cell], key=lambda each: each.scores["provenance"]["date"])
            other_settings = _differing(older.scores["parameters"], cell.scores["parameters"])
            left_out.append(f"{os.path.relpath(older.folder, folder)} is an earlier run of {cell.backbone} on "
                            f"{cell.dataset} than {os.path.relpath(cell.folder, folder)}{other_settings}")
        cells[cell.dataset, cell.backbone] = cell
    order = {row.dataset: place for place, row in enumerate(PUBLISHED)}
    return sorted(cells.values(), key=lambda cell: order.get(cell.dataset, len(order))), left_out


def _differing(older: Mapping[str, object], newer: Mapping[str, object]) -> str:
    """In words, the parameters that two runs were told differently; nothing where there are none."""
    told = [f"{name}={older.get(name)!r} instead of {value!r}" for name, value in newer.items()
            if name != "output_dir" and older.get(name) != value]
    return f", with {', '.join(told)}" if told else ""


def sources(cells: Sequence[Cell], folder: str | Path) -> dict[str, dict]:
    """Every results.json behind the cells by its path below `folder`, for `collected_provenance`."""
    return {os.path.relpath(cell.path(key) / "results.json", folder): results
            for cell in cells for key, results in cell.results.items()}


def saved_figure(cell: Cell, key: str, name: str) -> Path | None:
    """The PNG of a notebook's figure, where that notebook ran and drew it; its PDF lies beside it."""
    if name not in cell.results.get(key, {}).get("figures", ()):
        return None
    path = cell.path(key) / "figures" / f"{name}.png"
    return path if path.is_file() else None


def show_figures(cells: Sequence[Cell], key: str, name: str, output_dir: str | Path) -> None:
    """Show a figure of every cell in the notebook that calls this, with links to its page and PDF.

    Args:
        cells: from `collect`.
        key: number of the notebook that drew it.
        name: of the figure.
        output_dir: of the calling notebook, from where the links start.
    """
    drawn = {cell: path for cell in cells if (path := saved_figure(cell, key, name))}
    for cell, path in drawn.items():
        pdf, page = (Path(os.path.relpath(target, output_dir)).as_posix() for target in (
            path.with_suffix(".pdf"), cell.path(key) / f"{cell.results[key]['notebook']}.html"))
        display(Markdown(f"**{cell.title}** · [page]({page}) · [PDF]({pdf})"),
                Image(path, alt=f"{name.replace('_', ' ')} of {cell.title}"))
    if missing := [cell.title for cell in cells if cell not in drawn]:
        display(Markdown(f"Not drawn for {', '.join(missing)}."))
    if not cells:
        display(Markdown("Nothing was run."))
