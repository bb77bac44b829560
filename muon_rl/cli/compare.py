"""``muon-rl compare``: from the runs of an MLflow experiment to a table with intervals."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from muon_rl.cli import ConfigError

HELP = """\
Compare the runs of MLflow experiments. Per group: the interquartile mean (IQM) of the final score
and of the area under the curve, with 95% bootstrap intervals; how probably one of its runs beats
one of the baseline's; frames and time to a threshold; speed. What speaks against believing a row
stands in its remarks."""

EXAMPLES = """\
examples:
  muon-rl compare cartpole-swingup                   # by method, from mlflow.db here
  muon-rl compare cheetah-run --group-by model.optimizer.critic.case --baseline adamw
  muon-rl compare cheetah-run --group-by optimizer data.batch_size --threshold 800
  muon-rl compare cheetah-run walker-walk --group-by optimizer --normalize 0:1000
  muon-rl compare cheetah-run --filter "tags.sweep = 'sac_momentum'" --last 3
  muon-rl compare cheetah-run --until 100_000        # who learns faster: at a smaller budget
  muon-rl compare snake --metric eval/score --tracking-uri http://localhost:5000

It writes summary.csv, summary.md, summary.tex, report.html, curves.png, curves.svg, aggregate.png
and aggregate.svg to --output, and logs them as a run of the (first) experiment. docs/compare.md
explains every column and every remark."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"compare: {message}. muon-rl compare --help shows how.")


def main(arguments: list[str]) -> None:
    """Compare, write and log.

    Args:
        arguments: of the command line, the subcommand first.
    """
    given = _parser().parse_args(arguments[1:])
    given.command = shlex.join(["muon-rl", *arguments])
    uri = given.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    given.tracking_uri = uri or f"sqlite:///{Path('mlflow.db').absolute()}"

    from muon_rl.cli import comparing  # MLflow and matplotlib are slow to import

    comparing.run(given)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "muon-rl compare", description=HELP, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    # argparse takes -1600:0 and -1e3 for options, and only -1600 for a number.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    add = parser.add_argument
    add("experiments", nargs="+", metavar="EXPERIMENT", help="name or id of an MLflow experiment")
    add(
        "--group-by",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        type=_words,
        help="tags or params whose values make a group, as optimizer or "
        "model.optimizer.critic.case; several: separated by commas or blanks, or repeated; "
        "default: the tag method, else optimizer",
    )
    add("--baseline", metavar="GROUP", help="the group that the others are measured against")
    add("--metric", default="eval/return", help="the score; more is better (default: %(default)s)")
    add(
        "--threshold",
        nargs="+",
        action="extend",
        default=[],
        metavar="[TASK=]VALUE",
        help="when do runs first reach this value of the metric?",
    )
    add(
        "--last",
        type=_positive,
        default=1,
        metavar="K",
        help="evaluations at a run's end that count as its final score (default: 1)",
    )
    add(
        "--until",
        type=_positive,
        metavar="FRAMES",
        help="what runs did at a smaller budget: evaluations after this frame are left out",
    )
    add(
        "--normalize",
        nargs="+",
        action="extend",
        default=[],
        metavar="[TASK=]LOW:HIGH",
        help="scores that become 0 and 1; several tasks are always normalised, by default to "
        "their lowest and highest evaluation",
    )
    add("--resamples", type=_positive, default=10_000, help="of the bootstrap (default: 10,000)")
    add("--seed", type=_natural, default=0, help="of the bootstrap (default: 0)")
    add("--filter", default="", help="only these runs: MLflow's filter, as \"tags.task = 'x'\"")
    add(
        "--tracking-uri",
        metavar="URI",
        help="default: MLFLOW_TRACKING_URI, else sqlite in mlflow.db here",
    )
    add(
        "--output",
        type=Path,
        default=Path("comparison"),
        metavar="FOLDER",
        help="where files are written (default: comparison/)",
    )
    add("--no-log", action="store_true", help="write files only: log no run of the comparison")
    return parser  # fmt: skip


def thresholds(words: Sequence[str]) -> dict[str, float]:
    """Return thresholds by task, ``""`` for every task.

    Args:
        words: ``VALUE`` or ``TASK=VALUE``.

    Raises:
        ConfigError: if one is neither.
    """
    found = {}
    for word in words:
        task, _, value = word.rpartition("=")
        found[task] = _number(value, "--threshold", word, "a number or TASK=NUMBER")
    return found


def bounds(words: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the scores that become 0 and 1 by task, ``""`` for every task.

    Args:
        words: ``LOW:HIGH`` or ``TASK=LOW:HIGH``.

    Raises:
        ConfigError: if one is neither.
    """
    found = {}
    for word in words:
        task, _, values = word.rpartition("=")
        low, _, high = values.partition(":")
        how = "LOW:HIGH or TASK=LOW:HIGH with LOW below HIGH"
        ends = _number(low, "--normalize", word, how), _number(high, "--normalize", word, how)
        if ends[0] >= ends[1]:
            raise ConfigError(f"--normalize must be {how}, but is {word!r}.")
        found[task] = ends
    return found


def _number(text: str, flag: str, came: str, how: str) -> float:
    try:
        value = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ConfigError(f"{flag} must be {how}, but is {came!r}.")
    return value


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _whole(text: str, least: int) -> int:
    try:
        value = int(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, but is {text!r}")
    return value


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)
