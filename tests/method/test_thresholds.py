import re

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from itae_utils.method import thresholds
from itae_utils.method.setting import ITAE, NORMS, SIDES, SOURCES
from itae_utils.method.thresholds import Thresholds, fit_threshold


def mixture(rng, size, share, gap, sigma=0.1, low_sigma=0.1):
    """Return log-normal norms with a low mode `gap` standard deviations below the high one, and which belong to it."""
    low = rng.random(size) < share
    logs = np.where(low, rng.normal(2 - gap * sigma, low_sigma, size), rng.normal(2, sigma, size))
    return np.exp(logs), low


@pytest.mark.parametrize("share", [0.001, 0.003, 0.02, 0.1, 0.2])
@pytest.mark.parametrize("size", [20_000, 100_000])
def test_two_modes_are_separated(share, size):
    norms, low = mixture(np.random.default_rng(1), size, share, gap=10)
    fit = fit_threshold(norms)
    found = norms <= fit.threshold
    assert (found & low).sum() / found.sum() > 0.99
    assert (found & low).sum() / low.sum() > 0.99
    assert abs(fit.share - share) < 0.2 * share + 1e-4
    assert fit.separation > 5
    assert "two modes" in fit.reason


def test_a_rare_mode_under_a_skewed_bulk_is_found():
    rng = np.random.default_rng(2)
    bulk = rng.gamma(9, 1.0, 100_000)  # skewed to the right, and in the log to the left
    norms = np.concatenate([bulk, rng.normal(0.05, 0.005, 300)])
    fit = fit_threshold(norms)
    assert 0.07 < fit.threshold < bulk.min()


def test_a_bulk_with_a_tail_towards_the_artifacts_does_not_hide_them():
    """The likeliest two normals split such a bulk. A less likely fit separates the modes."""
    rng = np.random.default_rng(8)
    low = rng.random(25_000) < 0.02
    logs = np.where(low, rng.normal(-1.0, 0.1, 25_000), 0.05 * (4 - rng.gamma(4, 1, 25_000)))
    found = np.exp(logs) <= fit_threshold(np.exp(logs)).threshold
    assert (found == low).mean() > 0.999


@pytest.mark.parametrize("low_sigma", [0.02, 0.3])
def test_modes_of_unequal_width(low_sigma):
    norms, low = mixture(np.random.default_rng(3), 50_000, 0.03, gap=20, low_sigma=low_sigma)
    found = norms <= fit_threshold(norms).threshold
    assert (found == low).mean() > 0.9995


UNIMODAL = {
    "normal": lambda rng, n: rng.normal(10, 1, n).clip(0),
    "lognormal": lambda rng, n: rng.lognormal(1, 0.5, n),
    "gamma": lambda rng, n: rng.gamma(2, 1, n),
    "exponential": lambda rng, n: rng.exponential(1, n),
    "uniform": lambda rng, n: rng.uniform(1, 2, n),
    "uniform from 0": lambda rng, n: rng.uniform(0, 1, n),
    "weibull, long low tail in the log": lambda rng, n: rng.weibull(1.5, n),
    "beta, long low tail": lambda rng, n: rng.beta(8, 1.5, n),
    "heavy tails": lambda rng, n: np.exp(rng.standard_t(4, n) * 0.2),
    "chi with 64 degrees": lambda rng, n: np.sqrt(rng.chisquare(64, n)),
    "skewed to the left": lambda rng, n: np.exp(-rng.gamma(3, 0.3, n)),
    "two modes that overlap": lambda rng, n: mixture(rng, n, 0.2, gap=2)[0],
    "a high mode": lambda rng, n: np.where(rng.random(n) < 0.05, 40, 5) * rng.lognormal(0, 0.1, n),
}


@pytest.mark.parametrize("name", UNIMODAL)
@pytest.mark.parametrize("size", [2_000, 25_000, 130_000])
def test_nothing_is_found_without_a_low_mode(name, size):
    for seed in range(5):
        fit = fit_threshold(UNIMODAL[name](np.random.default_rng(seed), size))
        assert fit.threshold is None, fit.reason
        assert fit.reason


def test_a_share_outside_the_range_is_refused():
    rng = np.random.default_rng(4)
    half = fit_threshold(mixture(rng, 20_000, 0.5, gap=15)[0])
    assert half.threshold is None
    assert "50%" in half.reason
    few = np.concatenate([rng.lognormal(2, 0.1, 100_000), rng.lognormal(-1, 0.05, 20)])
    assert fit_threshold(few).threshold is None


