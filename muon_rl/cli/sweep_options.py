"""The options of ``muon-rl sweep``, and the values and seeds in them."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from muon_rl.cli import ConfigError

# Keys of fit that a sweep sets itself, and what to give in their place.
OWN = {
    "seed_everything": "give seeds with --seeds",
    "ckpt_path": "the same command again goes on from each training's last checkpoint",
    "checkpoint.folder": "checkpoints lie in sweeps/STUDY/",
    "trainer.logger.experiment_name": "name the study with --name",
    "trainer.logger.run_name": "the point names the run",
    "trainer.logger.run_id": "each training has a run of its own",
    "trainer.logger.tags": "give tags with --tag NAME=VALUE",
}
RESERVED = ("task", "method", "algorithm", "optimizer", "seed", "sweep", "point", "git_commit")

USAGE = "muon-rl sweep CONFIG [--grid KEY=V1,V2 ...] [--seeds 0:5] [--jobs 2] [--KEY=VALUE ...]"
ABOUT = """\
Train at every point of a grid, a list or a search, each with the same seeds, each in a process
of its own, as child runs of one MLflow run. Stopped or killed, the same command goes on.

CONFIG is a recipe or a sweep's file, by name or path (see muon-rl recipes). A name that is both
means the sweep; with --grid or --point, the recipe. Any option of fit goes to every training.
"""
EXAMPLES = """\
examples:
  muon-rl sweep sac_cheetah --grid model.optimizer.critic.case=adamw,muon --seeds 0:5 --jobs 2
      two points with five seeds each; muon-rl compare sac_cheetah_sweep tells what came out
  muon-rl sweep sac_cartpole_swingup --grid 'model.optimizer.{actor,critic}.muon.lr=0.01,0.02' \\
      --grid model.gamma=0.98,0.99 --seeds 0,1,2 --data.total_frames=20000 --name rates
      keys in braces move together (quote them); four points, a smaller budget, a name
  muon-rl sweep ppo_snake_muon --search tpe --trials 30 --seeds 0:2 --jobs 4 --metric eval/score
      thirty trials over the ranges of recipes/sweeps/ppo_snake_muon.yaml (muon-rl[search])

Logs and checkpoints lie in sweeps/STUDY/. The experiment in MLflow is named STUDY.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"sweep: {message}; muon-rl sweep --help shows how.")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all options but CONFIG and those of fit."""
    new = _Parser(
        prog="muon-rl sweep", usage=USAGE, description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    what = new.add_argument_group("what is varied")
    what.add_argument(
        "--grid", nargs="+", action="extend", default=[], metavar="KEY=V1,V2",
        help="values of a key; every combination with other keys is a point",
    )  # fmt: skip
    what.add_argument(
        "--point", nargs="+", action="append", default=[], metavar="KEY=V",
        help="a single point: 'KEY=V KEY2=V2'; once for each",
    )  # fmt: skip
    what.add_argument("--config", "-c", action="append", default=[], metavar="NAME",
                      help="a recipe, a task or a file that goes on top of CONFIG")  # fmt: skip
    what.add_argument("--tasks", type=_words, default=None, metavar="T1,T2",
                      help="tasks or files, each of which every point is run on")  # fmt: skip
    what.add_argument("--seeds", type=seeds, default=None, metavar="0:5",
                      help="0:5 is 0,1,2,3,4; of every point (default 0)")  # fmt: skip
    search = new.add_argument_group("a search over the ranges of a sweep's file")
    search.add_argument("--search", choices=("random", "tpe"), help="how points are drawn")
    search.add_argument("--trials", type=_positive, metavar="N", help="points of the whole search")
    search.add_argument("--metric", default="eval/return",
                        help="whose last value, as the mean over the seeds, is to be large; shown "
                        "in table and plot too (default eval/return)")  # fmt: skip
    search.add_argument("--minimize", action="store_true", help="it is to be small")
    search.add_argument("--search-seed", type=int, default=0, metavar="N",
                        help="of the draws (default 0)")  # fmt: skip
    how = new.add_argument_group("how it runs")
    how.add_argument("--jobs", type=_positive, default=1, metavar="N",
                     help="trainings at a time (default 1)")  # fmt: skip
    how.add_argument("--threads", type=_positive, metavar="N",
                     help="of each training (default: OMP_NUM_THREADS where it is set, else "
                          "processors / jobs)")  # fmt: skip
    how.add_argument("--retries", type=_count, default=1, metavar="N",
                     help="how often a training that fails is run again (default 1)")  # fmt: skip
    how.add_argument("--launcher", choices=("local", "ray"), default="local",
                     help="ray hands the trainings to a Ray cluster (muon-rl[ray])")  # fmt: skip
    how.add_argument("--dry-run", action="store_true",
                     help="check all points, print the commands, run nothing")  # fmt: skip
    name = new.add_argument_group("how it is found again")
    name.add_argument("--name", metavar="STUDY",
                      help="of the study and its experiment (default: the sweep's name, or the "
                      "recipe's with _sweep)")  # fmt: skip
    name.add_argument("--tag", action="append", default=[], metavar="NAME=VALUE",
                      help="a tag of every training's run, such as tuning_trials=10")  # fmt: skip
    return new


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a sweep, and those that go to every fit.

    Args:
        arguments: behind the word ``sweep``.

    Raises:
        ConfigError: naming the option that is wrong.
    """
    words = list(arguments)
    config = words.pop(0) if words and not words[0].startswith("-") else None
    options, passed = parser().parse_known_args(words)
    if config is None:
        if not options.config:
            raise ConfigError(
                "sweep needs a recipe or a sweep's file as its first word: muon-rl sweep CONFIG "
                "--grid KEY=V1,V2 (muon-rl recipes lists both)."
            )
        config, *options.config = options.config
    options.recipe = config
    for word in passed:
        key = word.removeprefix("--").partition("=")[0].replace(".init_args", "")
        if word.startswith("--") and key in OWN:
            raise ConfigError(f"sweep sets {key} itself: {OWN[key]}.")
    options.tag = dict(_assignment(word, "--tag") for word in options.tag)
    for tag in options.tag:
        if tag in RESERVED or tag.startswith(("mlflow.", "muon_rl.", "version/")):
            raise ConfigError(f"--tag {tag}: this tag is set by the training itself; name another.")
    return options, passed


