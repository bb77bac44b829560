"""The points of a sweep: which keys of a config are set to what."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from muon_rl.experiments.ranges import Ranges, read_ranges

_TOGETHER = re.compile(r"\{([^{}]*)\}")


KINDS = ("grid", "points", "ranges")


class Sweep(NamedTuple):
    """A recipe and the points that it is run at, or the ranges that they are drawn from.

    Args:
        config: the recipe's name or file.
        points: of each, the values by dotted key; none where there are ranges.
        tasks: names or files of what goes on top of the recipe.
        ranges: by dotted key; none where there are points.
    """

    config: str
    points: list[dict[str, Any]]
    tasks: tuple[str, ...] = ()
    ranges: Ranges = MappingProxyType({})


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file: ``config``, ``tasks`` if there are any, and what is varied.

    That is one of ``grid`` (see :func:`grid_points`), ``points`` (a list of values by dotted key)
    and ``ranges`` (see :func:`~muon_rl.experiments.read_ranges`). Braces in a key stand for several
    keys in each of them.

    Args:
        path: of the YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has other keys, or what is varied is not as it must be.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    keys = set(content) if isinstance(content, dict) else set()
    kind = keys & set(KINDS)
    if "config" not in keys or len(kind) != 1 or keys - {"config", "tasks", *KINDS}:
        there = ", ".join(map(str, content)) if keys else "no keys"
        raise ValueError(
            f"{path} must have the key config, one of grid, points and ranges, and may have tasks, "
            f"but has {there}."
        )
    tasks = content.get("tasks") or []
    tasks = tuple(map(str, [tasks] if isinstance(tasks, str) else tasks))
    given = content[kind.pop()]
    try:
        if "ranges" in keys:
            return Sweep(str(content["config"]), [], tasks, read_ranges(given))
        points = grid_points(given) if "grid" in keys else _listed(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Sweep(str(content["config"]), points, tasks)


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
    return [
        expand(dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())
    ]


def expand(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with a key for each that braces stand for.

    Args:
        values: by dotted key.

    Raises:
        ValueError: if a key is set twice.

    Example:
        >>> expand({"{actor,critic}.lr": 0.1, "clip": 0.2})
        {'actor.lr': 0.1, 'critic.lr': 0.1, 'clip': 0.2}
    """
    point: dict[str, Any] = {}
    for group, value in values.items():
        for key in _keys(str(group)):
            if key in point:
                raise ValueError(f"A point sets {key} twice: {', '.join(map(str, values))}.")
            point[key] = value
    return point


def _listed(points: Any) -> list[dict[str, Any]]:
    """Return the points of a list."""
    if not isinstance(points, list) or not points:
        raise ValueError(f"points must be a list of at least one, not {points!r}.")
    for point in points:
        if not isinstance(point, dict):
            raise ValueError(f"A point must be values by dotted key, not {point!r}.")
    return [expand(point) for point in points]


def _keys(key: str) -> list[str]:
    """Return the keys that braces stand for, or the key itself."""
    match = _TOGETHER.search(key)
    if match is None:
        return [key]
    words = [word.strip() for word in match[1].split(",")]
    return [k for word in words for k in _keys(key[: match.start()] + word + key[match.end() :])]
