"""Measure ``muon-rl compare`` on a sqlite store of 100 runs with three metrics of 10,000 points.

The store is made once, which takes minutes and 0.9 GB, and kept.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import append_row, commit_of, processor
from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.models import SqlMetric
from sqlalchemy import create_engine, insert

RESULTS = Path(__file__).parent / "results" / "compare_speed.csv"
METRICS = ("eval/return", "train/frames_per_second", "train/optimizer_share")
GROUPS, SEEDS, POINTS = 10, 10, 10_000
START = 1_700_000_000_000  # milliseconds


def make(folder: Path) -> None:
    """Write the runs: metrics straight into the table, all else through MLflow's client."""
    folder.mkdir(parents=True)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("speed", str(folder / "artifacts"))
    engine = create_engine(client.tracking_uri)
    generator = np.random.default_rng(0)
    for index in range(GROUPS * SEEDS):
        tags = {"seed": str(index % SEEDS), "optimizer": f"optimizer {index // SEEDS}"}
        run = client.create_run(experiment, start_time=START, tags=tags).info.run_id
        rows = [
            {"key": key, "value": value, "timestamp": START + 1000 * i, "step": 100 * i,
             "is_nan": False, "run_uuid": run}
            for key in METRICS for i, value in enumerate(generator.random(POINTS).tolist(), start=1)
        ]  # fmt: skip
        with engine.begin() as connection:
            connection.execute(insert(SqlMetric.__table__), rows)
        client.set_terminated(run)
        print(f"\r{index + 1} of {GROUPS * SEEDS} runs written", end="", flush=True)
    print()


def main() -> None:
    """Print seconds and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(tempfile.gettempdir()) / "muon_rl_compare_speed"
    parser.add_argument("--folder", type=Path, default=default, help="of the store")
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.folder.exists():
        make(options.folder)
    command = [
        sys.executable, "-W", "ignore", "-c", "from muon_rl.cli import main; main()", "compare",
        "speed", f"--tracking-uri=sqlite:///{options.folder}/mlflow.db", "--group-by=optimizer",
        "--baseline=optimizer 0", "--threshold=0.5", f"--resamples={options.resamples}",
        f"--output={options.folder}/comparison", "--no-log",
    ]  # fmt: skip
    for number in range(options.rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"round {number}: {wall:.1f} s, {cpu:.1f} s of CPU time", flush=True)
        append_row(options.rows, {
            "runs": GROUPS * SEEDS, "metrics": len(METRICS), "points": POINTS,
            "resamples": options.resamples, "seconds": f"{wall:.1f}", "cpu_seconds": f"{cpu:.1f}",
            "processor": processor(), "git_commit": commit_of(),
        })  # fmt: skip


if __name__ == "__main__":
    main()
