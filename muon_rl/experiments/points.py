"""The points of a sweep: which keys of a config are set to what."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_TOGETHER = re.compile(r"\{([^{}]*)\}")


class Sweep(NamedTuple):
    """A recipe and the points that it is run at.

    Args:
        config: the recipe's name or file.
        points: of each, the values by dotted key.
    """

    config: str
    points: list[dict[str, Any]]


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file: ``config`` and ``grid``.

    Args:
        path: of the YAML file; see :func:`grid_points` for ``grid``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has other keys, or a grid that is none.
    """
    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, dict) or set(content) != {"config", "grid"}:
        there = ", ".join(map(str, content)) if isinstance(content, dict) else "no keys"
        raise ValueError(f"{path} must have the keys config and grid, but has {there}.")
    return Sweep(str(content["config"]), grid_points(content["grid"]))


def grid_points(
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Sequence[Any]]],
) -> list[dict[str, Any]]:
    """Return the points of a grid: every combination of the values of its keys.

    Args:
        grid: lists of values by dotted key; a list of grids is their union. Braces in a key stand
            for several keys that move together: ``model.optimizer.{actor,critic}.case``.

    Raises:
        ValueError: if the values of a key are no list, or an empty one.

    Example:
        >>> grid_points({"{a,b}.case": ["muon"], "c": [1, 2]})
        [{'a.case': 'muon', 'b.case': 'muon', 'c': 1}, {'a.case': 'muon', 'b.case': 'muon', 'c': 2}]
    """
    if not isinstance(grid, Mapping):
        return [point for part in grid for point in grid_points(part)]
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"The values of {key} must be a list of at least one, not {values!r}.")
    keys = [_keys(key) for key in grid]
    return [
        {key: value for group, value in zip(keys, values, strict=True) for key in group}
        for values in itertools.product(*grid.values())
    ]


def _keys(key: str) -> list[str]:
    """Return the keys that braces stand for, or the key itself."""
    match = _TOGETHER.search(key)
    if match is None:
        return [key]
    words = [word.strip() for word in match[1].split(",")]
    return [k for word in words for k in _keys(key[: match.start()] + word + key[match.end() :])]
