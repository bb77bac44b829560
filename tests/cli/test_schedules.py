"""Real runs with annealed rates and clipped gradients: set, logged, stopped and continued."""

from __future__ import annotations

import signal

import pytest
import torch
import yaml
from muon_rl.recipes.sac import SAC
from torch.optim import SGD, lr_scheduler

from muon_rl.cli import main, recipes

# One update a collection, every one of them logged: at 102 frames the first, 2 frames each.
EACH = (
    "--data.steps_per_collection=1", "--trainer.log_every_n_steps=1", "--data.eval_episodes=1",
    "--data.eval_every=1000", "--model.optimizer.critic.case=adamw",
)  # fmt: skip
INITIAL = {
    "learning_rate": 0.02, "aux_learning_rate": 3e-4, "learning_rate/actor": 0.02,
    "aux_learning_rate/actor": 3e-4, "learning_rate/critic": 3e-4, "learning_rate/alpha": 3e-4,
}  # fmt: skip
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 40}}


def line(updates: range, of: int) -> list[tuple[int, float]]:
    """Return the frames and shares of the initial rate at some updates of a run."""
    return [(102 + 2 * update, 1 - update / of) for update in updates]


def by_hand(make, updates: int, lr: float) -> list[dict]:
    """Return the settings of each step of a torch optimizer under a scheduler."""
    optimizer = SGD([torch.nn.Parameter(torch.ones(()))], lr=lr, momentum=0.95)
    scheduler = make(optimizer)
    groups = []
    for _ in range(updates):
        groups.append(dict(optimizer.param_groups[0]))
        optimizer.step()
        scheduler.step()
    return groups


def stop_at(update: int, monkeypatch, run) -> None:
    """Run until Ctrl-C comes in the middle of an update."""
    step = SAC.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == update:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(SAC, "training_step", interrupted)
        run()


def groups_of(path) -> dict[str, dict]:
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    return {group["name"]: group for group in groups}


def message_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code == 2
    (text,) = [line for line in capsys.readouterr().err.splitlines() if "Seed" not in line]
    return text


def test_annealed_rates_of_a_stopped_and_resumed_run_are_those_of_one_run(workspace, monkeypatch):
    options = (*EACH, "--data.total_frames=180", "--model.anneal_lr=true")
    stop_at(17, monkeypatch, lambda: workspace.fit(*options))
    stopped = groups_of(workspace.checkpoint())
    assert stopped["actor/muon"]["lr"] == 0.02 * (1 - 18 / 40)
    workspace.fit(*options, "--ckpt_path=last")
    for name, lr in INITIAL.items():
        expected = [(frame, lr * share) for frame, share in line(range(40), of=40)]
        assert workspace.history(f"train/{name}") == expected
    ended = groups_of(workspace.checkpoint())
    assert {group["lr"] for group in ended.values()} == {0.0}


def test_a_scheduler_of_torch_goes_on_where_it_was(workspace, monkeypatch):
    """OneCycleLR moves momentum beside the rate, and gives every group one rate."""
    options = (*EACH, "--data.total_frames=180", "--model.anneal_lr=OneCycleLR",
               "--model.anneal_lr.max_lr=0.01", "--model.anneal_lr.total_steps=40")  # fmt: skip
    stop_at(17, monkeypatch, lambda: workspace.fit(*options))
    workspace.fit(*options, "--ckpt_path=last")
    expected = by_hand(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=40), 40, 0.02)
    for metric, key in (
        ("learning_rate", "lr"),
        ("learning_rate/critic", "lr"),
        ("momentum/actor/muon", "momentum"),
    ):
        points = workspace.history(f"train/{metric}")
        assert [value for _, value in points] == [group[key] for group in expected]


