"""Sweeps of real trainings: killed and resumed, stopped, broken, by Ray."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from muon_rl.cli import main

TINY = (
    "ppo_snake_adam_small", "--env.num_envs=8", "--env.max_steps=20",
    "--data.steps_per_rollout=64", "--data.epochs=2", "--data.minibatches=2",
    "--data.eval_every=64", "--data.eval_episodes=2", "--model.policy.d_model=16",
    "--model.policy.num_layers=1", "--trainer.log_every_n_steps=1", "--name=study",
)  # fmt: skip
ROLLOUTS = list(range(64, 1281, 64))
GRID = (
    *TINY, "--grid", "model.clip=0.1,0.2", "model.optimizer.{trunk,actor,critic}.lr=1e-3,1e-4",
    "--seeds", "0:2", "--jobs", "4", "--data.total_frames=1280", "--tag", "tuning_trials=10",
)  # fmt: skip


def runs_of(workspace):
    """Return the parent and its children."""
    records = workspace.records
    (parent,) = (r for r in records if r.data.tags.get("muon_rl.kind") == "sweep")
    children = [r for r in records if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(records) - 1
    return parent, children


def when(condition, then, patience=120):
    """Do something, in a thread, as soon as a condition is met."""

    def wait():
        until = time.monotonic() + patience
        while not condition() and time.monotonic() < until:
            time.sleep(0.1)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def trains(workspace):
    """Return whether a training has evaluated, and so saved."""
    logs = workspace.folder.glob("sweeps/study/*.log")
    return any("frames  eval" in log.read_text() for log in logs)


def test_a_sweep_that_is_killed_goes_on_and_loses_nothing(workspace, capfd):
    process = subprocess.Popen(
        [sys.executable, "-m", "muon_rl.cli", "sweep", *GRID],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if "done  " in line:
            break
    process.kill()
    process.communicate()
    _, children = runs_of(workspace)
    finished = {r.info.run_id for r in children if r.info.status == "FINISHED"}
    assert 1 <= len(finished) < 8

    main(["sweep", *GRID])
    output = capfd.readouterr().out
    parent, children = runs_of(workspace)
    assert parent.info.status == "FINISHED"
    assert [r.info.status for r in children] == ["FINISHED"] * 8
    assert finished <= {r.info.run_id for r in children}
    # Of those that were finished nothing was run again, and of the others none twice.
    assert output.count("started ") + output.count("goes on ") <= 8 - len(finished)
    words = ("started ", "goes on ")
    begun = {line.split("  ", 2)[2] for line in output.splitlines() if line[10:18] in words}
    names = {r.info.run_name for r in children if r.info.run_id not in finished}
    assert begun == names
    told = {
        (r.data.params["model.clip"], r.data.params["model.optimizer.critic.lr"],
         r.data.tags["seed"])
        for r in children
    }  # fmt: skip
    assert told == {(c, lr, s) for c in ("0.1", "0.2") for lr in ("0.001", "0.0001") for s in "01"}
    for run in children:
        for metric in ("train/loss_critic", "train/learning_rate", "eval/return", "eval/score"):
            history = workspace.client.get_metric_history(run.info.run_id, metric)
            assert Counter(point.step for point in history) == dict.fromkeys(ROLLOUTS, 1)
        assert run.data.tags["sweep"] == "study" and run.data.tags["tuning_trials"] == "10"
        clip, lr = run.data.params["model.clip"], run.data.tags["point"].rpartition("=")[2]
        assert run.data.tags["point"] == (
            f"model.clip={clip} model.optimizer.{{actor,critic,trunk}}.lr={lr}"
        )
        assert run.info.run_name == f"clip={clip} lr={lr} seed={run.data.tags['seed']}"
        assert {"task", "algorithm", "optimizer"} <= set(run.data.tags)

    assert parent.data.metrics == {"points_finished": 8.0, "points_failed": 0.0}
    table = workspace.client.download_artifacts(parent.info.run_id, "points.csv")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    values = {run.info.run_id: run.data.metrics["eval/return"] for run in children}
    assert {row["run_id"]: float(row["eval/return"]) for row in rows} == pytest.approx(
        values, rel=1e-5
    )
    picture = workspace.client.download_artifacts(parent.info.run_id, "points.png")
    assert os.path.getsize(picture) > 10_000

    # Once more there is nothing to do, and another study may not take its name.
    main(["sweep", *GRID])
    assert "8 trainings, 8 of them finished already" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", *GRID, "--data.epochs=3"])
    error = capfd.readouterr().err
    assert "There is a study study already, and it differs in\n  options of fit: " in error
    assert "--data.epochs=3 now" in error and "--name" in error


def test_ctrl_c_saves_and_says_how_to_go_on(workspace, capfd):
    command = [*TINY, "--data.total_frames=1000000"]
    before = signal.getsignal(signal.SIGINT)
    stopper = when(lambda: trains(workspace), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *command])
    stopper.join()
    assert stop.value.code == 130
    output, error = capfd.readouterr()
    assert "stopping: what runs saves and ends" in output and "stopped  default seed=0" in output
    assert "To go on, the same command again:\n  muon-rl sweep ppo_snake_adam_small" in error
    parent, (child,) = runs_of(workspace)
    assert parent.info.status == child.info.status == "KILLED"
    assert len(list(workspace.folder.glob("sweeps/study/*/*/seed_0/*/last.ckpt"))) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_training_that_breaks_is_reported(workspace, capfd):
    command = [*TINY, "--data.total_frames=128", "--point", "model.optimizer.trunk.lr=1e38"]
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *command, "--retries", "0"])
    assert stop.value.code == 1
    output, error = capfd.readouterr()
    assert "1 of 1 trainings failed. The same command runs them again." in error
    report = output.partition("\nFAILED lr=1e38 seed=0 (exit code 1), ")[2].splitlines()
    log = workspace.folder / report[0].rstrip(":")
    assert log.parent.name == "study" and log.read_text().splitlines()[-1] in "\n".join(report)
    assert any("`nan`" in line for line in report[1:6])
    parent, (child,) = runs_of(workspace)
    assert parent.info.status == child.info.status == "FAILED"
    assert parent.data.metrics == {"points_finished": 0.0, "points_failed": 1.0}


def test_ray_runs_a_sweep(workspace, capfd):
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'muon-rl[ray]'")
    main(["sweep", *TINY, "--data.total_frames=128", "--launcher", "ray"])
    assert "1 of 1 trainings of study are finished" in capfd.readouterr().out
    parent, (child,) = runs_of(workspace)
    assert parent.info.status == child.info.status == "FINISHED"
    history = workspace.client.get_metric_history(child.info.run_id, "eval/return")
    assert [point.step for point in history] == [64, 128]
