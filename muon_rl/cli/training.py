"""``muon-rl fit`` and ``muon-rl validate``: the command around a recipe."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import warnings
from itertools import pairwise
from typing import NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException

from muon_rl.callbacks import RedFlagError
from muon_rl.cli import help, recipes
from muon_rl.cli.recipe_cli import RecipeCLI


def main(arguments: list[str]) -> None:
    """Run ``fit`` or ``validate``.

    Args:
        arguments: of the command line, the subcommand first.
    """
    quieten()
    recipes.import_pages()
    arguments = with_recipe_paths(arguments)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help.render(arguments[0], help.load(config_paths(arguments))))
        return
    cli: RecipeCLI | None = None
    try:
        cli = RecipeCLI(arguments)
        cli.run()
    except RedFlagError as flag:
        sys.stderr.write(f"{flag}\n")
        raise SystemExit(1) from flag
    except (SystemExit, KeyboardInterrupt) as stop:
        # Lightning turns a second Ctrl-C into a plain exit with code 1.
        was_stopped = isinstance(stop, (SIGTERMException, KeyboardInterrupt))
        if not was_stopped and not (cli and cli.stop.interrupted):
            raise
        end_stopped(cli, arguments, isinstance(stop, KeyboardInterrupt))


def quieten() -> None:
    """Leave out the chatter of libraries that says nothing about a run."""
    for name in ("torchrl", "absl", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("absl", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning|glfw|torchrl|tensordict|mlflow")


def with_recipe_paths(arguments: list[str]) -> list[str]:
    """Return the arguments with shipped recipes' names turned into their paths.

    Args:
        arguments: of the command line.
    """
    resolved = []
    for index, word in enumerate(arguments):
        if index and arguments[index - 1] in ("--config", "-c"):
            word = recipes.find(word)
        elif word.startswith("--config="):
            word = "--config=" + recipes.find(word.removeprefix("--config="))
        resolved.append(word)
    return resolved


def config_paths(arguments: list[str]) -> list[str]:
    """Return the files that are given as ``--config``.

    Args:
        arguments: of the command line.
    """
    paths = [after for word, after in pairwise(arguments) if word in ("--config", "-c")]
    return paths + [w.removeprefix("--config=") for w in arguments if w.startswith("--config=")]


def command_without_checkpoint(arguments: list[str]) -> str:
    """Return the command line, quoted for a shell, for a ``--ckpt_path`` to be put behind it.

    Args:
        arguments: of the command line; ``--ckpt_path=X`` and ``--ckpt_path X`` are left out.

    Example:
        >>> command_without_checkpoint(["fit", "--ckpt_path", "last", "--model.actor={a: 3}"])
        "muon-rl fit '--model.actor={a: 3}'"
    """
    kept = [
        word
        for before, word in pairwise(["", *arguments])
        if before != "--ckpt_path" and word.partition("=")[0] != "--ckpt_path"
    ]
    return shlex.join(["muon-rl", *kept])


def end_stopped(cli: RecipeCLI | None, arguments: list[str], by_keyboard: bool) -> NoReturn:
    """Say how to go on after a stop, and exit as the signal demands.

    Args:
        cli: the command that was stopped, if it had begun.
        arguments: of its command line.
        by_keyboard: whether Ctrl-C ended it; the command knows of one that it took over itself.
    """
    if cli and cli.checkpoints.saved_frames is not None:
        sys.stderr.write(
            f"Stopped; {cli.checkpoints.saved_frames:,} frames are saved. To go on:\n"
            f"  {command_without_checkpoint(arguments)} --ckpt_path={cli.checkpoints.last_path}\n"
        )
    else:
        sys.stderr.write("Stopped; nothing was saved.\n")
    by_keyboard = by_keyboard or bool(cli and cli.stop.interrupted)
    raise SystemExit(128 + (signal.SIGINT if by_keyboard else signal.SIGTERM)) from None
