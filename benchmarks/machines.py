"""Extraction by Dask beside the same without it: what workers gain, what a shard costs, what a lost worker costs.

    python -m benchmarks.machines [--images 40000] [--many 200000]

One worker is one thread, and so is what it is compared with. The model is the embedded demo, the images are made as
they are read. Times are taken in turns; what is told is the median of the ratios within a round, with their range.
`--many` images then go through one process and through two workers, and the memory of each is watched.
"""

from __future__ import annotations

import json
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
from PIL import Image

VARIANTS = 8


class MadeImages:
    """A sequence of pictures that are made when they are asked for, each from its number."""

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
    """`MadeImages` as the package takes a data set."""

    images: MadeImages
    name: str = "made"
    targets: None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), -1


@dataclass
class Timed:
    """Seconds of a run, and its highest memory in the first and in the last fifth of the time, in MB, by process."""

    seconds: float
    memory: dict[int, tuple[float, float]]


def run(images: int, client: object = None, disturb: Callable[[], None] | None = None) -> Timed:
    """Extract the features of made images into a new store, and watch the memory of all processes involved."""
    import itae_utils as itae

    settings = {f"v{number}": itae.ITAE("key", 1.0 + number / 10) for number in range(1, VARIANTS)}
    pids = [os.getpid()] if client is None else list(client.run(os.getpid).values())
    backbone, dataset = itae.load_backbone("demo", device="cpu"), MadeDataset(MadeImages(images))
    with tempfile.TemporaryDirectory() as store, watched(pids) as memory:
        if disturb is not None:
            threading.Timer(1.5, disturb).start()
        start = time.perf_counter()
        features = itae.extract_features(backbone, dataset, {"baseline": None, **settings}, store=store, client=client)
        seconds = time.perf_counter() - start
        if set(features.computed.values()) != {images}:
            raise RuntimeError("not every image was computed")
    return Timed(seconds, {pid: first_and_last(seen) for pid, seen in memory.items()})


@contextmanager
def watched(pids: list[int]) -> Iterator[dict[int, list[float]]]:
    """Resident memory of processes in MB, ten times a second."""
    import psutil

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


def first_and_last(values: list[float]) -> tuple[float, float]:
    """The highest of the second fifth (the first is the start), and of the last."""
    fifth = max(1, len(values) // 5)
    return max(values[fifth:2 * fifth] or [0.0]), max(values[-fifth:] or [0.0])


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def kill_a_worker(client: object) -> None:
    """End one worker process without warning."""
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)


def compare(images: int, rounds: int) -> dict[str, object]:
    """Rounds of: without Dask, one worker, two workers, two of which one is killed."""
    import torch
    from distributed import Client

    from itae_utils.extraction.job import shard_size
    from itae_utils.extraction.workers import local_cluster
    from itae_utils.models.backbones import load_backbone

    torch.set_num_threads(1)
    shards = -(-images // shard_size(load_backbone("demo", device="cpu"), 64))
    times: dict[str, list[float]] = {"alone": [], "one": [], "two": [], "killed": []}
    with (local_cluster("local:1", threads=1) as one, Client(one) as first,
          local_cluster("local:2", threads=1) as two, Client(two) as second):
        for client in (None, first, second):  # what is imported is imported now
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
    """Memory over a long run: in one process, and in two workers."""
    from distributed import Client

    from itae_utils.extraction.workers import local_cluster

    found: dict[str, object] = {"images": images}
    with local_cluster("local:2", threads=1) as cluster, Client(cluster) as client:
        for name, who in (("one process", None), ("two workers", client)):
            timed = run(images, who)
            found[name] = {"seconds": timed.seconds, "memory (MB), early and late": list(timed.memory.values())}
            click.echo(f"{images:,} images, {name}: {timed.seconds:.0f} s, memory early and late "
                       + "; ".join(f"{early:.0f}, {late:.0f} MB" for early, late in timed.memory.values()))
    return found


@click.command()
@click.option("--images", type=click.IntRange(1), default=40_000, show_default=True, help="Of a timed run.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--many", type=click.IntRange(0), default=200_000, show_default=True, help="Of the long run; 0: none.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("reports/machines.json"), show_default=True)
def main(images: int, rounds: int, many: int, output: Path) -> None:
    """Print what was measured, and write every number to a file."""
    os.environ["ITAE_PROGRESS"] = "0"
    found: dict[str, object] = {"compare": compare(images, rounds)}
    for name, each in found["compare"]["ratios"].items():
        click.echo(f"{name:<34} {each['median']:.3f}  ({each['low']:.3f} to {each['high']:.3f})")
    cost, alone = found["compare"]["seconds a shard"], statistics.median(found["compare"]["seconds"]["alone"])
    low, median, high = (1000 * cost[name] for name in ("low", "median", "high"))
    click.echo(f"Dask adds {median:.0f} ms a shard ({low:.0f} to {high:.0f}), "
               f"{cost['median'] * found['compare']['shards'] / alone:.1%} of its work")
    if many:
        found["many"] = many_images(many)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
