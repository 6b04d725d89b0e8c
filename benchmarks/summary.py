"""Turn measured times and bytes into ratios, one per row, and compare them with their targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from benchmarks.contenders import COUNTS, EAGER, PLAIN, SIZES, loop, ours

TIME = {ours(1): {"S": 0.92, "B": 0.92, "L": 0.98}, ours(48): {"S": 0.97, "B": 0.97, "L": 1.02}}  # upper limits
MEMORY = {ours(count): 1.1 for count in COUNTS}  # upper limits
FASTER = 45  # lower limit: time of the loop over 48 variants ÷ time of the one pass
FROM_FILES = 0.95  # lower limit on a GPU
HEADINGS = {
    "passes": "time ÷ plain forward_features",
    "loop": "time ÷ ours with as many variants",
    "rate": "share of a matrix product's rate",
    "memory": "peak memory above the weights ÷ plain forward_features",
    "files": "images per second ÷ bare forward",
    "kmeans": "share of the time",
    "scaling": "time ÷ time of the smaller run",
    "store": "time ÷ cold",
}

Row = dict[str, object]


def summarize(run: Mapping[str, object]) -> list[Row]:
    """Return every ratio of a run, in the order of `HEADINGS`.

    Args:
        run: the entry of one environment in `bench.json`.

    Returns:
        Rows with the keys heading (a key of `HEADINGS`), size, what, ratio, low, high (median, lowest and highest over
        the repeats), target ("≤ 0.92", or None) and verdict ("met", "missed by 0.030", or None).
    """
    on_gpu = run["environment"]["on_gpu"]
    sections = {"passes": _passes, "memory": _memory, "kmeans": _kmeans, "scaling": _scaling, "store": _store,
                "files": lambda size, found: _files(size, found, on_gpu)}
    rows = [row for part, rows_of in sections.items() for size, found in run.get(part, {}).items()
            for row in rows_of(size, found)]
    return sorted(rows, key=lambda row: (list(HEADINGS).index(row["heading"]), [*SIZES, "demo"].index(row["size"])))


def table(run: Mapping[str, object]) -> Iterator[str]:
    """Yield a run as lines of text: the models, then every ratio below its heading."""
    for size, found in run.get("passes", {}).items():
        yield from _described(size, found)
    shown = None
    for row in run.get("summary", []):
        if row["heading"] != shown:
            shown = row["heading"]
            yield from ("", HEADINGS[shown])
        spread = f"{row['low']:.3f} – {row['high']:.3f}" if row["low"] < row["high"] else ""
        target = f"{row['target']}: {row['verdict']}" if row["target"] else ""
        yield f"  {row['size']:<5}{row['what']:<50}{row['ratio']:>8.3f}  {spread:<17}  {target}".rstrip()


def _described(size: str, found: Mapping) -> Iterator[str]:
    plain, agreement = np.median(found["seconds"][PLAIN]), found["agreement"]
    yield (f"ViT-{size}: {found['model']}, {found['image_size']} px, batch {found['batch']}, "
           f"{len(found['seconds'][PLAIN])} repeats: median, lowest – highest")
    yield f"  a plain pass takes {plain:.3g} s, {found['batch'] / plain:.3g} images per second"
    yield (f"  contenders with equal features differ by {agreement['largest_difference']:.1g} at most, "
           f"each variant changes a feature by {agreement['smallest_effect']:.1g} at least")


def _passes(size: str, found: Mapping) -> Iterator[Row]:
    seconds = found["seconds"]
    for name in seconds:
        yield _row("passes", size, name, seconds[name], seconds[PLAIN], at_most=TIME.get(name, {}).get(size))
    looped = SIZES[size].looped
    yield _row("loop", size, EAGER, seconds[EAGER], seconds[ours(1)])
    yield _row("loop", size, loop(looped), seconds[loop(looped)], seconds[ours(looped)],
               at_least=FASTER if looped == 48 else None)
    if looped != 48:
        longer = np.array(seconds[loop(looped)]) * 48 / looped
        yield _row("loop", size, f"{loop(48)} (extrapolated from {looped})", longer, seconds[ours(48)], at_least=FASTER)
    rate = found["flop_per_image"] * found["batch"] / np.array(seconds[PLAIN])
    yield _row("rate", size, PLAIN, rate, found["matmul_flop_per_second"])


def _memory(size: str, found: Mapping) -> Iterator[Row]:
    for name, grown in found["growth"].items():
        yield _row("memory", size, name, grown, found["growth"][PLAIN], at_most=MEMORY.get(name))


def _files(size: str, found: Mapping, on_gpu: bool) -> Iterator[Row]:
    seconds = found["seconds"]
    yield _row("files", size, "from JPEG files to features", seconds["bare forward"], seconds["from files"],
               at_least=FROM_FILES if on_gpu else None)


def _kmeans(size: str, found: Mapping) -> Iterator[Row]:
    seconds = found["seconds"]
    what = f"k-means on {found['variants']} variants, {found['seeds']} seeds × {found['n_init']} starts"
    yield _row("kmeans", size, what, seconds["k-means"], np.sum([*seconds.values()], axis=0))


def _scaling(size: str, found: Mapping) -> Iterator[Row]:
    for what, (few, many) in found["counts"].items():
        of = "demo" if what == "images" else size
        yield _row("scaling", of, f"{few:,} to {many:,} {what}", found["seconds"][f"{many} {what}"],
                   found["seconds"][f"{few} {what}"])


def _store(size: str, found: Mapping) -> Iterator[Row]:
    yield _row("store", size, "warm store", found["seconds"]["warm"], found["seconds"]["cold"])


def _row(heading: str, size: str, what: str, measured: object, unit: object, *, at_most: float | None = None,
         at_least: float | None = None) -> Row:
    ratios = np.atleast_1d(np.asarray(measured, dtype=float) / np.asarray(unit, dtype=float))
    ratio = float(np.median(ratios))
    target = verdict = None
    if at_most is not None or at_least is not None:
        target = f"≤ {at_most:g}" if at_least is None else f"≥ {at_least:g}"
        missed = ratio - at_most if at_least is None else at_least - ratio
        verdict = "met" if missed <= 0 else f"missed by {missed:.3f}"
    return {"heading": heading, "size": size, "what": what, "ratio": ratio, "low": float(ratios.min()),
            "high": float(ratios.max()), "target": target, "verdict": verdict}

