"""A group's learning curve over frames and over time, and the frames that a score takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from muon_rl.experiments.comparison import Comparison
from muon_rl.experiments.groups import Evaluated, Group
from muon_rl.experiments.statistics import Floats, bootstrap_curves, iqm

POINTS = 60  # of a curve
MOST_RESAMPLES = 1000  # of a curve's interval: at each of its points


class Curve(NamedTuple):
    """A line with its interval.

    Args:
        x: frames, seconds or scores, shape ``(points,)``.
        middle: IQM or median, same shape.
        low: lower end of the interval, same shape; ``None`` without one.
        high: upper end.
    """

    x: Floats
    middle: Floats
    low: Floats | None = None
    high: Floats | None = None


def over_frames(comparison: Comparison, group: Group, tasks: Sequence[str]) -> Curve | None:
    """Return the IQM of a group's scores over frames, up to its smallest budget.

    Args:
        comparison: that the group is in.
        group: whose.
        tasks: that count together; without runs of all of them there is no curve.
    """
    return _curve(comparison, group, tasks, lambda one: one.history.frames.astype(float))


def over_time(comparison: Comparison, group: Group, tasks: Sequence[str]) -> Curve | None:
    """Return the IQM of a group's scores over seconds, up to the time of its fastest run's end.

    Args:
        comparison: that the group is in.
        group: whose.
        tasks: that count together; without runs of all of them there is no curve.
    """
    return _curve(comparison, group, tasks, lambda one: one.seconds)


def frames_needed(comparison: Comparison, group: Group, tasks: Sequence[str]) -> Curve | None:
    """Return the frames after which most runs have reached a score, over scores.

    Args:
        comparison: that the group is in.
        group: whose.
        tasks: that count together; without runs of all of them there is no curve.
    """
    if not all(group.tasks.get(task) for task in tasks):
        return None
    runs = [
        (one.history.frames, comparison.normalised(one.history.values, task))
        for task in tasks
        for one in group.tasks[task]
    ]
    scores = np.concatenate([values for _, values in runs])
    levels = np.linspace(scores.min(), scores.max(), POINTS)
    needed = np.full((len(runs), POINTS), np.inf)
    for row, (frames, values) in zip(needed, runs, strict=True):
        # The first evaluation that reaches a level is the first whose record does.
        first = np.searchsorted(np.maximum.accumulate(values), levels)
        row[first < len(frames)] = frames[first[first < len(frames)]]
    median = np.median(needed, axis=0)
    reached = np.isfinite(median)
    return Curve(levels[reached], median[reached])


def _curve(comparison: Comparison, group: Group, tasks: Sequence[str], axis) -> Curve | None:
    if not all(group.tasks.get(task) for task in tasks):
        return None
    members: list[Evaluated] = [one for task in tasks for one in group.tasks[task]]
    first = max(axis(one)[0] for one in members)
    end = min(axis(one)[-1] for one in members)
    if not first < end:
        return None
    x = np.linspace(first, end, POINTS)
    rows = [
        comparison.normalised(
            np.array([np.interp(x, axis(one), one.history.values) for one in group.tasks[task]]),
            task,
        )
        for task in tasks
    ]
    middle = iqm(np.concatenate(rows), axis=0)
    if min(map(len, rows)) < 2:
        return Curve(x, middle)
    low, high = bootstrap_curves(
        rows,
        iqm,
        resamples=min(comparison.options.resamples, MOST_RESAMPLES),
        generator=np.random.default_rng(comparison.options.seed),
    )
    return Curve(x, middle, low, high)
