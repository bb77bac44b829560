"""A study in MLflow: a parent run, and a child run for each job."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from muon_rl.experiments.jobs import Job, Point
from muon_rl.passwords import without_passwords
from muon_rl.turns import one_process_at_a_time

PARENT = "mlflow.parentRunId"
KIND = "muon_rl.kind"
PLAN = "study.json"


class StudyDiffers(ValueError):
    """What is asked for is not what the study of this name is about."""


class Study:
    """Reads and writes a study's runs.

    Args:
        name: of the study, and of its experiment in MLflow.
        tracking_uri: of the store.
        folder: where its logs and checkpoints lie.
    """

    def __init__(self, name: str, tracking_uri: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.tracking_uri = tracking_uri
        self.client = MlflowClient(tracking_uri)
        self.parent_id = ""
        self._tasks: dict[str, str] = {}

    def log_file(self, job: Job) -> Path:
        """Return the file of a job's output."""
        return self.folder / f"{job.slug}.log"

    def checkpoints(self, job: Job) -> Path:
        """Return the folder of a job's checkpoints."""
        return self.folder / job.slug

    # -- the parent ----------------------------------------------------------------------------

    def open(
        self,
        spec: Mapping[str, Any],
        command: str,
        tasks: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Begin the study, or go on with it.

        Args:
            spec: what its jobs have in common.
            command: the command line.
            tasks: hashes of their files, by name.

        Raises:
            StudyDiffers: if there is one of this name with another spec or task file, or in another
                folder.
        """
        with self._alone():
            experiment = self.client.get_experiment_by_name(self.name)
            if experiment is not None and experiment.lifecycle_stage != "active":
                raise StudyDiffers(
                    f"The experiment {self.name} was deleted in MLflow: restore it, or name "
                    "another study with --name."
                )
            self._experiment = (
                self.client.create_experiment(self.name)
                if experiment is None
                else experiment.experiment_id
            )
        tags = {
            KIND: "sweep",
            "muon_rl.command": without_passwords(command)[:5000],
            "muon_rl.spec": without_passwords(json.dumps(spec)),
            "muon_rl.folder": str(self.folder.resolve()),
        }
        found = self._search(f"tags.`{KIND}` = 'sweep'")
        if found:
            parent = found[0]
            self._check(parent.data.tags, tags)
            self.parent_id = parent.info.run_id
            self._check_tasks(tasks)
            with self._alone():
                self.client.update_run(self.parent_id, status="RUNNING")
                self.client.set_tag(self.parent_id, "muon_rl.command", tags["muon_rl.command"])
        else:
            with self._alone():
                run = self.client.create_run(self._experiment, tags=tags, run_name=self.name)
            self.parent_id = run.info.run_id
        self._tasks = dict(tasks)

    def _check_tasks(self, tasks: Mapping[str, str]) -> None:
        had = self._read_plan().get("tasks", {})
        if changed := [name for name in tasks if had.get(name, tasks[name]) != tasks[name]]:
            raise StudyDiffers(
                f"The file of the task {changed[0]} has changed since the study {self.name} was "
                "begun: put it back, or name another study with --name."
            )

    def _check(self, old: Mapping[str, str], new: Mapping[str, str]) -> None:
        there = old.get("muon_rl.folder", "")
        if there != new["muon_rl.folder"] and Path(there).is_dir():
            raise StudyDiffers(
                f"The study {self.name} has its logs and checkpoints in {there}: go on in the "
                "folder that it was begun in, or name another study with --name."
            )
        before, now = (json.loads(tags.get("muon_rl.spec", "{}")) for tags in (old, new))
        differing = [
            f"{key}: {_shown(before.get(key))} before, {_shown(now.get(key))} now"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise StudyDiffers(
                f"There is a study {self.name} already, and it differs in\n  "
                + "\n  ".join(differing)
                + "\nTo go on with it, give what it was begun with; for another study, --name=NAME."
            )

    def plan(self, points: Sequence[Point], seeds: Sequence[int]) -> tuple[list[Point], list[int]]:
        """Return the study's points and seeds: those that it had, with what is new.

        Every point is run with every seed, so none of them has fewer than another.

        Args:
            points: that are asked for.
            seeds: that are asked for.
        """
        old = self._read_plan()
        had = [Point.of(point["values"], point["task"]) for point in old.get("points", [])]
        points = list(dict.fromkeys([*had, *points]))
        seeds = sorted({*old.get("seeds", []), *seeds})
        plan = {
            "points": [{"values": dict(p.values), "task": p.task} for p in points],
            "seeds": seeds,
            "tasks": {**old.get("tasks", {}), **self._tasks},
        }
        if plan != old:
            self.client.log_text(self.parent_id, json.dumps(plan, indent=1), PLAN)
        return points, seeds

    def _read_plan(self) -> dict[str, Any]:
        if PLAN not in [file.path for file in self.client.list_artifacts(self.parent_id)]:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(
                Path(self.client.download_artifacts(self.parent_id, PLAN, folder)).read_text()
            )

    def close(self, status: str) -> None:
        """End the parent.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        with self._alone():
            self.client.set_terminated(self.parent_id, status)

    def describe(self, metrics: Mapping[str, float], note: str) -> None:
        """Give the parent metrics and a description.

        Args:
            metrics: by name.
            note: Markdown.
        """
        with self._alone():
            for name, value in metrics.items():
                self.client.log_metric(self.parent_id, name, value)
            self.client.set_tag(self.parent_id, "mlflow.note.content", note)

    # -- the children --------------------------------------------------------------------------

    def tags(self, job: Job) -> dict[str, str]:
        """Return the tags that tell a job's run, beside those of every fit."""
        point = job.point
        return {
            **({PARENT: self.parent_id} if self.parent_id else {}),
            "sweep": self.name,
            "point": point.text,
            "muon_rl.values": json.dumps(dict(point.values)),
            **({"muon_rl.task": point.task} if point.task else {}),
            **({"muon_rl.trial": str(point.trial)} if point.trial is not None else {}),
        }

    def runs(self) -> dict[Job, Run]:
        """Return the newest run of each job that has one."""
        found: dict[Job, Run] = {}
        for run in self._search(f"tags.`{PARENT}` = '{self.parent_id}'"):
            tags = run.data.tags
            if "muon_rl.values" not in tags or "seed" not in tags:
                continue
            trial = tags.get("muon_rl.trial")
            values, task = json.loads(tags["muon_rl.values"]), tags.get("muon_rl.task", "")
            point = Point.of(values, task, int(trial) if trial else None)
            found.setdefault(Job(point, int(tags["seed"])), run)
        return found

    def last_checkpoint(self, job: Job, run: Run) -> Path | None:
        """Return the newest ``last.ckpt`` of a run, if there is one that can be read."""
        folder = self.checkpoints(job)
        for path in sorted(folder.glob("*/*/*/last.ckpt"), key=lambda p: p.parent.name)[::-1]:
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if saved["muon_rl"]["mlflow_run_id"] == run.info.run_id:
                    return path
            except Exception:
                continue  # half written: the training begins anew
        return None

    def end(self, run: Run, status: str) -> None:
        """Set the status of a run whose process has ended without doing so, when it last wrote."""
        if run.info.status == "RUNNING":
            times = (metric.timestamp for metric in run.data.to_proto().metrics)
            last = max(times, default=run.info.start_time)
            with self._alone():
                self.client.set_terminated(run.info.run_id, status, end_time=last)

    def discard(self, run: Run) -> None:
        """Delete a run that begins anew (MLflow can restore it)."""
        with self._alone():
            self.client.delete_run(run.info.run_id)

    def _alone(self) -> AbstractContextManager:
        return one_process_at_a_time(self.tracking_uri)

    def _search(self, condition: str) -> list[Run]:
        """Return all runs of the experiment that meet a condition, the newest first."""
        runs: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = self.client.search_runs(
                [self._experiment], condition, run_view_type=ViewType.ACTIVE_ONLY,
                order_by=["attributes.start_time DESC"], page_token=token or None,
            )  # fmt: skip
            runs += page
            token = page.token or None
        return runs


def final_value(run: Run | None, metric: str) -> float | None:
    """Return a run's last value of a metric; ``None`` without one.

    Args:
        run: a job's, if it has one.
        metric: its name.
    """
    return run.data.metrics.get(metric) if run is not None else None


def is_finished(run: Run | None) -> TypeGuard[Run]:
    """Return whether a job's run is there and finished.

    Args:
        run: a job's, if it has one.
    """
    return run is not None and run.info.status == "FINISHED"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
