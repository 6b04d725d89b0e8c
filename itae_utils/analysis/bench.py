"""The expected results of the backbone `demo` on digits, beside the measured ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from itae_utils.analysis.words import percent
from itae_utils.method.artifacts import precision_recall

RECOVERED = "ITAE recovers at least 80 % of the ACC lost by planting"
BENCH_TARGETS: dict[str, tuple[Callable[[float], bool], Callable[[float], str]]] = {  # whether it is met, and its text
    "demo-clean beats raw pixels by at least 0.08 ACC": (lambda lead: lead >= 0.08, "{:+.3f}".format),
    "planting the artifacts costs at least 0.08 ACC": (lambda cost: cost >= 0.08, "{:+.3f}".format),
    "the precision of the detection is at least 0.99": (lambda precision: precision >= 0.99, "{:.4f}".format),
    "the recall of the detection is at least 0.99": (lambda recall: recall >= 0.99, "{:.4f}".format),
    RECOVERED: (lambda share: share >= 0.8, percent),
    "the random control recovers less than 20 % of it": (lambda share: share < 0.2, percent),
}


def bench_targets(acc: Mapping[str, float], found: np.ndarray, truth: np.ndarray) -> pd.DataFrame:
    """Compare measured with expected results; `bench_table` formats the table.

    `acc` is the mean ACC of "raw pixels", "baseline" (demo), "demo-clean", "itae" and "random control"; `found` and
    `truth` are the detected and the planted artifacts (bool, of one shape). The columns are measured (NaN if that is
    impossible) and met.
    """
    lead, cost = acc["demo-clean"] - acc["raw pixels"], acc["demo-clean"] - acc["baseline"]
    recovered = [(acc[name] - acc["baseline"]) / cost if cost > 0 else np.nan for name in ("itae", "random control")]
    table = pd.DataFrame({"measured": [lead, cost, *precision_recall(found, truth), *recovered]},
                         index=pd.Index(list(BENCH_TARGETS), name="expected result"))
    return table.assign(met=[BENCH_TARGETS[target][0](value) for target, value in table.measured.items()])


def bench_table(bench: pd.DataFrame) -> pd.DataFrame:
    """Return `bench_targets` as text, in columns measured and verdict."""
    measured = ["–" if np.isnan(value) else BENCH_TARGETS[target][1](value) for target, value in bench.measured.items()]
    return pd.DataFrame({"measured": measured, "verdict": np.where(bench.met, "met", "not met")}, index=bench.index)
