"""Measure how often the 95% bootstrap interval of the IQM holds the true IQM, by number of seeds.

Normal scores, whose true IQM is their mean, and scores of which one in ten is a failure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from machine import append_row, commit_of, processor

from muon_rl.experiments.statistics import iqm, percentile_interval, stratified_bootstrap

RESULTS = Path(__file__).parent / "results" / "interval_coverage.csv"


def normal(generator: np.random.Generator, size: int) -> np.ndarray:
    """Return scores of a method that always works."""
    return generator.normal(size=size)


def with_failures(generator: np.random.Generator, size: int) -> np.ndarray:
    """Return scores of which one in ten lies five deviations below the others."""
    return generator.normal(size=size) - 5 * (generator.random(size) < 0.1)


def measure(draw, seeds: int, trials: int, resamples: int, generator: np.random.Generator) -> float:
    """Return the share of intervals that hold the true IQM."""
    truth = float(iqm(draw(generator, 2_000_000)))
    inside = 0
    for _ in range(trials):
        samples = stratified_bootstrap(
            [draw(generator, seeds)], iqm, resamples=resamples, generator=generator
        )
        low, high = percentile_interval(samples)
        inside += low <= truth <= high
    return inside / trials


def main() -> None:
    """Print a table and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10, 20, 50])
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.rows.unlink(missing_ok=True)
    print(f"{'seeds':>5}  normal  with failures")
    for seeds in options.seeds:
        found = [
            measure(draw, seeds, options.trials, options.resamples, np.random.default_rng(0))
            for draw in (normal, with_failures)
        ]
        print(f"{seeds:>5}  {found[0]:6.1%}  {found[1]:13.1%}", flush=True)
        append_row(options.rows, {
            "seeds": seeds, "normal": f"{found[0]:.4f}", "with_failures": f"{found[1]:.4f}",
            "trials": options.trials, "resamples": options.resamples,
            "processor": processor(), "git_commit": commit_of(),
        })  # fmt: skip


if __name__ == "__main__":
    main()
