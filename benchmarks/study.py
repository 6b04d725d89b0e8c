"""K-means of this package beside scikit-learn's and faiss's, on random features; and how its time grows.

    python -m benchmarks.study N DIM K SEEDS N_INIT CONTENDER

prints the peak memory of a contender above the features, in bytes, on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import click
import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import CLEAR, in_child, peak
from benchmarks.passes import matmul_rate
from benchmarks.timing import Conditions, interleaved
from itae_utils.analysis import remembered
from itae_utils.analysis.kmeans import cluster_seeds

try:
    import faiss
except ImportError:
    faiss = None

TURNS = 3  # at most, because some contenders take a minute
FAISS_ROUNDS = 50
OURS, LLOYD, ELKAN, FAISS = "ours", "scikit-learn lloyd", "scikit-learn elkan", f"faiss, {FAISS_ROUNDS} rounds"


@dataclass(frozen=True)
class Clustering:
    """Work for k-means: `seeds` runs, each the best of `n_init` starts, on each of some matrices (n, dim)."""

    n: int = 10_000
    dim: int = 768
    k: int = 100
    seeds: int = 10
    n_init: int = 1
    matrices: int = 1


STUDY = {"k=10": Clustering(k=10), "k=100": Clustering(k=100), "k=200": Clustering(k=200),
         "demo": Clustering(1797, 64, 10, n_init=10),
         "ablation": Clustering(1797, 64, 10, seeds=5, n_init=10, matrices=24)}
BASE = Clustering(n=5_000)
GROWTH = {"images": ("n", (2_500, 5_000, 10_000, 20_000)), "dimensions": ("dim", (192, 384, 768)),
          "clusters": ("k", (50, 100, 200)), "starts": ("seeds", (5, 10, 20, 40))}


def made_features(work: Clustering, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors (n, dim) of k overlapping classes, and the classes (n,)."""
    rng = np.random.default_rng(seed)
    scales = 1 / np.sqrt(np.arange(1, work.dim + 1))
    classes = rng.integers(work.k, size=work.n)
    points = (rng.standard_normal((work.k, work.dim)) * scales * 0.8)[classes]
    points = (points + rng.standard_normal((work.n, work.dim)) * scales).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True), classes


def labels_of(
    name: str, work: Clustering, matrices: Sequence[np.ndarray], device: str = "cpu", first: int = 0
) -> list[np.ndarray]:
    """Return the labels (seeds, n) that a contender finds for each matrix, with seeds from `first`.

    Ours clusters several matrices in one call, as the notebooks do. The others don't run on another device.
    """
    seeds = range(first, first + work.seeds)
    settings = {"seeds": seeds, "n_init": work.n_init, "normalize": False}
    if name == OURS and len(matrices) > 1:
        found = remembered.clusters_of_all(dict(enumerate(matrices)), work.k, **settings, store=None)
        return [labels for labels, _ in found.values()]
    if name == OURS:
        return [cluster_seeds(matrices[0], work.k, **settings, device=device)[0]]
    run = _faiss if name == FAISS else partial(_sklearn, name.split()[-1])
    return [np.stack([run(work, points, seed) for seed in seeds]) for points in matrices]


def _sklearn(algorithm: str, work: Clustering, points: np.ndarray, seed: int) -> np.ndarray:
    settings = {"n_init": work.n_init, "tol": 0, "random_state": seed, "algorithm": algorithm}
    return KMeans(work.k, **settings).fit(points).labels_


def _faiss(work: Clustering, points: np.ndarray, seed: int) -> np.ndarray:
    found = faiss.Kmeans(work.dim, work.k, niter=FAISS_ROUNDS, nredo=work.n_init, seed=seed,
                         init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
                         min_points_per_centroid=1, max_points_per_centroid=len(points))
    found.train(points)
    return found.assign(points)[1]


