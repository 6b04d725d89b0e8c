"""Threads and precision of torch in k-means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from itae_utils.machine import available_cores

T, R = TypeVar("T"), TypeVar("R")


def side_by_side(compute: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return `compute` of all items; several run at once, each on one thread of torch."""
    with one_thread(), ThreadPoolExecutor(available_cores(), initializer=partial(torch.set_num_threads, 1)) as pool:
        running = [pool.submit(compute, item) for item in items]
        try:
            return [each.result() for each in running]
        except BaseException:  # also Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Let torch compute on one thread, if wanted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32, also where the user allows TF32 or bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
