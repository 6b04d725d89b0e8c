"""Compare extraction with and without Dask: the gain from workers, the cost per shard and the cost of a lost worker.

    python -m benchmarks.machines [--images 40000] [--many 200000]

A worker has one thread, and so has the run without Dask. The model is the embedded demo; the images are generated when
read. Times are taken in turns, and the table shows the median of the ratios within a round, with their range. Then
`--many` images go through one process and through two workers, and the memory of each process is recorded.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import psutil
import torch
from distributed import Client
from PIL import Image

import itae_utils as itae
from itae_utils.extraction.job import shard_size
from itae_utils.extraction.workers import local_cluster
from itae_utils.files import make_folder, write_json
from itae_utils.models.backbones import load_backbone

VARIANTS = 8
DISTURB_AFTER = 1.5  # seconds


class MadeImages:
    """A sequence of pictures, each generated from its index when read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return (np.indices((28, 28)).sum(axis=0) * (1 + index % 97) + index).astype(np.uint8)


@dataclass(frozen=True)
class MadeDataset:
    """A data set of `MadeImages` without labels."""

    images: MadeImages
    name: str = "made"
    targets: None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), -1


@dataclass
class Timed:
    """Time and memory of a run.

    Attributes:
        seconds: the run's time.
        memory: peak memory early and late in the run, in MB, by process; see `early_and_late`.
    """

    seconds: float
    memory: dict[int, tuple[float, float]]


def run(images: int, client: Client | None = None, disturb: Callable[[], None] | None = None) -> Timed:
    """Extract the features of `images` pictures into a new store, and record the memory of the processes that compute.

    Args:
        images: number of images.
        client: a `distributed.Client`; None computes in this process.
        disturb: called `DISTURB_AFTER` seconds after the start.

    Raises:
        RuntimeError: the run ended before `disturb`, or some image was not computed.
    """
    settings = {f"v{number}": itae.ITAE("key", 1.0 + number / 10) for number in range(1, VARIANTS)}
    pids = [os.getpid()] if client is None else list(client.run(os.getpid).values())
    backbone, dataset = load_backbone("demo", device="cpu"), MadeDataset(MadeImages(images))
    with tempfile.TemporaryDirectory() as store, watched(pids) as memory:
        timer = threading.Timer(DISTURB_AFTER, disturb or (lambda: None))
        timer.start()
        start = time.perf_counter()
        features = itae.extract_features(backbone, dataset, {"baseline": None, **settings}, store=store, client=client)
        seconds = time.perf_counter() - start
        timer.cancel()
        if disturb is not None and seconds < DISTURB_AFTER:
            raise RuntimeError(f"the run ended after {seconds:.1f} s, before a worker was killed: use more --images")
        if set(features.computed.values()) != {images}:
            raise RuntimeError("not every image was computed")
    return Timed(seconds, {pid: early_and_late(seen) for pid, seen in memory.items()})


@contextmanager
def watched(pids: list[int]) -> Iterator[dict[int, list[float]]]:
    """Record the resident memory of processes in MB, ten times per second."""
    seen: dict[int, list[float]] = {pid: [] for pid in pids}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for pid, values in seen.items():
                try:
                    values.append(psutil.Process(pid).memory_info().rss / 1e6)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def early_and_late(values: list[float]) -> tuple[float, float]:
    """Return the maximum of the second fifth (the first is the start-up) and of the last fifth."""
    fifth = max(1, len(values) // 5)
    return max(values[fifth:2 * fifth] or [0.0]), max(values[-fifth:] or [0.0])


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, lowest and highest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def kill_a_worker(client: Client) -> None:
    """Kill the process of one worker."""
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)


def compare(images: int, rounds: int) -> dict[str, object]:
    """Time rounds of four runs: without Dask, one worker, two workers, and two workers of which one is killed."""
    torch.set_num_threads(1)
    shards = -(-images // shard_size(load_backbone("demo", device="cpu"), 64))
    times: dict[str, list[float]] = {"alone": [], "one": [], "two": [], "killed": []}
    with (local_cluster("local:1", threads=1) as one, Client(one) as first,
          local_cluster("local:2", threads=1) as two, Client(two) as second):
        for client in (None, first, second):  # a warm-up, which also imports all modules
            run(2000, client)
        for number in range(rounds):
            times["alone"].append(run(images).seconds)
            times["one"].append(run(images, first).seconds)
            times["two"].append(run(images, second).seconds)
            times["killed"].append(run(images, second, lambda: kill_a_worker(second)).seconds)
            click.echo(f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:.1f} s" for name, each in times.items()))
    ratio = {name: spread([a / b for a, b in zip(times[top], times[bottom], strict=True)])
             for name, top, bottom in (("one worker / alone", "one", "alone"), ("two workers / one", "two", "one"),
                                       ("one of two killed / two workers", "killed", "two"))}
    cost = [(a - b) / shards for a, b in zip(times["one"], times["alone"], strict=True)]
    return {"images": images, "shards": shards, "seconds": times, "ratios": ratio, "seconds a shard": spread(cost)}


def many_images(images: int) -> dict[str, object]:
    """Record time and memory of a long run in one process and in two workers."""
    found: dict[str, object] = {"images": images}
    with local_cluster("local:2", threads=1) as cluster, Client(cluster) as client:
        for name, who in (("one process", None), ("two workers", client)):
            timed = run(images, who)
            found[name] = {"seconds": timed.seconds, "memory (MB), early and late": list(timed.memory.values())}
            click.echo(f"{images:,} images, {name}: {timed.seconds:.0f} s, memory early and late "
                       + "; ".join(f"{early:.0f}, {late:.0f} MB" for early, late in timed.memory.values()))
    return found


@click.command()
@click.option("--images", type=click.IntRange(1), default=40_000, show_default=True, help="Images per timed run.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--many", type=click.IntRange(0), default=200_000, show_default=True, help="Images of the long run.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("reports/machines.json"), show_default=True)
def main(images: int, rounds: int, many: int, output: Path) -> None:
    """Print the results, and write every number to a file."""
    os.environ["ITAE_PROGRESS"] = "0"
    found: dict[str, object] = {"compare": compare(images, rounds)}
    for name, each in found["compare"]["ratios"].items():
        click.echo(f"{name:<34} {each['median']:.3f}  ({each['low']:.3f} to {each['high']:.3f})")
    cost, alone = found["compare"]["seconds a shard"], statistics.median(found["compare"]["seconds"]["alone"])
    low, median, high = (1000 * cost[name] for name in ("low", "median", "high"))
    click.echo(f"Dask adds {median:.0f} ms per shard ({low:.0f} to {high:.0f}), "
               f"{cost['median'] * found['compare']['shards'] / alone:.1%} of the time without Dask")
    if many:
        found["many"] = many_images(many)
    make_folder(output.parent)
    write_json(output, found)


if __name__ == "__main__":
    main()
