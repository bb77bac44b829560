"""What a sweep shows while it runs: a table in a terminal, a line an event elsewhere."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TextIO

from mlflow.entities import Run
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from muon_rl.experiments.jobs import Job
from muon_rl.experiments.schedule import State
from muon_rl.experiments.study import Study, final_value

_FRAMES = re.compile(rb"([\d,]+)/([\d,]+) frames")
_REFRESH = 1.0  # seconds


class Lines:
    """Writes a line for each event.

    Args:
        study: whose jobs run.
        metric: shown for a job that has finished.
        stream: to write to.
    """

    def __init__(self, study: Study, metric: str, stream: TextIO | None = None) -> None:
        self._study, self._metric = study, metric
        self._stream = stream or sys.stdout
        self._state: State | None = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what was written."""

    def say(self, text: str, style: str = "") -> None:
        """Write a line."""
        self._stream.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
        self._stream.flush()

    def started(self, job: Job, resumed: bool) -> None:
        """Say that a job began, or goes on."""
        self.say(f"{'goes on' if resumed else 'started':8} {job.short}")

    def finished(self, job: Job, seconds: float, run: Run) -> None:
        """Say how a job ended, and how many have."""
        value = final_value(run, self._metric)
        result = f"{self._metric} {value:.4g}" if value is not None else f"no {self._metric}"
        so_far = f"; {counted(self._state)}" if self._state else ""
        self.say(f"{'done':8} {job.short}  {result} after {spell(seconds)}{so_far}", "green")

    def failed(self, job: Job, code: int, again: bool) -> None:
        """Say that a job failed, and where its log is."""
        then = "it is run again" if again else "it is left"
        log = self._study.log_file(job)
        self.say(f"{'FAILED':8} {job.short}  exit code {code}, {then}; see {log}", "red")

    def stopping(self) -> None:
        """Say that what runs saves first."""
        self.say("stopping: what runs saves and ends; Ctrl-C once more ends it at once, unsaved")

    def stopped(self, job: Job) -> None:
        """Say that a job was stopped."""
        self.say(f"{'stopped':8} {job.short}", "yellow")

    def tick(self, state: State) -> None:
        """Remember the state for the next line."""
        self._state = state


class LiveTable(Lines):
    """Shows the jobs that run in a table that moves, below the lines of those that ended.

    Args:
        study: whose jobs run.
        metric: shown for a job that has finished.
        jobs: how many run at a time.
        console: a terminal.
    """

    def __init__(self, study: Study, metric: str, jobs: int, console: Console) -> None:
        super().__init__(study, metric)
        self._jobs = jobs
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)
        self._shown = 0.0

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the table away and leave the lines."""
        self._live.update(Text(""), refresh=True)
        self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Write a line above the table."""
        line = Text(f"{time.strftime('%H:%M:%S')}  {text}", style=style)
        self._live.console.print(line, soft_wrap=True)

    def started(self, job: Job, resumed: bool) -> None:
        """Leave it to the table."""

    def tick(self, state: State) -> None:
        """Draw the table anew, once a second."""
        super().tick(state)
        if time.monotonic() - self._shown < _REFRESH:
            return
        self._shown = time.monotonic()
        self._live.update(self.table(state), refresh=True)

    def table(self, state: State) -> Group:
        """Return what is shown of a state.

        Args:
            state: of the study.
        """
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("running", "frames", "for"):
            table.add_column(title, justify="left" if title == "running" else "right")
        now, ahead = time.monotonic(), []
        for job, since in state.running.items():
            frames = frames_of(self._study.log_file(job))
            shown = f"{frames[0]:,} of {frames[1]:,}" if frames else "starting"
            table.add_row(job.short, shown, spell(now - since))
            ahead.append((now - since, frames))
        left = time_left(state, ahead, self._jobs)
        rest = f"; about {spell(left)} left" if left is not None else ""
        line = counted(state) + ("; stopping" if state.stopping else rest)
        return Group(table, Text(line, style="bold"))


def view_of(study: Study, metric: str, jobs: int) -> Lines:
    """Return the table where the output is a terminal, else the lines.

    Args:
        study: whose jobs run.
        metric: shown for a job that has finished.
        jobs: how many run at a time.
    """
    console = Console()
    return LiveTable(study, metric, jobs, console) if console.is_terminal else Lines(study, metric)


def counted(state: State) -> str:
    """Return how many jobs are done, running, failed and waiting, in words."""
    running, failed = len(state.running), len(state.failed)
    waiting = max(0, state.total - state.done - running - failed)
    return (
        f"{state.done} of {state.total} done, {running} running, {failed} failed, {waiting} waiting"
    )


def frames_of(log: Path) -> tuple[int, int] | None:
    """Return the frames that a fit's bar last showed, and its budget.

    Args:
        log: of the fit.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            found = _FRAMES.findall(file.read())
    except OSError:
        return None
    return tuple(int(number.replace(b",", b"")) for number in found[-1]) if found else None  # type: ignore[return-value]


def time_left(
    state: State, ahead: list[tuple[float, tuple[int, int] | None]], jobs: int
) -> float | None:
    """Return the seconds that are probably left; ``None`` as long as nothing tells.

    Args:
        state: of the study.
        ahead: of each running job the seconds so far, and its frames and their budget.
        jobs: how many run at a time.
    """
    if state.seconds:
        whole = sum(state.seconds) / len(state.seconds)
    else:
        guesses = [seconds * f[1] / f[0] for seconds, f in ahead if f and f[0] >= 0.02 * f[1]]
        if not guesses:
            return None
        whole = sum(guesses) / len(guesses)
    waiting = max(0, state.total - state.done - len(state.running) - len(state.failed))
    rest = sum(max(0.0, whole - seconds) for seconds, _ in ahead)
    return (waiting * whole + rest) / max(1, min(jobs, waiting + len(ahead)))


def spell(seconds: float) -> str:
    """Return a time in words.

    Example:
        >>> spell(7), spell(75), spell(7500)
        ('7 s', '1 min 15 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
