"""The first centres of k-means: greedy k-means++ (Arthur and Vassilvitskii, 2007) for many starts at once."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 512  # points per side of a tile of inner products


def inner_products(points: Tensor) -> Tensor:
    """Return the inner products of all pairs of points, (n, d) -> (n, n); each pair is computed once."""
    products = points.new_empty(len(points), len(points))
    for i in range(0, len(points), TILE):
        torch.mm(points[i : i + TILE], points[: i + TILE].T, out=products[i : i + TILE, : i + TILE])
        for j in range(0, i, TILE):
            products[j : j + TILE, i : i + TILE] = products[i : i + TILE, j : j + TILE].T
    return products


def plus_plus(points: Tensor, draws: Tensor, products: Tensor | None = None) -> Tensor:
    """Return the points (S, k) that greedy k-means++ chooses as the first centres of S starts.

    Args:
        points: (n, d) float32.
        draws: uniform random numbers in [0, 1), (S, k, trials) float64. The first one chooses the first point. Each
            further row chooses candidates with probabilities in proportion to the squared distance to the nearest
            centre so far; the best candidate becomes a centre.
        products: from `inner_products`, or None.
    """
    starts, k, _ = draws.shape
    squares, every = points.square().sum(dim=1), torch.arange(starts, device=points.device)

    def distances(chosen: Tensor) -> Tensor:
        """Return squared distances to all points: (S, trials) -> (S, trials, n)."""
        flat = chosen.flatten()
        inner = points[flat] @ points.T if products is None else products[flat]
        return inner.mul_(-2).add_(squares).add_(squares[flat, None]).clamp_(min=0).unflatten(0, chosen.shape)

    centres = torch.empty(starts, k, dtype=torch.int64, device=points.device)
    centres[:, 0] = (draws[:, 0, 0] * len(points)).long()
    nearest = distances(centres[:, :1])[:, 0]
    for turn in range(1, k):
        sums = nearest.double().cumsum(dim=1)
        candidates = torch.searchsorted(sums, draws[:, turn] * sums[:, -1:]).clamp_(max=len(points) - 1)
        after = distances(candidates)
        torch.minimum(after, nearest[:, None], out=after)
        best = after.sum(dim=2).argmin(dim=1)
        nearest, centres[:, turn] = after[every, best], candidates[every, best]
    return centres
