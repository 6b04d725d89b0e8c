import re

import pytest

from itae_utils.analysis.kmeans import ALGORITHMS
from itae_utils.errors import ItaeError
from itae_utils.report.report import plan_report
from itae_utils.report.rules import OPTIONS, RULES, check_options, check_values, recorded

WHOLE = ("limit", "clusters", "image_size", "batch_size", "sample", "seeds", "n_init", "seed", "num_workers",
         "examples", "subset_seed", "rank")
CHOICES = ("source", "attenuation", "preprocess", "precision", "pos_embed", "on_error", "device",
           "algorithm")

INVALID = [
    *((name, value) for name in WHOLE for value in (-1, 2**31, True, 2.5, "all", [1], {})),
    ("limit", 0), ("clusters", 1), ("seed", None), ("examples", 25), ("batch_size", 0), ("seeds", None),
    *((name, value) for name in CHOICES for value in ("nonsense", None, 3, ["key"])), ("device", "cuda:x"),
    ("alpha", 2), ("alpha", 0), ("alpha", float("nan")), ("alpha", True),
    ("threshold", -1.0), ("threshold", "much"), ("threshold", None), ("threshold", float("inf")),
    *(("threshold", f"share:{share}") for share in ("0%", "50%", "-2%", "2", "nan%", "%")), ("threshold", ["auto"]),
    *(("threshold", rule) for rule in ("sd:0", "sd:-3", "sd:inf", "sd:", "sd:3%", "share", "2%", "AUTO")),
    ("rank", 0), ("tail", "both"), ("tail", ""), ("tail", 1), ("tail", ["low"]),
    ("percents", [1, 0]), ("percents", ["1"]), ("percents", [1, 1.0]), ("percents", 5), ("percents", [[1]]),
    ("sources", []), ("sources", [["key"]]), ("sources", ["key", "key"]), ("sources", "key"),
    ("attenuations", ["min", "max"]), ("backbones", [1]), ("backbones", ["a", "a"]), ("normalize", 1),
    ("options", []), ("options", {1: 2}), ("checkpoint", 3), ("store", 1),
    ("fit_split", ""), ("fit_split", 3),
    ("dask", 2), ("dask", "local:0"), ("dask", "local:many"), ("dask", ""), ("backbone", None),
]


@pytest.mark.parametrize("parameters", [
    {"unknown": "thing"},
    {"limit": None, "clusters": None, "batch_size": "auto", "threshold": "auto", "pos_embed": "auto"},
    {"limit": 1, "seed": 0, "clusters": 2, "percents": [], "threshold": 0, "alpha": 0.5},
    {"threshold": "share:2%", "tail": None, "rank": 3}, {"threshold": "share:0.5%", "tail": "high", "source": "key"},
    {"threshold": "sd:3", "tail": "low", "source": "token"}, {"threshold": "sd:2.5", "options": {"tail": "low"}},
    {"source": "attention", "tail": "high"}, {"source": "direction", "options": {"tail": None}},
    {"sources": ["direction", "attention", "token"], "attenuations": ["spread", "clip", "substitute"]},
    {"sources": ["key", "query"], "attenuations": ["min"], "percents": [0.5, 99], "backbones": ["a"]},
    {"options": {"image_size": 56, "device": "cuda:1", "store": None, "kmeans_seed": 3, "unknown": 1}},
    OPTIONS,
])
def test_valid_values_pass(parameters):
    check_values(parameters)


def test_every_parameter_of_the_notebooks_has_a_rule_that_its_default_meets():
    for step in plan_report(profile="paper").steps + plan_report().steps:
        check_values(step.parameters)
        assert set(step.notebook.defaults) <= set(RULES)
        check_options(step.notebook.defaults.get("options", {}), RULES)


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_invalid_values_are_refused_by_name_as_parameter_and_as_option(name, value):
    for parameters in [{name: value}, {"options": {name: value}}][:1 if name == "options" else 2]:
        with pytest.raises(ItaeError, match=re.escape(f"{name}={value!r}")) as refused:
            check_values(parameters, "profile mine")
        assert str(refused.value).startswith("profile mine: ")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("source", ["direction", "attention"])
def test_a_tail_on_a_statistic_with_one_side_is_refused(source):
    for parameters in [{"source": source, "tail": "low"}, {"source": source, "options": {"tail": "low"}},
                       {"options": {"source": source, "tail": "low"}}]:
        with pytest.raises(ItaeError, match=f"^profile mine: tail='low' .*source='{source}'"):
            check_values(parameters, "profile mine")


def test_the_algorithms_are_those_of_k_means():
    assert all(RULES["algorithm"].allows(name) and name in RULES["algorithm"].words for name in ALGORITHMS)


def test_text_that_no_notebook_can_hold_is_refused():
    with pytest.raises(ItaeError, match=r"data_dir='x\\udcff'"):
        check_values({"data_dir": "x\udcff"})


def test_an_unknown_option_is_refused_with_the_closest_name():
    check_options({"image_size": 3}, OPTIONS)
    with pytest.raises(ItaeError, match=r"'imagesize'.* image_size"):
        check_options({"imagesize": 3}, OPTIONS)


def test_store_cluster_and_number_of_workers_are_not_recorded():
    options = {"store": "x", "dask": "local:2", "num_workers": 3, "device": "cpu"}
    assert recorded({"seed": 1, "options": options}) == {"seed": 1, "options": {"device": "cpu"}}
    assert recorded({"seed": 1}) == {"seed": 1}
