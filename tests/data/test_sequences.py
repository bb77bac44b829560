"""Sequences: unbroken windows, the share that is replayed, targets across ends, the resume."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from muon_rl.recipes.muesli import Muesli, MuesliData
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate
from walk import register

from muon_rl.envs import DMControl, EnvFactory, Gym, Snake
from muon_rl.modules import WorldModel

CARTPOLE = DMControl("cartpole", "swingup", action_repeat=2)
LENGTH = 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(specs) -> WorldModel:
    encoder = "mlp" if specs.observation.ndim == 1 else "conv"
    widths = {key: [8] for key in ("hidden", "dynamics_hidden", "head_hidden")}
    return WorldModel(specs, latent=8, bins=None, encoder=encoder, channels=[4], **widths)


def make(env: EnvFactory, agent: Muesli | None = None, **options) -> MuesliData:
    """Return Muesli's data on an environment, with an agent of its own, ready to fit."""
    defaults = {
        "total_frames": 400, "sequence_length": LENGTH, "batch_size": 8, "buffer_size": 100,
        "steps_per_collection": 40, "updates_per_step": 0.1, "num_envs": 2,
    }  # fmt: skip
    data = MuesliData(env, **{**defaults, **options})
    data.trainer = SimpleNamespace(
        lightning_module=agent or Muesli(env, small), received_sigterm=False, global_rank=0,
        state=SimpleNamespace(fn="fit"),
    )  # fmt: skip
    data.setup("fit")
    return data


def batches_with_fresh(data: MuesliData):
    """Yield each batch with the fresh sequences of that moment."""
    for batch in data.train_dataloader():
        yield batch, data._fresh


def places(batch, sequences) -> list[list[int]]:
    """Return for each sequence of a batch where the same observations are among some others."""
    same = (batch["observation"].unsqueeze(1) == sequences["observation"]).flatten(2).all(-1)
    return [row.nonzero().flatten().tolist() for row in same]


# ---------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(("num_envs", "buffer_size"), [(1, 100), (1, 47), (2, 100), (3, 61)])
def test_a_sequence_is_an_unbroken_stretch_of_one_game(num_envs, buffer_size):
    data = make(
        Gym(register()), num_envs=num_envs, buffer_size=buffer_size, steps_per_collection=30,
        batch_size=6, total_frames=300,
    )  # fmt: skip
    seen = 0
    for batch in data.train_dataloader():
        assert batch.shape == (6, LENGTH)
        after, later = batch["next", "observation"][:, :-1], batch["observation"][:, 1:]
        goes_on = ~batch["next", "done"][:, :-1].squeeze(-1)
        assert torch.equal(after[goes_on], later[goes_on])
        # Where an episode ended, another began.
        assert (after[~goes_on] != later[~goes_on]).all()
        seen += int((~goes_on).sum())
    assert seen > 20


def test_windows_begin_at_any_step():
    data = make(Gym(register()), replay_fraction=1.0)
    starts = set()
    for batch, _ in batches_with_fresh(data):
        starts |= set(
            batch["step_count" if "step_count" in batch else "observation"][:, 0, 1].tolist()
        )
    assert len(starts) > 40


def test_many_games_in_one_environment():
    env = Snake(6, 6, num_envs=3, max_steps=7, observation="planes")
    data = make(env, num_envs=1, steps_per_collection=30, buffer_size=90)
    for batch in data.train_dataloader():
        goes_on = ~batch["next", "done"][:, :-1].squeeze(-1)
        after, later = batch["next", "observation"][:, :-1], batch["observation"][:, 1:]
        assert torch.equal(after[goes_on], later[goes_on])
        assert not goes_on.all()


# ---------------------------------------------------------------------------------------- mixture


@pytest.mark.parametrize(("share", "replayed"), [(0.0, 0), (0.25, 2), (0.75, 6), (1.0, 8)])
def test_a_batch_has_the_share_of_replay_that_was_asked_for(share, replayed):
    data = make(Gym(register()), replay_fraction=share)
    assert (data.buffer is None) == (share == 0)
    older = 0
    for number, (batch, fresh) in enumerate(batches_with_fresh(data)):
        found = places(batch, fresh)
        assert all(len(where) == 1 for where in found[: 8 - replayed])
        if number >= 8:  # from the third collection on
            older += sum(not where for where in found[8 - replayed :])
    # Of the two collections and a half that the buffer holds most are not the newest.
    assert older >= 16 * replayed


