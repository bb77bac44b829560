"""A comparison from its arguments to its files and its run in MLflow."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path

from mlflow.exceptions import MlflowException

from muon_rl import __version__
from muon_rl.cli import ConfigError
from muon_rl.cli.commit import git_commit
from muon_rl.cli.compare import bounds, thresholds
from muon_rl.experiments import plots, report, tables
from muon_rl.experiments.comparison import Comparison, Options, compare
from muon_rl.experiments.log import log
from muon_rl.experiments.runs import ComparisonError, find_experiments, find_runs, open_store
from muon_rl.passwords import without_passwords
from muon_rl.turns import one_process_at_a_time


def run(given: Namespace) -> None:
    """Read, compare, write, show and log.

    Args:
        given: the arguments of ``muon-rl compare``.

    Raises:
        ConfigError: if there is nothing to compare, or an argument names what is not there.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    options = Options(
        group_by=list(chain(*given.group_by)),
        baseline=given.baseline,
        metric=given.metric,
        thresholds=thresholds(given.threshold),
        bounds=bounds(given.normalize),
        last=given.last,
        until=given.until,
        resamples=given.resamples,
        seed=given.seed,
    )
    try:
        client = open_store(given.tracking_uri)
        experiments = find_experiments(client, given.experiments)
        comparison = compare(client, find_runs(client, experiments, given.filter), options)
    except ComparisonError as error:
        raise ConfigError(str(error)) from error
    facts = facts_of(given, comparison, [experiment.name for experiment in experiments])
    files = write(comparison, given.output, facts)
    sys.stdout.write(f"{tables.to_text(comparison)}\nreport  {given.output / 'report.html'}\n")
    if given.no_log:
        return
    experiment = experiments[0]
    try:
        with one_process_at_a_time(given.tracking_uri):  # a sweep may be writing there
            run_id = log(client, experiment.experiment_id, comparison, files, facts)
    except (MlflowException, OSError) as error:
        sys.stderr.write(f"The files are written, but not logged in MLflow: {error}\n")
        return
    sys.stdout.write(f"MLflow  run {run_id} in experiment {experiment.name}\n")


def write(comparison: Comparison, folder: Path, facts: dict[str, str]) -> list[Path]:
    """Write all files of a comparison and return them.

    Args:
        comparison: to write.
        folder: to make and to write to.
        facts: how it was made.

    Raises:
        ConfigError: if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "summary.csv": tables.to_csv(comparison),
            "summary.md": tables.to_markdown(comparison),
            "summary.tex": tables.to_latex(comparison),
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
        pictures = plots.save(comparison, folder)
        page = folder / "report.html"
        page.write_text(report.to_html(comparison, folder, facts))
    except OSError as error:
        raise ConfigError(f"--output={folder} cannot be written: {error}") from error
    return [*(folder / name for name in texts), *pictures, page]


def facts_of(given: Namespace, comparison: Comparison, experiments: list[str]) -> dict[str, str]:
    """Return how a comparison was made.

    Args:
        given: the arguments of the command.
        comparison: that was made.
        experiments: the names of those that were read.
    """
    options = comparison.options
    now = datetime.now(timezone.utc)
    return {
        "command": without_passwords(given.command),
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "commit": git_commit().get("git_commit", "not in a git repository"),
        "version": f"muon_rl {__version__}",
        "tracking URI": without_passwords(given.tracking_uri),
        "experiments": ", ".join(experiments),
        "metric": options.metric,
        "grouped by": ", ".join(options.group_by),
        "baseline": options.baseline or "none",
        "last evaluations": str(options.last),
        "until": "the end" if options.until is None else f"frame {options.until:,}",
        "resamples": f"{options.resamples:,}",
        "seed of the bootstrap": str(options.seed),
    }
