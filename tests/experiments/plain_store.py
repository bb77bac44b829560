"""Runs written with MLflow's own client, as anybody's program would."""

from __future__ import annotations

import csv
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from muon_rl.cli import main
from muon_rl.experiments.comparison import Options, compare
from muon_rl.experiments.rows import Row
from muon_rl.experiments.runs import find_experiments, find_runs, open_store

START = 1_700_000_000_000  # milliseconds


class Store:
    """A sqlite store with one experiment.

    Args:
        folder: of the file.
        uri: of another store.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self.folder = folder
        self.uri = uri or f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self.experiments: dict[str, str] = {}

    def run(
        self,
        values: Sequence[float],
        *,
        experiment: str = "walk",
        seed: int | str | None = 0,
        status: str | None = "FINISHED",
        every: int = 1000,
        seconds: Sequence[float] | float = 10.0,
        start: int = START,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Sequence[float]] | None = None,
        metric: str = "eval/return",
    ) -> str:
        """Write a run that was evaluated every so many frames and seconds, and return its id."""
        if experiment not in self.experiments:
            folder = None if self.uri.startswith("http") else str(self.folder / "artifacts")
            self.experiments[experiment] = self.client.create_experiment(experiment, folder)
        tags = dict(tags or {}) if seed is None else {"seed": seed, **(tags or {})}
        run = self.client.create_run(self.experiments[experiment], start_time=start)
        times = (
            [seconds * (i + 1) for i in range(len(values))]
            if isinstance(seconds, (int, float))
            else seconds
        )
        points = [
            Metric(metric, value, start + int(1000 * time), every * (i + 1))
            for i, (value, time) in enumerate(zip(values, times, strict=True))
        ]
        for name, others in (metrics or {}).items():
            points += [Metric(name, v, start, every * (i + 1)) for i, v in enumerate(others)]
        self.client.log_batch(
            run.info.run_id,
            metrics=points,
            params=[Param(key, str(value)) for key, value in (params or {}).items()],
            tags=[RunTag(key, str(value)) for key, value in tags.items()],
        )
        if status is not None:
            self.client.set_terminated(run.info.run_id, status)
        return run.info.run_id

    def group(self, optimizer: str, finals: Sequence[float], **options: Any) -> list[str]:
        """Write a run a seed, each on a straight line to its final score over 5 evaluations."""
        options = {"tags": {}, **options}
        tags = {"optimizer": optimizer, **options.pop("tags")}
        first = options.pop("first_seed", 0)
        return [
            self.run([final * i / 5 for i in range(1, 6)], seed=first + s, tags=tags, **options)
            for s, final in enumerate(finals)
        ]

    def compare(self, *options: str, experiments: Sequence[str] = ("walk",)) -> dict[str, dict]:
        """Run the command and return the rows of its ``summary.csv`` by group."""
        output = self.folder / "out"
        main([
            "compare", *experiments, f"--tracking-uri={self.uri}", f"--output={output}",
            "--no-log", "--resamples=1000", "--group-by=optimizer", *options,
        ])  # fmt: skip
        with (output / "summary.csv").open(newline="") as file:
            return {row["group"]: row for row in csv.DictReader(file)}

    def rows(self, *experiments: str, where: str = "", **options: Any) -> dict[str, Row]:
        """Return the rows by group, without a file or a picture."""
        client = open_store(self.uri)
        runs = find_runs(client, find_experiments(client, experiments or ["walk"]), where)
        options = {"group_by": ["optimizer"], "resamples": 100, **options}
        return {row.group: row for row in compare(client, runs, Options(**options)).rows}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
