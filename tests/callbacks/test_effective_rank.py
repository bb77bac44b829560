"""The rank of the critics' features: right numbers, right frames, and nothing else is changed."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from muon_rl.recipes.sac import SAC, SACData

import muon_rl
from muon_rl.callbacks import EffectiveRank
from muon_rl.cli import main
from muon_rl.envs import DMControl

CARTPOLE = ("--config=sac_cartpole_swingup", "--data.init_random_frames=100",
            "--data.eval_every=1000", "--data.eval_episodes=1", "--data.batch_size=16",
            "--model.actor.hidden=[16]", "--model.critic.hidden=[16,12]",
            "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=5")  # fmt: skip
KINDS = ("effective_rank", "stable_rank", "dormant_share", "top3_mass")
NAMES = ["repr/q_effective_rank_mean", *(f"repr/q{i}_{kind}" for i in (1, 2) for kind in KINDS)]

STATE = ("state_dict", "optimizer_states", "SACData", "global_step")


def rank(every: int, *options: str) -> list[str]:
    return ["--effective_rank.enabled=true", "--effective_rank.top_k=3",
            f"--effective_rank.every_n_updates={every}", *options]  # fmt: skip


def load(run) -> dict:
    return torch.load(run.checkpoint(), weights_only=True)


def measured(run) -> dict[str, list[tuple[int, float]]]:
    return {name: run.history(name) for name in NAMES}


def leaves(value, place: tuple):
    """Yield what a checkpoint holds, by its place there."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*place, key))
    else:
        yield place, value


@pytest.fixture
def cartpole(workspace):
    workspace.options = CARTPOLE
    return workspace


@pytest.fixture
def elsewhere(cartpole, monkeypatch):
    """A second run's folder, which is worked in from here on."""
    folder = cartpole.folder / "elsewhere"
    folder.mkdir()

    def go() -> type(cartpole):
        monkeypatch.chdir(folder)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow's own, of the first run
        return type(cartpole)(folder, CARTPOLE)

    return go


def by_hand(checkpoint: dict) -> dict[str, float]:
    """Return the metrics on all of a checkpoint's buffer, in numpy."""
    transitions = checkpoint["SACData"]["contents"]["transitions"]
    state = torch.cat([transitions["observation"], transitions["action"]], -1).double().numpy()
    metrics = {}
    for i in range(2):
        hidden = state
        for layer in (0, 2):
            weight, bias = (
                checkpoint["state_dict"][f"loss.qvalue_network_params.module.{layer}.{name}"][i]
                for name in ("weight", "bias")
            )
            hidden = np.maximum(hidden @ weight.double().numpy().T + bias.double().numpy(), 0)
        values = np.linalg.svd(hidden, compute_uv=False)
        shares = values / values.sum()
        entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
        activity = np.abs(hidden).mean(0)
        metrics |= {
            f"repr/q{i + 1}_effective_rank": np.exp(entropy),
            f"repr/q{i + 1}_stable_rank": (hidden**2).sum() / values[0] ** 2,
            f"repr/q{i + 1}_dormant_share": (activity <= 0.025 * activity.mean()).mean(),
            f"repr/q{i + 1}_top3_mass": shares[:3].sum(),
        }
    ranks = [metrics[f"repr/q{i}_effective_rank"] for i in (1, 2)]
    return metrics | {"repr/q_effective_rank_mean": sum(ranks) / 2}


def test_a_fit_tracks_what_the_checkpoint_says_at_the_right_frames(cartpole):
    cartpole.fit("--data.total_frames=140", *rank(5))
    points = measured(cartpole)
    for name in NAMES:  # an update for each 2 frames after 100
        assert [frame for frame, _ in points[name]] == [110, 120, 130, 140], name
    expected = by_hand(load(cartpole))
    assert set(expected) == set(NAMES)
    assert {name: history[-1][1] for name, history in points.items()} == pytest.approx(expected)
    assert expected["repr/q1_effective_rank"] != expected["repr/q2_effective_rank"]
    assert len({value for _, value in points["repr/q1_effective_rank"]}) == 4  # it moves
    # The config is part of the run's, and of the checkpoint, which gives its policy all the same.
    assert cartpole.records[0].data.params["effective_rank.every_n_updates"] == "5"
    config = yaml.safe_load(load(cartpole)["muon_rl"]["config"])
    assert config["effective_rank"]["top_k"] == 3
    assert muon_rl.load_policy(cartpole.checkpoint()).in_keys == ["observation"]


