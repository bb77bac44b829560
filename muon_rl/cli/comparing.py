"""A comparison from its arguments to its files and its run in MLflow."""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import chain

from muon_rl.cli import ConfigError
from muon_rl.cli.compare import bounds, thresholds
from muon_rl.experiments import tables
from muon_rl.experiments.comparison import Options, compare
from muon_rl.experiments.runs import ComparisonError, find_experiments, find_runs, open_store


def run(given: Namespace) -> None:
    """Read, compare, write and show.

    Args:
        given: the arguments of ``muon-rl compare``.

    Raises:
        ConfigError: if there is nothing to compare, or an argument names what is not there.
    """
    options = Options(
        group_by=list(chain(*given.group_by)),
        baseline=given.baseline,
        metric=given.metric,
        thresholds=thresholds(given.threshold),
        bounds=bounds(given.normalize),
        last=given.last,
        resamples=given.resamples,
        seed=given.seed,
    )
    try:
        client = open_store(given.tracking_uri)
        experiments = find_experiments(client, given.experiments)
        comparison = compare(client, find_runs(client, experiments, given.filter), options)
    except ComparisonError as error:
        raise ConfigError(str(error)) from error
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "summary.csv").write_text(tables.to_csv(comparison))
    (given.output / "summary.md").write_text(tables.to_markdown(comparison))
    (given.output / "summary.tex").write_text(tables.to_latex(comparison))
    sys.stdout.write(tables.to_text(comparison))
