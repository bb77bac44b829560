"""What bad input gets: a line or two, exit code 2, no stack trace, no MLflow run."""

from __future__ import annotations

import gymnasium
import pytest
import torch
import yaml
from muon_rl.recipes.sac import SACData

from muon_rl.cli import main, recipes

FIT = ["fit", "--config=sac_cheetah"]


def message_of(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    text = "\n".join(line for line in captured.err.splitlines() if "Seed set" not in line).strip()
    assert text.startswith("muon-rl: ")
    assert len(text.splitlines()) <= 2
    assert "Traceback" not in text
    assert "NoneType" not in text
    return text


def lacking():
    """Make an environment as Gymnasium does without what it depends on."""
    raise gymnasium.error.DependencyNotInstalled("lacking is not there: pip install lacking")


gymnasium.register("Lacking-v0", lacking)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--trainer.max_epoch=1"], ["'trainer.max_epoch'", "max_epochs"]),
        (["--modell.gamma=1"], ["'modell.gamma'", "did you mean model?", "env, data, model"]),
        (["--model.gama=1"], ["'model.gama'", "did you mean gamma?", "num_critics"]),
        (["--data.totl_frames=1"], ["'data.totl_frames'", "did you mean total_frames?"]),
        (
            ["--model.optimizer.critc.case=adam"],
            ["'model.optimizer.critc.case'", "did you mean critic?", "actor, critic, alpha"],
        ),
        (["--model.optimzer.critic.case=adam"], ["model.optimzer.critic.case'", "mean optimizer?"]),
        (["--data.optimizer.critic.case=adamw"], ["'data.optimizer.critic.case'", "SACData takes"]),
        (["--model.optimizer.critic.muon.lrr=1"], ["critic.muon.lrr'", "did you mean lr?"]),
        (["--model.optimizer.critic.case=sgd"], ["critic.case", "muon or adamw or adam", "'sgd'"]),
        (["--model.optimizer.critic.lr=high"], ["critic.lr must be float", "'high'"]),
        (["--model.optimizer.actor.muon.momentum=1.5"], ["momentum", "[0, 1)", "1.5", "actor"]),
        (["--model.optimizer.critic.cas=adam"], ["critic.cas'", "did you mean case?"]),
        (
            ["--env.id=Pendulum-v1"],
            ["no key 'env.id': DMControl takes domain, task, action_repeat"],
        ),
        (["--model.actor.hiden=[3]"], ["hiden'", "did you mean hidden?"]),
        (["--model.actor.hidden=[]"], ["no matrix", "'actor'", "actor.case to adamw or adam"]),
        (["--model=SAK"], ["'SAK'", "model", "did you mean SAC?"]),
        (["--env=DMControll"], ["'DMControll'", "did you mean DMControl?"]),
        (["--env.domain=cheeta"], ["cheeta-run", "did you mean cheetah-run?"]),
        (["--env=Gym", "--env.id=Foo-v3"], ["'Foo-v3'", "doesn't exist"]),
        (["--env=Gym", "--env.id=Lacking-v0"], ["Lacking-v0 needs", "pip install lacking"]),
        (["--env=Gym", "--env.id=CartPole-v1"], ["bounded vector as action", "Categorical"]),
        (["--data.batch_size=100000"], ["batch_size is 100000", "init_random_frames=10000"]),
        (["--data.total_frames=-1"], ["data.total_frames must be at least 1", "-1"]),
        (["--matmul_precision=low"], ["matmul_precision", "highest or high or medium", "'low'"]),
        (["--seed_everything=foo"], ["seed_everything must be bool or int", "'foo'"]),
        (["--ckpt_path=none.ckpt"], ["no checkpoint none.ckpt"]),
        (["--ckpt_path=last"], ["no last checkpoint", "checkpoints/sac_cheetah_muon_muon/seed_0"]),
        (["--checkpoint.mode=up"], ["checkpoint.mode must be max or min", "'up'"]),
        (["--checkpoint.monitor=x"], ["checkpoint.monitor must be eval/return", "'x'"]),
        (["--seed_everything=-3"], ["seed_everything must be from 0", "-3"]),
        (["--seed_everything=false"], ["seed_everything must be from 0", "False"]),
        (["--method_name=../x"], ["method_name", "no slash", "'../x'"]),
        (["--model.num_critics=1"], ["model.num_critics must be at least 2"]),
        (["--config=sac_cheeta"], ["sac_cheeta", "did you mean sac_cheetah?"]),
        (["--model.anneal_lr=CosineAnnealingLR"], ["model.anneal_lr.T_max must be given"]),
        (["--model.anneal_lr=CosineAnealingLR"], ["did you mean CosineAnnealingLR?"]),
        (["--model.anneal_lr=0.5"], ["'0.5'", "anneal_lr", "true, false or a scheduler", "StepLR"]),
        (
            ["--model.anneal_lr=StepLR", "--model.anneal_lr.step_size=ten"],
            ["model.anneal_lr.step_size must be int", "'ten'"],
        ),
        (
            ["--model.anneal_lr=StepLR", "--model.anneal_lr.step_size=0"],
            ["model.anneal_lr makes no scheduler that works", "zero"],
        ),
        (["--model.anneal_lr=ReduceLROnPlateau"], ["anneal_lr: Multiple subclasses with name"]),
        (
            ["--model.anneal_lr=torch.optim.lr_scheduler.ReduceLROnPlateau"],
            ["model.anneal_lr must be true, false", "no metric", "ReduceLROnPlateau"],
        ),
        (
            [
                "--model.anneal_lr=OneCycleLR",
                "--model.anneal_lr.max_lr=0.1",
                "--model.anneal_lr.total_steps=9",
            ],
            ["total_steps=9", "run makes 495000 updates"],
        ),
        (["--policy_average=0.1"], ["policy_average has keys", "--policy_average.KEY", "'0.1'"]),
        (
            ["--model.optimizer.critic=adamw"],
            ["model.optimizer.critic has keys", "--model.optimizer.critic.KEY", "'adamw'"],
        ),
        (["--env=nothing"], ["'nothing' for env: muon_rl has Arena, DMControl", "Snake. Others"]),
        (["--trainer.precision=64-true"], ["trainer.precision must be 32-true", "'64-true'"]),
        (["--trainer.precision=64"], ["trainer.precision must be 32-true", "'64'"]),
        (["--trainer.precision=bf16-true"], ["or 16-mixed", "'bf16-true'"]),
        (["--trainer.strategy=ddp_spawn"], ["trainer.strategy", "'ddp_spawn'", "ddp does"]),
        (["--model.max_grad_norm=0"], ["model.max_grad_norm", "above 0", "0.0"]),
        (["--model.max_grad_norm.critc=1"], ["model.max_grad_norm", "'critc'", "actor, critic"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "--" in value[0] else "",
)
def test_a_mistake_on_the_command_line(options, parts, capsys, workspace):
    text = message_of(capsys, FIT + options)
    for part in parts:
        assert part in text
    assert not (workspace.folder / "checkpoints").exists()
    assert not workspace.records


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("total_frames", "totl_frames", ["'data.totl_frames'", "total_frames"]),
        ("critic: {case: muon}", "critc: {case: muon}", ["critc", "did you mean critic?"]),
        ("critic: {case: muon}", "critic: {case: mun}", ["critic.case", "'mun'", "adamw"]),
        ("class_path: SAC\n", "class_path: SAK\n", ["'SAK'", "SAC"]),
        ("domain:", "domian:", ["'env.domian'", "did you mean domain?"]),
        ("1_000_000", "many", ["data.total_frames must be int", "'many'"]),
        ("env:", "envv:", ["envv", "did you mean env?"]),
        ("env:", "loss_health: false\nenv:", ["loss_health must have", "loss_health.enabled"]),
        ("env:", "policy_average: 0.9\nenv:", ["policy_average must have", "but is 0.9"]),
    ],
)
def test_a_mistake_in_a_file(old, new, parts, capsys, workspace):
    text = recipes.shipped()["sac_cheetah"].read_text()
    assert old in text
    (workspace.folder / "mine.yaml").write_text(text.replace(old, new, 1))
    shown = message_of(capsys, ["fit", "--config=mine.yaml"])
    for part in parts:
        assert part in shown


