"""Environments: one flat observation, summed rewards, counters, seeds and exact state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from muon_rl.envs import DMControl, Gym


def play(env, carrier, actions):
    """Take actions; return the next observations and rewards, and the carrier."""
    seen = []
    for action in actions:
        carrier["action"] = action
        step, carrier = env.step_and_maybe_reset(carrier)
        seen.append(torch.cat([step["next", "observation"], step["next", "reward"]]))
    return torch.stack(seen), carrier


@pytest.mark.parametrize("action_repeat", [1, 4])
def test_dm_control_matches_the_suite_itself(action_repeat):
    from dm_control import suite

    factory = DMControl("cheetah", "run", action_repeat=action_repeat)
    env = factory.make(seed=7)
    carrier = env.reset()
    # TorchRL resets once when it seeds, and once when asked.
    bare = suite.load("cheetah", "run", task_kwargs={"random": 7})
    bare.reset()
    expected = bare.reset().observation
    for _ in range(20):
        action = env.action_spec.rand()
        seen, carrier = play(env, carrier, [action])
        steps = [bare.step(action.double().numpy()) for _ in range(action_repeat)]
        expected = steps[-1].observation
        flat = np.concatenate([expected["position"], expected["velocity"]]).astype(np.float32)
        np.testing.assert_array_equal(seen[0, :-1].numpy(), flat)
        assert seen[0, -1].item() == pytest.approx(sum(step.reward for step in steps), rel=1e-6)


def test_counters_count_agent_steps_and_sum_rewards():
    rollout = DMControl("cartpole", "swingup", action_repeat=2).make(seed=0).rollout(1000)
    assert rollout.shape == (500,)  # 1000 frames an episode
    assert rollout["next", "step_count"][-1].item() == 500
    torch.testing.assert_close(
        rollout["next", "episode_return"][-1], rollout["next", "reward"].sum(0)
    )
    assert rollout["next", "truncated"][-1].item()
    assert not rollout["next", "terminated"].any()


@pytest.mark.parametrize(
    "factory",
    [DMControl("walker", "walk", action_repeat=2), Gym("Pendulum-v1"), Gym("CartPole-v1")],
    ids=lambda factory: factory.task,
)
def test_observation_is_one_flat_float32_vector(factory):
    env = factory.make(seed=0)
    check_env_specs(env)
    observation = env.rollout(3)["observation"]
    assert observation.dtype == torch.float32
    assert observation.shape[1:] == factory.specs.observation.shape
    assert observation.ndim == 2


def test_discrete_observations_of_gymnasium_are_flattened():
    observation = Gym("FrozenLake-v1").make(seed=0).rollout(2)["observation"]
    assert observation.shape[-1] == 16
    assert observation[0].tolist() == [1.0] + [0.0] * 15


def test_equal_seeds_give_equal_episodes_and_others_do_not():
    factory = DMControl("cartpole", "swingup")
    first, again, other = (factory.make(seed=s).reset()["observation"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("domain", "task"), [("cheetah", "run"), ("reacher", "easy"), ("finger", "turn_hard")]
)
def test_a_restored_environment_goes_on_bit_for_bit(domain, task):
    factory = DMControl(domain, task, action_repeat=2)
    env = factory.make(seed=3)
    actions = [env.action_spec.rand() for _ in range(40)]
    _, carrier = play(env, env.reset(), actions[:20])
    state, kept = factory.env_state(env), carrier.clone()
    expected, _ = play(env, carrier, actions[20:])
    expected_reset = env.reset()["observation"]

    other = factory.make(seed=99)
    other.reset()
    factory.load_env_state(other, state)
    got, _ = play(other, kept, actions[20:])
    assert torch.equal(got, expected)
    assert torch.equal(other.reset()["observation"], expected_reset)


def test_an_unknown_task_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match="no task cheeta-run; did you mean cheetah-run"):
        DMControl("cheeta", "run")


def test_an_unknown_gymnasium_id_is_named():
    with pytest.raises(ValueError, match="cannot make 'Pendulum-v9'"):
        Gym("Pendulum-v9")


def test_a_time_limit_truncates_the_episode():
    env = DMControl("cheetah", "run", action_repeat=2, time_limit=0.5).make(seed=0)
    last = env.rollout(1000)[-1]["next"]  # 0.01 s a frame
    assert last["step_count"].item() == 25
    assert last["truncated"].item() and not last["terminated"].item()
    with pytest.raises(ValueError, match="time_limit must be above 0, but is 0"):
        DMControl("cheetah", "run", time_limit=0)


def test_action_repeat_below_one_is_refused():
    with pytest.raises(ValueError, match="action_repeat must be at least 1, but is 0"):
        DMControl("cheetah", "run", action_repeat=0)
