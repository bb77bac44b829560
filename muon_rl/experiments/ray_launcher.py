"""Where the jobs of a study run: a Ray cluster, on as many machines as it has."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from muon_rl.experiments.launch import with_parent
from muon_rl.experiments.lock import join_lock


class RayLauncher:
    """Hands each command to Ray as a task that takes a number of processors.

    It joins the cluster that ``RAY_ADDRESS`` or ``ray start`` names, or begins one on this machine.
    The working folder has to be the same on all machines, on a file system that they share.

    Args:
        environment: of each process, on top of its machine's.
        threads: processors of each task.
        jobs: how many run at a time; a cluster that is begun here takes that many.
    """

    def __init__(self, environment: Mapping[str, str], threads: int, jobs: int) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
        try:
            ray.init(address="auto", **options)
        except ConnectionError:
            ray.init(num_cpus=threads * jobs, include_dashboard=False, **options)
        self._environment = dict(environment)
        self._stop: Any = ray.remote(num_cpus=0)(_Stop).remote()
        self._run: Any = ray.remote(num_cpus=threads, max_retries=0)(_run)
        self._tasks: dict[Any, Hashable] = {}

    def start(self, key: Hashable, command: Sequence[str], log: Path) -> None:
        """Run a command on some machine, whose output is put behind what the log has."""
        task = self._run.remote(list(command), os.getcwd(), str(log), self._environment, self._stop)
        self._tasks[task] = key

    def ended(self) -> dict[Hashable, int]:
        """Return the exit codes of the commands that have ended since the last call."""
        if not self._tasks:
            return {}
        done, _ = ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        return {self._tasks.pop(task): _code(task) for task in done}

    def stop(self) -> None:
        """Send SIGTERM to all processes: a fit then saves and ends."""
        ray.get(self._stop.ask.remote("terminate"))

    def kill(self) -> None:
        """Send SIGKILL to all processes."""
        ray.get(self._stop.ask.remote("kill"))

    def close(self) -> None:
        """Leave the cluster, which ends if it was begun here."""
        ray.shutdown()


class _Stop:
    """What the tasks are asked to do with their processes."""

    def __init__(self) -> None:
        self._asked = ""

    def ask(self, action: str) -> None:
        self._asked = action

    def asked(self) -> str:
        return self._asked


def _run(command: list[str], folder: str, log: str, environment: dict[str, str], stop: Any) -> int:
    """Run a command on the machine that Ray has chosen, and return its exit code."""
    if ray.get(stop.asked.remote()):
        return 143
    path = Path(folder) / log
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = join_lock(path.parent)
    with path.open("a") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=with_parent(environment),
            pass_fds=[lock],
        )
        os.close(lock)  # the process holds it
        done = ""
        while process.poll() is None:
            asked = ray.get(stop.asked.remote())
            if asked != done:
                getattr(process, asked)()
                done = asked
            time.sleep(0.5)
    return process.returncode


def _code(task: Any) -> int:
    """Return a task's exit code; 1 where Ray lost its machine or its worker."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError:
        return 1
