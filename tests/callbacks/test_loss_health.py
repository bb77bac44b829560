"""Loss health: what is measured, and each red flag on a run that was made to show it."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from muon_rl.recipes.muesli import Muesli, MuesliData
from muon_rl.recipes.sac import SAC, SACData
from tensordict import TensorDict
from torch import nn

from muon_rl.agent import Agent
from muon_rl.callbacks import LossHealth, RedFlagError
from muon_rl.callbacks.loss_health import gradient_norms, measure
from muon_rl.callbacks.red_flags import Limits, RedFlags
from muon_rl.cli import main
from muon_rl.envs import DMControl, Gym
from muon_rl.modules import WorldModel

WINDOW, PATIENCE = 3, 5
LIMITS = Limits(window=WINDOW, patience=PATIENCE)
HEALTHY = {
    "term/loss_policy": -0.01, "term/loss_value": 0.3, "term/loss_cmpo": 0.05,
    "gradient_norm/loss_policy": 0.5, "gradient_norm/loss_value": 0.2, "model_ratio": 5.0,
    "entropy_share": 0.5, "explained_variance": 0.7, "cmpo_kl": 0.03, "cmpo_adv_std": 0.4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------ rules


def names_after(*measured: dict[str, float]) -> list[str]:
    """Return the flags after the last of several measurements."""
    flags, found = RedFlags(LIMITS), []
    for changed in measured:
        found = flags.look({**HEALTHY, **changed})
    return [flag.name for flag in found]


def test_a_healthy_run_has_no_flag():
    assert names_after(*[{}] * 20) == []


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"term/loss_value": 0.51}, "term_dominates"),
        ({"term/loss_policy": -3.1}, "term_dominates"),
        ({"model_ratio": 1001.0}, "model_dominates"),
        ({"cmpo_kl": 0.11}, "policy_does_not_follow"),
        ({"cmpo_adv_std": 9e-5}, "actions_alike"),
    ],
)
def test_a_flag_of_what_is_usual_takes_most_of_a_window(changed, name):
    assert names_after({}, {}, changed) == []
    assert names_after({}, changed, changed) == [name]
    assert names_after(changed, changed) == []  # the window is not full


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"entropy_share": 0.81}, "entropy_stays"),
        ({"explained_variance": -0.01}, "value_explains_nothing"),
        ({"cmpo_kl": 0.0}, "nothing_to_follow"),
    ],
)
def test_a_flag_of_what_lasts_takes_patience(changed, name):
    assert names_after(*[changed] * (PATIENCE - 1)) == []
    assert names_after(*[changed] * PATIENCE) == [name]
    assert names_after({}, *[changed] * (PATIENCE - 1)) == []


def test_an_entropy_that_falls_fast_is_flagged_and_one_that_falls_slowly_is_not():
    fast = [0.9, 0.5, 0.3, 0.19]
    assert names_after(*[{"entropy_share": x} for x in fast]) == ["entropy_collapses"]
    slow = [0.9, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.19]
    assert names_after(*[{"entropy_share": x} for x in slow]) == []


def test_a_gradient_that_spikes_is_flagged():
    quiet = {"gradient_norm/loss_value": 0.2}
    assert names_after(quiet, quiet, {"gradient_norm/loss_value": 1.9}) == []
    assert names_after(quiet, quiet, {"gradient_norm/loss_value": 2.1}) == ["gradient_spikes"]


def test_a_flag_tells_its_number_its_limit_and_what_to_try():
    flags = RedFlags(LIMITS)
    for _ in range(WINDOW):
        found = flags.look({**HEALTHY, "term/loss_value": 0.6})
    assert "loss_value is 0.6, 12 times" in found[0].text
    assert "(limit 10)" in found[0].text
    assert "lower its coefficient" in found[0].text


def test_every_flag_says_what_to_try():
    broken = {
        "term/loss_value": 50.0, "model_ratio": 2e3, "cmpo_adv_std": 0.0, "cmpo_kl": 0.0,
        "explained_variance": -1.0, "entropy_share": 0.9,
    }  # fmt: skip
    flags = RedFlags(LIMITS)
    for _ in range(PATIENCE):
        found = flags.look({**HEALTHY, **broken})
    assert len(found) == 6
    for flag in found:
        assert any(
            word in flag.text for word in ("Lower", "lower", "Raise", "raise", "See", "Look")
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"term_ratio": 1.0}, {"spike": 0.0}, {"model_ratio": math.nan}, {"entropy_low": 0.9},
        {"entropy_high": 1.1}, {"cmpo_kl": 0.0}, {"advantage_std": -1.0}, {"window": 0},
        {"patience": 0},
    ],
)  # fmt: skip
def test_a_limit_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=f"limits.{next(iter(wrong))}"):
        Limits(**wrong)


# --------------------------------------------------------------------------------------- measures


class Two(nn.Module):
    """Two terms on a shared trunk, one of which has a head of its own."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.head = nn.Parameter(torch.tensor(10.0))

    def terms(self):
        return {
            "loss_policy": (self.trunk * torch.tensor([1.0, 0.0])).sum(),
            "loss_value": 2 * (self.trunk * torch.tensor([3.0, 4.0])).sum() + 7 * self.head,
        }


def test_gradient_norms_are_those_on_what_is_shared():
    loss = Two()
    norms = gradient_norms(loss, loss.terms())
    assert norms["loss_policy"].item() == 1.0
    assert norms["loss_value"].item() == 10.0  # 2 * |(3, 4)|, without the head's 7
    assert loss.trunk.grad is None
    alone = gradient_norms(loss, {"loss_value": loss.terms()["loss_value"]})
    assert alone["loss_value"].item() == pytest.approx(math.sqrt(149))


