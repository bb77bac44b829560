"""The recipes that are shipped: their pages, their files and what each is for."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from muon_rl.cli import ConfigError

FOLDER = Path(str(importlib.import_module("muon_rl.recipes").__file__)).parent


def import_pages() -> None:
    """Import every recipe's page, so that a config may name its classes without a path."""
    for page in pkgutil.iter_modules([str(FOLDER)]):
        importlib.import_module(f"muon_rl.recipes.{page.name}")


def shipped() -> dict[str, Path]:
    """Return the shipped recipes' names and files."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def tasks() -> dict[str, Path]:
    """Return the names and files of the shipped tasks, which go on top of a recipe."""
    return {path.stem: path for path in sorted((FOLDER / "tasks").glob("*.yaml"))}


def sweeps() -> dict[str, Path]:
    """Return the names and files of the shipped sweeps."""
    return {path.stem: path for path in sorted((FOLDER / "sweeps").glob("*.yaml"))}


def find(name: str) -> str:
    """Return a shipped recipe's or task's path for its name, and anything else as it is.

    Args:
        name: what was given as ``--config``; an existing file goes before a shipped recipe.

    Raises:
        ConfigError: if it is neither.
    """
    recipes = shipped() | tasks()
    if Path(name).is_file():
        return name
    if name in recipes:
        return str(recipes[name])
    close = difflib.get_close_matches(name, recipes, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(
        f"--config={name}: there is no such file and no shipped recipe of this name{hint} "
        f"Shipped are the recipes {', '.join(shipped())} and the tasks {', '.join(tasks())}."
    )


def default_optimizer(model: str) -> dict[str, Any]:
    """Return the fields of the optimizers that a model has by default; empty if it has none.

    Args:
        model: the class's path.

    Example:
        >>> default_optimizer("muon_rl.recipes.sac.SAC")["alpha"]["case"]
        'adam'
    """
    parameter = inspect.signature(pkgutil.resolve_name(model)).parameters.get("optimizer")
    default = parameter and parameter.default
    return asdict(default) if is_dataclass(default) and not isinstance(default, type) else {}


def main(arguments: list[str]) -> None:
    """Print the shipped recipes, tasks and sweeps, a sentence each.

    Args:
        arguments: of the command line.
    """
    if unknown := [word for word in arguments[1:] if word not in ("-h", "--help")]:
        raise ConfigError(f"recipes takes no arguments, but got {' '.join(unknown)}.")
    kinds = {
        "recipes, to run: muon-rl fit --config NAME": shipped(),
        "tasks, on top of a recipe: muon-rl fit --config NAME --config TASK": tasks(),
        "sweeps, points of a study or ranges of a search: muon-rl sweep NAME": sweeps(),
    }
    width = max(len(name) for files in kinds.values() for name in files)
    for title, files in kinds.items():
        sys.stdout.write(f"{title}\n")
        for name, path in files.items():
            first = path.read_text().splitlines()[0]
            sys.stdout.write(f"  {name:<{width}}  {first.lstrip('# ')}\n")
        sys.stdout.write("\n")
    sys.stdout.write(f"The files are in {FOLDER}.\n")
