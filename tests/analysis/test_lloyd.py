import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from itae_utils.analysis import centres, lloyd, plus_plus
from itae_utils.analysis.plus_plus import inner_products


def overlapping(n=600, dim=16, k=8, spread=1.0, seed=0):
    """Points (n, dim) of overlapping classes about 0, and first centres of 5 starts, (5, k, dim)."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(k, dim))[rng.integers(k, size=n)] + spread * rng.normal(size=(n, dim))
    points = torch.from_numpy((points - points.mean(axis=0)).astype(np.float32))
    return points, torch.stack([points[rng.choice(n, k, replace=False)] for _ in range(5)])


def all_ways(points, centres):
    """The labels by every way of computing them."""
    return {
        "centres": lloyd.lloyd(points, centres),
        "inner products": lloyd.lloyd(points, centres, inner_products(points)),
        "parts": lloyd.lloyd_in_parts(lambda: points.split(77), len(points), centres),
    }


def plain(points, centres):
    """Scikit-learn's k-means from the given centres."""
    return KMeans(len(centres), init=centres.numpy(), n_init=1, tol=0).fit(points.numpy())


def count_clusters(labels):
    return [len(run.unique()) for run in labels]


@pytest.fixture(params=[{}, {"BLOCK": 1000}, {"OLDEST": 1, "CHEAP": 1}, {"MOST_ACTIVE": 1.0}], ids=str)
def constants(request, monkeypatch):
    for name, value in request.param.items():
        for module in (centres, lloyd):
            monkeypatch.setattr(module, name, value, raising=False)


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("data", [{}, {"spread": 0.1}, {"k": 40}, {"dim": 1}, {"dim": 200, "k": 3}, {"n": 80, "k": 79}],
                         ids=str)
def test_labels_are_scikit_learns_from_the_same_centres(data):
    points, centres = overlapping(**data)
    expected = [plain(points, first).labels_ for first in centres]
    for way, labels in all_ways(points, centres).items():
        np.testing.assert_array_equal(labels, expected, err_msg=way)


def test_inertias_are_scikit_learns():
    points, centres = overlapping()
    expected = [plain(points, first).inertia_ for first in centres]
    found = lloyd.inertias_of(lambda: points.split(77), lloyd.lloyd(points, centres), centres.shape[1])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_empty_clusters_take_the_farthest_points():
    """Two of the centres are far from all points, so that their clusters are empty in the first round."""
    points, centres = overlapping(k=6)
    centres[:, 4:] += 100
    expected = [plain(points, first) for first in centres]
    for way, labels in all_ways(points, centres).items():
        assert count_clusters(labels) == [6] * 5, way
        np.testing.assert_array_equal(labels, [run.labels_ for run in expected], err_msg=way)


@pytest.mark.parametrize("points", [torch.zeros(20, 3), torch.eye(3).repeat(10, 1), torch.full((20, 3), 1e4)],
                         ids=["zeros", "three points", "constant"])
def test_fewer_distinct_points_than_clusters(points):
    distinct, k = len(points.unique(dim=0)), 5
    for way, labels in all_ways(points, points[:k][None].repeat(2, 1, 1)).items():
        assert count_clusters(labels) == [distinct] * 2, way
        torch.testing.assert_close(lloyd.inertias_of(lambda: [points], labels, k), torch.zeros(2).double())


def test_duplicates_give_the_inertia_of_scikit_learn():
    rng = np.random.default_rng(0)
    points = torch.from_numpy(np.repeat(rng.normal(size=(60, 4)), 5, axis=0).astype(np.float32))
    points -= points.mean(dim=0)
    centres = points[torch.from_numpy(rng.choice(300, size=(4, 50)))]  # some coincide
    for labels in all_ways(points, centres).values():
        for run, first, inertia in zip(labels, centres, lloyd.inertias_of(lambda: [points], labels, 50), strict=True):
            expected = plain(points, first)
            assert len(run.unique()) == 50
            assert inertia <= 1.2 * expected.inertia_


def test_inner_products_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(plus_plus, "TILE", 50)
    points, _ = overlapping(n=333)
    torch.testing.assert_close(inner_products(points), points @ points.T)


class TestPlusPlus:
    @staticmethod
    def slow(points, draws):
        """Greedy k-means++, centre by centre."""
        points = points.double()
        chosen = [int(draws[0, 0] * len(points))]
        for numbers in draws[1:]:
            nearest = torch.cdist(points, points[chosen]).square().amin(dim=1)
            candidates = torch.searchsorted(nearest.cumsum(0), numbers * nearest.sum())
            left = [torch.minimum(nearest, (points - points[c]).square().sum(dim=1)).sum() for c in candidates]
            chosen.append(int(candidates[torch.stack(left).argmin()]))
        return chosen

    @pytest.mark.parametrize("trials", [1, 4])
    def test_centres_are_those_of_the_slow_way(self, trials):
        points, _ = overlapping()
        draws = torch.from_numpy(np.random.default_rng(1).random((6, 12, trials)))
        expected = [self.slow(points, numbers) for numbers in draws]
        assert plus_plus.plus_plus(points, draws).tolist() == expected
        assert plus_plus.plus_plus(points, draws, inner_products(points)).tolist() == expected

    def test_points_that_coincide_are_not_chosen_twice(self):
        points = torch.eye(5).repeat_interleave(4, dim=0)
        chosen = plus_plus.plus_plus(points, torch.from_numpy(np.random.default_rng(0).random((20, 5, 3))))
        assert all(len(points[run].unique(dim=0)) == 5 for run in chosen)


def test_starts_that_end_are_counted():
    points, centres = overlapping()
    for run in (lambda note: lloyd.lloyd(points, centres, None, note),
                lambda note: lloyd.lloyd_in_parts(lambda: [points], len(points), centres, note)):
        ended = []
        run(ended.append)
        assert sum(ended) == 5


def test_rounds_are_limited(monkeypatch):
    points, centres = overlapping(k=40)
    for rounds in (1, 2):
        monkeypatch.setattr(lloyd, "MOST_ROUNDS", rounds)
        state = centres
        for _ in range(rounds):
            expected = torch.stack([torch.cdist(points, first).argmin(dim=1) for first in state])
            state = torch.stack([torch.stack([points[run == c].mean(dim=0) for c in range(40)]) for run in expected])
        for labels in all_ways(points, centres).values():
            np.testing.assert_array_equal(labels, expected)
