"""Draw the learning curves of runs that MLflow has, and keep their points as rows.

One line a run, no interval and no comparison: what a run does, not which method is better.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from mlflow import MlflowClient

COLUMNS = ("task", "method", "seed", "frames", "value", "git_commit", "run_id")
LABELS = {
    "eval/return": "return (mean of the evaluation)",
    "eval/score": "score: apples eaten (mean of the evaluation)",
    "repr/q_effective_rank_mean": "effective rank of the critics' features (mean)",
}


def points(
    client: MlflowClient, experiment: str, metric: str, sweep: str | None
) -> list[dict[str, str]]:
    """Return the points of every finished run of an experiment, or of one sweep in it."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise SystemExit(f"There is no experiment {experiment!r} in this store.")
    rows = []
    which = "status = 'FINISHED'" + (f" and tags.sweep = '{sweep}'" if sweep else "")
    for run in client.search_runs([found.experiment_id], which):
        tags = run.data.tags
        for point in client.get_metric_history(run.info.run_id, metric):
            rows.append({
                "task": tags["task"], "method": tags["method"], "seed": tags["seed"],
                "frames": str(point.step), "value": f"{point.value:.2f}",
                "git_commit": tags.get("git_commit", ""), "run_id": run.info.run_id,
            })  # fmt: skip
    return sorted(rows, key=lambda row: (row["method"], int(row["seed"]), int(row["frames"])))


def draw(rows: list[dict[str, str]], metric: str, output: Path) -> None:
    """Draw one line a run."""
    runs: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        key = (row["method"], row["seed"])
        runs.setdefault(key, []).append((int(row["frames"]), float(row["value"])))
    many = len(runs) > 4
    figure, axes = plt.subplots(figsize=(9.6 if many else 6.4, 3.8), layout="constrained")
    for (method, seed), line in runs.items():
        axes.plot(*zip(*line, strict=True), marker=".", label=f"{method}, seed {seed}")
    axes.set(xlabel="frames", ylabel=LABELS.get(metric, metric), title=rows[0]["task"])
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if many else {}
    axes.legend(frameon=False, fontsize="small", **beside)
    axes.grid(alpha=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def main() -> None:
    """Write rows and picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", help="name of the MLflow experiment: the task")
    parser.add_argument("--tracking-uri", default=f"sqlite:///{Path('mlflow.db').absolute()}")
    parser.add_argument("--metric", default="eval/return")
    parser.add_argument("--sweep", help="only the runs of this sweep (the tag sweep)")
    parser.add_argument("--rows", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--picture", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    client = MlflowClient(options.tracking_uri)
    rows = points(client, options.experiment, options.metric, options.sweep)
    if not rows:
        raise SystemExit("There is no finished run.")
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    with options.rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.metric, options.picture)
    print(f"{len(rows)} points -> {options.rows}, {options.picture}")


if __name__ == "__main__":
    main()
