"""The logger of runs, where other processes write into its store too."""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L

from muon_rl.cli.record import RunRecord
from muon_rl.tracking import MLflow
from muon_rl.turns import one_process_at_a_time


def test_a_writer_waits_for_its_turn_and_writes_all_in_order(workspace):
    logger = MLflow(experiment_name="study", run_name="run")
    logger.log_metrics({"a": 0.0}, step=0)
    for operation in logger._pending:
        operation.result()
    with one_process_at_a_time(logger.tracking_uri):
        for step in range(1, 51):  # of more it would wait for what is written
            logger.log_metrics({"a": float(step)}, step=step)
        time.sleep(0.5)
        assert len(workspace.history("a")) == 1
    logger.finalize("success")
    assert workspace.history("a") == [(step, float(step)) for step in range(51)]
    (record,) = workspace.records
    assert record.info.status == "FINISHED"


def test_what_lies_before_a_checkpoint_is_written_before_it(workspace, monkeypatch):
    """A process that is killed may leave the checkpoint, and a resumed run logs nothing twice."""
    write, save, found = MLflow._write_queued, L.Trainer.save_checkpoint, []

    def slowly(*args):
        time.sleep(0.3)
        write(*args)

    def save_checkpoint(trainer, *args, **options):
        found.append((trainer.datamodule.frames, workspace.history("eval/return")[-1][0]))
        save(trainer, *args, **options)

    monkeypatch.setattr(MLflow, "_write_queued", slowly)
    monkeypatch.setattr(L.Trainer, "save_checkpoint", save_checkpoint)
    workspace.fit("--data.total_frames=400")
    assert {frames for frames, _ in found} == {200, 400}
    assert all(written == frames for frames, written in found)


def test_what_is_recorded_holds_no_password(workspace):
    logger = MLflow(experiment_name="study", run_name="run")
    uri = "https://ada:s3:cr@t@host:80/a"
    logger.log_hyperparams({"store": uri, "plain": "sqlite:///mlflow.db", "mail": "ada@host"})
    RunRecord(f"store: {uri}\nother: [{uri}]\n")._log_files(logger, "table")
    logger.finalize("success")
    (record,) = workspace.records
    hidden = "https://ada:***@host:80/a"
    assert record.data.params == {
        "store": hidden, "plain": "sqlite:///mlflow.db", "mail": "ada@host"
    }  # fmt: skip
    path = workspace.client.download_artifacts(record.info.run_id, "config.yaml")
    assert Path(path).read_text() == f"store: {hidden}\nother: [{hidden}]\n"
