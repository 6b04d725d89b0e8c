import pytest

from itae_utils.errors import ItaeError, unknown_name

KNOWN = ("cifar10", "cifar100", "stl10", "digits")


def test_unknown_name_offers_the_closest_ones_and_the_command():
    assert str(unknown_name("data set", "cifar-10", KNOWN, see="itae datasets")) == (
        "unknown data set 'cifar-10': did you mean cifar10 or cifar100? itae datasets lists them all")


def test_unknown_name_offers_nothing_far_off():
    assert str(unknown_name("data set", "zzz", KNOWN, see="itae datasets")) == (
        "unknown data set 'zzz': itae datasets lists them all")


def test_names_may_be_any_iterable():
    assert "did you mean digits?" in str(unknown_name("data set", "digit", iter(KNOWN), see="itae datasets"))


def test_it_is_a_value_error_and_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(ItaeError("a bad value: use a good one")))
    with pytest.raises(ValueError, match=r"^a bad value: use a good one$"):
        raise error
