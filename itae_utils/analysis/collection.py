"""The published results, the measured results in a report's folder, and which of them can be compared."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from IPython.display import Image, Markdown, display

from itae_utils.analysis.words import escape
from itae_utils.data.published import DATASETS
from itae_utils.errors import ItaeError
from itae_utils.results import is_collection, read_results

SOURCE = (
    "Nakamura, Nozawa, Lin, Nakata, Ng: Improving Image Clustering with Artifacts Attenuation via Inference-Time "
    "Attention Engineering. ACCV 2024, arXiv 2410.04801. k-means on the test split; backbones as a public leaderboard "
    "lists them."
)

UNKNOWN = "unknown to us"


@dataclass(frozen=True)
class PublishedRow:
    """One published ITAE result; `dataset` is `load_dataset`'s name, `backbone` is None if it is unknown to us."""

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
BY_DATASET = {row.dataset: row for row in PUBLISHED}

# MTEB's clustering of plain DINOv2: one run of k-means each, so without a spread.
MTEB_SOURCE = (
    "MTEB 1.14.15, the tasks CIFAR10Clustering, CIFAR100Clustering and TinyImageNetClustering for the models "
    "facebook/dinov2-small, -base, -large and -giant, in github.com/embeddings-benchmark/results: cluster_accuracy, "
    "v_measure and ari. K-means (mini-batch): features not normalised, 1 start without a seed, fitted on the scored "
    "images, test (10,000); Tiny-ImageNet: validation (10,000)."
)
MTEB_BACKBONES = {f"dinov2_vit{size}14": f"DINOv2 ViT-{size.upper() if size != 'g' else size}/14" for size in "sblg"}
MTEB = {
    (dataset, backbone): dict(zip(("acc", "nmi", "ari"), scores, strict=True))
    for dataset, table in {
        "cifar10": [(0.8006, 0.7925, 0.7121), (0.7544, 0.8262, 0.7041), (0.7276, 0.7990, 0.6041),
                    (0.6923, 0.7684, 0.5443)],
        "cifar100": [(0.5716, 0.7262, 0.4057), (0.6021, 0.7720, 0.3884), (0.6576, 0.7993, 0.3835),
                     (0.5940, 0.7577, 0.1539)],
        "tiny-imagenet": [(0.4776, 0.7065, 0.2854), (0.5553, 0.7431, 0.1916), (0.6077, 0.7722, 0.1818),
                          (0.4883, 0.7013, 0.0454)],
    }.items()
    for backbone, scores in zip(MTEB_BACKBONES, table, strict=True)
}
# What makes a run one by MTEB's protocol: parameters and options, and entries of the backbone's provenance.
MTEB_SETTINGS = {"algorithm": "mini-batch", "n_init": 1, "normalize": False, "fit_split": None, "clusters": None}
MTEB_IMAGES = {"preprocess": "meta-eval", "image_size": 224}

SCORES = "03"  # the notebook that measures the scores
OTHER_WEIGHTS, OTHER_IMAGES, UNCHECKED = "other weights", "other images", "weights not checked"
SHORT_HASH = 12
# Results belong together if these parts of their provenance are equal.
IDENTITY = (("backbone", "name", "backbone"), ("backbone", "weights_sha256", "weights (SHA-256)"),
            ("dataset", "name", "data set"), ("dataset", "fingerprint", "images (SHA-256)"))


