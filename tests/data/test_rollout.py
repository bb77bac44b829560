"""Rollouts: targets by hand, every transition once an epoch, the resume, the rates applied."""

from __future__ import annotations

import csv
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from on_policy import GAMMA, LMBDA, VectorPPO, VectorPPOData, make
from torchrl.objectives import ValueEstimators
from walk import register

from muon_rl.envs import DMControl, EnvFactory, Gym, Snake
from muon_rl.envs.several import _Serial

CARTPOLE = DMControl("cartpole", "swingup", action_repeat=2)
KEPT = {
    "observation", "action", "action_log_prob", "state_value", "advantage", "value_target",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Script(gymnasium.Env):
    """Episodes of two steps, then three, and so on, that terminate and are truncated in turn."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = -1 if seed is not None else self.episode + 1
        self.count = 0
        return self._observation(), {}

    def step(self, action):
        self.count += 1
        ended, odd = self.count == 2 + self.episode, bool(self.episode % 2)
        return self._observation(), 1.0, ended and not odd, ended and odd, {}

    def _observation(self):
        return np.array([10 * self.episode + self.count], np.float32)


gymnasium.register("Script-v0", entry_point=Script)


def rollout_of(data: VectorPPOData) -> tuple:
    """Return the first rollout as it was collected, and as it is served, in its order."""
    raw = []
    collect = data.collect

    def recorded():
        raw.append(collect().clone())
        return raw[-1].clone()

    data.collect = recorded
    next(iter(data.train_dataloader()))
    return raw[0], data._rollout


# ---------------------------------------------------------------------------------------- targets


def test_targets_are_those_computed_by_hand():
    env = Gym("Script-v0")
    agent = VectorPPO(env, gamma=0.5, lmbda=0.5)
    critic = agent.policy.module[0].module
    for parameter in critic.parameters():
        parameter.data.zero_()
    critic[0].weight.data[0, 0] = critic[2].weight.data[0, 0] = 1.0  # V(s) = s
    raw, served = rollout_of(make(env, agent, steps_per_rollout=7, minibatches=1))
    assert raw["observation"].flatten().tolist() == [0, 1, 10, 11, 12, 20, 21]
    assert raw["next", "observation"].flatten().tolist() == [1, 2, 11, 12, 13, 21, 22]
    assert raw["next", "terminated"].flatten().tolist() == [False, True, *[False] * 5]
    assert raw["next", "truncated"].flatten().tolist() == [*[False] * 4, True, False, False]
    # delta = 1 + V(s') / 2 - V(s), without V(s') at the termination; A = delta + A' / 4
    expected = [1.5, 0.0, -4.78125, -5.125, -4.5, -10.75, -9.0]
    assert served["advantage"].flatten().tolist() == expected
    targets = [1.5, 1.0, 5.21875, 5.875, 7.5, 9.25, 12.0]
    assert served["value_target"].flatten().tolist() == targets


@pytest.mark.parametrize("num_envs", [1, 3])
def test_targets_are_torchrl_s_with_a_pass_over_every_state(num_envs):
    env = Gym(register())
    data = make(env, steps_per_rollout=240, num_envs=num_envs)
    raw, served = rollout_of(data)
    ends = raw["next"]
    assert ends["terminated"].any() and (ends["truncated"] & ~ends["terminated"]).any()
    estimator = data.trainer.lightning_module.loss.value_estimator
    assert (estimator.gamma.item(), estimator.lmbda.item()) == pytest.approx((GAMMA, LMBDA))
    with torch.no_grad():
        expected = estimator(raw.exclude("state_value", ("next", "state_value"))).reshape(-1)
    for key in ("advantage", "value_target", "state_value", "observation", "action"):
        torch.testing.assert_close(served[key], expected[key])
    assert set(served.keys(True, True)) == KEPT


def test_advantages_have_mean_0_and_deviation_1_over_a_rollout_if_the_loss_says_so():
    env = Gym(register())
    agent = VectorPPO(env)
    agent.loss.make_value_estimator(ValueEstimators.GAE, gamma=GAMMA, lmbda=LMBDA, average_gae=True)
    advantage = rollout_of(make(env, agent))[1]["advantage"]
    assert advantage.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantage.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "trunk"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_values_of_the_rollout_are_used_again(num_envs, shared):
    env = Gym(register())
    data = make(env, VectorPPO(env, shared=shared), steps_per_rollout=60, num_envs=num_envs)
    first, rows = data.trainer.lightning_module.policy.module[0], []
    first.module.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0][..., 0].numel()))
    raw, served = rollout_of(data)
    ends = raw["next", "done"].clone()
    ends[..., -1, :] = True
    further = (ends & ~raw["next", "terminated"]).sum().item()
    assert num_envs <= further < 20
    assert rows[:-1] == [num_envs] * (60 // num_envs)
    assert rows[-1] == further
    assert not served.requires_grad and set(served.keys(True, True)) == KEPT


def test_no_action_is_drawn_for_the_values_at_the_ends():
    env = Gym("Script-v0")
    data = make(env, steps_per_rollout=6, minibatches=1)
    rollout, state = data.collect(), torch.get_rng_state()
    assert (rollout["next", "truncated"]).any()
    keys = set(rollout.keys(True, True))
    data._prepared(rollout)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(rollout.keys(True, True)) == keys  # the collector's own, left as it is


def test_targets_have_the_keys_that_the_loss_reads():
    agent = VectorPPO(CARTPOLE)
    agent.loss.set_keys(advantage="gain", value_target="goal")
    served = rollout_of(make(CARTPOLE, agent))[1]
    expected = KEPT - {"advantage", "value_target"} | {"gain", "goal"}
    assert set(served.keys(True, True)) == expected


def test_a_rollout_that_ends_terminated_needs_no_further_pass():
    data = make(Gym("Script-v0"), steps_per_rollout=2, minibatches=1)
    raw, served = rollout_of(data)
    assert raw["next", "terminated"].flatten().tolist() == [False, True]
    torch.testing.assert_close(served["value_target"][1], torch.ones(1))


# ---------------------------------------------------------------------------------------- serving


@pytest.mark.parametrize(("minibatches", "sizes"), [(1, {40}), (4, {10}), (7, {5, 6}), (40, {1})])
def test_every_transition_is_served_once_an_epoch_in_a_new_order(minibatches, sizes):
    data = make(Gym(register()), epochs=3, minibatches=minibatches)
    stream = data.train_dataloader()
    assert len(stream) == 5 * 3 * minibatches == data.total_updates
    assert data.updates_per_rate == 3 * minibatches
    seen = [(data.frames, batch.clone()) for batch in stream]
    assert len(seen) == len(stream) and {len(batch) for _, batch in seen} == sizes
    orders = []
    for epoch in range(15):
        part = seen[epoch * minibatches : (epoch + 1) * minibatches]
        assert {frames for frames, _ in part} == {40 * (1 + epoch // 3)}
        served = torch.cat([batch for _, batch in part])
        place = served["observation"][:, 1]  # tells each step apart
        orders.append(place)
        assert place.unique().numel() == 40
    for rollout in range(5):
        first, second, third = orders[3 * rollout : 3 * rollout + 3]
        assert torch.equal(first.sort()[0], second.sort()[0])
        assert torch.equal(first.sort()[0], third.sort()[0])
        assert not torch.equal(first, second) and not torch.equal(second, third)
        assert not torch.equal(first, first.sort()[0])
    assert not set(orders[0].tolist()) & set(orders[3].tolist())


def test_frames_are_rounded_up_to_whole_rollouts_and_evaluated_after_their_updates():
    data = make(CARTPOLE, total_frames=170, eval_every=80, epochs=2, minibatches=3)
    due = []
    for _ in data.train_dataloader():
        if data.evaluation_due:
            due.append((data.frames, data.updates))
            data.evaluated_frames = data.frames
    assert data.total_updates == data.updates == 18
    assert due == [(80, 6), (160, 12), (240, 18)]


def test_rollouts_are_whole_steps_of_all_environments():
    data = make(Gym(register()), num_envs=3, steps_per_rollout=40)
    raw, served = rollout_of(data)
    assert raw.shape == (3, 14) and served.shape == (42,) and data.frames == 42


def test_rollouts_are_whole_steps_of_games_that_step_together():
    data = VectorPPOData(Snake(6, 6, num_envs=10), total_frames=200, steps_per_rollout=64)
    assert data.steps_per_rollout == 70
    assert data.total_updates == 3 * data.updates_per_rate


class Three(Gym):
    """Three worlds as one environment."""

    def build(self):
        return _Serial(3, super().build)


def test_an_environment_with_a_batch_of_its_own_has_rollouts_of_whole_steps():
    agent = VectorPPO(Gym(register()))
    _, served = rollout_of(make(Three(register()), agent, steps_per_rollout=42))
    assert served.shape == (42,)
    with pytest.raises(ValueError, match=r"has 42 steps, but .* is 40: .* which are 3\."):
        rollout_of(make(Three(register()), agent, steps_per_rollout=40))


def test_games_that_step_together_are_told_how_to_be_more():
    with pytest.raises(ValueError, match=r"data\.num_envs is 2, .* Snake .* set env\.num_envs"):
        VectorPPOData(Snake(6, 6, num_envs=4), total_frames=200, num_envs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_rollout": 0}, "data.steps_per_rollout must be at least 1, but is 0"),
        ({"epochs": 0}, "data.epochs must be at least 1, but is 0"),
        ({"minibatches": 0}, "data.minibatches must be at least 1, but is 0"),
        ({"minibatches": 41}, "minibatches is 41, but .* gives only 40 transitions"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(CARTPOLE, **options)


def test_a_policy_without_values_and_a_loss_without_gae_are_refused():
    agent = VectorPPO(CARTPOLE)
    agent.loss.make_value_estimator("td0", gamma=0.9)
    with pytest.raises(ValueError, match="is GAE, but ClipPPOLoss's is TD0Estimator"):
        next(iter(make(CARTPOLE, agent).train_dataloader()))
    agent = VectorPPO(CARTPOLE)
    agent.policy = agent.policy[1:]
    with pytest.raises(ValueError, match=r"that writes 'state_value' .* \['action', "):
        next(iter(make(CARTPOLE, agent).train_dataloader()))


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("num_envs", "updates"), [(1, 1), (1, 4), (1, 8), (2, 5), (2, 11)])
def test_a_resumed_stream_goes_on_in_the_middle_of_a_rollout(num_envs, updates, tmp_path):
    options = {"num_envs": num_envs, "epochs": 2, "minibatches": 4}  # 8 updates a rollout
    data = make(CARTPOLE, **options)
    stream = iter(data.train_dataloader())
    for _ in range(updates):
        next(stream)
    torch.save(data.state_dict(), tmp_path / "data.pt")
    expected = [batch.clone() for batch in stream]

    torch.manual_seed(1)
    resumed = make(CARTPOLE, **options)
    resumed.trainer.lightning_module.load_state_dict(data.trainer.lightning_module.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "data.pt", weights_only=True))
    rest = resumed.train_dataloader()
    assert len(rest) == len(expected) == 24 - updates
    for batch, other in zip(rest, expected, strict=True):
        assert (batch == other).all()


def test_episodes_that_ended_before_a_checkpoint_are_told_after_it():
    data, resumed = (make(Gym(register())) for _ in range(2))
    next(iter(data.train_dataloader()))
    resumed.load_state_dict(data.state_dict())
    metrics = data.take_episode_metrics()
    assert metrics["train/episode_length"] > 0
    assert resumed.take_episode_metrics() == metrics


def test_a_checkpoint_between_rollouts_holds_none():
    data = make(CARTPOLE, epochs=1, minibatches=2)
    stream = iter(data.train_dataloader())
    next(stream)
    assert set(data.state_dict()["contents"]) == {"sizes", "rollout", "order"}
    next(stream)
    assert set(data.state_dict()["contents"]) == {"sizes"}


@pytest.mark.parametrize("option", [{"epochs": 3}, {"minibatches": 5}, {"steps_per_rollout": 50}])
def test_a_checkpoint_of_rollouts_of_other_sizes_is_refused(option):
    data = make(CARTPOLE)
    next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match="set it as it was, or begin a fresh run"):
        make(CARTPOLE, **option).load_state_dict(data.state_dict())


# ---------------------------------------------------------------------------------- under Lightning


class Rates(Callback):
    """Keeps the rates of all groups as each optimizer step applies them."""

    def __init__(self):
        self.applied: list[dict[str, float]] = []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_pre_hook(self._read)

    def _read(self, optimizer, args, kwargs):
        self.applied.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def fit(
    agent: VectorPPO, env: EnvFactory, *callbacks: Callback, ckpt_path=None, logger=False
) -> VectorPPOData:
    data = VectorPPOData(
        env, total_frames=120 * env.action_repeat, steps_per_rollout=40, epochs=2, minibatches=4,
        eval_episodes=1, eval_every=10_000,
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(agent, data, ckpt_path=ckpt_path)
    return data


def metrics_of(path: Path) -> list[dict[str, str]]:
    """Return the training metrics of each rollout, without those that a clock gives."""
    clocks = {"train/frames_per_second", "train/optimizer_share"}
    with path.open() as file:
        rows = [
            {name: row[name] for name in sorted(row) if row[name] and name not in clocks}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if "train/loss_objective" in row]


@pytest.mark.parametrize("anneal", [True, False], ids=["annealed", "constant"])
@pytest.mark.parametrize("case", ["muon", "adam"])
def test_the_rate_applied_is_that_of_the_rollout(case, anneal):
    rates = Rates()
    env = Gym(register())
    agent = VectorPPO(env, case=case, anneal_lr=anneal)
    first = {group["name"]: group["lr"] for group in agent.build_optimizer().param_groups}
    assert len(set(first.values())) == (3 if case == "muon" else 2)
    data = fit(agent, env, rates)
    per_rollout, rollouts = 8, 3
    assert len(rates.applied) == data.updates == per_rollout * rollouts
    for step, applied in enumerate(rates.applied):
        share = max(0.0, 1 - (step // per_rollout) / rollouts) if anneal else 1.0
        assert applied == pytest.approx({name: lr * share for name, lr in first.items()})


def test_a_resumed_run_ends_as_the_whole_one_bit_by_bit(tmp_path):
    whole, rates = VectorPPO(CARTPOLE, shared=True, anneal_lr=True), Rates()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    fit(whole, CARTPOLE, saved, rates, logger=CSVLogger(tmp_path, "whole", ""))
    changed = [n for n, value in whole.state_dict().items() if not torch.equal(value, before[n])]
    assert len(changed) >= 8
    torch.manual_seed(1)
    again, later = VectorPPO(CARTPOLE, shared=True, anneal_lr=True), Rates()
    within_the_second_rollout = str(tmp_path / "step=10.ckpt")
    logger = CSVLogger(tmp_path, "again", "")
    fit(again, CARTPOLE, later, ckpt_path=within_the_second_rollout, logger=logger)
    assert later.applied == rates.applied[10:]
    # Means over all of the second rollout's updates, those before the checkpoint too.
    rows = {name: metrics_of(tmp_path / name / "metrics.csv") for name in ("whole", "again")}
    assert len(rows["again"]) == 2
    assert rows["again"] == rows["whole"][1:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
