import copy
import re

import pytest

from itae_utils.report.methods import citations, methods_paragraph, run_hash
from tests.tiny_notebooks import RESULTS, changed

OPTIONS = {"attenuation": "min", "alpha": 0.25, "tail": None, "n_init": 7, "normalize": True, "algorithm": "exact"}
ROWS = [{"backbone": "demo", "dataset": "digits", "n": 1797, "variant": "itae", "seed": None, "metric": metric,
         "value": value} for metric, value in (("acc_difference", 0.2), ("acc_difference_low", 0.15),
                                               ("acc_difference_high", 0.25))]
RUN = changed(RESULTS, "parameters", {"source": "key", "threshold": "auto", "clusters": None, "seeds": 3,
                                      "options": OPTIONS})
RUN = changed(changed(RUN, "thresholds", {"‖key‖₂, last block": 2.4636}), "rows", [*RESULTS["rows"], *ROWS])


def test_every_number_is_from_the_results():
    words = methods_paragraph(RUN)
    numbers = set(re.findall(r"(?<![\w.-])[+-]?\d+(?:,\d{3})*(?:\.\d+)*", words))
    assert {"6", "64", "1,797", "28", "7", "2.464", "3", "0.605", "0.805", "+0.200", "+0.150", "+0.250"} <= numbers
    assert numbers <= {"6", "64", "1,797", "28", "7", "2.464", "1", "3", "0.605", "0.805", "+0.200", "+0.150", "+0.250",
                       "95", "3.11.2", "0.1.0", "2.9.0"}
    assert "abababababab" in words
    assert RESULTS["provenance"]["backbone"]["source"] in words


@pytest.mark.parametrize(("place", "value", "said", "before"), [
    ("parameters.threshold", 2.0, "(given)", "found without labels"),
    ("parameters.threshold", "share:2%", "from the rule share:2%", "found without labels"),
    ("parameters.options.tail", "high", "at or above", "at or below"),
    ("parameters.source", "token", "at or above", "at or below"),
    ("parameters.options.attenuation", "scale", "multiplied by α = 0.25", "edit min"),
    ("parameters.options.normalize", False, "not normalised", "length 1"),
    ("parameters.clusters", 25, "k = 25", "number of classes"),
    ("thresholds", {"‖key‖₂, last block": None}, "no patch was attenuated", "θ ="),
    ("rows", RESULTS["rows"], "Versions", "interval"),
    ("provenance.fitted_on", {"split": "train"}, "fitted on train", "starts each)"),
])
def test_it_says_what_was_run(place, value, said, before):
    plain, other = methods_paragraph(RUN), methods_paragraph(changed(RUN, place, value))
    assert before in plain
    assert before not in other
    assert said in other


def test_the_hash_is_that_of_inputs_and_results_without_dates():
    whole = run_hash({"03": RUN})
    assert run_hash({"03": changed(changed(RUN, "provenance.date", "x"), "provenance.seconds", 3)}) == whole
    others = [changed(RUN, "rows.0.value", 0.1), changed(RUN, "provenance.versions.torch", "1"),
              changed(RUN, "provenance.backbone.weights_sha256", "cd"), changed(RUN, "thresholds", {})]
    assert len({whole, *(run_hash({"03": each}) for each in others)}) == 5
    assert run_hash({"03": copy.deepcopy(RUN), "01": RUN}) != whole


def test_citations_name_paper_software_and_run():
    text = citations({"03": RUN})
    assert text.count("@") == 2
    assert f"run {run_hash({'03': RUN})}" in text
    assert "version = {0.1.0}" in text
    assert text.count("{") == text.count("}")
