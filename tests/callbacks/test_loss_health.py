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
        ({"cmpo_kl": 1e-9}, "nothing_to_follow"),
    ],
)
def test_a_flag_of_what_lasts_takes_patience(changed, name):
    assert names_after(*[changed] * (PATIENCE - 1)) == []
    assert names_after(*[changed] * PATIENCE) == [name]
    assert names_after({}, *[changed] * (PATIENCE - 1)) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"term/loss_value": 0.5},  # ten times 0.05
        {"model_ratio": 1000.0},
        {"entropy_share": 0.8},
        {"explained_variance": 0.0},
        {"cmpo_kl": 0.1},
        {"cmpo_kl": 1.1e-9},
        {"cmpo_adv_std": 1e-4},
    ],
)
def test_at_its_limit_a_number_is_healthy(changed):
    assert names_after(*[changed] * 2 * PATIENCE) == []


def test_terms_of_either_sign_count_by_their_size():
    # A policy's term that changes its sign: the median of its values is 0, of its sizes 0.2.
    flags = RedFlags(Limits(window=4))
    for sign in (-1, 1, -1, 1, -1, 1):
        found = flags.look({"term/loss_policy": sign * 0.2, "term/loss_value": 1.0})
        assert found == []
    for sign in (-1, 1, -1, 1):
        found = flags.look({"term/loss_policy": sign * 11.0, "term/loss_value": 1.0})
    assert [flag.name for flag in found] == ["term_dominates"]
    assert "loss_policy is 11, 11 times" in found[0].text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["term/loss_value", "gradient_norm/loss_policy"])
def test_a_number_that_is_not_finite_is_flagged_at_once(name, value):
    flags = RedFlags(LIMITS)
    for _ in range(PATIENCE):
        assert flags.look(HEALTHY) == []
    first, *others = flags.look({**HEALTHY, name: value})
    assert first.name == "not_finite"
    assert f"{name} is {value} (limit: any finite number)" in first.text
    # Only an infinite gradient is a spike as well.
    spiked = name.startswith("gradient") and value == math.inf
    assert [flag.name for flag in others] == ["gradient_spikes"] * spiked
    for _ in range(PATIENCE):
        assert flags.look(HEALTHY) == []


def test_what_is_no_number_leaves_medians_as_they_are():
    for broken in HEALTHY:
        found = names_after({}, {}, *[{broken: math.nan}, {}] * PATIENCE)
        assert found == []


def test_a_term_that_is_switched_off_is_forgotten():
    flags = RedFlags(LIMITS)
    for _ in range(WINDOW):
        found = flags.look({**HEALTHY, "term/loss_q": 50.0})
    assert [flag.name for flag in found] == ["term_dominates"]
    assert flags.look(HEALTHY) == []
    assert flags.look({**HEALTHY, "term/loss_q": 50.0}) == []  # its window begins anew


def test_an_entropy_that_falls_fast_is_flagged_and_one_that_falls_slowly_is_not():
    fast = [0.9, 0.5, 0.3, 0.19]
    assert names_after(*[{"entropy_share": x} for x in fast]) == ["entropy_collapses"]
    for other in (
        [0.9, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.19],  # slowly
        [0.9, 0.5, 0.3, 0.2],  # to the limit
        [0.49, 0.19],  # from less than a half
        [0.5, 0.4, 0.3, 0.25, 0.19],  # in four measurements
    ):
        assert names_after(*[{"entropy_share": x} for x in other]) == []
    assert names_after(*[{"entropy_share": x} for x in (0.5, 0.19)]) == ["entropy_collapses"]


def test_a_gradient_that_spikes_is_flagged():
    quiet = {"gradient_norm/loss_value": 0.2}
    assert names_after(quiet, quiet, {"gradient_norm/loss_value": 2.0}) == []
    assert names_after(quiet, quiet, {"gradient_norm/loss_value": 2.1}) == ["gradient_spikes"]


def test_a_flag_tells_its_number_its_limit_and_what_to_try():
    flags = RedFlags(LIMITS)
    for _ in range(WINDOW):
        found = flags.look({**HEALTHY, "term/loss_value": 0.6})
    assert "loss_value is 0.6, 12 times" in found[0].text
    assert "(limit 10)" in found[0].text
    assert "lower its coefficient" in found[0].text


def test_every_flag_tells_its_number_its_limit_and_what_to_try():
    lasting = {
        "term/loss_value": 50.0, "model_ratio": 2e3, "cmpo_adv_std": 2e-5, "cmpo_kl": 1e-11,
        "explained_variance": -0.003, "entropy_share": 0.9,
    }  # fmt: skip
    flags = RedFlags(LIMITS)
    for _ in range(PATIENCE):
        found = flags.look({**HEALTHY, **lasting})
    last = {"term/loss_value": math.inf, "gradient_norm/loss_value": 40.0, "entropy_share": 0.11}
    found += flags.look({**HEALTHY, **last, "cmpo_kl": 0.7})
    for _ in range(WINDOW):
        found += flags.look({**HEALTHY, "cmpo_kl": 0.7})
    texts = {flag.name: flag.text for flag in found}
    told = {
        "term_dominates": ("50, 1e+03 times", "limit 10)", "lower its coefficient"),
        "model_dominates": ("2e+03 times", "limit 1000,", "Lower policy_pred_coef"),
        "entropy_collapses": ("0.11", "limit 0.2, coming from 0.5", "slower prior (tau=0.01)"),
        "entropy_stays": ("above 0.90", "limit 0.8)", "raise the rate"),
        "value_explains_nothing": ("-0.003", "limit 0,", "Raise the critic's rate"),
        "gradient_spikes": ("norm 40, 200 times", "limit 10)", "Clip gradients"),
        "policy_does_not_follow": ("0.7 nats", "limit 0.1,", "Raise kl_coef"),
        "nothing_to_follow": ("1e-11 nats", "limit 1e-09)", "See that SoftUpdate steps"),
        "actions_alike": ("2e-05", "limit 0.0001)", "Look at the explained variance"),
        "not_finite": ("inf", "limit: any finite", "Lower the rate"),
    }
    assert set(texts) == set(told)
    for name, words in told.items():
        assert all(word in texts[name] for word in words), texts[name]


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
    # It is saved, and goes no further while the flag stands.
    saved = torch.load(workspace.checkpoint(), weights_only=True)
    assert saved["MuesliData"]["frames"] == 200


def test_a_resumed_run_is_judged_by_all_of_it_and_warned_once(workspace):
    watched = (
        "fit", "--config=muesli_cartpole", "--loss_health.enabled=true", "--model.value_coef=1e5",
        "--loss_health.every_n_updates=10", "--loss_health.limits.window=2",
        "--trainer.enable_progress_bar=false", "--data.eval_every=1000", "--data.eval_episodes=1",
    )  # fmt: skip

    def flagged(*options: str) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            main([*watched, *options])
        texts = [str(warning.message) for warning in caught]
        return [text for text in texts if "Red flag term_dominates" in text]

    assert flagged("--data.total_frames=200") == []
    assert len(flagged("--data.total_frames=400", "--ckpt_path=last")) == 1
    assert flagged("--data.total_frames=600", "--ckpt_path=last") == []
    points = {}
    for record in workspace.records:
        for point in workspace.client.get_metric_history(record.info.run_id, "diag/red_flags"):
            points[point.step] = point.value
    # After 400 frames the second measurement fills the window that the first run began.
    assert points == {200: 0.0, 400: 1.0, 600: 1.0}
