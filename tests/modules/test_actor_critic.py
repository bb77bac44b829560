"""Actors and critics of plain perceptrons."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from muon_rl.modules import QCritic, TanhNormalActor
from muon_rl.specs import Specs

SPECS = Specs(Unbounded(5), Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])))


def test_actions_stay_within_their_bounds():
    actor = TanhNormalActor(SPECS, hidden=[16])
    with set_exploration_type(ExplorationType.RANDOM):
        action = actor(TensorDict({"observation": 100 * torch.randn(1000, 5)}, [1000]))["action"]
    assert (action >= SPECS.action.space.low).all()
    assert (action <= SPECS.action.space.high).all()
    assert action.std(0).min() > 0.1


def test_the_deterministic_action_is_the_squashed_mean():
    actor = TanhNormalActor(SPECS, hidden=[16])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        out = actor(TensorDict({"observation": torch.randn(7, 5)}, [7]))
    low, high = SPECS.action.space.low, SPECS.action.space.high
    expected = low + (high - low) * (1 + torch.tanh(out["loc"])) / 2
    torch.testing.assert_close(out["action"], expected)


def test_the_scale_keeps_its_floor():
    actor = TanhNormalActor(SPECS, hidden=[16], min_scale=0.3)
    out = actor(TensorDict({"observation": 1e4 * torch.randn(64, 5)}, [64]))
    assert out["scale"].min() >= 0.3


def test_the_critic_reads_observation_and_action():
    critic = QCritic(SPECS, hidden=[16])
    td = TensorDict({"observation": torch.randn(3, 5), "action": torch.randn(3, 2)}, [3])
    value = critic(td.clone())["state_action_value"]
    assert value.shape == (3, 1)
    other = critic(td.clone().set("action", td["action"] + 1))["state_action_value"]
    assert not torch.equal(value, other)


def test_a_discrete_action_is_refused():
    with pytest.raises(ValueError, match=r"bounded vector as action, but .* Categorical"):
        TanhNormalActor(Specs(Unbounded(5), Categorical(3)))


@pytest.mark.parametrize("network", [TanhNormalActor, QCritic])
def test_an_image_is_refused(network):
    with pytest.raises(ValueError, match=r"vector as observation, but .* \(3, 8, 8\)"):
        network(Specs(Unbounded((3, 8, 8)), SPECS.action))
