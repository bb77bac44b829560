"""Checks a sweep's points before any is run, and finds out how they are tracked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from muon_rl.cli import ConfigError
from muon_rl.cli.recipe_cli import RecipeCLI
from muon_rl.cli.training import with_recipe_paths
from muon_rl.tracking import MLflow

_CLASS = "muon_rl.tracking.MLflow"


class Tracking(NamedTuple):
    """How the trainings of a sweep are tracked.

    Args:
        uri: of the MLflow store.
        loggers: of the recipe, as its config has them: one, or a list.
    """

    uri: str
    loggers: Any

    def options(self, *, experiment: str, run: str, tags: Mapping[str, str]) -> list[str]:
        """Return the options of fit that put a training under a study.

        Args:
            experiment: the study's name.
            run: the run's name.
            tags: of the run, on top of the recipe's own.
        """
        if not isinstance(self.loggers, list):
            own = _arguments(self.loggers).get("tags") or {}
            return [
                f"--trainer.logger.experiment_name={experiment}",
                f"--trainer.logger.run_name={run}",
                f"--trainer.logger.tags={json.dumps({**own, **tags})}",
            ]
        loggers = [dict(logger) for logger in self.loggers]
        for logger in loggers:
            if logger["class_path"] == _CLASS:
                own = _arguments(logger)
                tags = {**(own.get("tags") or {}), **tags}
                more = {"experiment_name": experiment, "run_name": run, "tags": tags}
                logger["init_args"] = {**own, **more}
        return [f"--trainer.logger={json.dumps(loggers)}"]


def check_points(options: Mapping[str, Sequence[str]]) -> Tracking:
    """Make the parts of every point, and return how they are tracked.

    Args:
        options: of fit, by the name of the point.

    Raises:
        ConfigError: naming the point and what is wrong with it, or saying what tracking a sweep
            needs.
    """
    tracking, last = None, time.monotonic()
    for number, (name, words) in enumerate(options.items()):
        if time.monotonic() - last > 10:
            print(f"checked {number} of {len(options)} points", flush=True)
            last = time.monotonic()
        try:
            cli = RecipeCLI(with_recipe_paths(["fit", *words]))
        except ConfigError as error:
            raise ConfigError(f"{error}\n  (at the point {name}; nothing was run)") from error
        tracking = tracking or _tracking_of(cli)
    if tracking is None:
        raise ConfigError("A sweep needs at least one point.")
    return tracking


def _tracking_of(cli: RecipeCLI) -> Tracking:
    ours = [logger for logger in cli.trainer.loggers if isinstance(logger, MLflow)]
    if len(ours) != 1:
        raise ConfigError(
            f"A sweep finds its trainings by their MLflow runs, but trainer.logger has {len(ours)} "
            f"loggers of the class {_CLASS}: leave trainer.logger out, or have one of them in it."
        )
    (uri,) = (logger.tracking_uri for logger in ours)
    loggers = cli.settings.trainer.logger
    if isinstance(loggers, list):
        return Tracking(uri, [_plain(logger) for logger in loggers])
    return Tracking(uri, _plain(loggers))


def _plain(logger: Any) -> dict[str, Any]:
    return logger.as_dict() if hasattr(logger, "as_dict") else dict(logger)


def _arguments(logger: Mapping[str, Any]) -> dict[str, Any]:
    return dict(logger.get("init_args") or {})
