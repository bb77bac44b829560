"""Which features are looked at: the last layers' inputs, in any of TorchRL's losses."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchrl.data import LazyTensorStorage, OneHot, TensorDictReplayBuffer
from torchrl.modules import QValueActor, ValueOperator
from torchrl.objectives import (
    BCLoss,
    ClipPPOLoss,
    DDPGLoss,
    DQNLoss,
    REDQLoss,
    SACLoss,
    TD3Loss,
)

from muon_rl.callbacks import EffectiveRank
from muon_rl.callbacks.effective_rank import find_critic
from muon_rl.diagnostics import measures
from muon_rl.envs import DMControl
from muon_rl.modules import QCritic, TanhNormalActor

SPECS = DMControl("cartpole", "swingup").specs  # 5 observations, 1 action
BOTH = ["observation", "action"]


class Net(nn.Module):
    """Layers in another order than they are listed, of whatever kind."""

    def __init__(self, inputs: int, *, wrap=lambda layer: layer, extra=nn.Identity) -> None:
        super().__init__()
        self.head = wrap(nn.Linear(8, 1))
        self.body = nn.Sequential(wrap(nn.Linear(inputs, 8)), nn.ReLU(), extra())

    def features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat(inputs, -1))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(*inputs))


class Duel(nn.Module):
    """Two heads on a trunk, as in a duelling network."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
        self.value, self.advantage = nn.Linear(4, 1), nn.Linear(8, 3)

    def features(self, observation: torch.Tensor) -> torch.Tensor:
        trunk = self.trunk(observation)
        return torch.cat([self.hidden(trunk), trunk], -1)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        trunk = self.trunk(observation)
        return self.value(self.hidden(trunk)) + self.advantage(trunk)