def test_without_a_recipe_the_missing_part_is_named(capsys, workspace):
    assert "missing: name a recipe" in message_of(capsys, ["fit"])


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fitt"])
    assert stop.value.code == 2
    assert "did you mean fit?" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_names_the_tensor(trained, workspace, capsys):
    text = message_of(
        capsys,
        ["fit", *workspace.options, "--model.actor.hidden=[64,32]", "--data.total_frames=500",
         f"--ckpt_path={trained.checkpoint()}"],
    )  # fmt: skip
    assert "actor_network_params" in text
    assert "(32, 17) in the checkpoint and (64, 17) in the model" in text


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("critic.case=adam", ["critic/muon", "critic/adam"]),
        ("actor.muon.lr=0.01", ["lr of actor/muon is 0.02 in the checkpoint and 0.01 in this"]),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(option, parts, trained, workspace, capsys):
    text = message_of(
        capsys,
        ["fit", *workspace.options, f"--model.optimizer.{option}",
         "--data.total_frames=500", f"--ckpt_path={trained.checkpoint()}"],
    )  # fmt: skip
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("buffer_size=150", "holds 200 transitions, but data.buffer_size is 150"),
        ("n_steps=3", "another data.n_steps than 3"),
    ],
)
def test_contents_that_do_not_fit_are_refused_before_a_run_exists(
    option, part, trained, workspace, capsys
):
    text = message_of(
        capsys,
        ["fit", *workspace.options, f"--data.{option}", "--data.total_frames=500",
         f"--ckpt_path={trained.checkpoint()}"],
    )  # fmt: skip
    assert part in text
    assert not (workspace.folder / "checkpoints").exists()


