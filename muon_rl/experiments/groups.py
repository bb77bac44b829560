"""What of a group's runs counts, and the scores and times that they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from muon_rl.experiments.history import History
from muon_rl.experiments.runs import Run, natural
from muon_rl.experiments.statistics import Floats

_MOST_FRAMES = 10_000  # of a grid


@dataclass(frozen=True)
class Evaluated:
    """A finished run that counts.

    Args:
        run: whose it is.
        history: of the metric; at least one point.
        seconds: from the run's start to each point, pauses left out, shape ``(points,)``.
        rate: frames a second.
        optimizer_share: of the time, between 0 and 1.
    """

    run: Run
    history: History
    seconds: Floats = field(repr=False)
    rate: float | None
    optimizer_share: float | None

    def final(self, last: int) -> float:
        """Return the mean of the last evaluations.

        Args:
            last: how many.
        """
        return float(self.history.values[-last:].mean())

    def reaches(self, threshold: float) -> tuple[float, float]:
        """Return frames and seconds at the first evaluation of at least this; infinite if none is.

        Args:
            threshold: in the metric's unit.
        """
        reached = self.history.values >= threshold
        if not reached.any():
            return np.inf, np.inf
        first = int(reached.argmax())
        return float(self.history.frames[first]), float(self.seconds[first])


@dataclass(frozen=True)
class Group:
    """Runs that are compared as one.

    Args:
        label: its name.
        runs: all of them, those left out too.
        tasks: by task, the runs that count, by seed.
        doubled: by task, seeds of which an older finished run is left out.
        without_metric: finished runs that do not have the metric.
        without_number: finished runs of which every value is NaN or infinite.
    """

    label: str
    runs: Sequence[Run]
    tasks: Mapping[str, Sequence[Evaluated]]
    doubled: Mapping[str, Sequence[str]]
    without_metric: Sequence[Run]
    without_number: Sequence[Run]

    @property
    def counted(self) -> list[Evaluated]:
        """The runs that count, of all tasks."""
        return [one for task in self.tasks.values() for one in task]

    @property
    def seeds(self) -> int:
        """The number of seeds of the task that has fewest."""
        return min((len(task) for task in self.tasks.values()), default=0)

    def seed_names(self, task: str) -> set[str]:
        """Return a task's seeds, as they are named.

        Args:
            task: any.
        """
        return {one.run.seed or one.run.run_id for one in self.tasks.get(task, ())}

    def with_status(self, *statuses: str) -> list[Run]:
        """Return the runs of some statuses, counted or not.

        Args:
            statuses: MLflow's.
        """
        return [run for run in self.runs if run.status in statuses]


def make_group(label: str, runs: Sequence[Run], evaluated: Mapping[str, Evaluated | None]) -> Group:
    """Return a group: of its finished runs with evaluations, the newest of each task and seed.

    Args:
        label: its name.
        runs: of the group.
        evaluated: by run id; ``None`` where every value is NaN or infinite. Finished runs that
            are not in it do not have the metric.
    """
    newest: dict[tuple[str, str], Evaluated] = {}
    doubled: dict[str, list[str]] = {}
    finished = [run for run in runs if run.status == "FINISHED"]
    for run in sorted(finished, key=lambda run: (run.start, run.run_id)):
        one = evaluated.get(run.run_id)
        if one is None:
            continue
        key = (run.task, run.run_id if run.seed is None else run.seed)
        if key in newest:
            doubled.setdefault(run.task, []).append(key[1])
        newest[key] = one
    tasks: dict[str, list[Evaluated]] = {}
    for task, seed in sorted(newest, key=lambda key: (natural(key[0]), natural(key[1]))):
        tasks.setdefault(task, []).append(newest[task, seed])
    without_metric = [run for run in finished if run.run_id not in evaluated]
    without_number = [run for run in finished if evaluated.get(run.run_id, run) is None]
    return Group(label, runs, tasks, doubled, without_metric, without_number)


def common_frames(groups: Sequence[Group], task: str) -> Floats:
    """Return the frames at which all of a task's runs are compared.

    Every frame at which one of them was evaluated, from the first that all have reached to the
    smallest budget: there, evaluations are joined by straight lines. Beyond 10,000 frames, as many
    at equal distances.

    Args:
        groups: all of the comparison.
        task: of the runs.

    Returns:
        Ascending, shape ``(frames,)``; empty if a run begins where another ends.
    """
    histories = [one.history for group in groups for one in group.tasks.get(task, ())]
    first = max(history.frames[0] for history in histories)
    end = min(history.budget for history in histories)
    if first > end:
        return np.empty(0)
    frames = np.unique(np.concatenate([history.frames for history in histories] + [[end]]))
    frames = frames[(frames >= first) & (frames <= end)].astype(float)
    return frames if frames.size <= _MOST_FRAMES else np.linspace(first, end, _MOST_FRAMES)


def on_grid(runs: Sequence[Evaluated], frames: Floats) -> Floats:
    """Return the runs' values at given frames, between evaluations on straight lines.

    Args:
        runs: of one task.
        frames: ascending, shape ``(frames,)``.

    Returns:
        Shape ``(runs, frames)``.
    """
    return np.array([np.interp(frames, one.history.frames, one.history.values) for one in runs])
