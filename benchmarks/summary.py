"""Turn measured times and bytes into ratios, one per row, and compare them with their targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from benchmarks.contenders import ALL_SOURCES, COUNTS, EAGER, LATE, PLAIN, REGISTERS, SIZES, START, loop, ours
from benchmarks.study import ELKAN, LLOYD, OURS, STUDY

TIME = {ours(1): {"S": 0.92, "B": 0.92, "L": 0.98}, ours(48): {"S": 0.97, "B": 0.97, "L": 1.02},
        ALL_SOURCES: {"S": 1.05}}  # upper limits
MORE = {START: {"S": 1.15}, LATE: {"S": 0.65}}  # upper limits
MEMORY = {ours(count): 1.1 for count in COUNTS}  # upper limits
FASTER = 45  # lower limit: time of the loop over 48 variants ÷ time of the one pass
FROM_FILES = 0.95  # lower limit on a GPU
STUDY_FASTER = {"k=100": 6, "k=200": 8, "ablation": 3}  # lower limits: time of scikit-learn's faster algorithm ÷ ours
INERTIA = 1.001  # upper limit: mean inertia ÷ scikit-learn's
HEADINGS = {
    "passes": "time ÷ plain forward_features",
    "registers": "time beyond ours, 0 variants ÷ plain forward_features",
    "loop": "time ÷ ours with as many variants",
    "rate": "share of a matrix product's rate",
    "memory": "peak memory above the weights ÷ plain forward_features",
    "files": "images per second ÷ bare forward",
    "scaling": "time ÷ time of the smaller run",
    "store": "time ÷ cold",
    "study": "time ÷ our k-means",
    "inertia": "inertia ÷ that of scikit-learn lloyd",
    "shares": "share of a report's time",
    "estimate": "the dry run's estimate ÷ time",
}
ORDER = [*SIZES, "demo", *STUDY, "k-means", "paper"]

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
    sections = {"passes": _passes, "memory": _memory, "scaling": _scaling, "growth": _scaling, "store": _store,
                "study": _study, "shares": _shares, "files": lambda size, found: _files(size, found, on_gpu)}
    rows = [row for part, rows_of in sections.items() for size, found in run.get(part, {}).items()
            for row in rows_of(size, found)]
    return sorted(rows, key=lambda row: (list(HEADINGS).index(row["heading"]), ORDER.index(row["size"])))


def table(run: Mapping[str, object]) -> Iterator[str]:
    """Yield a run as lines of text: the models, then every ratio below its heading."""
    for size, found in run.get("passes", {}).items():
        yield from _described(size, found)
    for size, found in run.get("study", {}).items():
        yield from _described_study(size, found)
    for size, found in run.get("shares", {}).items():
        yield f"report, {size}: " + ", ".join(f"{what} {seconds:.3g} s" for what, seconds in found["seconds"].items())
    shown = None
    for row in run.get("summary", []):
        if row["heading"] != shown:
            shown = row["heading"]
            yield from ("", HEADINGS[shown])
        spread = f"{row['low']:.3f} – {row['high']:.3f}" if row["low"] < row["high"] else ""
        target = f"{row['target']}: {row['verdict']}" if row["target"] else ""
        yield f"  {row['size']:<9}{row['what']:<50}{row['ratio']:>8.3f}  {spread:<17}  {target}".rstrip()


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
    for name in filter(seconds.__contains__, REGISTERS):  # runs before these were measured lack them
        more = np.subtract(seconds[name], seconds[ours(0)])
        yield _row("registers", size, name, more, seconds[PLAIN], at_most=MORE.get(name, {}).get(size))
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


def _scaling(size: str, found: Mapping) -> Iterator[Row]:
    for what, counts in found["counts"].items():
        of = "demo" if what == "images" and size in SIZES else size
        for few, many in pairwise(counts):
            yield _row("scaling", of, f"{few:,} to {many:,} {what}", found["seconds"][f"{many} {what}"],
                       found["seconds"][f"{few} {what}"])


def _store(size: str, found: Mapping) -> Iterator[Row]:
    yield _row("store", size, "warm store", found["seconds"]["warm"], found["seconds"]["cold"])


def _study(size: str, found: Mapping) -> Iterator[Row]:
    seconds, inertia = found["seconds"], found["inertia"]
    faster = min((LLOYD, ELKAN), key=lambda name: np.median(seconds[name]))
    for name in seconds:
        if name != OURS:
            yield _row("study", size, name, seconds[name], seconds[OURS],
                       at_least=STUDY_FASTER.get(size) if name == faster else None)
        if name not in (LLOYD, ELKAN):
            yield _row("inertia", size, f"{name}, mean of the runs", np.mean(inertia[name]), np.mean(inertia[LLOYD]),
                       at_most=INERTIA if name == OURS else None)
    rate = found["flop"] / np.array(seconds[OURS])
    yield _row("rate", size, "our k-means, its matrix products", rate, found["matmul_flop_per_second"])


def _described_study(size: str, found: Mapping) -> Iterator[str]:
    yield "k-means, {0}: {matrices} × {n:,} × {dim}, k={k}, {seeds} runs of {n_init} starts".format(
        size, **found["work"])
    for name, seconds in found["seconds"].items():
        inertia, memory = np.array(found["inertia"][name]), found["memory"].get(name)
        error = inertia.std(axis=1).mean() / np.sqrt(inertia.size)
        yield (f"  {name:<20}{np.median(seconds):>7.2f} s ({min(seconds):.2f} – {max(seconds):.2f}), inertia "
               f"{inertia.mean():.1f} ± {error:.1f}, best {inertia.min(axis=1).mean():.1f}, "
               + ("memory not measured" if memory is None else f"memory {memory / 1e6:,.0f} MB"))


def _shares(size: str, found: Mapping) -> Iterator[Row]:
    total = sum(found["seconds"].values())
    for what, seconds in found["seconds"].items():
        yield _row("shares", size, what, seconds, total)
    for what, (estimated, measured) in found["estimate"].items():
        yield _row("estimate", size, what, estimated, measured)


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

