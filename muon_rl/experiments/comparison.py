"""Groups of runs side by side: scores with intervals, improvement over a baseline, speed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from mlflow import MlflowClient

from muon_rl.experiments.groups import Evaluated, Group, common_frames, make_group, on_grid
from muon_rl.experiments.history import active_seconds, read_histories, read_means
from muon_rl.experiments.remarks import remarks_of
from muon_rl.experiments.rows import EVERY_TASK, Options, Row, make_row
from muon_rl.experiments.runs import ComparisonError, Run, group_runs
from muon_rl.experiments.statistics import Floats

RATE = "train/frames_per_second"
SHARE = "train/optimizer_share"


@dataclass(frozen=True)
class Comparison:
    """Groups with their rows.

    Args:
        options: as asked for, with the keys that were found.
        groups: the baseline first.
        rows: of the groups, in their order.
        tasks: of all groups.
        bounds: by task, the scores that become 0 and 1; empty where scores are in the metric's
            unit.
        finals: of each group, by task, the final scores, ascending, normalised where there are
            bounds.
    """

    options: Options
    groups: Sequence[Group]
    rows: Sequence[Row]
    tasks: Sequence[str]
    bounds: Mapping[str, tuple[float, float]]
    finals: Sequence[Mapping[str, Floats]]

    def normalised(self, scores: Floats, task: str) -> Floats:
        """Return scores with the task's bounds at 0 and 1, or as they are without bounds.

        Args:
            scores: in the metric's unit.
            task: whose.
        """
        return normalise(scores, self.bounds.get(task))


def compare(client: MlflowClient, runs: Sequence[Run], options: Options) -> Comparison:
    """Return the comparison of runs.

    Args:
        client: of the store that they are in.
        runs: as :func:`muon_rl.experiments.runs.find_runs` returns them.
        options: what is compared, and how.

    Raises:
        ComparisonError: if there is no finished run with the metric, or no such key or baseline.
    """
    evaluated = evaluate(client, runs, options.metric, options.until)
    if not any(evaluated.values()):
        raise ComparisonError(_nothing(client, runs, options))
    keys, by_label = group_runs(runs, options.group_by)
    groups = [make_group(label, members, evaluated) for label, members in by_label.items()]
    baseline = _baseline(groups, keys, options.baseline)
    groups.sort(key=lambda group: group is not baseline)
    tasks = sorted({task for group in groups for task in group.tasks})
    bounds = _bounds(groups, tasks, options, normal=len(tasks) > 1 and "task" not in keys)
    grids = {task: common_frames(groups, task) for task in tasks}

    def scores(group: Group, of: Callable[[str, Sequence[Evaluated]], Floats]) -> dict:
        found = {task: of(task, members) for task, members in group.tasks.items()}
        # Sorted, so that no number hangs on the order of the runs in the store.
        return {t: np.sort(normalise(s, bounds.get(t))) for t, s in found.items() if s.size}

    finals = [
        scores(group, lambda _, members: np.array([one.final(options.last) for one in members]))
        for group in groups
    ]
    areas = [
        scores(group, lambda task, members: on_grid(members, grids[task]).mean(axis=1))
        if all(grids[task].size for task in group.tasks)
        else {}
        for group in groups
    ]
    rows = [
        make_row(group, final, area, options, finals[0] if baseline and index else None)
        for index, (group, final, area) in enumerate(zip(groups, finals, areas, strict=True))
    ]
    found = replace(options, group_by=keys, baseline=baseline.label if baseline else None)
    words = remarks_of(groups, rows, tasks, found)
    rows = [replace(row, remarks="; ".join(said)) for row, said in zip(rows, words, strict=True)]
    return Comparison(found, groups, rows, tasks, bounds, finals)


def evaluate(
    client: MlflowClient, runs: Sequence[Run], metric: str, until: int | None = None
) -> dict[str, Evaluated | None]:
    """Return the finished runs that have a metric, by their ids; ``None`` without any number.

    Args:
        client: of the store.
        runs: any.
        metric: its name.
        until: the last frame that counts; ``None`` for all.
    """
    finished = {run.run_id: run for run in runs if run.status == "FINISHED"}
    histories = read_histories(client, list(finished), metric, until)
    rates = read_means(client, list(histories), RATE)
    shares = read_means(client, list(histories), SHARE)
    evaluated: dict[str, Evaluated | None] = {}
    for run_id, history in histories.items():
        if not history.values.size:
            evaluated[run_id] = None
            continue
        run = finished[run_id]
        seconds = active_seconds(history, run.start, run.pauses)
        by_clock = history.frames[-1] / seconds[-1] if seconds[-1] > 0 else None
        evaluated[run_id] = Evaluated(
            run, history, seconds, rates.get(run_id, by_clock), shares.get(run_id)
        )
    return evaluated


def normalise(scores: Floats, bounds: tuple[float, float] | None) -> Floats:
    """Return scores with the bounds at 0 and 1, or as they are without bounds.

    Args:
        scores: in the unit of the bounds.
        bounds: low and high.
    """
    if bounds is None:
        return scores
    low, high = bounds
    return (scores - low) / (high - low)


def _bounds(
    groups: Sequence[Group], tasks: Sequence[str], options: Options, normal: bool
) -> dict[str, tuple[float, float]]:
    """Return the scores that become 0 and 1: as given, else the task's lowest and highest."""
    if unknown := set(options.bounds) - set(tasks) - {EVERY_TASK}:
        raise ComparisonError(
            f"--normalize names the task {min(unknown)!r}, but runs have {', '.join(tasks)}."
        )
    if unknown := set(options.thresholds) - set(tasks) - {EVERY_TASK}:
        raise ComparisonError(
            f"--threshold names the task {min(unknown)!r}, but runs have {', '.join(tasks)}."
        )
    bounds = {}
    for task in tasks if normal or options.bounds else ():
        seen = [o.history.values for group in groups for o in group.tasks.get(task, ())]
        span = float(min(map(np.min, seen))), float(max(map(np.max, seen)))
        low, high = options.bounds.get(task, options.bounds.get(EVERY_TASK, span))
        bounds[task] = (low, high if high > low else low + 1)
    return bounds


def _baseline(groups: Sequence[Group], keys: Sequence[str], label: str | None) -> Group | None:
    if label is None:
        return None
    for group in groups:
        values = ",".join(part.split("=", 1)[-1] for part in group.label.split(", "))
        spelled = {group.label, values} if len(keys) > 1 else {group.label}
        if "".join(label.split()) in {"".join(name.split()) for name in spelled}:
            if not group.counted:
                raise ComparisonError(f"The baseline {label!r} has no finished run with a score.")
            return group
    labels = [group.label for group in groups]
    close = difflib.get_close_matches(label, labels, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ComparisonError(f"There is no group {label!r}: {hint}There are {', '.join(labels)}.")


def _nothing(client: MlflowClient, runs: Sequence[Run], options: Options) -> str:
    finished = [run for run in runs if run.status == "FINISHED"]
    if not finished:
        statuses = ", ".join(sorted({run.status for run in runs}))
        return f"None of the {len(runs)} runs is FINISHED: they are {statuses}."
    metric, until = options.metric, options.until
    if until is not None and read_histories(client, [run.run_id for run in finished], metric):
        return f"No finished run has a number for {metric!r} up to frame {until:,} (--until)."
    known = sorted({m for run in finished[:20] for m in client.get_run(run.run_id).data.metrics})
    close = difflib.get_close_matches(metric, known, n=3) or known[:20]
    return (
        f"No finished run has a number for {metric!r}; they have {', '.join(close) or 'no metric'}."
    )