def test_measures_of_a_loss():
    loss = Two()
    output = TensorDict(
        {**loss.terms(), "entropy": torch.tensor(0.5), "cmpo_kl": torch.tensor(0.02)}
    )
    found = measure(loss, output, actions=4)
    assert found["term/loss_policy"] == 3.0
    assert found["term/loss_value"] == 120.0
    assert found["ratio/loss_value"] == 40.0
    assert found["entropy"] == 0.5
    assert found["entropy_share"] == pytest.approx(0.5 / math.log(4))
    assert found["cmpo_kl"] == pytest.approx(0.02)
    assert "entropy_share" not in measure(loss, output)


# --------------------------------------------------------------------------------------- real runs


def small(specs) -> WorldModel:
    widths = {key: [16] for key in ("hidden", "dynamics_hidden", "head_hidden")}
    return WorldModel(specs, latent=16, **widths)


class Tracked(Muesli):
    """Keeps what it sends to loggers."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.tracked = []

    def track(self, metrics):
        self.tracked.append((self.frames, dict(metrics)))


def fit(agent: Agent, *callbacks) -> Agent:
    data = MuesliData(
        Gym("CartPole-v1"), total_frames=800, sequence_length=10, batch_size=4, buffer_size=400,
        steps_per_collection=40, updates_per_step=0.05, eval_episodes=1,
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(agent, data)
    return agent


def test_a_healthy_run_is_measured_and_not_warned_of():
    agent = fit(Tracked(Gym("CartPole-v1"), small), LossHealth(True, every_n_updates=4))
    rows = [(f, m) for f, m in agent.tracked if "diag/red_flags" in m]
    assert [frames for frames, _ in rows] == list(range(80, 801, 80))  # 2 updates a collection
    terms = {"policy", "value", "cmpo", "dynamics_reward", "dynamics_returns", "muesli_policy"}
    for _, metrics in rows:
        assert metrics["diag/red_flags"] == 0.0
        for term in terms:
            assert metrics[f"diag/gradient_norm/loss_{term}"] > 0.0
            ratio = abs(metrics[f"diag/term/loss_{term}"] / metrics["diag/term/loss_policy"])
            assert metrics[f"diag/ratio/loss_{term}"] == pytest.approx(ratio, rel=1e-4)
        assert 0.0 < metrics["diag/entropy_share"] <= 1.0
        assert {"diag/explained_variance", "diag/cmpo_kl", "diag/cmpo_tv"} <= set(metrics)


def test_training_is_the_same_with_it_and_without():
    states = []
    for callbacks in ([], [LossHealth(True, every_n_updates=3)]):
        torch.manual_seed(3)
        agent = fit(Muesli(Gym("CartPole-v1"), small), *callbacks)
        assert agent.output is None
        states.append(agent.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def warnings_of(agent: Agent, watch: LossHealth) -> list[str]:
    """Return what a fit warns of; pytest.warns would raise for those of libraries."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(agent, watch)
    return [str(warning.message) for warning in caught]


def test_a_term_that_drowns_the_others_is_warned_of_once():
    agent = Muesli(Gym("CartPole-v1"), small, value_coef=500.0)
    watch = LossHealth(True, every_n_updates=2, limits=Limits(window=3))
    (text,) = [text for text in warnings_of(agent, watch) if "term_dominates" in text]
    assert "loss_value is" in text


def test_a_prior_that_is_the_policy_is_warned_of():
    agent = Muesli(Gym("CartPole-v1"), small, tau=1.0, advantage_clip=1e-9)
    watch = LossHealth(True, every_n_updates=2, limits=Limits(window=3, patience=5))
    assert any("Red flag nothing_to_follow" in text for text in warnings_of(agent, watch))


def test_a_flag_may_stop_the_run():
    agent = Muesli(Gym("CartPole-v1"), small, value_coef=500.0)
    watch = LossHealth(True, every_n_updates=2, stop=True, limits=Limits(window=3))
    with pytest.raises(RedFlagError, match="term_dominates"):
        fit(agent, watch)


def test_losses_of_torchrl_are_watched_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env, tracked = DMControl("cartpole", "swingup", action_repeat=2), []
    monkeypatch.setattr(SAC, "track", lambda self, metrics: tracked.append(metrics))
    data = SACData(env, total_frames=140, init_random_frames=80, batch_size=16, eval_episodes=1)
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False,
        callbacks=[LossHealth(True, every_n_updates=10)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    ).fit(SAC(env), data)  # fmt: skip
    rows = [metrics for metrics in tracked if "diag/red_flags" in metrics]
    assert len(rows) == 3
    assert all(row["diag/ratio/loss_actor"] == pytest.approx(1.0) for row in rows)


def test_the_command_line_turns_it_on(workspace):
    main([
        "fit", "--config=muesli_cartpole", "--data.total_frames=1200", "--data.eval_every=1200",
        "--data.eval_episodes=1", "--loss_health.enabled=true", "--loss_health.every_n_updates=20",
        "--loss_health.limits.window=4", "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    assert [frame for frame, _ in workspace.history("diag/red_flags")] == [400, 800, 1200]


def test_a_flag_that_stops_is_told_in_a_line(workspace, capsys):
    with pytest.raises(SystemExit) as stop:
        main([
            "fit", "--config=muesli_cartpole", "--data.total_frames=1200",
            "--loss_health.enabled=true", "--loss_health.stop=true", "--model.value_coef=1e5",
            "--loss_health.every_n_updates=10", "--loss_health.limits.window=1",
            "--trainer.enable_progress_bar=false",
        ])  # fmt: skip
    assert stop.value.code == 1
    assert "Red flag term_dominates" in capsys.readouterr().err
    (record,) = workspace.records
    assert record.info.status == "FAILED"
