import pytest

from itae_utils.environment import network_timeout
from itae_utils.errors import ItaeError


@pytest.mark.parametrize(("text", "seconds"), [("0.5", 0.5), ("30", 30), ("", 8)])
def test_the_timeout_is_a_number_of_seconds(monkeypatch, text, seconds):
    monkeypatch.setenv("ITAE_TIMEOUT", text)
    assert network_timeout() == seconds


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1e300", "soon"])
def test_other_timeouts_are_refused(monkeypatch, text):
    monkeypatch.setenv("ITAE_TIMEOUT", text)
    with pytest.raises(ItaeError, match=f"ITAE_TIMEOUT='{text}'"):
        network_timeout()