@dataclass(frozen=True, eq=False)
class Pairing:
    """The results of one backbone on one data set.

    `results` and `folders` map the number of each notebook that ran, always with "03", to its results and its folder.
    These folders lie in `folder`.
    """

    folder: Path
    results: Mapping[str, dict]
    folders: Mapping[str, Path]

    @property
    def scores(self) -> dict:
        """The results of the notebook that measured the scores."""
        return self.results[SCORES]

    @property
    def backbone(self) -> str:
        """The backbone's name."""
        return self.scores["provenance"]["backbone"]["name"]

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return self.scores["provenance"]["dataset"]["name"]

    @property
    def title(self) -> str:
        """Both names, such as "demo on digits", and the rule if it follows MTEB; `escape` it for Markdown."""
        rule = f" as MTEB, pos_embed={self.mteb_rule}" if self.mteb_rule else ""
        return f"{self.backbone} on {self.dataset}{rule}"

    @property
    def settings(self) -> dict[str, object]:
        """Parameters and options of the notebook that measured the scores."""
        parameters = dict(self.scores["parameters"])
        return parameters | parameters.pop("options", {})

    @property
    def mteb_rule(self) -> str | None:
        """The rule of the position embedding if the scores were measured by MTEB's protocol, else None."""
        about, settings = self.scores["provenance"]["backbone"], self.settings
        follows = all(settings.get(name, ...) == value for name, value in MTEB_SETTINGS.items())
        return about["pos_embed"] if follows and MTEB_IMAGES.items() <= about.items() else None

    def caveats(self) -> dict[str, tuple[str, str]]:
        """Return label and reason, as `judge_weights` does, for each of "backbone" and "dataset" that needs one.

        Only a data set of the paper can need one: results on other images aren't compared with published numbers.
        """
        if self.dataset not in BY_DATASET:
            return {}
        about = self.scores["provenance"]
        found = {"backbone": judge_weights(about["backbone"]), "dataset": judge_images(about["dataset"])}
        return {part: caveat for part, caveat in found.items() if caveat}


def judge_weights(about: Mapping[str, object]) -> tuple[str, str] | None:
    """Return a label and the reason if the weights are not, or not known to be, the published ones, else None.

    `about` is a backbone's provenance.
    """
    source, hub = about["source"], about.get("hub")
    match about.get("kind"):
        case "random":
            return OTHER_WEIGHTS, source
        case "embedded":
            return OTHER_WEIGHTS, f"{source}; no published checkpoint"
        case "local":
            return UNCHECKED, f"weights from a {source}, not compared with the published ones"
        case "published" if not hub:
            return None
        case "published":
            host = urlsplit(hub).hostname or hub
            label = OTHER_WEIGHTS if host in ("localhost", "::1") or host.startswith("127.") else UNCHECKED
            return label, f"weights served by {hub} instead of the usual server"
    return UNCHECKED, f"{source}; these results do not record whether the weights are the published ones"


def judge_images(about: Mapping[str, object]) -> tuple[str, str] | None:
    """Return a label and the reason if images under the name of one of the paper's data sets are not all of its images.

    `about` is a data set's provenance.
    """
    info = DATASETS[about["name"]]
    if about["size"] != info.images:
        return OTHER_IMAGES, f"{about['size']:,} images ({about['split']}) instead of {info.images:,}"
    if about["classes"] != info.classes:
        return OTHER_IMAGES, f"{about['classes']:,} classes instead of {info.classes:,}"
    return None