def test_a_late_momentum_goes_on_where_it_was(workspace, monkeypatch):
    schedule = "--model.optimizer.actor.momentum_schedule"
    options = (*EACH, "--data.total_frames=180", f"{schedule}.enabled=true",
               f"{schedule}.start_step=5", f"{schedule}.warmup_steps=20")  # fmt: skip
    stop_at(17, monkeypatch, lambda: workspace.fit(*options))
    workspace.fit(*options, "--ckpt_path=last")
    shares = [0.0] * 5 + [k / 20 for k in range(20)] + [1.0] * 15
    for group, momentum in (("actor/muon", 0.95), ("actor/aux", 0.9)):
        values = [value for _, value in workspace.history(f"train/momentum/{group}")]
        assert values == pytest.approx([momentum * share for share in shares])
    assert {value for _, value in workspace.history("train/momentum/critic/adamw")} == {0.9}


def test_a_scheduler_is_named_in_a_file_too(workspace):
    recipe = yaml.safe_load(recipes.shipped()["sac_cheetah"].read_text())
    recipe["model"]["init_args"]["anneal_lr"] = COSINE
    (workspace.folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    main(["fit", "--config=mine.yaml", *workspace.options[1:], *EACH, "--data.total_frames=120"])
    for name, lr in (("learning_rate", 0.02), ("learning_rate/critic", 3e-4)):
        expected = by_hand(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40), 10, lr)
        points = workspace.history(f"train/{name}")
        assert [value for _, value in points] == [group["lr"] for group in expected]


def test_a_finished_run_with_more_frames_follows_the_new_horizon(workspace):
    options = (*EACH, "--model.anneal_lr=true")
    workspace.fit(*options, "--data.total_frames=120")
    workspace.fit(*options, "--data.total_frames=160", "--ckpt_path=last")
    shares = line(range(10), of=10) + line(range(10, 30), of=30)
    for name, lr in INITIAL.items():
        assert workspace.history(f"train/{name}") == [
            (frame, lr * share) for frame, share in shares
        ]


def test_a_resume_with_another_schedule_rate_or_task_is_refused(workspace, capsys):
    options = [*workspace.options, "--model.anneal_lr=true"]
    main(["fit", *options, "--data.total_frames=120", "--data.eval_episodes=1"])
    more = ["--data.total_frames=140", "--ckpt_path=last"]
    text = message_of(capsys, *options, "--model.optimizer.actor.muon.lr=0.01", *more)
    assert "lr of actor/muon is 0.02 in the checkpoint and 0.01 in this config" in text
    text = message_of(capsys, *options, "--model.anneal_lr=false", *more)
    assert "model.anneal_lr is True in the checkpoint and False in this config" in text
    text = message_of(capsys, *options, "--env.action_repeat=1", *more)
    assert "env.action_repeat is 2 in the checkpoint and 1 in this config" in text
    text = message_of(capsys, *options, "--model.gamma=0.9", *more)
    assert "model.gamma is 0.99 in the checkpoint and 0.9 in this config" in text
    (record,) = workspace.records
    assert record.info.status == "FINISHED"


def test_a_constant_rate_is_not_annealed_by_a_resume(trained, workspace, capsys):
    text = message_of(
        capsys, *workspace.options, f"--model.anneal_lr={yaml.safe_dump(COSINE).strip()}",
        "--data.total_frames=500", f"--ckpt_path={trained.checkpoint()}",
    )  # fmt: skip
    assert "model.anneal_lr is False in the checkpoint and {'class_path': 'torch.optim" in text


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        (["--model.max_grad_norm=0.5"], 0.5),
        (["--model.max_grad_norm={actor: 0.5, critic: 10}"], {"actor": 0.5, "critic": 10.0}),
        (["--model.max_grad_norm.critic=10"], {"critic": 10.0}),
    ],
)
def test_bounds_on_gradients_are_set_from_the_command_line(options, bounds, workspace, monkeypatch):
    used = []
    monkeypatch.setattr("muon_rl.agent.clip_gradients", lambda optimizer, norm: used.append(norm))
    workspace.fit("--data.total_frames=120", "--data.eval_episodes=1", *options)
    assert used == [bounds] * 10


def test_the_help_says_what_annealing_and_clipping_do(workspace, capsys):
    main(["fit", "--config=sac_cheetah", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.anneal_lr whether all learning rates fall along a line, to 0" in text
    assert (
        "--model.max_grad_norm bound on the norm of all gradients together, or {critic: 10}" in text
    )
