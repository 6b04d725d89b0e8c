"""Observations that the tests of figures share."""

from dataclasses import replace

import numpy as np
import pytest

from itae_utils.extraction.observation import Observation

GRID = (4, 5)
PATCHES = 20
HEADS = 3


@pytest.fixture
def seen():
    """Twelve images whose first patch is an artifact: 30 × as long from block 2 on, with 0.8 of the attention."""
    rng = np.random.default_rng(0)
    artifacts = np.zeros((12, PATCHES), dtype=bool)
    artifacts[:, 0] = True
    hidden = rng.uniform(0.9, 1.1, (12, 3, PATCHES))
    hidden[:, 1:, 0] *= 30
    attention = np.full((12, PATCHES), 0.2 / (PATCHES - 1))
    attention[:, 0] = 0.8
    after = np.full((12, PATCHES), 1 / (PATCHES - 1))
    after[:, 0] = 0
    statistics = {name: rng.uniform(1, 2, (12, PATCHES)) for name in ("query", "key", "value")}
    return Observation(np.arange(12), GRID, hidden, statistics, attention, after, artifacts,
                       rng.uniform(1, 2, (12, HEADS, 2)), artifacts)


@pytest.fixture
def nothing(seen):
    """The same images without artifacts."""
    flat, values = np.full_like(seen.attention, 1 / PATCHES), seen.value_norms.copy()
    values[..., 0] = np.nan
    return replace(seen, hidden_norms=np.ones_like(seen.hidden_norms), attention=flat, attention_after=flat,
                   artifacts=np.zeros_like(seen.artifacts), value_norms=values, truth=None)
