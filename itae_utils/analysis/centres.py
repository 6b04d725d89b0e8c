"""The clusters of many starts of k-means: centres, sums and sizes, and the scores of all points, kept up to date.

The score of a centre c for a point x is x·c − ‖c‖²/2: the nearest centre has the largest. Only the scores of centres
that moved are computed again: as a product of centres and points or, if few points moved, by adding and subtracting the
inner products of these points with all points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

BLOCK = 2**22  # values that are computed at a time; they stay in a CPU's cache
CHEAP = 16     # adding a row of inner products takes the time of a product of so many dimensions
OLDEST = 20    # additions to a score before it is computed anew, so that rounding errors do not pile up


@dataclass(frozen=True)
class Moves:
    """Points that leave a cluster or come to one, sorted by cluster. Clusters are numbered over all starts.

    Attributes:
        points: numbers of rows in a matrix of points.
        signs: −1 for a point that leaves, +1 for one that comes.
        clusters: those with any moves, in ascending order.
        counts: number of moves of each of these clusters.
    """

    points: Tensor
    signs: Tensor
    clusters: Tensor
    counts: Tensor

    @classmethod
    def of(cls, points: Tensor, old: Tensor | None, new: Tensor) -> Moves:
        """Return the moves of points from clusters `old` (None for no cluster) to clusters `new`."""
        signs, clusters = torch.ones(len(new), device=new.device), new
        if old is not None:
            points, clusters, signs = torch.cat([points, points]), torch.cat([old, new]), torch.cat([-signs, signs])
        clusters, order = clusters.sort(stable=True)
        clusters, counts = clusters.unique_consecutive(return_counts=True)
        return cls(points[order], signs[order], clusters, counts)

    def sums(self, rows: Tensor) -> Tensor:
        """Return the signed sum of the moved rows of a matrix (n, …), for each cluster."""
        first = self.counts.cumsum(0) - self.counts
        return embedding_bag(self.points, rows, first, mode="sum", per_sample_weights=self.signs.to(rows.dtype))

    @cached_property
    def growth(self) -> Tensor:
        """The number of points that each cluster gains, int64."""
        totals = pad(self.signs.long().cumsum(0), (1, 0))[pad(self.counts.cumsum(0), (1, 0))]
        return totals.diff()

    def of_clusters(self, which: Tensor) -> Moves:
        """Return the moves of some of the clusters, given a bool for each."""
        moves = which.repeat_interleave(self.counts)
        return Moves(self.points[moves], self.signs[moves], self.clusters[which], self.counts[which])

    def split(self, size: int) -> Iterator[Moves]:
        """Yield the moves of at most `size` clusters at a time."""
        first = 0
        for clusters, counts in zip(self.clusters.split(size), self.counts.split(size), strict=True):
            moves = slice(first, first := first + int(counts.sum()))
            yield Moves(self.points[moves], self.signs[moves], clusters, counts)


class Clusters:
    """The clusters of S starts, numbered over all starts.

    Attributes:
        k: number of clusters per start.
        centres: (S · k, d) float32.
        halves: ‖centre‖²/2, (S · k,).
        sums: of the points of each cluster, (S · k, d) float64.
        sizes: number of points of each cluster, (S · k,) int64.
    """

    def __init__(self, centres: Tensor) -> None:
        self.k = centres.shape[1]
        self.centres = centres.flatten(0, 1).clone()
        self.halves = self.centres.square().sum(dim=1) / 2
        self.sums = torch.zeros_like(self.centres, dtype=torch.float64)
        self.sizes = torch.zeros_like(self.halves, dtype=torch.int64)

    def add(self, moves: Moves, rows: Tensor) -> None:
        """Move points, which are rows of a matrix; the centres stay."""
        self.sums[moves.clusters] += moves.sums(rows)
        self.sizes[moves.clusters] += moves.growth

    def recentre(self, clusters: Tensor) -> None:
        """Move the centres of some clusters to the means of their points; an empty cluster keeps its centre."""
        clusters = clusters[self.sizes[clusters] > 0]
        means = (self.sums[clusters] / self.sizes[clusters, None]).float()
        self.centres[clusters], self.halves[clusters] = means, means.square().sum(dim=1) / 2

    def scores(self, clusters: Tensor | slice, points: Tensor) -> Tensor:
        """Return the scores of some centres for points (m, d): (clusters, m)."""
        return torch.addmm(-self.halves[clusters, None], self.centres[clusters], points.T)

    def keep(self, starts: Tensor) -> None:
        """Drop the starts for which `starts` is False."""
        for name in ("centres", "halves", "sums", "sizes"):
            setattr(self, name, of_starts(getattr(self, name), starts, self.k))


def of_starts(values: Tensor, starts: Tensor, k: int) -> Tensor:
    """Return the values (S · k, …) of the clusters of some starts."""
    return values.unflatten(0, (-1, k))[starts].flatten(0, 1)


class Scores:
    """The scores of all centres for all points, held in memory and kept up to date.

    Args:
        clusters: the centres.
        points: (n, d) float32.
        products: from `plus_plus.inner_products`; None computes all scores as products of centres and points.
    """

    def __init__(self, clusters: Clusters, points: Tensor, products: Tensor | None) -> None:
        self.clusters, self.points, self.products = clusters, points, products
        self.values = points.new_empty(len(clusters.sizes), len(points))
        self.ages = torch.zeros_like(clusters.sizes)  # additions since a centre's scores were computed anew
        self.step = max(1, BLOCK // len(points))
        self.renew(torch.arange(len(self.values), device=points.device))

    def renew(self, clusters: Tensor) -> None:
        """Compute the scores of some centres anew."""
        for block in clusters.split(self.step):
            self.values.index_copy_(0, block, self.clusters.scores(block, self.points))
        self.ages[clusters] = 0

    def update(self, moves: Moves) -> None:
        """Recentre the clusters that have lost or gained points, and update their scores."""
        halves, after = self.clusters.halves[moves.clusters], self.clusters.sizes[moves.clusters]
        before = after - moves.growth
        self.clusters.recentre(moves.clusters)
        few = (moves.counts <= self.points.shape[1] // CHEAP) & (self.ages[moves.clusters] < OLDEST)
        few &= (before > 0) & (after > 0)
        if self.products is None:
            few.zero_()
        self.renew(moves.clusters[~few])
        if not few.any():
            return
        # A centre is a mean of points, so its products with all points are a mean of rows of inner products.
        moves, before, after, halves = moves.of_clusters(few), before[few], after[few], halves[few]
        ratios = (before / after).float()
        shifts = halves * ratios - self.clusters.halves[moves.clusters]
        self.ages[moves.clusters] += 1
        columns = (values[:, None].split(self.step) for values in (ratios, shifts, after))
        for part, ratio, shift, size in zip(moves.split(self.step), *columns, strict=True):
            values = self.values.index_select(0, part.clusters).mul_(ratio).add_(shift)
            self.values.index_copy_(0, part.clusters, values.addcdiv_(part.sums(self.products), size))

    def keep(self, starts: Tensor) -> None:
        """Drop the starts for which `starts` is False, also from the clusters."""
        self.clusters.keep(starts)
        self.values, self.ages = (of_starts(values, starts, self.clusters.k) for values in (self.values, self.ages))