def inertia(points: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the sum of squared distances to the means of the clusters, in float64."""
    points, members = points.astype(np.float64), np.eye(k)[labels]
    lengths = np.square(members.T @ points).sum(axis=1)
    return float(np.square(points).sum() - (lengths / np.maximum(members.sum(axis=0), 1)).sum())


def measure_study(size: str, conditions: Conditions) -> dict[str, object]:
    """Return seconds per turn, inertias per matrix and run, and peak memory of every contender.

    Every turn has other seeds, so that the mean inertia is that of many runs. The operations are those of the matrix
    products that ours makes, as torch counts them. Sums of rows do not count.
    """
    work = STUDY[size]
    matrices = [made_features(work, seed)[0] for seed in range(work.matrices)]
    names = [OURS, LLOYD, ELKAN, *([FAISS] if faiss else [])]
    found: dict[str, list] = {name: [] for name in names}
    if not faiss:
        conditions.log("faiss is skipped: pip install faiss-cpu")

    def call(name: str) -> None:
        found[name].append(labels_of(name, work, matrices, conditions.device, first=len(found[name]) * work.seeds))

    with threadpool_limits(torch.get_num_threads()):
        for name in names:
            _warm_up(name, work, matrices[0], conditions.device)
        seconds = interleaved({name: partial(call, name) for name in names}, _few_turns(conditions))
        with FlopCounterMode(display=False) as counter:
            for points in matrices:  # one by one, because operations are counted in this thread only
                labels_of(OURS, work, [points], conditions.device)
        rate = matmul_rate(replace(conditions, precision="fp32"))
    conditions.log("inertia and memory")
    inertias = {name: [[inertia(points, run, work.k) for turn in turns for run in turn[number]]
                       for number, points in enumerate(matrices)] for name, turns in found.items()}
    return {"work": asdict(work), "seconds": seconds, "inertia": inertias, "flop": counter.get_total_flops(),
            "matmul_flop_per_second": rate, "memory": _memory(names, work, conditions)}


def _memory(names: Sequence[str], work: Clustering, conditions: Conditions) -> dict[str, int]:
    """Return the peak memory above one matrix, in bytes by contender, empty if the system does not report it."""
    if conditions.kind == "cuda":
        call = partial(labels_of, OURS, work, [made_features(work)[0]], conditions.device)
        return {OURS: peak(call, torch.device(conditions.device))}
    if not os.access(CLEAR, os.W_OK):
        return {}
    seeds = {OURS: work.seeds}  # the others run seed after seed
    return {name: in_child("benchmarks.study", work.n, work.dim, work.k, seeds.get(name, 1), work.n_init, name)
            for name in names}


def measure_growth(_size: str, conditions: Conditions) -> dict[str, object]:
    """Time k-means on `BASE` with other numbers of images, dimensions, clusters and starts."""
    calls = {}
    for what, (field, counts) in GROWTH.items():
        for count in counts:
            work = replace(BASE, **{field: count})
            calls[f"{count} {what}"] = partial(labels_of, OURS, work, [made_features(work)[0]], conditions.device)
    _warm_up(OURS, work, made_features(work)[0], conditions.device)
    return {"base": asdict(BASE), "counts": {what: list(counts) for what, (_, counts) in GROWTH.items()},
            "seconds": interleaved(calls, _few_turns(conditions))}


def _warm_up(name: str, work: Clustering, points: np.ndarray, device: str = "cpu") -> None:
    labels_of(name, replace(work, seeds=1, n_init=1), [points[: 4 * work.k]], device)


def _few_turns(conditions: Conditions) -> Conditions:
    return replace(conditions, repeats=min(conditions.repeats, TURNS))


@click.command(hidden=True)
@click.argument("numbers", nargs=5, type=int)
@click.argument("contender")
def main(numbers: tuple[int, ...], contender: str) -> None:
    """Print the peak memory of one contender on the CPU, in bytes."""
    work = Clustering(*numbers)
    points = made_features(work)[0]
    _warm_up(contender, work, points)
    click.echo(peak(partial(labels_of, contender, work, [points]), torch.device("cpu")))


if __name__ == "__main__":
    main()