@pytest.mark.parametrize(("batch_size", "updates"), [(8, 8), (6, 4)])
def test_every_fresh_sequence_is_served_before_any_is_served_again(batch_size, updates):
    data = make(
        Gym(register()), replay_fraction=0.5, batch_size=batch_size, updates_per_step=updates / 40
    )
    served = []  # of each collection, the places of the sequences in their order
    for number, (batch, fresh) in enumerate(batches_with_fresh(data)):
        if number % updates == 0:
            served.append([])
        served[-1] += [place for (place,) in places(batch[: batch_size // 2], fresh)]
    assert len(served) == 10
    orders = set()
    for order in served:  # of 8 sequences each four times, or once and a half
        assert len(order) == updates * batch_size // 2
        for start in range(0, len(order), 8):
            round_ = order[start : start + 8]
            assert len(set(round_)) == len(round_)
            assert set(round_) == set(range(8)) or (len(round_) < 8 and set(round_) < set(range(8)))
            orders.add(tuple(round_))
    assert len(orders) > 0.75 * 10 * -(-len(served[0]) // 8)


@pytest.mark.parametrize(("frames", "updates"), [(400, 40), (401, 44), (40, 4)])
def test_updates_follow_the_frames(frames, updates):
    data = make(Gym(register()), total_frames=frames)
    assert len(data.train_dataloader()) == data.total_updates == updates
    assert sum(1 for _ in data.train_dataloader()) == updates
    assert data.frames == updates * 10


def test_a_collection_is_rounded_up_to_whole_sequences_of_every_game():
    assert make(Gym(register()), steps_per_collection=41, num_envs=3).steps_per_collection == 45
    data = make(Snake(6, 6, num_envs=4, observation="planes"), num_envs=1, steps_per_collection=1)
    assert data.steps_per_collection == 20


# ---------------------------------------------------------------------------------------- targets


def test_returns_across_ends_are_those_of_a_loop_over_steps():
    env = Gym(register())
    data = make(env, sequence_length=20, steps_per_collection=40, buffer_size=200)
    agent = data.trainer.lightning_module
    batch = list(data.train_dataloader())[-1]
    policy = agent.loss.losses["policy"]
    seen = batch.copy()
    prior = policy.target_critic_network_params
    policy.value_estimator(seen, params=prior, target_params=prior)

    def values(of):
        with torch.no_grad(), prior.to_module(policy.critic_network):
            return policy.critic_network(of.select("observation"))["value_pred"].squeeze(-1)

    with torch.no_grad():
        distribution = agent.policy.get_dist(batch.select("observation"))
        ratio = (distribution.log_prob(batch["action"]) - batch["action_log_prob"]).exp()
    reward, after = batch["next", "reward"].squeeze(-1), values(batch["next"])
    done, terminated = (batch["next", key].squeeze(-1) for key in ("done", "terminated"))
    assert (done & ~terminated).any() and terminated.any()
    for row in range(len(batch)):
        later = None
        for t in reversed(range(20)):
            value = 0.0 if terminated[row, t] else after[row, t]
            if later is not None and not done[row, t]:
                c = 0.95 * min(1.0, float(ratio[row, t + 1]))
                value = value + c * (later - after[row, t])
            later = reward[row, t] + 0.99 * value
            assert seen["value_target"][row, t, 0] == pytest.approx(float(later), abs=1e-4)


@pytest.mark.parametrize("value_target", ["action_value", "state_value"])
@pytest.mark.parametrize("resumed", [False, True])
def test_losses_across_ends_are_those_of_a_loop_over_steps(value_target, resumed):
    env = Gym("CartPole-v1", options={"max_episode_steps": 18})
    agent = Muesli(env, small, value_target=value_target, unroll_steps=3)

    def shake():
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter += 0.3 * torch.randn_like(parameter)

    shake()  # else all values are 0
    for target in agent.targets:
        SoftUpdate(target.loss_module, tau=1.0).step()
    sizes = {"sequence_length": 20, "steps_per_collection": 80, "buffer_size": 200}
    data = make(env, agent, replay_fraction=0.5, updates_per_step=0.05, **sizes)
    batches = list(data.train_dataloader())  # 200 steps a game, of which the buffer holds 100
    if resumed:
        data, state = make(env, agent, replay_fraction=0.5, total_frames=800, **sizes), data
        data.load_state_dict(state.state_dict())
        batches = list(data.train_dataloader())

    def flags(batch):
        return (batch["next", key].squeeze(-1) for key in ("done", "terminated"))

    def ends_both_ways(batch):
        done, terminated = flags(batch)
        return terminated.any() and (done & ~terminated).any() and not done[:, -1].all()

    batch = next(batch for batch in reversed(batches) if ends_both_ways(batch))
    done, terminated = flags(batch)
    prior = deepcopy(agent.policy)  # the target networks' parameters
    shake()

    def told(policy, of):
        model = policy.world_model
        return model.prediction(model.representation(of.select("observation")))

    def taken(model, hidden, action):
        step = TensorDict({"hidden_state": hidden, "action": action}, hidden.shape[:-1])
        step = model.dynamics(step)
        after = step["next", "hidden_state"]
        ahead = model.prediction(TensorDict({"hidden_state": after}, hidden.shape[:-1]))
        return after, step["reward_pred"].squeeze(-1), ahead

    model, reward = agent.policy.world_model, batch["next", "reward"].squeeze(-1)
    rows, length = batch.shape
    with torch.no_grad():
        now, before, after = (
            told(agent.policy, batch),
            told(prior, batch),
            told(prior, batch["next"]),
        )
        value, next_value = (x["value_pred"].squeeze(-1) for x in (before, after))
        logits = now["logits"].log_softmax(-1)
        log_prob = logits.gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        ratio = (log_prob - batch["action_log_prob"]).exp()
        assert (ratio - 1).abs().max() > 0.1
        # -- Retrace
        returns = torch.zeros(rows, length)
        for row in range(rows):
            for t in reversed(range(length)):
                ahead = 0.0 if terminated[row, t] else next_value[row, t]
                if t < length - 1 and not done[row, t]:
                    trace = 0.95 * min(1.0, float(ratio[row, t + 1]))
                    ahead = ahead + trace * (returns[row, t + 1] - next_value[row, t])
                returns[row, t] = reward[row, t] + 0.99 * ahead
        target = returns
        if value_target == "state_value":
            target = value + ratio.clamp(max=1.0) * (returns - value)
        # -- CMPO's policy, one step ahead in the prior's model
        root = prior.world_model.representation(batch.select("observation"))["hidden_state"]
        ahead = [taken(prior.world_model, root, torch.full((rows, length), a)) for a in (0, 1)]
        q = torch.stack([r + 0.99 * p["value_pred"].squeeze(-1) for _, r, p in ahead], -1)
        scale = (target - value).square().mean().sqrt()
        exponent = ((q - value.unsqueeze(-1)) / scale).clamp(-1.0, 1.0)
        better = (before["logits"].log_softmax(-1) + exponent).log_softmax(-1)
        # -- the model, from every state on
        errors = {"reward": [], "value": [], "policy": []}
        for row in range(rows):
            for t in range(length):
                hidden = model.representation(batch[row, t].select("observation"))["hidden_state"]
                for k in range(t, t + 3):
                    if k == length or (k > t and done[row, k - 1]):
                        break
                    hidden, says, ahead = taken(model, hidden, batch["action"][row, k])
                    errors["reward"].append((says - reward[row, k]).square())
                    last = k == length - 1 or done[row, k]
                    wanted = next_value[row, k] if last else target[row, min(k + 1, length - 1)]
                    wanted = 0.0 if terminated[row, k] else wanted
                    errors["value"].append((ahead["value_pred"].squeeze(-1) - wanted).square())
                    if not last:
                        wanted = better[row, k + 1]
                        off = wanted - ahead["logits"].log_softmax(-1)
                        errors["policy"].append((wanted.exp() * off).sum())
        advantage = returns - value
        expected = {
            "loss_policy": -(ratio * advantage / advantage.square().mean().sqrt()).mean(),
            "loss_value": 0.25 * (now["value_pred"].squeeze(-1) - target).square().mean(),
            "loss_cmpo": (better.exp() * (better - logits)).sum(-1).mean(),
            "dynamics_reward_loss": torch.stack(errors["reward"]).mean(),
            "dynamics_returns_loss": torch.stack(errors["value"]).mean(),
            "muesli_policy_loss": torch.stack(errors["policy"]).mean(),
        }
    out = agent.loss(batch)
    for name, wanted in expected.items():
        assert out[name].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6), name


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("updates", [1, 3, 4, 30])
@pytest.mark.parametrize("share", [0.0, 0.75])
def test_a_resumed_stream_goes_on(updates, share, tmp_path):
    data = make(CARTPOLE, total_frames=800, replay_fraction=share)
    stream = iter(data.train_dataloader())
    for _ in range(updates):
        next(stream)
    torch.save(data.state_dict(), tmp_path / "data.pt")
    expected = [batch.clone() for batch in stream]

    torch.manual_seed(1)
    resumed = make(CARTPOLE, total_frames=800, replay_fraction=share)
    resumed.trainer.lightning_module.load_state_dict(data.trainer.lightning_module.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "data.pt", weights_only=True))
    rest = resumed.train_dataloader()
    assert len(rest) == len(expected) == 40 - updates
    for batch, other in zip(rest, expected, strict=True):
        assert (batch == other).all()


@pytest.mark.parametrize(
    "updates", [20, 60]
)  # with a buffer that is not full, and with one that is
def test_new_episodes_after_a_resume_follow_the_end_of_the_old_ones(updates):
    data = make(Gym(register()), total_frames=200, replay_fraction=1.0, updates_per_step=0.5)
    stream = iter(data.train_dataloader())
    for _ in range(updates):
        next(stream)
    last = data._fresh.reshape(2, -1)["next"][:, -1]
    assert not last["done"].all()
    resumed = make(Gym(register()), total_frames=200, replay_fraction=1.0, updates_per_step=0.5)
    resumed.load_state_dict(data.state_dict())
    across = 0
    for batch in resumed.train_dataloader():
        after, later = batch["next", "observation"][:, :-1], batch["observation"][:, 1:]
        goes_on = ~batch["next", "done"][:, :-1].squeeze(-1)
        assert torch.equal(after[goes_on], later[goes_on])
        assert (after[~goes_on] != later[~goes_on]).all()
        for seen in last["observation"][~last["done"].squeeze(-1)]:
            cut = (after == seen).all(-1)
            assert not batch["next", "terminated"][:, :-1].squeeze(-1)[cut].any()
            across += int(cut.sum())
    assert across > 0


def test_windows_are_drawn_uniformly_after_a_resume_too():
    data = make(Gym(register()), replay_fraction=1.0, buffer_size=400, total_frames=600)
    stream = iter(data.train_dataloader())
    for _ in range(33):  # nine collections
        next(stream)
    resumed = make(Gym(register()), replay_fraction=1.0, buffer_size=400, total_frames=600)
    resumed.load_state_dict(data.state_dict())
    stream = iter(resumed.train_dataloader())
    while resumed.frames == data.frames:
        next(stream)
    # A tenth of the buffer is new. Drawn by stretches of time, half of the windows would be.
    newest = resumed._fresh.reshape(1, -1)
    windows = torch.stack([resumed.buffer.sample()["observation"] for _ in range(100)])
    begun = windows.reshape(-1, LENGTH, 2)[:, 0]
    new = (begun.unsqueeze(1) == newest["observation"]).all(-1).any(1)
    assert 0.05 < new.float().mean() < 0.15


def test_without_its_buffer_a_resumed_run_collects_first():
    data = make(Gym(register()), save_buffer=False)
    stream = iter(data.train_dataloader())
    for _ in range(6):
        next(stream)
    state = data.state_dict()
    assert "contents" not in state
    resumed = make(Gym(register()), save_buffer=False)
    resumed.load_state_dict(state)
    assert sum(1 for _ in resumed.train_dataloader()) == 34


@pytest.mark.parametrize(
    "option",
    [{"sequence_length": 4}, {"num_envs": 1}, {"steps_per_collection": 20}, {"buffer_size": 90}],
)
def test_a_checkpoint_of_other_sizes_is_refused(option):
    data = make(Gym(register()))
    next(iter(data.train_dataloader()))
    name = f"data.{next(iter(option))}"
    with pytest.raises(ValueError, match=f"{name} is .* set it as it was, or begin a fresh run"):
        make(Gym(register()), **option).load_state_dict(data.state_dict())


@pytest.mark.parametrize(("before", "now", "held"), [(0.0, 0.75, "no"), (0.75, 0.0, "a")])
def test_a_checkpoint_with_or_without_a_buffer_is_refused(before, now, held):
    data = make(Gym(register()), replay_fraction=before)
    next(iter(data.train_dataloader()))
    message = f"replay_fraction is {now}, but the checkpoint holds {held} replay buffer: set it"
    with pytest.raises(ValueError, match=message):
        make(Gym(register()), replay_fraction=now).load_state_dict(data.state_dict())


def test_a_checkpoint_of_another_number_of_games_in_one_environment_is_refused():
    def snake(games: int) -> MuesliData:
        env = Snake(6, 6, num_envs=games, observation="planes")
        return make(env, num_envs=1, steps_per_collection=40)

    data = snake(4)
    next(iter(data.train_dataloader()))
    message = "the number of games in one environment is 4 in the checkpoint and 2 in this config"
    with pytest.raises(ValueError, match=message):
        snake(2).load_state_dict(data.state_dict())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"replay_fraction": 1.2}, "replay_fraction must be in"),
        ({"replay_fraction": float("nan")}, "replay_fraction must be in"),
        (
            {"replay_fraction": 0.06},
            "replay_fraction=0.06 of data.batch_size=8 is rounded to 0 sequences, which is no "
            "mixture: raise data.batch_size, or set data.replay_fraction to 0",
        ),
        (
            {"replay_fraction": 0.95, "batch_size": 2},
            "of data.batch_size=2 is rounded to 2 sequences.* set data.replay_fraction to 1",
        ),
        ({"updates_per_step": 0.0}, "updates_per_step must be above 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"buffer_size": 39}, "buffer_size is 39, but one collection has 40 steps"),
        ({"updates_per_step": 0.002}, "leave no update"),
    ],
)
def test_a_number_out_of_range_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        make(Gym(register()), **option)
