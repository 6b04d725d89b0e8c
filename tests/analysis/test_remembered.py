import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans

from itae_utils.analysis import remembered
from itae_utils.analysis.kmeans import cluster_seeds
from itae_utils.errors import ItaeError
from itae_utils.store.housekeeping import list_entries
from itae_utils.store.store import open_store

FEATURES = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
SETTINGS = {"k": 3, "seeds": [0, 4], "n_init": 2, "normalize": True}


@pytest.fixture
def calls(monkeypatch):
    """Settings that clusters were computed with."""
    made = []
    monkeypatch.setattr(remembered, "cluster_seeds",
                        lambda features, **settings: made.append(settings) or cluster_seeds(features, **settings))
    return made


def test_clusters_are_those_of_cluster_seeds_and_computed_once(tmp_path, calls):
    expected = cluster_seeds(FEATURES, **SETTINGS)
    for store in (tmp_path, tmp_path, None):
        labels, inertias = remembered.clusters(FEATURES, **SETTINGS, store=store)
        assert np.array_equal(labels, expected[0])
        assert np.array_equal(inertias, expected[1])
    assert len(calls) == 2
    assert [entry.path.split("/")[1] for entry in list_entries(open_store(tmp_path))] == ["clusters"]


@pytest.mark.parametrize("small", [0, 1e9])
def test_several_are_clustered_as_each_alone(tmp_path, monkeypatch, small):
    monkeypatch.setattr(remembered, "SMALL", small)
    features = {name: FEATURES + shift for name, shift in (("a", 0), ("b", 1), ("c", 0))}
    threads = torch.get_num_threads()
    for _ in range(2):
        found = remembered.clusters_of_all(features, **SETTINGS, store=tmp_path)
        assert torch.get_num_threads() == threads
        assert list(found) == list(features)
        for name, rows in features.items():
            for several, alone in zip(found[name], cluster_seeds(rows, **SETTINGS), strict=True):
                assert np.array_equal(several, alone)


def test_an_error_of_one_is_raised():
    with pytest.raises(ItaeError, match="image 3 "):
        remembered.clusters_of_all({"a": FEATURES, "b": np.where(np.arange(60)[:, None] == 3, np.nan, FEATURES)},
                                   **SETTINGS, store=None)


def test_everything_that_decides_clusters_is_in_the_key(tmp_path, calls, monkeypatch):
    changed = FEATURES.copy()
    changed[3, 2] = np.nextafter(changed[3, 2], np.float32(9))
    others = [{}, {"features": changed}, {"features": FEATURES[::-1]}, {"features": FEATURES.reshape(50, 6)}, {"k": 4},
              {"seeds": [0]}, {"seeds": [4, 0]}, {"n_init": 1}, {"normalize": False}, {"algorithm": "mini-batch"}]
    for _ in range(2):
        for other in others:
            remembered.clusters(**{"features": FEATURES} | SETTINGS | other, store=tmp_path)
        assert len(calls) == len(others)
    monkeypatch.setattr(remembered, "deciding_code", lambda: "changed")
    remembered.clusters(FEATURES, **SETTINGS, store=tmp_path)
    assert len(calls) == len(others) + 1


def test_mteb_s_protocol_is_a_direct_call_of_scikit_learn(tmp_path):
    labels, _ = remembered.clusters(FEATURES, 5, seeds=range(10), n_init=1, normalize=False, algorithm="mini-batch",
                                    store=tmp_path)
    direct = [MiniBatchKMeans(5, batch_size=500, n_init="auto", random_state=seed).fit(FEATURES).labels_
              for seed in range(10)]
    np.testing.assert_array_equal(labels, direct)


def test_tsne_is_computed_once_for_the_same(tmp_path, monkeypatch):
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    expected = TSNE(perplexity=5, random_state=1).fit_transform(normalize(FEATURES))
    assert np.array_equal(remembered.tsne(FEATURES, perplexity=5, seed=1, store=tmp_path), expected)
    monkeypatch.setattr(TSNE, "fit_transform", lambda self, rows: np.zeros((len(rows), 2)))
    assert np.array_equal(remembered.tsne(FEATURES, perplexity=5, seed=1, store=tmp_path), expected)
    for other in ({"perplexity": 6}, {"seed": 2}, {"normalize": False}):
        assert not remembered.tsne(FEATURES, **{"perplexity": 5, "seed": 1} | other, store=tmp_path).any()


def test_the_environment_s_store_is_the_default(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("ITAE_STORE", str(tmp_path))
    for _ in range(2):
        remembered.clusters(FEATURES, **SETTINGS)
    assert len(calls) == 1
