"""A comparison as a run in MLflow: its files and numbers, the table as its description."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from muon_rl.experiments.comparison import Comparison
from muon_rl.experiments.tables import to_markdown
from muon_rl.tags import KIND


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
    tags = {KIND: "comparison", "mlflow.note.content": to_markdown(comparison)[:8000]}
    run_id = client.create_run(experiment_id, tags=tags, run_name=name[:250]).info.run_id
    groups = _names([row.group for row in comparison.rows])
    metrics = [
        Metric(f"{group}/{column}", value, 0, 0)
        for group, row in zip(groups, comparison.rows, strict=True)
        for column, value in asdict(row).items()
        if isinstance(value, (int, float))
    ]
    params = [Param(key.replace(" ", "_"), value[:6000]) for key, value in facts.items()]
    status = "FAILED"
    try:
        client.log_batch(run_id, params=params)
        for start in range(0, len(metrics), 1000):  # MLflow takes as many at a time
            client.log_batch(run_id, metrics=metrics[start : start + 1000])
        for file in files:
            client.log_artifact(run_id, str(file))
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    return run_id


def _names(labels: Sequence[str]) -> list[str]:
    """Return a name for each label that MLflow takes as the folder of a metric, none twice."""
    names = [re.sub(r"[^\w.: -]", "_", label)[:150].strip(". ") or "_" for label in labels]
    return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
