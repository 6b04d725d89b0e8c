"""Fixtures that the tests of the analysis share."""

import pytest

from itae_utils.analysis import baseline, collection, comparison


@pytest.fixture
def shown(monkeypatch):
    """Objects that were displayed."""
    objects = []
    for module in (baseline, collection, comparison):
        monkeypatch.setattr(module, "display", lambda *things: objects.extend(things))
    return objects
