"""From the options of ``muon-rl sweep`` to a study: its name, its points, what they share."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from muon_rl.cli import ConfigError, names, recipes, sweep_options
from muon_rl.experiments import Sweep, expand, grid_points, read_sweep
from muon_rl.experiments.jobs import Point
from muon_rl.experiments.points import KINDS
from muon_rl.experiments.ranges import Ranges


@dataclass(frozen=True)
class Plan:
    """What a sweep is to run.

    Args:
        name: of the study.
        configs: of every training, the later ones winning.
        tasks: files by the names that points call them by; each goes on top of the first config.
        points: of the study; none where a search draws them.
        ranges: that a search draws from.
        passed: options of fit for every training.
    """

    name: str
    configs: list[str]
    tasks: dict[str, str]
    points: list[Point]
    ranges: Ranges
    passed: list[str]

    def fit_options(self, point: Point) -> list[str]:
        """Return the options of fit that a point has, but for seed, folder and tracking.

        Raises:
            ConfigError: if it is an older point of the study, on a task that is not found by name.
        """
        first, *others = self.configs
        task = [self._file(point.task)] if point.task else []
        configs = [f"--config={path}" for path in (first, *task, *others)]
        return [*configs, *self.passed, *point.options()]

    def _file(self, task: str) -> str:
        if task in self.tasks:
            return self.tasks[task]
        try:
            return recipes.find(task)
        except ConfigError as error:
            raise ConfigError(
                f"The study has points on the task {task} as well: give its file with --tasks too."
            ) from error

    def task_digests(self) -> dict[str, str]:
        """Return a hash of what each task's file says; it may not change within a study."""
        return {name: _digest(path) for name, path in self.tasks.items()}

    def spec(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return what all trainings of the study have in common; it may not change within one."""
        spec: dict[str, Any] = {
            "configs (and a hash of what they say)": [_digest(path) for path in self.configs],
            "options of fit": self.passed,
        }
        if self.ranges:
            spec["search"] = f"{options.search} for {'small' if options.minimize else 'large'} "
            spec["search"] += f"{options.metric}, drawn with seed {options.search_seed}"
            spec["ranges"] = {key: str(given) for key, given in self.ranges.items()}
        return spec


def plan_of(options: argparse.Namespace, passed: Sequence[str]) -> Plan:
    """Return what a sweep is to run.

    Args:
        options: of the command line, as :func:`sweep_options.read` returns them.
        passed: options of fit.

    Raises:
        ConfigError: if the options do not go together, or name what there is not.
    """
    path = _find(options.recipe, both_mean_recipe=bool(options.grid or options.point))
    sweep = _read(path)
    is_sweep = sweep is not None
    if sweep is None:
        sweep = Sweep(str(path), [{}])
    tasks = options.tasks if options.tasks is not None else list(sweep.tasks)
    files = [recipes.find(name) for name in tasks]
    _check_search(options, sweep, tasks)
    extra = [recipes.find(name) for name in options.config]
    base = sweep.config if not is_sweep else _config_of(path, sweep.config)
    named = _by_name(files)
    return Plan(
        name=_name(options.name, path, is_sweep, extra),
        configs=[base, *extra],
        tasks=named,
        points=[] if sweep.ranges else _points(options, sweep, list(named)),
        ranges=sweep.ranges,
        passed=list(passed),
    )


def _by_name(files: Sequence[str]) -> dict[str, str]:
    """Return tasks' files by the names that tell their runs."""
    named: dict[str, str] = {}
    for file in files:
        if (other := named.setdefault(Path(file).stem, file)) != file:
            raise ConfigError(
                f"--tasks names two files that are called alike, {other} and {file}: rename one, "
                "since runs are told apart by it."
            )
    return named


def _points(options: argparse.Namespace, sweep: Sweep, tasks: Sequence[str]) -> list[Point]:
    """Return every combination of the file's points, the listed ones and the grid's."""
    try:
        listed = [expand(sweep_options.point(words)) for words in options.point]
        grid = grid_points(sweep_options.grid(options.grid)) if options.grid else [{}]
    except ValueError as error:
        raise ConfigError(f"sweep: {error}") from error
    points = sweep.points
    for more in (listed or [{}], grid):
        points = [_merged(old, new) for old in points for new in more]
    return list(
        dict.fromkeys(Point.of(values, task) for task in tasks or [""] for values in points)
    )


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    if twice := sorted(set(old) & set(new)):
        raise ConfigError(f"sweep: --grid, --point and the file set {twice[0]} twice.")
    return {**old, **new}


def _check_search(options: argparse.Namespace, sweep: Sweep, tasks: Sequence[str]) -> None:
    if not sweep.ranges:
        if options.search or options.trials:
            raise ConfigError(
                f"--search draws from the ranges of a sweep's file, and {options.recipe} has none: "
                f"give a file with ranges, such as {', '.join(_with_ranges())}."
            )
        return
    if options.grid or options.point:
        raise ConfigError(
            f"{options.recipe} has ranges to search in: --grid and --point do not go with them."
        )
    if not options.search or not options.trials:
        raise ConfigError(
            f"{options.recipe} has ranges to search in: give --search random or --search tpe, and "
            "--trials N."
        )
    if tasks:
        raise ConfigError(
            "A search is for one task, since returns of several have no common scale: put it on "
            "top with --config TASK."
        )


def _with_ranges() -> list[str]:
    return [name for name, path in recipes.sweeps().items() if read_sweep(path).ranges]


def _find(name: str, both_mean_recipe: bool) -> Path:
    """Return the file of a recipe or a sweep."""
    if Path(name).is_file():
        return Path(name)
    sweeps, shipped = recipes.sweeps(), recipes.shipped()
    known = {**sweeps, **shipped} if both_mean_recipe else {**shipped, **sweeps}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(
        f"sweep {name}: there is no such file, and no shipped recipe or sweep of this name{hint} "
        f"Shipped are the recipes {', '.join(shipped)} and the sweeps {', '.join(sweeps)}."
    )


def _read(path: Path) -> Sweep | None:
    """Return what a sweep's file says; ``None`` for a recipe."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not {"config", *KINDS} & set(content):
        return None
    try:
        return read_sweep(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _config_of(path: Path, config: str) -> str:
    """Return the recipe that a sweep's file names: a file beside it, or a shipped one."""
    beside = path.parent / config
    return str(beside) if beside.is_file() else recipes.find(config)


def _name(given: str | None, path: Path, is_sweep: bool, extra: Sequence[str]) -> str:
    """Return the study's name, which is that of a folder as well."""
    parts = [path.stem, *(Path(file).stem for file in extra)]
    name = given if given is not None else "_".join(parts) + ("" if is_sweep else "_sweep")
    try:
        names.check(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("method_name", "--name")) from error
    return name


def _digest(path: str) -> str:
    content = json.dumps(yaml.safe_load(Path(path).read_text()), sort_keys=True, default=str)
    return f"{Path(path).stem} {hashlib.sha256(content.encode()).hexdigest()[:8]}"
