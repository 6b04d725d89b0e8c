"""What is known of the backbone `demo` on digits, whose artifacts were planted: expected results, and its neurons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from itae_utils.analysis.words import percent
from itae_utils.extraction.observation import measured_batches
from itae_utils.method.anatomy import adapt, block_inputs, tokens_entering
from itae_utils.method.artifacts import precision_recall
from itae_utils.method.register_setting import TestTimeRegisters
from itae_utils.method.registers import apply_registers
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import Place

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


def register_checks(backbone: Backbone, dataset: Dataset, found: TestTimeRegisters, indices: np.ndarray, *,
                    store: str | Path | Store | None = "auto", **reading: object) -> pd.DataFrame:
    """Return whether test-time registers do on some images what they say, as text; `reading` is as for `observe`.

    `found` has form "token". `indices` are the images' numbers in the data set.
    """
    model, last, place = backbone.model, backbone.num_blocks - 1, backbone.model.num_prefix_tokens

    def measure(images: Tensor, _image_numbers: tuple[int, ...]) -> dict[str, Tensor]:
        before, loudest = tokens_entering(model, images, [last])[last].float().norm(dim=-1), []
        with apply_registers(model, found), ExitStack() as stack:
            last_block = adapt(model).blocks[last]
            for block, units in found.neurons:
                def listen(_module: torch.nn.Module, args: tuple[Tensor], units: tuple[int, ...] = units) -> None:
                    loudest.append(args[0][:, place + 1:, list(units)].abs().amax(dim=(1, 2)))

                stack.callback(model.blocks[block].mlp.fc2.register_forward_pre_hook(listen).remove)
            inputs = block_inputs(model, images, [last])[last]
            after, weights = inputs.tokens.float().norm(dim=-1), last_block.qkv(inputs).cls_logits.softmax(dim=-1)
        return {"before": before[:, place:], "after": after[:, place + 1:], "register": after[:, place],
                "attention": weights[:, :, 0, place].mean(dim=1), "loudest": torch.stack(loudest).amax(dim=0)}

    seen = measured_batches(Place(open_store(store), backbone, dataset), indices, measure, **reading)
    planted = {(backbone.truth.block, unit) for unit in backbone.truth.neurons}
    neurons = {(block, unit) for block, units in found.neurons for unit in units}
    outliers = [int((seen[name] > found.threshold).sum()) for name in ("before", "after")]
    ratio = np.median(seen["register"]) / np.median(seen["after"])
    checks = {
        "planted neurons that were found": f"{len(neurons & planted)} of {len(planted)}",
        "other neurons that were found": f"{len(neurons - planted)}",
        "largest activation of a found neuron in a patch, with the register": f"{seen['loudest'].max():.3g}",
        "patches that are longer than τ, without and with the register": f"{outliers[0]:,} → {outliers[1]:,}",
        "length of the register over that of a patch, medians": f"{ratio:.3g} ×",
        "share of the [CLS] attention on the register": percent(float(seen["attention"].mean())),
    }
    return pd.Series(checks).to_frame("measured").rename_axis("check")
