"""A group's line of the table: its scores with intervals, its times and its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from muon_rl.experiments.groups import Group
from muon_rl.experiments.statistics import (
    Floats,
    Interval,
    bootstrap_improvement,
    iqm,
    percentile_interval,
    probability_of_improvement,
    stratified_bootstrap,
)

EVERY_TASK = ""  # the key of bounds or a threshold that hold for all tasks


@dataclass(frozen=True)
class Options:
    """What is compared, and how.

    Args:
        group_by: keys of tags or params; none of them means ``method``, else ``optimizer``.
        baseline: the label of the group that the others are measured against.
        metric: whose values are the scores; more is better.
        thresholds: by task, in the metric's unit; the key ``""`` is for every task.
        bounds: by task, the scores that become 0 and 1; the key ``""`` is for every task.
        last: how many evaluations at the end of a run count as its final score.
        until: the frame at which runs end; what a run did after it is left out.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    group_by: Sequence[str] = ()
    baseline: str | None = None
    metric: str = "eval/return"
    thresholds: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    last: int = 1
    until: int | None = None
    resamples: int = 10_000
    seed: int = 0

    @property
    def up_to(self) -> str:
        """The words for ``until``, with a blank before them; empty without it."""
        return "" if self.until is None else f" up to frame {self.until:,}"


@dataclass(frozen=True)
class Row:
    """A group's line of the table, in the order of ``summary.csv``; ``None`` is an empty cell."""

    group: str
    runs: int
    seeds: int
    failed: int
    frames: int | None = None
    final_iqm: float | None = None
    final_iqm_low: float | None = None
    final_iqm_high: float | None = None
    final_mean: float | None = None
    final_median: float | None = None
    auc_iqm: float | None = None
    auc_iqm_low: float | None = None
    auc_iqm_high: float | None = None
    improvement_probability: float | None = None
    improvement_low: float | None = None
    improvement_high: float | None = None
    frames_to_threshold: float | None = None
    seconds_to_threshold: float | None = None
    frames_per_second: float | None = None
    optimizer_share: float | None = None
    remarks: str = ""


COLUMNS = tuple(column.name for column in fields(Row))


def make_row(
    group: Group,
    final: Mapping[str, Floats],
    area: Mapping[str, Floats],
    options: Options,
    baseline: Mapping[str, Floats] | None,
) -> Row:
    """Return a group's line, without its remarks.

    Args:
        group: whose.
        final: by task, the final scores of its runs, ascending.
        area: by task, the means of their curves, ascending; empty where frames have none in common.
        options: of the comparison.
        baseline: by task, the final scores of the baseline's runs, ascending, if there is one.
    """
    row: dict[str, Any] = {
        "group": group.label,
        "runs": len(group.with_status("FINISHED")),
        "seeds": group.seeds,
        "failed": len(group.with_status("FAILED", "KILLED", "RUNNING")),
    }
    if not group.counted:
        return Row(**row)
    pooled = np.concatenate(list(final.values()))
    row |= {
        "frames": min(one.history.budget for one in group.counted),
        "final_mean": float(pooled.mean()),
        "final_median": float(np.median(pooled)),
        "frames_per_second": _median([one.rate for one in group.counted]),
        "optimizer_share": _median([one.optimizer_share for one in group.counted]),
    }
    for name, found in (("final_iqm", final), ("auc_iqm", area)):
        if found:
            interval = _interval(group, found, options)
            row |= {
                name: float(iqm(np.concatenate(list(found.values())))),
                f"{name}_low": interval and interval.low,
                f"{name}_high": interval and interval.high,
            }
    shared = sorted(set(final) & set(baseline or {}))
    if baseline and shared:
        ours, theirs = ([scores[task] for task in shared] for scores in (final, baseline))
        row["improvement_probability"] = probability_of_improvement(ours, theirs)
        if min(map(len, [*ours, *theirs])) > 1:
            samples = bootstrap_improvement(
                ours,
                theirs,
                resamples=options.resamples,
                generator=np.random.default_rng(options.seed),
            )
            row["improvement_low"], row["improvement_high"] = percentile_interval(samples)
    if options.thresholds:
        limits = options.thresholds
        reached = [
            one.reaches(limits[task] if task in limits else limits[EVERY_TASK])
            for task, members in group.tasks.items()
            for one in members
            if task in limits or EVERY_TASK in limits
        ]
        for name, values in zip(("frames", "seconds"), zip(*reached, strict=True), strict=False):
            median = float(np.median(values))
            row[f"{name}_to_threshold"] = median if np.isfinite(median) else None
    return Row(**row)


def _interval(group: Group, scores: Mapping[str, Floats], options: Options) -> Interval | None:
    """Return the interval of the IQM: of one seed there is none."""
    if group.seeds < 2:
        return None
    samples = stratified_bootstrap(
        [scores[task] for task in sorted(scores)],
        iqm,
        resamples=options.resamples,
        generator=np.random.default_rng(options.seed),
    )
    return percentile_interval(samples)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
