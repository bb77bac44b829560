"""What a sweep leaves in its parent run: a table, a plot, a few lines of text."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlflow.entities import Run

from muon_rl.experiments.jobs import Job, Point
from muon_rl.experiments.study import Study, final_value, is_finished

_CURVES = 10  # more of them are a tangle: the best are drawn
_ROWS = 40  # points whose values are drawn


def rows_of(jobs: Sequence[Job], runs: Mapping[Job, Run], metric: str) -> list[dict[str, Any]]:
    """Return a row for each job: its point, seed, status and last value.

    Args:
        jobs: of the study.
        runs: by their jobs.
        metric: whose last value is shown.
    """
    keys = list(dict.fromkeys(key for job in jobs for key, _ in job.point.values))
    rows = []
    for job in jobs:
        run = runs.get(job)
        info = run.info if run is not None else None
        seconds = (info.end_time - info.start_time) / 1000 if info and info.end_time else None
        rows.append(
            {
                "point": job.point.text,
                "task": run.data.tags.get("task", job.point.task) if run else job.point.task,
                "trial": "" if job.point.trial is None else job.point.trial,
                "seed": job.seed,
                "status": info.status if info else "NOT RUN",
                metric: _given(final_value(run, metric)),
                "seconds": _given(seconds),
                "run_id": info.run_id if info else "",
                **{key: dict(job.point.values).get(key, "") for key in keys},
            }
        )
    return rows


def log_results(
    study: Study, jobs: Sequence[Job], runs: Mapping[Job, Run], metric: str, minimize: bool
) -> None:
    """Put table, plot, counts and a note into the parent run.

    Args:
        study: whose parent it is.
        jobs: of the study.
        runs: by their jobs.
        metric: that is shown.
        minimize: whether the smallest value is the best.
    """
    rows = rows_of(jobs, runs, metric)
    finished = sum(row["status"] == "FINISHED" for row in rows)
    failed = sum(row["status"] == "FAILED" for row in rows)
    ranked = ranking(jobs, runs, metric, minimize)
    counts = {"points_finished": finished, "points_failed": failed}
    study.describe(counts, _note(study, ranked, rows, metric))
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "points.csv"
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        study.client.log_artifact(study.parent_id, str(table))
        if ranked:
            picture = Path(folder) / "points.png"
            draw(study, ranked, runs, metric).savefig(picture, dpi=150)
            study.client.log_artifact(study.parent_id, str(picture))


Ranked = list[tuple[Point, dict[int, float]]]


def ranking(
    jobs: Sequence[Job], runs: Mapping[Job, Run], metric: str, minimize: bool = False
) -> Ranked:
    """Return each point's values by seed, the point with the best mean first.

    Args:
        jobs: of the study.
        runs: by their jobs; those that are not finished are left out.
        metric: whose last value counts.
        minimize: whether the smallest is the best.
    """
    values: dict[Point, dict[int, float]] = {}
    for job in jobs:
        run = runs.get(job)
        value = final_value(run, metric) if is_finished(run) else None
        if value is not None and np.isfinite(value):
            values.setdefault(job.point, {})[job.seed] = value
    sign = 1 if minimize else -1
    return sorted(values.items(), key=lambda item: sign * float(np.mean(list(item[1].values()))))


def draw(study: Study, ranked: Ranked, runs: Mapping[Job, Run], metric: str) -> Figure:
    """Return the plot: each point's last values, a dot a seed, and its curve, the mean over seeds.

    Args:
        study: that the runs are read from.
        ranked: values of each point by seed, the best first.
        runs: by their jobs.
        metric: that is drawn.
    """
    shown = ranked[:_ROWS]
    height = max(3.2, 1.2 + 0.28 * len(shown))
    figure = Figure(figsize=(12, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    colors = [f"C{i % 10}" for i in range(len(shown))]
    _draw_values(left, shown, colors, metric)
    for (point, values), color in list(zip(shown, colors, strict=True))[:_CURVES]:
        curves = [_curve(study, runs[Job(point, seed)], metric) for seed in values]
        # Evaluations come at the same frames but for a stop in between: those that all have.
        frames = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [np.mean([curve[frame] for curve in curves]) for frame in frames]
        right.plot(frames, means, color=color, marker=".", label=point.name)
    right.set(xlabel="frames", ylabel=metric, title="Mean over the seeds")
    right.grid(alpha=0.3)
    left_out = len(ranked) - min(len(ranked), _CURVES)
    note = f"; curves of the best {_CURVES} of {len(ranked)} points" if left_out else ""
    figure.suptitle(f"{study.name}: {metric}{note}")
    return figure


def _draw_values(axes: Axes, shown: Ranked, colors: Sequence[str], metric: str) -> None:
    for place, ((_, values), color) in enumerate(zip(shown, colors, strict=True)):
        last = list(values.values())
        axes.plot(last, [place] * len(last), "o", color=color, alpha=0.6)
        axes.plot([np.mean(last)], [place], "|", color="black", markersize=14)
    axes.set_yticks(range(len(shown)), [point.name for point, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=max(0.05, 0.5 / len(shown)))
    axes.set(xlabel=f"last {metric}", title="A dot a seed, a stroke their mean")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3, axis="x")


def _curve(study: Study, run: Run, metric: str) -> dict[int, float]:
    history = study.client.get_metric_history(run.info.run_id, metric)
    return {point.step: point.value for point in history}


def _note(study: Study, ranked: Ranked, rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Return the parent's description in the MLflow UI."""
    finished = sum(row["status"] == "FINISHED" for row in rows)
    lines = [
        f"**{study.name}**: {finished} of {len(rows)} trainings finished. "
        "Plot and table are `points.png` and `points.csv` under Artifacts. What can be claimed of "
        f"it, `muon-rl compare {study.name} --group-by point` tells.",
        "",
        f"| point | seeds | mean of the last {metric} |",
        "|---|---|---|",
    ]
    for point, values in ranked[:20]:
        mean = float(np.mean(list(values.values())))
        lines.append(f"| {point.name} | {len(values)} | {mean:.4g} |")
    return "\n".join(lines)


def _given(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
