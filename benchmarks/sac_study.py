"""Run the points of the SAC study's sweeps, one process each, and keep a row for each that ends.

A point whose run is FINISHED in the tracking store is not run again, so a study that was stopped
goes on where it was. What fails is named at the end, with its log. One seed a point is a look at
what a run does: no comparison.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from muon_rl.cli import recipes
from muon_rl.experiments import read_sweep

RESULTS = Path(__file__).parent / "results" / "sac_study.csv"
SPECIAL = (  # what a hypothesis is looked at by, beside the return
    "train/momentum/critic/muon", "train/momentum/critic/adamw", "repr/q_effective_rank_mean",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One run of a study.

    Args:
        sweep: the sweep's name.
        config: the recipe's name.
        task: the name of the task's file.
        seed: of the run.
        frames: budget.
        values: of the keys that the sweep sets.
    """

    sweep: str
    config: str
    task: str
    seed: int
    frames: int
    values: dict[str, Any]

    @property
    def tag(self) -> str:
        """What tells the point apart in the tracking store."""
        values = [f"{key}={value}" for key, value in self.values.items()]
        return " ".join([self.sweep, self.task, f"seed={self.seed}", f"{self.frames}", *values])

    def command(self) -> list[str]:
        """Return the command that runs it."""
        values = [f"--{key}={_written(value)}" for key, value in self.values.items()]
        return [
            sys.executable, "-c", "from muon_rl.cli import main; main()", "fit",
            f"--config={self.config}", f"--config={self.task}", *values,
            f"--seed_everything={self.seed}", f"--data.total_frames={self.frames}",
            f"--trainer.logger.tags={json.dumps({'sweep': self.sweep, 'point': self.tag})}",
        ]  # fmt: skip


def _written(value: Any) -> str:
    """Return a value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def finished(client: MlflowClient) -> dict[str, Run]:
    """Return the finished runs of all studies by their point's tag."""
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(ids, "status = 'FINISHED'", max_results=50_000)
    return {run.data.tags["point"]: run for run in runs if "point" in run.data.tags}


def run(point: Point, number: int, logs: Path, threads: int) -> None:
    """Run a point in a process of its own, and say how it ended."""
    log = logs / f"{point.sweep}_{point.task}_seed{point.seed}_{number}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as file:
        done = subprocess.run(point.command(), stdout=file, stderr=file, env=environment)
    print(f"{'done  ' if done.returncode == 0 else 'FAILED'} {log}  {point.tag}", flush=True)


def row(point: Point, run: Run) -> dict[str, str]:
    """Return what a finished point's run has to show."""
    tags, metrics = run.data.tags, run.data.metrics
    return {
        "sweep": point.sweep, "task": tags["task"], "seed": str(point.seed),
        "frames": str(point.frames), "method": tags["method"],
        "return": f"{metrics['eval/return']:.1f}",
        "frames_per_second": f"{metrics['train/frames_per_second']:.1f}",
        **{name: f"{metrics[name]:.4g}" if name in metrics else "" for name in SPECIAL},
        "git_commit": tags.get("git_commit", ""), "run_id": run.info.run_id,
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Put rows into a file, beside those of other studies that it has."""
    others = []
    if path.exists():
        with path.open(newline="") as file:
            names = {(line["sweep"], line["task"], line["seed"], line["frames"]) for line in rows}
            others = [
                line
                for line in csv.DictReader(file)
                if (line["sweep"], line["task"], line["seed"], line["frames"]) not in names
            ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(others + rows)


def main() -> None:
    """Run what is not finished yet, then print and write the rows of all points."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = {"nargs": "+", "metavar": "NAME"}
    shipped = recipes.shipped()
    sweeps = [n for n in recipes.sweeps() if n.startswith("sac_") and n in shipped]
    tasks = list(recipes.tasks())
    parser.add_argument(
        "--sweeps", **known, choices=sweeps, default=sweeps,
        help=f"whose points are run: {', '.join(sweeps)} (default all)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", **known, choices=tasks, default=["cartpole_swingup"],
        help=f"that they are run on: {', '.join(tasks)} (default cartpole_swingup)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="of each point (default 0)"
    )
    parser.add_argument("--frames", type=int, default=20_000, help="of each run (default 20000)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder (default logs)")
    parser.add_argument(
        "--rows", type=Path, default=RESULTS, help=f"CSV file to write (default {RESULTS.name})"
    )
    options = parser.parse_args()

    options.logs.mkdir(parents=True, exist_ok=True)
    here = f"sqlite:///{Path('mlflow.db').absolute()}"
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", here))
    read = {name: read_sweep(recipes.sweeps()[name]) for name in options.sweeps}
    points = [
        Point(name, sweep.config, task, seed, options.frames, values)
        for seed in options.seeds
        for task in options.tasks
        for name, sweep in read.items()
        for values in sweep.points
    ]
    done = finished(client)
    left = [point for point in points if point.tag not in done]
    print(f"{len(points)} points, {len(points) - len(left)} of them finished already", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for point in left:
            pool.submit(run, point, points.index(point), options.logs, options.threads)
    done = finished(client)
    rows = [row(point, done[point.tag]) for point in points if point.tag in done]
    if rows:
        write(options.rows, rows)
        for line in rows:
            print("  ".join(line[name] or "-" for name in list(line)[:-2]))
    if missing := len(points) - len(rows):
        raise SystemExit(f"{missing} of {len(points)} points did not finish: see {options.logs}/")


if __name__ == "__main__":
    main()
