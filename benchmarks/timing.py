"""Under which conditions things are measured, and times taken in turns, so that the machine's moods hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditions:
    """How to measure.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        precision: "fp32" or "bf16" (autocast).
        repeats: how often everything is timed.
        batch: images at a time; None is the size's own.
        say: is told what is going on.
    """

    device: str = "cpu"
    precision: str = "fp32"
    repeats: int = 1
    batch: int | None = None
    say: Callable[[str], None] = lambda words: None

    @property
    def kind(self) -> str:
        """Kind of device, "cpu" or "cuda"."""
        return torch.device(self.device).type

    @contextmanager
    def running(self) -> Iterator[None]:
        """How models are run: no gradients, and bfloat16 autocast where it is asked for."""
        with torch.inference_mode(), torch.autocast(self.kind, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def wait(self) -> None:
        """Until a GPU has done what it was given."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call, until the device is done."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start


def interleaved(calls: Mapping[str, Callable[[], object]], how: Conditions, *, turns: int = 1,
                once: Collection[str] = ()) -> dict[str, list[float]]:
    """Seconds of each call in each repeat, taken in turns; every turn starts one further on than the last.

    Args:
        calls: by name.
        how: holds the number of repeats.
        turns: of a repeat, whose time is the median of them: a busy moment then spoils a turn, not the repeat.
        once: calls that are long enough to be run in the first turn alone.
    """
    names, seconds = list(calls), {name: [] for name in calls}
    for repeat in range(how.repeats):
        how.say(f"repeat {repeat + 1} of {how.repeats}")
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(turns):
            start = (repeat * turns + turn) % len(names)
            for name in names[start:] + names[:start]:
                if turn == 0 or name not in once:
                    taken[name].append(how.seconds(calls[name]))
        for name, values in taken.items():
            seconds[name].append(statistics.median(values))
    return seconds
