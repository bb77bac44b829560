"""MLflow as a Lightning logger that keeps one point a metric and frame, and a run's true status."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from muon_rl.passwords import without_passwords
from muon_rl.tags import PAUSES
from muon_rl.turns import one_process_at_a_time


class MLflow(MLFlowLogger):
    """Tracks runs in MLflow: by default in ``mlflow.db`` in the working folder.

    Metrics are written in the background. A resumed run goes on in the same MLflow run, in which
    every metric has at most one value a frame. Writers of a sqlite store take turns, by a lock
    beside it: sqlite's own gives up on a busy store after 20 seconds.

    Args:
        experiment_name: under which runs are listed; left out, it is the task's name.
        run_name: shown for the run; left out, it is the method's name and the seed.
        tracking_uri: of the tracking store; left out, ``MLFLOW_TRACKING_URI`` or sqlite here.
        run_id: of a run to go on with.
        tags: further tags of the run.
    """

    def __init__(
        self,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        tags: dict[str, str | int | float | bool | list | None] | None = None,
    ) -> None:
        # Absolute: MLflow keeps a store open by its address, wherever the process goes.
        here = f"sqlite:///{Path('mlflow.db').absolute()}"
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or here
        with one_process_at_a_time(uri):
            super().__init__(
                experiment_name=experiment_name or "",
                run_name=run_name,
                tracking_uri=uri,
                run_id=run_id,
                tags=tags,
            )
        self._queue: deque[Metric] = deque()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._pending: list[Future] = []
        self._last_frame: dict[str, int] = {}

    @property
    def experiment(self) -> MlflowClient:
        """The MLflow client, with the run begun."""
        if self._initialized:
            return self._mlflow_client
        with one_process_at_a_time(self._tracking_uri):
            return super().experiment

    @property
    def tracking_uri(self) -> str:
        """Of the store that the run is in."""
        return self._tracking_uri

    def describe(self, *, experiment_name: str, run_name: str, tags: Mapping[str, str]) -> None:
        """Name a run that is not begun yet, where the user has not.

        Args:
            experiment_name: if none was given.
            run_name: if none was given.
            tags: of the run; the user's own stand.
        """
        mine: Any = self
        mine._experiment_name = mine._experiment_name or experiment_name
        mine._run_name = mine._run_name or run_name
        # A number or a list is a tag as well; MLflow stores text.
        mine.tags = {**tags, **{name: str(tag) for name, tag in (mine.tags or {}).items()}}

    def is_unfinished(self, run_id: str | None) -> bool:
        """Return whether this store has a run that was stopped, broke or was lost.

        Args:
            run_id: of the run, if there was one.
        """
        if run_id is None:
            return False
        try:
            return self._mlflow_client.get_run(run_id).info.status != "FINISHED"
        except MlflowException:
            return False

    def resume(self, run_id: str) -> None:
        """Go on with a run: mark it as running, note the pause and each metric's last frame.

        Args:
            run_id: of a run; where this store does not have it, a new one begins.
        """
        try:
            self._mlflow_client.get_run(run_id)
        except MlflowException:
            mine: Any = self
            mine.tags = {**(mine.tags or {}), "resumed_from": run_id}
            return
        self._run_id = run_id
        client = self.experiment
        run = client.get_run(run_id)
        stopped = run.info.end_time or run.info.start_time
        with one_process_at_a_time(self._tracking_uri):
            client.update_run(run_id, status="RUNNING")
        for name in run.data.metrics:
            history = client.get_metric_history(run_id, name)
            self._last_frame[name] = max(point.step for point in history)
            # A run that was lost has no end, or that of an earlier stop.
            stopped = max(stopped, *(point.timestamp for point in history))
        pauses = [*json.loads(run.data.tags.get(PAUSES, "[]")), [stopped, int(time.time() * 1000)]]
        with one_process_at_a_time(self._tracking_uri):
            client.set_tag(run_id, PAUSES, json.dumps(pauses))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue metrics, leaving out those that the run already has at this frame.

        Args:
            metrics: names and values.
            step: frames.
        """
        step = step or 0
        # What lies between a checkpoint and a crash is trained again by a resumed run.
        new = {name: v for name, v in metrics.items() if step > self._last_frame.get(name, -1)}
        if new:
            now = int(time.time() * 1000)
            client, run_id = self.experiment, self.run_id
            self._queue.extend(Metric(name, float(v), now, step) for name, v in new.items())
            self._pending.append(self._writer.submit(self._write_queued, client, run_id))
            self._last_frame.update(dict.fromkeys(new, step))
        if len(self._pending) > 100:
            self._wait()

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log flat parameters; those that the run already has stay as they are.

        Args:
            params: names and values; a resumed run may have other values, which MLflow refuses.
        """
        known = self.experiment.get_run(self.run_id).data.params
        texts = {name: without_passwords(str(value)) for name, value in params.items()}
        new = [Param(name, text[:6000]) for name, text in texts.items() if name not in known]
        client = self.experiment
        with one_process_at_a_time(self._tracking_uri):
            for start in range(0, len(new), 100):  # MLflow takes 100 at a time
                client.log_batch(self.run_id, params=new[start : start + 100])

    @rank_zero_only
    def save(self) -> None:
        """Write what is queued: from here on a killed process has lost none of it."""
        self._wait()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write what is queued and set the run's status: FINISHED, FAILED or KILLED.

        Args:
            status: Lightning's; it says "failed" for a run that was stopped, too.
        """
        if not self._initialized:
            return
        self._wait()
        stopped = isinstance(sys.exc_info()[1], (SIGTERMException, KeyboardInterrupt))
        with one_process_at_a_time(self._tracking_uri):
            super().finalize("KILLED" if status == "failed" and stopped else status)

    def _write_queued(self, client: MlflowClient, run_id: str) -> None:
        """Write what is queued; after a wait for other writers that is more than one call's."""
        if not self._queue:
            return
        with one_process_at_a_time(self._tracking_uri):
            while self._queue:
                count = min(len(self._queue), 1000)  # MLflow takes 1000 at a time
                points = [self._queue.popleft() for _ in range(count)]
                client.log_batch(run_id, metrics=points)

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for operation in pending:
            operation.result()
