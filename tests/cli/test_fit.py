"""Real runs on cheetah-run: what is trained, tracked, saved and continued."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml

import muon_rl
from muon_rl.cli import main, recipes


def load(path):
    return torch.load(path, weights_only=True)


def test_a_fit_trains_every_network(trained):
    checkpoint = load(trained.checkpoint())
    assert checkpoint["global_step"] == 150  # (400 - 100) frames / action repeat 2
    moments = checkpoint["optimizer_states"][0]
    names = [group["name"] for group in moments["param_groups"]]
    assert names == ["actor/muon", "actor/aux", "critic/muon", "critic/aux", "alpha/adam"]
    for group in moments["param_groups"]:
        for index in group["params"]:
            state = moments["state"][index]
            assert all(value.abs().sum() > 0 for value in state.values())


def test_metrics_are_tracked_against_frames(trained):
    assert [frame for frame, _ in trained.history("eval/return")] == [200, 400]
    assert [value for _, value in trained.history("eval/length")] == [100, 100]
    # Every 10 updates of 2 frames each, after the warm-up of 100.
    every = list(range(120, 401, 20))
    for name in ("loss_actor", "loss_qvalue", "loss_alpha"):
        assert [frame for frame, _ in trained.history(f"train/{name}")] == every
    # The first ones are of updates alone: the clock starts behind their frames.
    for name in ("frames_per_second", "optimizer_share"):
        assert [frame for frame, _ in trained.history(f"train/{name}")] == every[1:]
    for name, rate in {
        "learning_rate": 0.02, "aux_learning_rate": 3e-4, "learning_rate/critic": 0.02,
        "aux_learning_rate/critic": 3e-4, "learning_rate/alpha": 3e-4,
        "momentum/actor/muon": 0.95, "momentum/critic/aux": 0.9,
    }.items():  # fmt: skip
        assert {value for _, value in trained.history(f"train/{name}")} == {rate}


def test_the_run_tells_what_made_it(trained):
    (record,) = trained.records
    assert record.info.status == "FINISHED"
    assert record.info.run_name == "sac_cheetah_muon_muon_seed0"
    assert trained.client.get_experiment(record.info.experiment_id).name == "cheetah-run"
    tags = record.data.tags
    assert tags["task"] == "cheetah-run"
    assert tags["algorithm"] == "SAC"
    assert tags["seed"] == "0"
    assert tags["optimizer"] == "actor=muon, critic=muon, alpha=adam"
    assert tags["version/torch"] == torch.__version__
    assert record.data.params["data.total_frames"] == "400"
    assert record.data.params["model.optimizer.critic.muon.lr"] == "0.02"
    artifacts = {item.path for item in trained.client.list_artifacts(record.info.run_id)}
    assert artifacts == {"config.yaml", "optimizer.txt", "versions.yaml"}


def test_the_config_on_the_run_makes_the_same_run(trained, workspace):
    config = yaml.safe_load(load(trained.checkpoint())["muon_rl"]["config"])
    (workspace.folder / "again.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config=again.yaml"])
    assert workspace.history("eval/return") == trained.history("eval/return")
    assert workspace.history("train/loss_qvalue") == trained.history("train/loss_qvalue")


def test_the_best_checkpoint_is_the_best_evaluation(trained):
    best = max(trained.history("eval/return"), key=lambda point: point[1])
    assert load(trained.checkpoint("best"))["muon_rl"]["frames"] == best[0]
    assert load(trained.checkpoint("last"))["muon_rl"]["frames"] == 400


def test_load_policy_gives_the_policy_that_was_evaluated(trained):
    assert trained.played() == pytest.approx(trained.history("eval/return")[-1][1], rel=1e-5)


def test_load_policy_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        muon_rl.load_policy(tmp_path / "none.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"as a checkpoint: torch\.save did not"):
        muon_rl.load_policy(tmp_path / "broken.ckpt")
    torch.save({"muon_rl": tmp_path}, tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors, numbers and text"):
        muon_rl.load_policy(tmp_path / "object.ckpt")
    for other in ({"state_dict": {}}, {"muon_rl": None}, torch.zeros(3), 5, "muon_rl state_dict"):
        torch.save(other, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match="not saved by muon-rl fit"):
            muon_rl.load_policy(tmp_path / "other.ckpt")


def test_validate_repeats_the_last_evaluation(trained, workspace, capsys):
    (workspace.folder / "mlflow.db").unlink()
    main(["validate", *workspace.options, "--data.total_frames=400",
          f"--ckpt_path={trained.checkpoint()}"])  # fmt: skip
    expected = trained.history("eval/return")[-1][1]
    assert f"eval/return  {expected:.1f}" in capsys.readouterr().out
    assert not (workspace.folder / "mlflow.db").exists()  # a look is no run


def test_a_resumed_run_equals_one_that_was_never_stopped(trained, workspace, capsys):
    workspace.fit("--data.total_frames=300")
    halfway = workspace.records[0].info.run_id
    assert len(load(workspace.checkpoint())["SACData"]["contents"]["transitions"]["action"]) == 150
    workspace.fit("--data.total_frames=400", "--ckpt_path=last")

    # One MLflow run, one folder, each metric once a frame (the stop adds one evaluation).
    assert [record.info.run_id for record in workspace.records] == [halfway]
    assert workspace.records[0].info.status == "FINISHED"
    assert len(list(workspace.folder.glob("checkpoints/*/*/*"))) == 1
    assert [frame for frame, _ in workspace.history("eval/return")] == [200, 300, 400]
    assert workspace.history("train/loss_qvalue") == trained.history("train/loss_qvalue")
    assert workspace.history("eval/return")[-1] == trained.history("eval/return")[-1]

    ours, theirs = load(workspace.checkpoint()), load(trained.checkpoint())
    assert ours["global_step"] == theirs["global_step"]
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    ours, theirs = (c["SACData"]["contents"]["transitions"] for c in (ours, theirs))
    assert torch.equal(ours["observation"], theirs["observation"])


def test_a_checkpoint_of_another_store_begins_a_run_that_names_its_origin(trained, workspace):
    workspace.fit("--data.total_frames=420", f"--ckpt_path={trained.checkpoint()}",
                  "--checkpoint.folder=elsewhere")  # fmt: skip
    (record,) = workspace.records
    assert record.data.tags["resumed_from"] == trained.records[0].info.run_id
    assert [frame for frame, _ in workspace.history("eval/return")] == [420]
    assert load(trained.checkpoint())["muon_rl"]["frames"] == 400  # its own folder is left alone
    assert list(workspace.folder.glob("elsewhere/*/*/*/last.ckpt"))


def test_a_fresh_fit_overwrites_nothing(workspace):
    for _ in range(2):
        workspace.fit("--data.total_frames=140", "--data.eval_episodes=1")
    folders = list(workspace.folder.glob("checkpoints/sac_cheetah_muon_muon/seed_0/*"))
    assert len(folders) == 2
    assert len(workspace.records) == 2
    assert all((folder / "last.ckpt").is_file() for folder in folders)


@pytest.mark.parametrize("case", ["adam", "adamw"])
def test_the_optimizer_of_one_network_is_set_from_the_command_line(case, workspace):
    workspace.fit("--data.total_frames=140", f"--model.optimizer.critic.case={case}")
    groups = load(workspace.checkpoint())["optimizer_states"][0]["param_groups"]
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"actor/muon": 0.02, "actor/aux": 3e-4, f"critic/{case}": 3e-4,
                     "alpha/adam": 3e-4}  # fmt: skip


def test_without_a_logger_nothing_is_tracked_but_checkpoints_are(workspace):
    (workspace.folder / "mlflow.db").unlink()
    workspace.fit("--data.total_frames=140", "--trainer.logger=false")
    assert workspace.checkpoint().is_file()
    assert not (workspace.folder / "mlflow.db").exists()


def test_another_logger_gets_the_same_metrics(workspace):
    workspace.fit("--data.total_frames=140", "--trainer.logger=CSVLogger",
          "--trainer.logger.save_dir=logs")  # fmt: skip
    (path,) = workspace.folder.glob("logs/**/metrics.csv")
    header = path.read_text().splitlines()[0]
    assert "eval/return" in header
    assert "train/loss_qvalue" in header


def test_the_tracking_uri_of_the_environment_is_honoured(workspace, monkeypatch):
    (workspace.folder / "mlflow.db").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace.folder}/elsewhere.db")
    workspace.fit("--data.total_frames=140")
    assert (workspace.folder / "elsewhere.db").is_file()
    assert not (workspace.folder / "mlflow.db").exists()


def test_the_summary_says_where_everything_is(workspace, capsys):
    workspace.fit("--data.total_frames=140")
    out = capsys.readouterr().out
    assert f"mlflow ui --backend-store-uri sqlite:///{workspace.folder}/mlflow.db" in out
    assert str(workspace.checkpoint().parent.relative_to(workspace.folder)) in out
    assert workspace.records[0].info.run_id in out


def test_runs_that_start_together_share_a_new_store(workspace):
    (workspace.folder / "mlflow.db").unlink()
    program = [sys.executable, "-c", "from muon_rl.cli import main; main()", "fit"]
    command = [*program, *workspace.options, "--data.total_frames=120", "--data.eval_episodes=1"]
    both = [
        subprocess.Popen([*command, f"--seed_everything={seed}"], stderr=subprocess.PIPE)
        for seed in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sorted(record.data.tags["seed"] for record in workspace.records) == ["0", "1"]
    assert {record.info.status for record in workspace.records} == {"FINISHED"}


def test_two_processes_train_one_agent(workspace):
    # DDP starts the second by this process's own command line.
    command = [
        sys.executable, "-m", "muon_rl.cli", "fit", *workspace.options, "--data.total_frames=140",
        "--data.eval_episodes=1", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.strategy=ddp",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained 140 frames.") == 1
    (record,) = workspace.records
    assert record.info.status == "FINISHED"
    assert len(list(workspace.folder.glob("checkpoints/*/*/*/last.ckpt"))) == 1


def test_the_bar_counts_frames(workspace, capsys):
    options = [word for word in workspace.options if "progress_bar" not in word]
    main(["fit", *options, "--data.total_frames=200"])
    out = capsys.readouterr().out
    assert "200/200 frames" in out
    assert "frames/s" in out
    value = workspace.history("eval/return")[-1][1]
    assert f"return {value:.1f}" in out
    assert "v_num" not in out
    assert "evaluating" in out
    assert json.dumps(out).count("200 frames  eval/length 100.0") == 1


def test_a_run_without_its_buffer_fills_one_before_it_goes_on(workspace):
    workspace.fit("--data.total_frames=200", "--data.save_buffer=false")
    assert "contents" not in load(workspace.checkpoint())["SACData"]
    workspace.fit("--data.total_frames=300", "--data.save_buffer=false", "--ckpt_path=last")
    assert load(workspace.checkpoint())["global_step"] == 100
    assert [frame for frame, _ in workspace.history("eval/return")] == [200, 300]


def test_an_absolute_path_keeps_the_best_checkpoint(workspace):
    workspace.fit("--data.total_frames=300")
    best, value = max(workspace.history("eval/return"), key=lambda point: point[1])
    workspace.fit("--data.total_frames=320", f"--ckpt_path={workspace.checkpoint()}")
    if workspace.history("eval/return")[-1][1] <= value:
        assert load(workspace.checkpoint("best"))["muon_rl"]["frames"] == best


def test_a_recipe_may_leave_the_optimizers_out(workspace):
    text = recipes.shipped()["sac_cheetah"].read_text()
    (workspace.folder / "bare.yaml").write_text(text[: text.index("    optimizer:")])
    main(["fit", "--config=bare.yaml", *workspace.options[1:], "--data.total_frames=140"])
    groups = load(workspace.checkpoint())["optimizer_states"][0]["param_groups"]
    assert [group["name"] for group in groups][-1] == "alpha/adam"
