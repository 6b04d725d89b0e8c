"""Lloyd's algorithm in torch: many starts on one matrix at once, until no label changes, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from itae_utils.analysis.centres import BLOCK, Clusters, Moves, Scores

MOST_ROUNDS = 300
ROUNDING = 1e-6     # squared distances below this share of the largest ‖x‖² may be rounding errors
MOST_ACTIVE = 0.75  # starts that have ended are dropped when no more than this share still runs

Progress = Callable[[int], object]  # called with the number of starts that have ended
Parts = Callable[[], Iterable[Tensor]]  # called for every pass; gives matrices (m, d) in the same order each time


class Labels:
    """The labels of the starts that still run, and the final labels of those that have ended.

    Attributes:
        running: labels (S, n) int64.
        final: labels of all starts, (all S, n) int32.
    """

    def __init__(self, starts: int, n: int, device: torch.device, progress: Progress) -> None:
        self.running = torch.zeros(starts, n, dtype=torch.int64, device=device)
        self.final = torch.empty(starts, n, dtype=torch.int32, device=device)
        self._starts, self._progress = torch.arange(starts, device=device), progress

    def end(self, starts: Tensor) -> None:
        """End the starts for which `starts` is True."""
        self.final[self._starts[starts]] = self.running[starts].int()
        self.running, self._starts = self.running[~starts], self._starts[~starts]
        self._progress(int(starts.sum()))


def _relabel(scores: Tensor, labels: Tensor, is_first: bool, has_ties: bool
             ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Update labels (S, m) in place by scores (S, k, m).

    Args:
        scores: of all centres.
        labels: of the last round.
        is_first: whether this is the first round, in which every point comes to a cluster.
        has_ties: whether centres may coincide. Then all points go to the first of them, so that the others are empty
            and get other points.

    Returns:
        The points that changed, their old clusters (None in the first round) and new clusters, numbered over all
        starts; and the highest score of every point, (S, m).
    """
    # A maximum is much faster than its index, so the index is computed only for points that change.
    best = scores.amax(dim=1)
    if has_ties or is_first:
        all_new = torch.zeros_like(labels)
        for cluster in reversed(range(scores.shape[1])):  # three times as fast as argmax
            all_new.masked_fill_(scores[:, cluster] == best, cluster)
        changed = (all_new != labels) | is_first
    else:
        changed = best > scores.gather(1, labels[:, None])[:, 0]
    starts, points = changed.nonzero(as_tuple=True)
    new = all_new[changed] if has_ties or is_first else scores[starts, :, points].argmax(dim=1)
    numbers = starts * scores.shape[1]
    old = None if is_first else numbers + labels[starts, points]
    labels[starts, points] = new
    return points, old, numbers + new, best