def test_training_is_the_same_bit_by_bit_without_it(cartpole, elsewhere):
    cartpole.fit("--data.total_frames=160")
    assert not any(measured(cartpole).values())  # off unless asked for
    other = elsewhere()
    other.fit("--data.total_frames=160", *rank(1, "--effective_rank.max_samples=20"))
    assert len(other.history(NAMES[0])) == 30
    ours, theirs = (
        {place: leaf for key in STATE for place, leaf in leaves(load(run)[key], (key,))}
        for run in (other, cartpole)
    )
    assert list(ours) == list(theirs)
    differing = [place for place, leaf in ours.items() if not np.array_equal(leaf, theirs[place])]
    assert not differing
    for name in ("train/loss_qvalue", "eval/return"):
        assert other.history(name) == cartpole.history(name)


def test_a_resumed_run_measures_at_the_same_updates_on_the_same_samples(
    cartpole, elsewhere, monkeypatch
):
    options = ("--data.total_frames=160", *rank(4, "--effective_rank.max_samples=20"))
    cartpole.fit(*options)
    other, step = elsewhere(), SAC.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 13:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(SAC, "training_step", interrupted)
        other.fit(*options)
    assert load(other)["global_step"] == 14
    other.fit(*options, "--ckpt_path=last")
    assert [frame for frame, _ in other.history(NAMES[0])] == list(range(108, 161, 8))
    assert measured(other) == measured(cartpole)


class Tracked(Callback):
    """Keeps what is sent to the loggers from the representation's metrics."""

    def __init__(self):
        self.frames: list[int] = []

    def on_fit_start(self, trainer, pl_module):
        def track(metrics):
            if NAMES[0] in metrics:
                self.frames.append(pl_module.frames)

        pl_module.track = track


@pytest.mark.parametrize(
    ("updates_per_step", "accumulate", "every", "frames"),
    [
        (1, 1, 3, [86, 92, 98]),
        (2, 1, 1, [82, 84, 86, 88, 90, 92, 94, 96, 98, 100]),  # the first of a frame's two updates
        (2, 1, 3, [84, 86, 90, 92, 96, 98]),
        (1, 2, 1, [84, 88, 92, 96, 100]),  # an update takes two batches
        (1, 1, None, []),  # not enabled
    ],
)
def test_each_nth_update_is_measured_once_and_a_frame_once(
    updates_per_step, accumulate, every, frames
):
    callback = EffectiveRank(enabled=every is not None, every_n_updates=every or 1)
    env, tracked = DMControl("cartpole", "swingup", action_repeat=2), Tracked()
    data = SACData(
        env, total_frames=100, init_random_frames=80, batch_size=16, eval_episodes=1,
        updates_per_step=updates_per_step,
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[tracked, callback],
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(SAC(env), data)
    assert tracked.frames == frames


def message_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *CARTPOLE, "--data.total_frames=120", *arguments])
    assert stop.value.code == 2
    (text,) = [line for line in capsys.readouterr().err.splitlines() if "Seed" not in line]
    return text


@pytest.mark.parametrize("name", ["every_n_updates", "max_samples", "top_k"])
def test_a_number_below_one_is_refused(name, workspace, capsys):
    text = message_of(capsys, f"--effective_rank.{name}=0")
    assert text.endswith(f"effective_rank.{name} must be at least 1, but is 0.")


def test_a_run_too_short_for_a_measurement_says_so(workspace):
    with pytest.warns(UserWarning, match="made 20 updates, .* rank is measured every 1000: lower"):
        main(["fit", *CARTPOLE, *rank(1000), "--data.total_frames=140"])
    (record,) = workspace.records
    assert not [name for name in record.data.metrics if name.startswith("repr/")]


def test_a_misspelt_key_is_explained(workspace, capsys):
    text = message_of(capsys, "--effective_rank.every_updates=3")
    assert "did you mean every_n_updates?" in text
    text = message_of(capsys, "--efective_rank.enabled=true")
    assert "did you mean effective_rank?" in text


def test_a_loss_without_a_critic_is_refused_before_there_is_a_run(workspace, capsys, monkeypatch):
    monkeypatch.setattr("muon_rl.callbacks.effective_rank.CRITICS", ("none_network", "no_network"))
    text = message_of(capsys, "--effective_rank.enabled=true")
    assert "SACLoss has neither none_network nor no_network with a last layer" in text
    assert not workspace.records
    main(["fit", *CARTPOLE, "--data.total_frames=120"])  # where nothing asks for it
    assert workspace.records[0].info.status == "FINISHED"


def test_the_help_lists_it_with_a_recipes_values(workspace, capsys):
    (workspace.folder / "mine.yaml").write_text("effective_rank: {every_n_updates: 250}\n")
    main(["fit", "--config=sac_cheetah", "--config=mine.yaml", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--effective_rank.enabled whether to measure at all [False]" in text
    assert "from one measurement to the next [250]" in text
