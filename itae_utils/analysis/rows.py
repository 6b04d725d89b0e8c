"""Features as float32 rows, checked, copied and sampled a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from sklearn.preprocessing import normalize as unit_rows

from itae_utils.errors import ItaeError

BLOCK = 4_096  # rows that are copied at a time

Parts = Callable[[], Iterable[np.ndarray]]  # called for every pass; gives matrices (m, dim) in the same order each time


def as_matrix(features: np.ndarray) -> np.ndarray:
    """Return features as a matrix; raise an `ItaeError` that says what to give if they are none."""
    if isinstance(features, Mapping):
        raise ItaeError(f"features of {len(features)} variants were given: choose one, such as "
                        f"features[{next(iter(features), 'baseline')!r}]")
    features = np.asarray(features)
    if features.ndim != 2 or features.dtype.kind not in "fiub":
        raise ItaeError(f"features of shape {features.shape} and type {features.dtype} can't be clustered: give a "
                        "matrix of numbers (images, dim)")
    return features


def read_rows(parts: Iterable[np.ndarray], normalize: bool, expected: int | None = None) -> Iterator[np.ndarray]:
    """Yield float32 copies of the parts' rows, at most `BLOCK` at a time, scaled to length 1 if `normalize`.

    Raises:
        ItaeError: a part is not a matrix, or not as wide as the others; a row is not finite; there are more or fewer
            rows than `expected`.
    """
    count, width = 0, None
    for part in parts:
        part = np.asarray(part)
        if part.ndim != 2 or (width is not None and part.shape[1] != width):
            raise ItaeError(f"a part of shape {part.shape} can't be clustered: give matrices "
                            f"(images, {'dim' if width is None else width})")
        width = part.shape[1]
        if expected is not None and count + len(part) > expected:
            break
        for start in range(0, len(part), BLOCK):
            with np.errstate(over="ignore"):  # named below
                rows = np.array(part[start : start + BLOCK], dtype=np.float32, order="C")
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad):
                raise ItaeError(f"features of image {count + bad[0]:,} are not finite in float32: extract them again")
            yield unit_rows(rows, copy=False) if normalize else rows
            count += len(rows)
    else:
        if expected in (None, count):
            return
    raise ItaeError(f"parts() does not give the same {expected:,} images each time: let it start over, as "
                    "lambda: features.parts(name) does")


def all_rows(features: np.ndarray, normalize: bool) -> np.ndarray:
    """Return a float32 copy of a matrix of features, as `read_rows`; only the copy is held."""
    held, first = np.empty(features.shape, dtype=np.float32), 0
    for rows in read_rows([features], normalize):
        held[first : first + len(rows)] = rows
        first += len(rows)
    return held


def sample_rows(blocks: Iterable[np.ndarray], bound: float) -> tuple[np.ndarray, int, np.ndarray]:
    """Return a uniform sample of the rows, all if they take at most `bound` bytes; the number of rows; their mean."""
    kept, count, total = [], 0, 0.0
    rng = np.random.default_rng(0)
    for rows in blocks:
        most = int(min(bound // (4 * rows.shape[1]), np.iinfo(np.int64).max))
        free = max(0, most - count)
        count, total = count + len(rows), total + rows.sum(axis=0, dtype=np.float64)
        if free or not kept:
            kept.append(rows[:free])
        if len(rows) > free:
            # reservoir sampling: row i takes a random one of i + 1 places, of which the sample holds the first
            kept = [np.concatenate(kept)] if len(kept) > 1 else kept
            places = rng.integers(1 + np.arange(count - len(rows) + free, count))
            taken = places < most
            kept[0][places[taken]] = rows[free:][taken]
    sample = np.concatenate(kept) if kept else np.empty((0, 0), dtype=np.float32)
    return sample, count, total / max(count, 1)