def _fill_empty(clusters: Clusters, labels: Tensor, distances: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Move the points that are farthest from their centres to the empty clusters, as scikit-learn does.

    A cluster stays empty if all points lie on their centres: there are fewer distinct points than clusters.

    Args:
        clusters: their sums and sizes change.
        labels: (S, n); they change.
        distances: of each point to its centre, squared (S, n).
        rows: gives points by their numbers, (m,) -> (m, d).

    Returns:
        The clusters that have gained or lost points.
    """
    k, touched = clusters.k, [labels.new_empty(0)]
    for start in (clusters.sizes.view(-1, k) == 0).any(dim=1).nonzero()[:, 0].tolist():
        empty = (clusters.sizes[start * k : (start + 1) * k] == 0).nonzero()[:, 0]
        far, points = distances[start].topk(min(len(empty), distances.shape[1]))
        points = points[far > 0]
        if len(points):
            old, new = labels[start, points], empty[: len(points)]
            labels[start, points] = new
            moves = Moves.of(torch.arange(len(points), device=points.device), start * k + old, start * k + new)
            clusters.add(moves, rows(points))
            touched.append(moves.clusters)
    return torch.cat(touched)


def _has_moved(clusters: Tensor, k: int, starts: int) -> Tensor:
    """Return for each start whether any of `clusters` is its own, (S,) bool."""
    moved = torch.zeros(starts, dtype=torch.bool, device=clusters.device)
    moved[clusters // k] = True
    return moved


def lloyd(
    points: Tensor, centres: Tensor, products: Tensor | None = None, progress: Progress = lambda starts: None
) -> Tensor:
    """Run Lloyd's algorithm on points (n, d) from the centres (S, k, d) of S starts, with all scores in memory.

    Args:
        points: float32.
        centres: float32.
        products: from `plus_plus.inner_products`, or None.
        progress: called with the number of starts that have ended.

    Returns:
        The labels (S, n), int32.
    """
    squares = points.square().sum(dim=1)
    scores = Scores(clusters := Clusters(centres), points, products)
    labels, filled = Labels(len(centres), len(points), points.device, progress), ()
    for turn in range(MOST_ROUNDS):
        of_starts = scores.values.unflatten(0, (-1, clusters.k))
        changed, old, new, best = _relabel(of_starts, labels.running, turn == 0, has_ties=len(filled) > 0)
        filled = labels.running.new_empty(0)
        if len(changed):
            moves = Moves.of(changed, old, new)
            clusters.add(moves, points)
            if not clusters.sizes.all():
                filled = _fill_empty(clusters, labels.running, _distances(squares, best), points.__getitem__)
            scores.update(moves)
            clusters.recentre(filled)
            scores.renew(filled)
            touched = torch.cat([filled, moves.clusters])
        else:
            touched = filled
        moved = _has_moved(touched, clusters.k, len(labels.running))
        if moved.sum() <= MOST_ACTIVE * len(moved):
            labels.end(~moved)
            scores.keep(moved)
        if not len(labels.running):
            return labels.final
    labels.end(torch.ones_like(moved))
    return labels.final


def lloyd_in_parts(parts: Parts, n: int, centres: Tensor, progress: Progress = lambda starts: None) -> Tensor:
    """Run `lloyd` on n points that are read part by part, once per round; no scores are kept."""
    clusters, labels, filled = Clusters(centres), Labels(len(centres), n, centres.device, progress), ()
    distances = torch.empty(len(centres), n, device=centres.device)
    for turn in range(MOST_ROUNDS):
        touched = []
        for first, points in slices(parts(), max(1, BLOCK // len(clusters.sizes))):
            rows = slice(first, first + len(points))
            scores = clusters.scores(slice(None), points).unflatten(0, (-1, clusters.k))
            changed, old, new, best = _relabel(scores, labels.running[:, rows], turn == 0, has_ties=len(filled) > 0)
            distances[:, rows] = _distances(points.square().sum(dim=1), best)
            if len(changed):
                moves = Moves.of(changed, old, new)
                clusters.add(moves, points)
                touched.append(moves.clusters)
        filled = ()
        if touched and not clusters.sizes.all():
            filled = _fill_empty(clusters, labels.running, distances, partial(_rows, parts))
            touched.append(filled)
        touched = torch.cat([labels.running.new_empty(0), *touched]).unique()
        clusters.recentre(touched)
        moved = _has_moved(touched, clusters.k, len(labels.running))
        if not moved.all():
            labels.end(~moved)
            clusters.keep(moved)
            distances = distances[moved]
        if not len(labels.running):
            return labels.final
    labels.end(torch.ones_like(moved))
    return labels.final


def _distances(squares: Tensor, best: Tensor) -> Tensor:
    """Return squared distances to the nearest centre from ‖x‖² and the best score, 0 if that may be rounding."""
    distances = squares - 2 * best
    return distances.where(distances > ROUNDING * squares.max(), 0)


def slices(parts: Iterable[Tensor], size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield parts in slices of at most `size` rows, each with the number of its first row."""
    first = 0
    for part in parts:
        for piece in part.split(size):
            yield first, piece
            first += len(piece)


def _rows(parts: Parts, numbers: Tensor) -> Tensor:
    """Return rows of the parts by their numbers, from one pass."""
    found = {}
    for first, part in slices(parts(), BLOCK):
        for number in numbers[(first <= numbers) & (numbers < first + len(part))].tolist():
            found[number] = part[number - first]
    return torch.stack([found[number] for number in numbers.tolist()])


def inertias_of(parts: Parts, labels: Tensor, k: int) -> Tensor:
    """Return the sum of squared distances to the means of the clusters, for labels (S, n): (S,) float64."""
    clusters = labels + k * torch.arange(len(labels), device=labels.device)[:, None]
    sizes, sums, total = clusters.flatten().bincount(minlength=k * len(labels)), 0, 0
    for first, points in slices(parts(), 1 + BLOCK // (8 * len(labels))):
        points = points.double()
        members = clusters[:, first : first + len(points)].flatten()
        moves = Moves.of(torch.arange(len(points), device=members.device).repeat(len(labels)), None, members)
        if not first:
            sums = points.new_zeros(len(sizes), points.shape[1])
        sums[moves.clusters] += moves.sums(points)
        total += points.square().sum()
    return total - (sums.square().sum(dim=1) / sizes.clamp(min=1)).view(-1, k).sum(dim=1)
