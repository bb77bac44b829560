"""Runs a study's jobs, some at a time, until all are done or a stop is asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mlflow.entities import Run

from muon_rl.experiments.jobs import Job
from muon_rl.experiments.launch import Launcher
from muon_rl.experiments.study import Study, is_finished

# job, checkpoint to go on from: the command that runs it
Command = Callable[[Job, "Path | None"], Sequence[str]]
_CONFIG_ERROR = 2  # exit code of a fit that refused its config, before anything ran


class Source(Protocol):
    """Where jobs come from."""

    total: int  # jobs of the study, finished ones included

    def next(self) -> Job | None:
        """Return a job to run; ``None`` if there is none now."""

    def ended(self, job: Job, run: Run | None) -> None:
        """Take note of a job that will not be run again; its run is FINISHED if it went well."""


class Listed:
    """Jobs that are known beforehand.

    Args:
        jobs: of the study.
        runs: those that there are; the jobs of finished ones are left out.
    """

    def __init__(self, jobs: Sequence[Job], runs: dict[Job, Run]) -> None:
        self.total = len(jobs)
        self._left = deque(job for job in jobs if not is_finished(runs.get(job)))

    def next(self) -> Job | None:
        """Return the next job that is left."""
        return self._left.popleft() if self._left else None

    def ended(self, job: Job, run: Run | None) -> None:
        """Note nothing: no job depends on another."""


class View(Protocol):
    """Who is told what happens."""

    def started(self, job: Job, resumed: bool) -> None: ...
    def finished(self, job: Job, seconds: float, run: Run) -> None: ...
    def failed(self, job: Job, code: int, again: bool) -> None: ...
    def stopping(self) -> None: ...
    def stopped(self, job: Job) -> None: ...
    def tick(self, state: State) -> None: ...


@dataclass
class State:
    """How far a study is.

    Args:
        total: jobs of the study.
        done: those that are finished, earlier ones included.
        running: since when each is, in seconds of :func:`time.monotonic`.
        failed: those that have failed for good, with their exit codes.
        seconds: that each job took which finished now.
        stopping: whether what runs has been asked to end.
    """

    total: int
    done: int = 0
    running: dict[Job, float] = field(default_factory=dict)
    failed: dict[Job, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    stopping: bool = False


class Stop:
    """Counts the signals that ask to stop.

    Args:
        signum: the first one's number; 0 before it.
        count: how many came.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.count = 0

    def __call__(self, signum: int, frame: object) -> None:
        """Take a signal."""
        self.signum = self.signum or signum
        self.count += 1


class Schedule:
    """Keeps ``jobs`` trainings running.

    A job that was interrupted goes on from its last checkpoint, in its own run; without one it
    begins anew. A job that fails is run again ``retries`` times.

    Args:
        study: whose jobs are run.
        source: gives the jobs.
        launcher: starts processes.
        command: makes a job's command.
        runs: that the study has already, by their jobs.
        view: is told what happens.
        stop: tells whether to stop.
        jobs: how many run at a time.
        retries: how often a job that fails is run again.
    """

    def __init__(
        self,
        study: Study,
        source: Source,
        launcher: Launcher,
        command: Command,
        *,
        runs: dict[Job, Run],
        view: View,
        stop: Stop,
        jobs: int,
        retries: int,
    ) -> None:
        self._study, self._source, self._launcher = study, source, launcher
        self._command, self._runs, self._view, self._stop = command, dict(runs), view, stop
        self._jobs, self._retries = jobs, retries
        self._again: deque[Job] = deque()
        self._attempts: dict[Job, int] = {}
        self._resumed: set[Job] = set()  # that run from a checkpoint
        self._anew: set[Job] = set()  # whose checkpoint was refused
        done = sum(is_finished(run) for run in runs.values())
        self.state = State(source.total, done)

    def run(self, pause: float = 0.2) -> State:
        """Run until nothing is left, or all that ran has been stopped.

        Args:
            pause: seconds between two looks.
        """
        signals = 0
        try:
            while True:
                if not self._stop.count:
                    self._fill()
                elif self._stop.count > signals:
                    signals = self._stop.count
                    self._end_all()
                if not self.state.running:
                    return self.state
                self._view.tick(self.state)
                self._settle(self._launcher.ended())
                time.sleep(pause)
        except BaseException:
            self._launcher.stop()  # what runs saves and ends, whatever broke here
            raise

    def _end_all(self) -> None:
        """Let what runs save and end; at the second signal, end it at once."""
        self.state.stopping = True
        if self._stop.count == 1:
            self._view.stopping()
            self._launcher.stop()
        else:
            self._launcher.kill()

    def _fill(self) -> None:
        while len(self.state.running) < self._jobs:
            job = self._again.popleft() if self._again else self._source.next()
            if job is None:
                return
            self._start(job)

    def _start(self, job: Job) -> None:
        run, checkpoint = self._runs.get(job), None
        if run is not None:
            if job not in self._anew:
                checkpoint = self._study.last_checkpoint(job, run)
            if checkpoint is None:
                self._study.discard(run)
                del self._runs[job]
        self._resumed.discard(job)
        if checkpoint is not None:
            self._resumed.add(job)
        log = self._study.log_file(job)
        self._launcher.start(job, self._command(job, checkpoint), log)
        self.state.running[job] = time.monotonic()
        self._view.started(job, checkpoint is not None)

    def _settle(self, codes: dict) -> None:
        """Take note of the jobs that ended."""
        if not codes:
            return
        runs = self._study.runs()
        for job, code in codes.items():
            seconds = time.monotonic() - self.state.running.pop(job)
            run = runs.get(job)
            if run is not None:
                self._runs[job] = run
            if code == 0 and is_finished(run):
                self.state.done += 1
                self.state.seconds.append(seconds)
                self._view.finished(job, seconds, run)
                self._source.ended(job, run)
            elif self._stop.count:
                if run is not None:
                    self._study.end(run, "KILLED")
                self._view.stopped(job)
            else:
                self._failed(job, code, run)

    def _failed(self, job: Job, code: int, run: Run | None) -> None:
        if run is not None:
            self._study.end(run, "FAILED")
        if code == _CONFIG_ERROR and job in self._resumed:
            # The checkpoint was refused, so nothing was run: that is no failure of the job.
            self._anew.add(job)
            self._again.append(job)
            return
        self._attempts[job] = self._attempts.get(job, 0) + 1
        again = self._attempts[job] <= self._retries
        self._view.failed(job, code, again)
        if again:
            self._again.append(job)
        else:
            self.state.failed[job] = code
            self._source.ended(job, run)


def tail(log: Path, lines: int = 5) -> str:
    """Return the last lines of a log; a bar that moved counts as what it last showed.

    Args:
        log: the file.
        lines: how many.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    shown = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return "\n".join([line for line in shown if line][-lines:])
