from dataclasses import replace
from importlib import metadata

import numpy as np
import pandas as pd
import pytest
from nbconvert.filters import markdown2html

from itae_utils.analysis import words
from itae_utils.data.datasets import load_dataset
from itae_utils.method.setting import SOURCES
from itae_utils.method.thresholds import fit_threshold
from itae_utils.models.backbones import load_backbone
from itae_utils.results import check_results
from tests.tiny_notebooks import RESULTS

TAG = "<img src=x onerror=alert(1)>"


class Own:
    """A data set with no more than torch asks for."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise AssertionError("describing a data set needs no image")


@pytest.mark.parametrize(("share", "text"), [
    (0, "0 %"), (0.0004, "< 0.1 %"), (0.004, "0.4 %"),
    (0.0885, "8.8 %"), (0.0996, "10 %"), (0.904, "90 %"), (0.9936, "99.4 %"),
    (0.99999, "99.9 %"), (1, "100 %"), (-0.14, "-14 %"), (1.2, "120 %"),
])
def test_percent(share, text):
    assert words.percent(share) == text


@pytest.mark.parametrize("text", [
    TAG, "a & b", "imagefolder:/a/__init__/x", "*a* `b` [c](d) ~~e~~ $f$", r"C:\images\*", "a &lt; b", "don't",
])
def test_escaped_text_is_literal_in_markdown(text):
    literal = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert markdown2html(f"x {words.escape(text)} y").strip() == f"<p>x {literal} y</p>"


@pytest.mark.parametrize(("text", "shown"), [
    ("two\nlines", r"two\nlines"), ("# no heading\n\n- no list", r"# no heading\n\n- no list"),
    ("latin-1 \udcff", r"latin-1 \udcff"), ("a\x1b[31mb", r"a\x1b[31mb"), ("{x} %s ^2", "{x} %s ^2"),
    ("קטה", "\u2068קטה\u2069"),
])
def test_escaped_text_is_one_line_of_utf_8(text, shown):
    assert markdown2html(f"x {words.escape(text)} y").strip() == f"<p>x {shown} y</p>"


def test_a_run_is_described_with_its_planted_artifacts():
    digits = load_dataset("digits")
    planted, clean = (words.describe_run(load_backbone(name), digits) for name in ("demo", "demo-clean"))
    assert words.PLANTED in planted
    assert "planted" not in clean
    assert "7 × 7 patches" in clean
    assert "1,797 images, 10 classes" in clean
    assert "fp32 on cpu" in clean
    for package in ("itae-utils", "torch", "timm", "scikit-learn"):
        assert f"{package} {metadata.version(package)}" in clean


def test_a_run_without_labels():
    images = replace(load_dataset("digits", limit=50), targets=None, classes=None)
    assert "50 images, without labels" in words.describe_run(load_backbone("demo"), images)
    assert "3 of 10 classes" in words.describe_run(load_backbone("demo"), load_dataset("digits", limit=3))


def test_names_in_the_description_of_a_run_are_literal():
    images = Own()
    images.name, images.source, images.notes = f"imagefolder:{TAG}", f"the folder {TAG}", (f"{TAG} was left out.",)
    page = markdown2html(words.describe_run(replace(load_backbone("demo"), source=f"local file {TAG}"), images))
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 4


def test_a_data_set_of_ones_own_is_described_as_far_as_it_goes():
    own = Own()
    assert "**Own**: 3 images, without labels" in words.describe_run(load_backbone("demo"), own)
    own.targets, own.name = [0, 5, 5], "mine"
    assert "**mine**: 3 images, 2 classes" in words.describe_run(load_backbone("demo"), own)
    own.classes, own.notes = list("abcdef"), ["First *note*.", "2 files were left out."]
    lines = words.describe_run(load_backbone("demo"), own).split("\n\n")
    assert "2 of 6 classes" in lines[1]
    assert lines[2:4] == [r"First \*note\*.", "2 files were left out."]


@pytest.mark.parametrize(("seeds", "n_init", "numbers"), [
    (5, 1, ["5 seeds", "1 start"]), (1, 10, ["1 seed ", "10 starts"]), (10, 10, ["10 seeds", "10 starts"]),
])
def test_runs_of_k_means_are_described(seeds, n_init, numbers):
    assert all(number in words.describe_runs(seeds, n_init) for number in numbers)


@pytest.mark.parametrize(("source", "name", "symbol"), [
    ("key", "norm of the key", "‖key‖₂"), ("token", "norm of the token", "‖token‖₂"),
    ("direction", "share along the singular direction", "|cos(token, direction)|"),
    ("attention", "share of the [CLS] attention", "[CLS] attention"),
])
def test_statistics_have_a_name_and_a_symbol(source, name, symbol):
    assert words.statistic_name(source) == name
    assert words.symbol(source) == symbol
    assert words.condition(source, "low", 2.46449) == f"{symbol} ≤ 2.464"
    assert words.condition(source, "high", 150.0) == f"{symbol} ≥ 150"


def test_no_two_statistics_have_the_same_words():
    assert len(set(map(words.statistic_name, SOURCES))) == len(set(map(words.symbol, SOURCES))) == len(SOURCES)


def test_threshold_is_described_with_its_origin():
    rng = np.random.default_rng(0)
    two = fit_threshold(np.concatenate([rng.normal(1, 0.05, 200), rng.normal(8, 0.5, 3800)]))
    one, few = fit_threshold(rng.normal(8, 0.5, 4000)), fit_threshold(np.arange(1.0, 1000.0))
    found, given, none, untested = (words.describe_threshold("key", fit, threshold, rule) for fit, threshold, rule in (
        (two, two.threshold, "auto"), (two, 3.0, 3.0), (one, None, "auto"), (few, None, "auto")))
    assert found.startswith(f"θ = {two.threshold:.4g} on the norm of the key")
    assert "θ = 3 " in given
    assert "given" in given
    assert one.reason in none
    assert "999 patches" in untested
    assert len({text.split("**")[1] for text in (none, untested)}) == 2


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("rule", ["share:2%", "share:0.5%", "sd:2", 6.5])
def test_theta_from_elsewhere_is_described_with_its_rule_and_the_share_beyond_it(side, rule):
    values = np.random.default_rng(0).normal(8, 0.5, 4000)
    fit = fit_threshold(values, side=side)
    theta = fit.apply(rule)
    text = words.describe_threshold("token", fit, theta, rule)
    beyond = sum(value <= theta if side == "low" else value >= theta for value in values.tolist()) / 4000
    assert text.startswith(f"θ = {theta:.4g} on the norm of the token")
    assert f"{words.percent(beyond)} of the patches lie at or {'below' if side == 'low' else 'above'} it" in text
    assert (f"follows from {rule}:" in text) == isinstance(rule, str)
    assert ("was given" in text) == (not isinstance(rule, str))
    assert fit.reason in text


def test_thetas_of_several_blocks():
    assert words.describe_thetas([None, 2.3149]) == "none, 2.31"
    assert words.describe_thetas([]) == ""


def rows_of(table, metrics=("acc",)):
    return words.result_rows(table, metrics, backbone="demo", dataset="digits", n=7)


def test_result_rows_hold_only_finite_numbers():
    rows = rows_of(pd.DataFrame({"variant": ["a", "b"], "seed": [0, 1], "acc": [0.5, np.nan], "nmi": [0.1, 0.2]}),
                   ["acc", "nmi"])
    assert rows[0] == {"backbone": "demo", "dataset": "digits", "n": 7, "variant": "a", "seed": 0, "metric": "acc",
                       "value": 0.5}
    assert [(row["variant"], row["metric"]) for row in rows] == [("a", "acc"), ("a", "nmi"), ("b", "nmi")]


def test_result_rows_carry_backbone_and_setting_of_the_table():
    settings = {"source": "key", "attenuation": "min", "theta": "auto"}
    table = pd.DataFrame([{"variant": "a", "acc": 0.2, **settings}, {"variant": "baseline", "acc": 0.1}])
    rows = rows_of(table.assign(backbone=["other", "demo"]))
    assert [(row["backbone"], row["seed"]) for row in rows] == [("other", None), ("demo", None)]
    assert [{name: row[name] for name in settings} for row in rows] == [settings, dict.fromkeys(settings)]
    check_results(RESULTS | {"rows": rows})


@pytest.mark.parametrize(("options", "fitted", "parts"), [
    ({"normalize": True, "n_init": 10}, None, ["exact", "length 1", "10 starts", "scored images, test (5)"]),
    ({"normalize": False, "n_init": 1, "algorithm": "mini-batch"}, "train (9)",
     ["mini-batch", "not normalised", "1 start,", "fitted on train (9), scored on test (5)"]),
    ({"normalize": False, "n_init": 1, "algorithm": "scikit-learn"}, "test (5)",
     ["scikit-learn", "not normalised", "1 start,", "fitted on the scored images, test (5)"]),
])
def test_how_features_were_clustered(options, fitted, parts):
    text = words.describe_kmeans(options, "test (5)", fitted)
    assert all(part in text for part in parts), text
