"""A comparison as a run in MLflow: its files and numbers, the table as its description."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from muon_rl.experiments.comparison import Comparison
from muon_rl.experiments.runs import KIND
from muon_rl.experiments.tables import to_markdown


def log(
    client: MlflowClient,
    experiment_id: str,
    comparison: Comparison,
    files: Sequence[Path],
    facts: Mapping[str, str],
) -> str:
    """Log a comparison as a run, which no comparison counts, and return the run's id.

    Args:
        client: of the store.
        experiment_id: of an experiment that exists.
        comparison: with its rows.
        files: to log as artifacts.
        facts: how it was made, as params.
    """
    name = f"comparison by {', '.join(comparison.options.group_by)}"
    run = client.create_run(experiment_id, run_name=name[:250])
    tags = {KIND: "comparison", "mlflow.note.content": to_markdown(comparison)[:8000]}
    metrics = [
        # Names of metrics take no other signs.
        Metric(f"{re.sub(r'[^A-Za-z0-9_.=: /-]', '_', row.group)[:150]}/{column}", value, 0, 0)
        for row in comparison.rows
        for column, value in asdict(row).items()
        if isinstance(value, (int, float))
    ]
    client.log_batch(
        run.info.run_id,
        params=[Param(key.replace(" ", "_"), value[:6000]) for key, value in facts.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    for start in range(0, len(metrics), 1000):  # MLflow takes as many at a time
        client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])
    for file in files:
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id)
    return run.info.run_id
