"""Precision and recall of θ found without labels, over a grid of synthetic mixtures of norms.

    python benchmarks/thresholds.py [--repeats 5]

The log norms are a bulk, normal or skewed, and a low mode at a distance D (Ashman's) below it. Each row shows how often
a threshold was found, and the mean precision and recall of the patches at or below it. With share 0 there is no low
mode, and "found" is the rate of false alarms.
"""

import click
import numpy as np
import pandas as pd

from itae_utils.method.artifacts import precision_recall
from itae_utils.method.thresholds import fit_threshold

SIGMA = 0.1
BULKS = {
    "normal": lambda rng, size: rng.normal(0, SIGMA, size),
    "skewed low": lambda rng, size: SIGMA * (4 - rng.gamma(4, 1, size)) / 2,
    "skewed high": lambda rng, size: SIGMA * (rng.gamma(4, 1, size) - 4) / 2,
}  # each with mean 0 and standard deviation SIGMA
SEPARATIONS = (3.0, 4.0, 6.0, 10.0)
SHARES = (0.0, 0.001, 0.005, 0.02, 0.1, 0.2)
SIZES = (2_000, 25_000, 130_000)


def measure(bulk: str, separation: float, share: float, size: int, repeats: int) -> dict[str, float]:
    """Return a row of the table: how often θ was found, and its mean precision and recall."""
    outcomes = []
    for seed in range(repeats):
        rng = np.random.default_rng([seed, size])
        low = rng.random(size) < share
        logs = np.where(low, rng.normal(-separation * SIGMA, SIGMA, size), BULKS[bulk](rng, size))
        threshold = fit_threshold(np.exp(logs)).threshold
        if threshold is not None:
            outcomes.append(precision_recall(np.exp(logs) <= threshold, low))
    precision, recall = np.mean(outcomes, axis=0) if outcomes else (np.nan, np.nan)
    return {"bulk": bulk, "patches": size, "share": share, "D": separation if share else np.nan,
            "found": len(outcomes) / repeats, "precision": precision, "recall": recall}


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Draws per row.")
def main(repeats: int) -> None:
    """Print the table."""
    rows = [measure(bulk, separation, share, size, repeats)
            for bulk in BULKS for size in SIZES for share in SHARES
            for separation in (SEPARATIONS if share else SEPARATIONS[:1])]
    table = pd.DataFrame(rows)
    with pd.option_context("display.max_rows", None, "display.width", 120):
        click.echo(table.to_string(index=False, float_format="{:.3f}".format, na_rep="–"))


if __name__ == "__main__":
    main()