class Draws(nn.Module):
    """A layer that draws random numbers in any mode, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return inputs + 0 * torch.rand_like(inputs)


def q(**options) -> ValueOperator:
    return ValueOperator(Net(6, **options), in_keys=BOTH)


def deterministic() -> TensorDictModule:
    return TensorDictModule(nn.Linear(5, 1), in_keys=["observation"], out_keys=["action"])


def sac(critics: list, **options) -> SACLoss:
    return SACLoss(TanhNormalActor(SPECS, hidden=[4]), critics, num_qvalue_nets=2, **options)


def td3(critics: list) -> TD3Loss:
    return TD3Loss(deterministic(), critics, bounds=(-1, 1), num_qvalue_nets=2)


def ppo() -> ClipPPOLoss:
    value = ValueOperator(Net(5), in_keys=["observation"])
    return ClipPPOLoss(TanhNormalActor(SPECS, hidden=[4]), value)


def dqn() -> DQNLoss:
    actor = QValueActor(Duel(), spec=OneHot(3), in_keys=["observation"])
    return DQNLoss(actor, action_space="one_hot")


LOSSES = {
    "SAC": lambda: sac([q(), q()]),
    "TD3": lambda: td3([q(), q()]),
    "REDQ": lambda: REDQLoss(TanhNormalActor(SPECS, hidden=[4]), q(), num_qvalue_nets=3),
    "DDPG": lambda: DDPGLoss(deterministic(), q()),
    "PPO": ppo,
    "DQN, two heads": dqn,
    "dropout": lambda: sac([q(extra=nn.Dropout), q(extra=nn.Dropout)]),
    "batch norm": lambda: DDPGLoss(deterministic(), q(extra=lambda: nn.BatchNorm1d(8))),
    "spectral norm": lambda: sac(
        [q(wrap=spectral_norm), q(wrap=spectral_norm)], deactivate_vmap=True
    ),
    "draws": lambda: DDPGLoss(deterministic(), q(extra=Draws)),
}


@pytest.fixture
def buffer() -> TensorDictReplayBuffer:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=4)
    data = {"observation": torch.randn(50, 5), "action": torch.randn(50, 1)}
    buffer.extend(TensorDict(data, [50]))
    return buffer


@pytest.mark.filterwarnings("ignore:.*wasn't part of the annotations")
@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_has_its_penultimate_features_measured_and_nothing_changed(name, buffer):
    loss = LOSSES[name]()
    critic = find_critic(loss)
    list(critic.network.modules())[-1].eval()  # a part that training leaves in evaluation mode
    modes = {part: part.training for part in critic.network.modules()}
    assert any(modes.values())
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    random, content = torch.get_rng_state(), buffer[:].clone()

    metrics = EffectiveRank(enabled=True, top_k=2).measure(loss, buffer)

    assert {part: part.training for part in critic.network.modules()} == modes
    assert not any(part._forward_pre_hooks for part in critic.network.modules())
    assert all(torch.equal(value, state[key]) for key, value in loss.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert (buffer[:] == content).all()

    net = next(part for part in critic.network.eval().modules() if isinstance(part, (Net, Duel)))
    stack = critic.parameters.reshape(-1)
    for number, parameters in enumerate(stack.unbind(0), start=1):
        with torch.no_grad(), parameters.clone().to_module(critic.network):
            inputs = [content[key] for key in critic.network.in_keys]
            features = net.features(*inputs)
        for kind, expected in measures(features, k=2).items():
            kind = kind.replace("topk", "top2")
            assert metrics[f"repr/q{number}_{kind}"] == pytest.approx(expected.item(), rel=1e-5)
    assert len(metrics) == 4 * len(stack) + 1
    assert metrics["repr/q_effective_rank_mean"] == pytest.approx(
        sum(metrics[f"repr/q{i + 1}_effective_rank"] for i in range(len(stack))) / len(stack)
    )


def test_a_critic_of_rank_one_shows_it_and_its_twin_does_not(buffer):
    loss = sac([QCritic(SPECS, hidden=[32, 32]) for _ in range(2)])
    weights = loss.qvalue_network_params
    with torch.no_grad():
        weights["module", "2", "weight"][1] = torch.rand(32)  # every unit of Q2 is the same
        weights["module", "2", "bias"][1] = 0
    metrics = EffectiveRank().measure(loss, buffer)
    assert metrics["repr/q2_effective_rank"] == pytest.approx(1, abs=1e-3)
    assert metrics["repr/q2_stable_rank"] == pytest.approx(1, abs=1e-3)
    assert metrics["repr/q2_top10_mass"] == pytest.approx(1, abs=1e-3)
    assert metrics["repr/q1_effective_rank"] > 5
    assert metrics["repr/q1_top10_mass"] < 0.95
    with torch.no_grad():
        weights["module", "2", "weight"][0, :8] = 0  # a quarter of Q1's units is dead
        weights["module", "2", "bias"][0, :8] = 0
        weights["module", "2", "bias"][0, 8:] = 9
    assert EffectiveRank().measure(loss, buffer)["repr/q1_dormant_share"] == 0.25


def test_max_samples_are_drawn_by_the_update_and_never_twice(buffer, monkeypatch):
    drawn = []

    def keep(features, **options):
        drawn.append(features[0].clone())
        return measures(features, **options)

    monkeypatch.setattr("muon_rl.callbacks.effective_rank.measures", keep)
    loss, callback = sac([q(), q()]), EffectiveRank(max_samples=30)
    for update in (1, 1, 2):
        callback.measure(loss, buffer, update)
    first, again, other = drawn
    assert first.shape == (30, 8)
    assert len(first.unique(dim=0)) >= 29  # zero where every unit is
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    EffectiveRank(max_samples=51).measure(loss, buffer)
    assert drawn[-1].shape == (50, 8)  # all that there are


@pytest.mark.filterwarnings("ignore:.*wasn't part of the annotations")
def test_what_has_no_critic_or_no_buffer_is_refused():
    callback = EffectiveRank(enabled=True)
    with pytest.raises(ValueError, match="BCLoss has neither qvalue_network, critic_network nor "):
        callback.check(BCLoss(TanhNormalActor(SPECS, hidden=[4])), None)
    with pytest.raises(ValueError, match="needs a replay buffer, but NoneType has no buffer"):
        callback.check(sac([q(), q()]), None)
