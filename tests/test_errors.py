import pickle

import pytest

from itae_utils.errors import ItaeError, unknown_name

KNOWN = ("cifar10", "cifar100", "stl10", "digits")


@pytest.mark.parametrize("known", [KNOWN, iter(KNOWN)])
def test_an_unknown_name_suggests_the_closest_ones_and_the_command(known):
    message = str(unknown_name("data set", "cifar-10", known, see="itae datasets"))
    assert message.index("'cifar-10'") < message.index("cifar10 or cifar100") < message.index("itae datasets")
    assert "stl10" not in message


def test_an_unknown_name_suggests_nothing_if_none_is_close():
    message = str(unknown_name("data set", "zzz", KNOWN, see="itae datasets"))
    assert "'zzz'" in message
    assert not any(name in message for name in KNOWN)


def test_it_is_a_value_error_and_can_be_pickled():
    error = pickle.loads(pickle.dumps(ItaeError("a bad value: use a good one")))
    with pytest.raises(ValueError, match=r"^a bad value: use a good one$"):
        raise error