def collect(folder: str | Path) -> tuple[list[Pairing], list[str]]:
    """Find all pairings below `folder`, at any depth, and say in plain text which results were left out and why.

    The paper's data sets come first. Of several runs of one backbone on one data set the latest counts; runs by MTEB's
    protocol, one for each rule of the position embedding, count beside it. Results of other notebooks count only if
    their backbone, weights and images are those of notebook 03 beside them.

    Raises:
        ItaeError: `folder` does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ItaeError(f"results_dir {str(folder)!r} is not a folder: name a report, or make one with "
                        "`itae report --profile paper`")

    def name(path: Path) -> str:
        return os.path.relpath(path, folder)

    runs, left_out = defaultdict(list), []
    for path in sorted(folder.rglob("results.json")):
        try:
            results = read_results(path)
        except ItaeError as error:
            left_out.append(str(error))
            continue
        if not is_collection(results):
            runs[path.parent.parent].append((path.parent, results))
    latest: dict[tuple[str, str, str | None], Pairing] = {}
    for place, runs_there in runs.items():
        pairing, reasons = _pair(place, runs_there, name)
        left_out += reasons
        if pairing is None:
            continue
        key = (pairing.dataset, pairing.backbone, pairing.mteb_rule)
        if other := latest.get(key):
            older, pairing = sorted([other, pairing], key=lambda each: each.scores["provenance"]["date"])
            left_out.append(f"{name(older.folder)} is an earlier run of {pairing.title} than {name(pairing.folder)}"
                            + _describe_changes(older.settings, pairing.settings))
        latest[key] = pairing
    order = {dataset: place for place, dataset in enumerate(BY_DATASET)}
    return sorted(latest.values(), key=lambda pairing: order.get(pairing.dataset, len(order))), left_out


def _pair(place: Path, runs: Sequence[tuple[Path, dict]],
          name: Callable[[Path], str]) -> tuple[Pairing | None, list[str]]:
    """Return the pairing of the results in one folder (None without notebook 03), and reasons for results left out."""
    results, folders, left_out = {}, {}, []
    for folder, content in sorted(runs, key=lambda run: run[1]["provenance"]["date"]):
        key = content["notebook"].partition("_")[0]
        if key in folders:
            left_out.append(f"{name(folders[key])} is an earlier run of notebook {key} than {name(folder)}")
        results[key], folders[key] = content, folder
    if SCORES not in results:
        return None, [*left_out, f"{name(place)} has no results of notebook {SCORES}"]
    for key in sorted(results):
        if difference := _difference(results[key]["provenance"], results[SCORES]["provenance"]):
            left_out.append(f"{name(folders[key])} differs from {name(folders[SCORES])} in the {difference}")
            del results[key], folders[key]
    return Pairing(place, dict(sorted(results.items())), folders), left_out


def _difference(about: Mapping[str, dict], other: Mapping[str, dict]) -> str | None:
    """Return the first part of IDENTITY in which two provenances differ, with both values; None if they agree."""
    for part, key, title in IDENTITY:
        values = [each[part].get(key) for each in (about, other)]
        if values[0] != values[1]:
            shown = ["not recorded" if value is None else value if key == "name" else value[:SHORT_HASH]
                     for value in values]
            return f"{title}: {shown[0]} instead of {shown[1]}"
    return None


def _describe_changes(older: Mapping[str, object], newer: Mapping[str, object]) -> str:
    """Return the parameters in which two runs differ as the end of a sentence; empty if they agree."""
    changes = [f"{name}={older.get(name)!r} instead of {value!r}" for name, value in newer.items()
               if name != "output_dir" and older.get(name) != value]
    return f", with {', '.join(changes)}" if changes else ""


def sources(pairings: Sequence[Pairing], folder: str | Path) -> dict[str, dict]:
    """Return every results.json behind the pairings by its path below `folder`, for `collected_provenance`."""
    return {os.path.relpath(pairing.folders[key] / "results.json", folder): results
            for pairing in pairings for key, results in pairing.results.items()}


def saved_figure(pairing: Pairing, key: str, name: str) -> Path | None:
    """Return the PNG of a notebook's figure, beside which lies a PDF; None if the notebook did not draw it."""
    if name not in pairing.results.get(key, {}).get("figures", ()):
        return None
    path = pairing.folders[key] / "figures" / f"{name}.png"
    return path if path.is_file() else None


def show_figures(pairings: Sequence[Pairing], key: str, name: str, output_dir: str | Path) -> None:
    """Display the figure `name` of notebook `key` for every pairing, with links to its page and PDF.

    Call it in a notebook; the links are relative to the notebook's `output_dir`.
    """
    drawn = {pairing: path for pairing in pairings if (path := saved_figure(pairing, key, name))}
    for pairing, path in drawn.items():
        pdf, page = (quote(Path(os.path.relpath(target, output_dir)).as_posix()) for target in (
            path.with_suffix(".pdf"), pairing.folders[key] / f"{pairing.results[key]['notebook']}.html"))
        display(Markdown(f"**{escape(pairing.title)}** · [page]({page}) · [PDF]({pdf})"),
                Image(path, alt=f"{name.replace('_', ' ')} of {pairing.title}"))
    if missing := [escape(pairing.title) for pairing in pairings if pairing not in drawn]:
        display(Markdown(f"Not drawn for {', '.join(missing)}."))
    if not pairings:
        display(Markdown("Nothing was run."))