def grid(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the lists of values by key.

    Args:
        words: such as ``model.gamma=0.98,0.99``; commas in brackets and quotes part nothing.

    Raises:
        ConfigError: if a word is none, or a key comes twice.

    Example:
        >>> grid(["betas=[0.0,0.999],[0.9,0.999]", "case=adamw,muon"])
        {'betas': ['[0.0,0.999]', '[0.9,0.999]'], 'case': ['adamw', 'muon']}
    """
    found: dict[str, list[str]] = {}
    for word in words:
        key, text = _assignment(word, "--grid")
        if key in found:
            raise ConfigError(f"--grid has {key} twice: give all of its values at once.")
        found[key] = _parts(key, text)
    return found


def point(words: Sequence[str]) -> dict[str, str]:
    """Return the values of a single point by key.

    Args:
        words: such as ``a.lr=0.1``; a word may hold several, parted by blanks.

    Raises:
        ConfigError: if a word is none.
    """
    pairs = [w for word in words for w in re.split(r"\s+(?=[\w.{},]+=)", word.strip())]
    found: dict[str, str] = {}
    for pair in pairs:
        key, value = _assignment(pair, "--point")
        if key in found:
            raise ConfigError(f"--point has {key} twice: {' '.join(words)}.")
        found[key] = _unquoted(key, value)
    return found


def seeds(text: str) -> list[int]:
    """Return the seeds that a text names.

    Args:
        text: numbers and ranges, the end left out: ``0:5`` or ``0,3,7`` or ``0:2,7``.

    Example:
        >>> seeds("0:3,7")
        [0, 1, 2, 7]
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", part)
        if match is None or (match[2] and int(match[2]) <= int(match[1])):
            raise argparse.ArgumentTypeError(
                f"must be seeds such as 0:5 (which is 0,1,2,3,4) or 0,3,7, but is {text!r}"
            )
        found += range(int(match[1]), int(match[2])) if match[2] else [int(match[1])]
    return list(dict.fromkeys(found))


def processors() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(options: argparse.Namespace) -> int:
    """Return the threads of each training: as asked for, as the user's shell says, or a share.

    Args:
        options: of the sweep.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    if options.threads:
        return int(options.threads)
    return int(said) if said.isdecimal() and int(said) else max(1, processors() // options.jobs)


def _assignment(word: str, option: str) -> tuple[str, str]:
    key, sign, value = word.partition("=")
    key = key.strip().removeprefix("--")
    if not sign or not key or not value.strip():
        raise ConfigError(f"{option} {word}: it must be KEY=VALUE, as in model.gamma=0.98.")
    return key, value.strip()


def _parts(key: str, text: str) -> list[str]:
    """Return the values in a text, parted by the commas that are in no bracket and no quote."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    parts = [part.strip() for part in parts]
    if depth or quote or not all(parts):
        raise ConfigError(f"--grid {key}={text}: a value is empty, or a bracket or quote is open.")
    return [_unquoted(key, part) for part in parts]


def _unquoted(key: str, text: str) -> str:
    """Return a value without the quotes around it."""
    if text[0] not in "'\"":
        return text
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, str):
        raise ConfigError(f"{key}={text}: the quotes do not close where the value ends.")
    return value


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _positive(text: str) -> int:
    number = _count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {text}")
    return number


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, but is {text!r}")
    return int(text)
