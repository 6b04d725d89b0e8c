"""The data of the explorer's view, as JSON: pictures, logits and statistics of images, and the map of their features.

Arrays are {"type", "shape", "data"} of little-endian bytes, which JSON has in base64; pictures are JPEG in base64.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from itae_utils.analysis.feature_map import MOST_IMAGES, FeatureMap
from itae_utils.analysis.words import statistic_name, symbol
from itae_utils.data.images import shown
from itae_utils.data.items import read_item, targets_of
from itae_utils.extraction.observation import Rows, observe_rows, sample_indices
from itae_utils.method.anatomy import adapt
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import ThresholdFit
from itae_utils.models.backbones import Backbone

PAGE_BYTES = 8_000_000
OTHER_BYTES = 150_000  # of the page: text, code and styles
MOST_IN_PANEL = 128
LARGEST, SMALL = 224, 32  # pixels per side of a picture in the panel, and on the map
QUALITY = 88  # of JPEG
BINS = 96  # of the histograms
QUANTILES = 2048  # from which the share of the patches beyond any θ is read


def panel_size(jpeg_bytes: float, tokens: int, heads: int, patches: int, statistics: int, used: int) -> int:
    """Return how many images fit into the panel.

    Args:
        jpeg_bytes: of a picture in base64, on average.
        tokens: of an image, prefix tokens included.
        heads: of the last block.
        patches: of an image.
        statistics: number of them.
        used: bytes of the page that the map and the distributions take.
    """
    each = jpeg_bytes + 4 / 3 * (2 * heads * tokens + 4 * statistics * patches)
    return int(max(1, min(MOST_IN_PANEL, (PAGE_BYTES - OTHER_BYTES - used) / each)))


def explorer_data(backbone: Backbone, dataset: Dataset, setting: ITAE, fits: Mapping[str, ThresholdFit],
                  found: FeatureMap, *, rows: Rows | None = None, seed: int = 0, **reading: object
                  ) -> dict[str, object]:
    """Return the view's data: the map, and as many of its images with their logits as fit into a page.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        setting: the run's, with a number for θ or None.
        fits: by source, in the last block; the values of a fit are the sample behind the histogram.
        found: from `feature_map`.
        rows: of the images of the panel, which are on the map; by default as many are drawn and observed as fit.
        seed: for drawing the images of the panel out of those of the map.
        reading: keyword arguments of `observe_rows`.
    """
    vit, patches = adapt(backbone.model), math.prod(backbone.patch_grid)
    drawn = found.indices[sample_indices(len(found.indices), MOST_IN_PANEL, seed)] if rows is None else rows.indices
    drawn, thumbs, panels = set(drawn.tolist()), [], {}
    for number in found.indices.tolist():
        image = backbone.picture(read_item(dataset, number)[0])
        thumbs.append(jpeg(image, SMALL))
        if number in drawn:
            panels[number] = jpeg(image, LARGEST)
    sources = [source_data(source, fit, setting) for source, fit in fits.items()]
    on_map = _map(dataset, found, thumbs)
    if rows is None:
        fitting = panel_size(sum(map(len, panels.values())) / len(panels), patches + vit.num_prefix_tokens,
                             vit.blocks[-1].num_heads, patches, len(fits), used=len(as_json([sources, on_map])))
        chosen = np.array(sorted(panels))[sample_indices(len(panels), fitting, seed)]
        rows = observe_rows(backbone, dataset, chosen, rank=setting.rank, **reading)
    return {
        "grid": list(rows.patch_grid),
        "run": {"source": setting.source, "theta": setting.thresholds[-1], "edit": setting.attenuation,
                "alpha": setting.alpha},
        "sources": sources,
        "panel": panel_data(rows, [panels[number] for number in rows.indices.tolist()]),
        "map": on_map,
    }


def panel_data(rows: Rows, pictures: Sequence[str]) -> dict[str, object]:
    """Return what the panel shows of images: their numbers, pictures, logits and statistics."""
    return {"numbers": rows.indices.tolist(), "pictures": pictures,
            "logits": _array(rows.logits - rows.logits.max(axis=-1, keepdims=True), "float16"),
            "statistics": {source: _array(values, "float32") for source, values in rows.statistics.items()}}


def comparison_data(found: FeatureMap) -> dict[str, object]:
    """Return what the view shows of features before and after, but for the map's points."""
    return {"clusters": [each.tolist() for each in found.clusters],
            "neighbours": [each.tolist() for each in found.neighbours], "change": _array(found.change, "float32")}


def describe_size(data: Mapping[str, object]) -> str:
    """Return a sentence on how many images the view shows."""
    panel, on_map = (len(data[part]["numbers"]) for part in ("panel", "map"))
    return (f"{panel:,} images have their attention in this page, and {on_map:,} are on the map: at most "
            f"{MOST_IN_PANEL} and {MOST_IMAGES:,}, so that the page stays below {PAGE_BYTES // 10**6} MB.")


def as_json(data: object) -> str:
    """Return data as JSON in ASCII that may stand in a script: no name in it can end the script or start another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, default=lambda raw: base64.b64encode(raw).decode())
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def source_data(source: str, fit: ThresholdFit, setting: ITAE) -> dict[str, object]:
    """Return what the view tells about a statistic: its names, its verdict, and its distribution."""
    values = fit.values.ravel()
    counts, edges = np.histogram(values, bins=BINS)
    return {"name": source, "symbol": symbol(source), "words": statistic_name(source), "side": fit.side,
            "threshold": setting.thresholds[-1] if source == setting.source else fit.threshold,
            "fitted": fit.threshold, "verdict": fit.reason,
            "counts": counts.tolist(), "range": [float(edges[0]), float(edges[-1])], "patches": int(values.size),
            "quantiles": _array(np.quantile(values, np.linspace(0, 1, QUANTILES + 1)), "float32")}


def _map(dataset: Dataset, found: FeatureMap, thumbs: Sequence[str]) -> dict[str, object]:
    targets, names, classes = targets_of(dataset), getattr(dataset, "names", None), getattr(dataset, "classes", None)
    if targets is not None and classes is None:
        classes = range(int(np.max(targets)) + 1)
    return {
        "numbers": found.indices.tolist(),
        "pictures": thumbs,
        "names": None if names is None else [shown(names[number]) for number in found.indices],
        "classes": None if targets is None else np.asarray(targets)[found.indices].tolist(),
        "classNames": None if targets is None else [shown(name) for name in classes],
        "points": None if found.points is None else [_array(points, "float32") for points in found.points],
        **comparison_data(found),
    }


def _array(values: np.ndarray, kind: str) -> dict[str, object]:
    little = np.ascontiguousarray(values).astype(np.dtype(kind).newbyteorder("<"))
    return {"type": kind, "shape": list(little.shape), "data": little.tobytes()}


def jpeg(picture: np.ndarray, side: int) -> str:
    """Return a picture (H, W, 3) in [0, 1] as a JPEG file in base64, at most `side` pixels wide and high."""
    image = Image.fromarray(np.round(255 * picture).astype(np.uint8))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()
