"""Ctrl-C and SIGTERM: saved, KILLED in MLflow, told how to go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from muon_rl.agent import Agent
from muon_rl.cli import main

PROGRAM = [sys.executable, "-c", "from muon_rl.cli import main; main()", "fit"]


def start(workspace, *options):
    bar = [word for word in workspace.options if "progress_bar" not in word]
    return subprocess.Popen(
        [*PROGRAM, *bar, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_line(process, text, stream="stdout"):
    """Read the program's output up to a text."""
    seen = ""
    while text not in seen:
        character = getattr(process, stream).read(1)
        assert character, f"ended before {text!r}: {process.stderr.read()}"
        seen += character


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_training_saves_and_says_how_to_go_on(signum, code, workspace, capsys):
    process = start(workspace, "--data.total_frames=1000000")
    wait_for_line(process, "200 frames  eval")
    time.sleep(1)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "--ckpt_path=" in errors
    (record,) = workspace.records
    assert record.info.status == "KILLED"
    saved = torch.load(workspace.checkpoint(), weights_only=True)
    frames = saved["muon_rl"]["frames"]
    assert frames > 200
    # The recipe collects 10 steps at a time: up to 9 of their updates may still be to come.
    assert 0 <= (frames - 100) // 2 - saved["global_step"] < 10
    assert f"{frames:,} frames" in errors

    # The command that it named goes on in the same run.
    main(["fit", *workspace.options, f"--data.total_frames={frames + 40}",
          f"--ckpt_path={workspace.checkpoint()}"])  # fmt: skip
    (record,) = workspace.records
    assert record.info.status == "FINISHED"
    steps = [frame for frame, _ in workspace.history("train/loss_qvalue")]
    assert steps == list(range(120, frames + 41, 20))


def test_a_signal_in_the_warm_up_stops_too(workspace):
    process = start(workspace, "--data.total_frames=10000000", "--data.init_random_frames=5000000")
    wait_for_line(process, "Training")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (record,) = workspace.records
    assert record.info.status == "KILLED"
    saved = torch.load(workspace.checkpoint(), weights_only=True)
    assert 0 < saved["muon_rl"]["frames"] < 5_000_000
    assert saved["global_step"] == 0


def test_a_second_ctrl_c_stops_at_once(workspace):
    process = start(workspace, "--data.total_frames=1000000", "--data.eval_episodes=1000")
    wait_for_line(process, "Training")
    time.sleep(4)  # into the long first evaluation
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "Stopping after this update", "stderr")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert workspace.records[0].info.status == "KILLED"


@pytest.mark.parametrize("episode", [0, 1])  # ends it there; after the last, all has been done
def test_a_run_stopped_in_its_last_evaluation_goes_on_with_it(episode, workspace, monkeypatch):
    with monkeypatch.context() as patch:
        step = Agent.validation_step

        def step_and_stop(agent, episode_steps, batch_idx, *rest):
            step(agent, episode_steps, batch_idx, *rest)
            if batch_idx == episode:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(Agent, "validation_step", step_and_stop)
        with pytest.raises(SystemExit, match="143"):
            workspace.fit("--data.total_frames=200")
    saved = torch.load(workspace.checkpoint(), weights_only=True)
    assert saved["muon_rl"]["frames"] == 200
    assert saved["SACData"]["evaluated_frames"] == (120, 200)[episode]
    assert [frame for frame, _ in workspace.history("eval/return")] == [200] * episode

    workspace.fit("--data.total_frames=200", "--ckpt_path=last")
    (record,) = workspace.records
    assert record.info.status == "FINISHED"
    assert [frame for frame, _ in workspace.history("eval/return")] == [200]
    ended = torch.load(workspace.checkpoint(), weights_only=True)
    assert ended["SACData"]["evaluated_frames"] == 200
    # Nothing was trained further.
    torch.testing.assert_close(ended["state_dict"], saved["state_dict"], rtol=0, atol=0)
    with pytest.raises(SystemExit, match="2"):
        workspace.fit("--data.total_frames=200", "--ckpt_path=last")
