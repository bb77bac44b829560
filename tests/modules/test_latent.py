"""Actions as features, the norms of hidden states, and what the dynamics adds up."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot, Unbounded

from muon_rl.modules.latent import ActionFeatures, Dynamics, ScalarHead, latent_norm_of
from muon_rl.modules.mlp import mlp


def test_the_bounds_of_a_continuous_action_enter_as_minus_one_and_one():
    spec = Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]))
    given = torch.stack([spec.space.low, spec.space.high, torch.tensor([0.0, 3.0])])
    assert ActionFeatures(spec)(given).tolist() == [[-1, -1], [1, 1], [0, 0.5]]


@pytest.mark.parametrize("spec", [Categorical(3), OneHot(3)], ids=["index", "one-hot"])
def test_a_discrete_action_enters_as_one_hot(spec):
    features = ActionFeatures(spec)
    assert features(spec.enumerate()).float().tolist() == torch.eye(3).tolist()
    assert features.discrete and features.features == 3


@pytest.mark.parametrize(
    "spec",
    [
        MultiCategorical([2, 3]),
        MultiOneHot([2, 3]),
        Categorical(3, shape=(1,)),
        Unbounded(2),
        Bounded(0, 5, shape=(2,), dtype=torch.int64),
        Bounded(-1, 1, shape=(2, 2)),
    ],
    ids=lambda spec: f"{type(spec).__name__}{tuple(spec.shape)}",
)
def test_other_actions_are_refused(spec):
    with pytest.raises(ValueError, match=r"one action of Categorical \(shape \(\)\) or OneHot"):
        ActionFeatures(spec)


def test_a_state_of_one_value_has_a_norm_and_a_gradient():
    state = torch.full((3, 8), 7.0, requires_grad=True)
    normed = latent_norm_of("minmax", 8)(state)
    normed.sum().backward()
    assert not normed.any() and state.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["minmax", "layernorm", "none"])
def test_the_dynamics_normalises_the_sum_of_the_state_and_what_is_added(kind):
    torch.manual_seed(0)
    network, reward = mlp(8 + 3, 8, [12]), mlp(8, 1, [12])
    dynamics = Dynamics(
        ActionFeatures(Categorical(3)), network, latent_norm_of(kind, 8), ScalarHead(reward, None)
    )
    state, action = torch.randn(5, 8), torch.tensor([0, 1, 2, 1, 0])
    total = state + network(torch.cat([state, torch.eye(3)[action]], -1))
    if kind == "minmax":
        total = torch.stack([(row - row.min()) / (row.max() - row.min()) for row in total])
    elif kind == "layernorm":
        total = (total - total.mean(-1, keepdim=True)) / total.std(-1, correction=0, keepdim=True)
    following, predicted = dynamics(state, action)
    torch.testing.assert_close(following, total, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(predicted, reward(following))


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match=r"latent_norm must be one of .* but is 'batch'"):
        latent_norm_of("batch", 8)
