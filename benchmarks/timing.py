"""The conditions of a measurement, and times taken in turns so that a busy moment affects all contenders alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditions:
    """The conditions of a measurement.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        precision: "fp32" or "bf16" (autocast).
        repeats: number of times per contender.
        batch: batch size; None for the model's default.
        log: called with progress messages.
    """

    device: str = "cpu"
    precision: str = "fp32"
    repeats: int = 1
    batch: int | None = None
    log: Callable[[str], None] = lambda message: None

    @property
    def kind(self) -> str:
        """Kind of device, "cpu" or "cuda"."""
        return torch.device(self.device).type

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run models without gradients, and in bfloat16 autocast if `precision` is "bf16"."""
        with torch.inference_mode(), torch.autocast(self.kind, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def synchronize(self) -> None:
        """Wait until a GPU has finished its work."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the time of one call, until the device has finished."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start


def interleaved(calls: Mapping[str, Callable[[], object]], conditions: Conditions, *, turns: int = 1,
                once: Collection[str] = ()) -> dict[str, list[float]]:
    """Time calls in turns; return the seconds of each call in each repeat. Every turn begins with the next call.

    Args:
        calls: the calls by name.
        conditions: holds the number of repeats.
        turns: turns per repeat. A repeat's time is their median, so that a busy moment spoils a turn, not the repeat.
        once: names of long calls, which run in the first turn of a repeat only.
    """
    names, seconds = list(calls), {name: [] for name in calls}
    for repeat in range(conditions.repeats):
        conditions.log(f"repeat {repeat + 1} of {conditions.repeats}")
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(turns):
            start = (repeat * turns + turn) % len(names)
            for name in names[start:] + names[:start]:
                if turn == 0 or name not in once:
                    taken[name].append(conditions.seconds(calls[name]))
        for name, values in taken.items():
            seconds[name].append(statistics.median(values))
    return seconds