def test_a_run_that_breaks_while_it_is_restored_keeps_the_checkpoint(workspace, monkeypatch):
    workspace.fit("--data.total_frames=150")
    before = workspace.checkpoint().read_bytes()

    def broken(self, contents):
        raise RuntimeError("half restored")

    with monkeypatch.context() as patch:
        patch.setattr(SACData, "load_contents", broken)
        with pytest.raises(RuntimeError, match="half restored"):
            workspace.fit("--data.total_frames=200", "--ckpt_path=last")
    assert workspace.checkpoint().read_bytes() == before
    workspace.fit("--data.total_frames=200", "--ckpt_path=last")


def test_a_finished_run_needs_more_frames(trained, workspace, capsys):
    text = message_of(
        capsys,
        [
            "fit",
            *workspace.options,
            "--data.total_frames=400",
            f"--ckpt_path={trained.checkpoint()}",
        ],
    )
    assert "all of its 400 frames" in text
    assert "raise --data.total_frames" in text


def test_a_broken_checkpoint_is_told(workspace, capsys):
    (workspace.folder / "broken.ckpt").write_bytes(b"\x00" * 100)
    assert "cannot be read" in message_of(capsys, [*FIT, "--ckpt_path=broken.ckpt"])


def test_a_real_bug_keeps_its_stack_trace(workspace, monkeypatch):
    def broken(self):
        return torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr("muon_rl.agent.Agent.build_optimizer", broken)
    with pytest.raises(RuntimeError, match="size"):
        main(FIT)


def test_a_run_that_breaks_is_failed(workspace, monkeypatch):
    def broken(self):
        raise RuntimeError("the simulator broke")

    monkeypatch.setattr(SACData, "is_up_to_date", property(broken))
    with pytest.raises(RuntimeError, match="simulator broke"):
        workspace.fit("--data.total_frames=200")
    assert [record.info.status for record in workspace.records] == ["FAILED"]


def test_a_loss_that_is_not_finite_fails_the_run_and_keeps_the_last_checkpoint(
    workspace, monkeypatch
):
    from muon_rl.recipes.sac import SAC

    step = SAC.training_step

    def poisoned(self, batch, batch_idx):
        if self.frames > 250:
            batch["next", "reward"].fill_(float("nan"))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SAC, "training_step", poisoned)
    with pytest.raises(FloatingPointError, match="is not finite"):
        workspace.fit("--data.total_frames=400")
    (record,) = workspace.records
    assert record.info.status == "FAILED"
    saved = torch.load(workspace.checkpoint(), weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_a_full_disk_fails_the_run_and_keeps_the_checkpoint_that_was_there(
    workspace, monkeypatch, capsys
):
    import lightning.fabric.plugins.io.torch_io as io

    save = io._atomic_save

    def full(checkpoint, path):
        if checkpoint["muon_rl"]["frames"] > 200:
            raise OSError(28, "No space left on device")
        save(checkpoint, path)

    monkeypatch.setattr(io, "_atomic_save", full)
    with pytest.raises(OSError, match="No space left"):
        workspace.fit("--data.total_frames=400")
    assert [record.info.status for record in workspace.records] == ["FAILED"]
    assert torch.load(workspace.checkpoint(), weights_only=True)["muon_rl"]["frames"] == 200
    assert "could not be saved" in capsys.readouterr().err


def test_the_default_of_every_top_key_is_in_the_dumped_config(trained):
    config = yaml.safe_load(
        torch.load(trained.checkpoint(), weights_only=True)["muon_rl"]["config"]
    )
    assert {"env", "data", "model", "trainer", "checkpoint", "method_name", "seed_everything",
            "matmul_precision"} <= set(config)  # fmt: skip