def test_a_separate_high_mode_is_not_called_an_overlap():
    norms = np.where(np.random.default_rng(8).random(25_000) < 0.05, 13, 5) + np.random.default_rng(9).random(25_000)
    fit = fit_threshold(norms)
    assert fit.threshold is None
    assert fit.reason.startswith(("no low mode", "no minority"))


def test_too_few_patches_and_equal_norms_are_not_fitted():
    norms, _ = mixture(np.random.default_rng(5), 2_000, 0.1, gap=15)
    few, equal = fit_threshold(norms[1:]), fit_threshold(np.full(3_000, 2.0))
    assert (few.threshold, few.is_tested, equal.threshold, equal.is_tested) == (None, False, None, True)
    assert "1,999" in few.reason
    assert "equal" in equal.reason
    assert fit_threshold(norms).threshold is not None


def test_zero_norms_are_a_low_mode():
    norms = np.concatenate([np.zeros(500), np.random.default_rng(6).lognormal(2, 0.1, 9_500)])
    assert 0 < fit_threshold(norms).threshold < norms[500:].min()


def test_scale_does_not_matter():
    norms, _ = mixture(np.random.default_rng(7), 20_000, 0.05, gap=10)
    assert fit_threshold(norms * 1000).threshold == pytest.approx(fit_threshold(norms).threshold * 1000, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_are_not_norms_are_refused(value):
    with pytest.raises(ItaeError, match=str(value)):
        fit_threshold(np.array([1.0, value] * 2000))


@pytest.mark.parametrize("norms", [{"key": np.ones(9)}, "key", [np.ones(2), np.ones(3)], [None, "a"], object()])
def test_what_is_no_array_of_numbers_is_refused(norms):
    with pytest.raises(ItaeError, match=type(norms).__name__):
        fit_threshold(norms)


# --- the high side, and other statistics ------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.002, 0.1, 0.5])
@pytest.mark.parametrize("source", NORMS)
def test_the_high_side_mirrors_the_low_one(source, share):
    norms, rare = mixture(np.random.default_rng(11), 20_000, share, gap=10)
    low, high = fit_threshold(norms, side="low", source=source), fit_threshold(1 / norms, side="high", source=source)
    assert (low.side, high.side) == ("low", "high")
    assert (low.share, low.separation) == pytest.approx((high.share, high.separation), rel=1e-3)
    assert (low.threshold is None) == (high.threshold is None) == (share == 0.5)
    if low.threshold is not None:
        assert high.threshold == pytest.approx(1 / low.threshold, rel=1e-3)
        assert ((1 / norms >= high.threshold) == rare).mean() > 0.999


@pytest.mark.parametrize("source", ["direction", "attention"])
def test_shares_are_fitted_as_they_are(source):
    rng = np.random.default_rng(12)
    rare = rng.random(20_000) < 0.03
    values = np.where(rare, rng.normal(0.9, 0.03, 20_000), np.abs(rng.normal(0, 0.15, 20_000))).clip(0, 1)
    fit, small, bulk, equal = (fit_threshold(each, side="high", source=source)
                               for each in (values, values * 1e-6, values[~rare], np.full(3_000, 0.25)))
    assert (fit.beyond(fit.threshold) == rare).mean() > 0.999
    assert small.threshold == pytest.approx(fit.threshold * 1e-6)
    assert (bulk.threshold, equal.threshold, equal.reason) == (None, None, "all values are equal")


@pytest.mark.parametrize(("side", "other"), [("low", "high"), ("high", "low")])
def test_the_verdict_names_the_other_side_and_what_to_type(side, other):
    norms, _ = mixture(np.random.default_rng(13), 20_000, 0.05, gap=10)
    norms = norms if other == "low" else 1 / norms
    fit, there = (fit_threshold(norms, side=each, source="token") for each in (side, other))
    assert fit.threshold is None
    assert f"rare {other} mode" in fit.reason
    assert f"tail='{other}'" in fit.reason
    assert there.threshold is not None
    one_mode = fit_threshold(np.random.default_rng(13).lognormal(0, 1, 20_000), side=side)
    one_sided = fit_threshold(norms / norms.max(), side="high", source="attention")
    assert not [each.reason for each in (there, one_mode, one_sided) if "tail=" in each.reason]


@pytest.mark.parametrize(("side", "expected"), [("low", 2500.75), ("high", 7500.25)])
def test_quantile_and_what_lies_beyond(side, expected):
    fit = fit_threshold(np.arange(1, 10_001, dtype=float).reshape(100, 100), side=side)
    assert fit.quantile(0.25) == pytest.approx(expected)
    found = fit.beyond(fit.quantile(0.25))
    assert (found.shape, found.sum()) == ((100, 100), 2500)
    assert found[0].all() == (side == "low")
    assert fit.beyond(7.0).sum() == (7 if side == "low" else 9994)
    assert not fit.beyond(None).any()


def test_a_rule_becomes_the_number_that_it_means():
    norms, _ = mixture(np.random.default_rng(15), 20_000, 0.05, gap=10)
    low, high = (fit_threshold(norms, side=side) for side in ("low", "high"))
    for rule, share in [("share:2%", 0.02), ("share: 0.5 %", 0.005), ("share:49.9%", 0.499)]:
        assert low.beyond(low.apply(rule)).mean() == pytest.approx(share, abs=1e-4)
        assert high.beyond(high.apply(rule)).mean() == pytest.approx(share, abs=1e-4)
    assert low.apply("sd:1.5") == pytest.approx(norms.mean() - 1.5 * norms.std())
    assert high.apply("sd:3") == pytest.approx(norms.mean() + 3 * norms.std())
    assert low.apply("sd:100") == 0  # below every norm
    assert (low.apply("auto"), high.apply("auto")) == (low.threshold, None)
    assert (low.apply(150.0), low.apply(None)) == (150, None)


@pytest.mark.parametrize("options", [{"side": "left"}, {"side": None}, {"source": "keys"}])
def test_an_unknown_side_or_source_is_refused(options):
    (name, value), = options.items()
    with pytest.raises(ItaeError, match=f"{name}={value!r}"):
        fit_threshold(np.ones(10), **options)


# --- fits by block and source -----------------------------------------------------------------------------------------

@pytest.fixture
def norms():
    rng = np.random.default_rng(10)
    return {(block, source): mixture(rng, 5_000, 0.05, gap=10)[0] for block in range(3) for source in SOURCES}


def test_a_fit_is_computed_once_when_it_is_first_read(norms, monkeypatch):
    fitted, fit = [], thresholds.fit_threshold
    monkeypatch.setattr(thresholds, "fit_threshold", lambda values, **of: fitted.append(values) or fit(values, **of))
    fits = Thresholds(norms, seconds=2.0)
    assert ((2, "key") in fits, len(fits), list(fits)) == (True, 18, list(norms))
    assert (fitted, fits.seconds) == ([], 2.0)
    assert fits[-1, "key"] is fits[2, "key"] is fits.get((-1, "key"))
    assert [values is norms[2, "key"] for values in fitted] == [True]
    assert fits.seconds > 2.0
    assert dict(fits) == {(block, source): fit_threshold(values, side=SIDES[source], source=source)
                          for (block, source), values in norms.items()}
    assert len(fitted) == 18


def test_fits_of_the_other_side_and_of_a_setting(norms):
    fits = Thresholds(norms, rank=2)
    assert fits[1, "key", "low"] is fits[1, "key"] is fits[-2, "key"]
    assert fits[1, "token", "high"] is fits[1, "token"]
    assert fits[1, "key", "high"] == fit_threshold(norms[1, "key"], side="high") != fits[1, "key"]
    assert fits.of(ITAE("value", blocks=2)) == [fits[1, "value"], fits[2, "value"]]
    assert fits.of(ITAE("value", tail="high")) == [fits[2, "value", "high"]]
    assert fits.of(ITAE("direction", rank=2)) == [fits[2, "direction"]]
    with pytest.raises(ItaeError, match=r"rank=1.*rank=2"):
        fits.of(ITAE("direction"))


def test_negative_blocks_count_from_the_end_however_a_fit_is_read(norms):
    fits = Thresholds(norms)
    for block in range(3):
        assert (block - 3, "value") in fits
        assert fits[block - 3, "value"] is fits.get((block - 3, "value")) is fits[block, "value"]
    assert {block for block, _ in fits} == {0, 1, 2}
    for key in [(3, "key"), (-4, "key"), (0, "keys"), "key", (0, "key", "left"), (0, "attention", "low"),
                (0, "key", "low", 1), (0.0, "key")]:
        assert key not in fits
        assert fits.get(key) is None
        assert fits.get(key, "default") == "default"
        with pytest.raises(ItaeError, match=re.escape(str(key))):
            fits[key]
