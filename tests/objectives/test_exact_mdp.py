"""Muesli's losses learn the best policy of an MDP that is known exactly, from random actions."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from made_up import Table, Toy
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch.distributions import Categorical
from torch.testing import assert_close
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SoftUpdate

from muon_rl.objectives import (
    CMPOLoss,
    DynamicsLoss,
    LossSequence,
    MuesliModelLoss,
    MuesliPolicyLoss,
    OneStepLookahead,
)

MODEL = frozenset({"loss_dynamics_reward", "loss_dynamics_returns", "loss_muesli_policy"})
UPDATES = 400
EVERYTHING = frozenset({"loss_policy", "loss_value", "loss_cmpo"}) | MODEL


@functools.cache
def trained(terms: frozenset[str]) -> Table:
    """Return tables that the terms have trained on sequences of random actions."""
    torch.manual_seed(0)
    toy = Toy()
    table = Table(4, 2)
    # Whoever looks past the end finds a treasure there.
    table.prediction.module.value.data[3] = 20.0
    actor = ProbabilisticActor(
        TensorDictSequential(table.representation, table.prediction),
        in_keys=["logits"],
        distribution_class=Categorical,
    )
    losses = {
        "policy": MuesliPolicyLoss(actor),
        "cmpo": CMPOLoss(actor, OneStepLookahead(table, gamma=toy.gamma)),
        "dynamics": DynamicsLoss(table, unroll_steps=3),
        "model": MuesliModelLoss(table, unroll_steps=3, own_unroll=False),
    }
    # Of random actions the action's own return would be a value of the random policy.
    losses["policy"].make_value_estimator(gamma=toy.gamma, target="state_value")
    targets = [SoftUpdate(losses[name], tau=0.5) for name in ("policy", "cmpo", "dynamics")]
    sequence = LossSequence(losses)
    optimizer = torch.optim.Adam(sequence.parameters(), lr=0.3)
    annealing = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, UPDATES)
    for _ in range(UPDATES):
        data = toy.data(16, 12, 50).exclude("cmpo", ("next", "cmpo"), "value_target")
        data["action_log_prob"] = torch.full((16, 12), math.log(0.5))
        prior = losses["policy"].target_critic_network_params
        losses["policy"].value_estimator(data, params=prior, target_params=prior)
        out = sequence(data)
        optimizer.zero_grad()
        sum(out[term] for term in terms).backward()
        optimizer.step()
        annealing.step()
        for target in targets:
            target.step()
    return table


@pytest.mark.parametrize(
    "terms",
    [
        EVERYTHING,
        EVERYTHING - {"loss_cmpo"} - MODEL,
        EVERYTHING - {"loss_policy", "loss_muesli_policy"},
    ],
    ids=["muesli", "policy gradient alone", "CMPO and model alone"],
)
def test_they_reach_the_best_policy_and_its_values(terms):
    toy = Toy()
    best = toy.optimal()
    # In some state the largest reward misleads: whoever sees no future fails.
    assert (best.argmax(-1) != toy.reward.argmax(-1)).any()
    table = trained(terms)
    state = TensorDict(observation=torch.eye(4)[:3], batch_size=[3])
    found = table.prediction(table.representation(state.clone()))
    probability = found["logits"].softmax(-1).gather(-1, best.argmax(-1, keepdim=True))
    assert probability.min() > 0.99
    assert_close(found["value_pred"].squeeze(-1), best.amax(-1), rtol=0, atol=0.3)
    if MODEL & terms:
        ahead = OneStepLookahead(table, gamma=toy.gamma)(state)["prior", "action_value"]
        assert_close(ahead, best, rtol=0, atol=0.3)


def test_the_model_foretells_what_the_best_policy_does():
    """Over three steps of any actions, without looking at the states in between."""
    toy, table = Toy(), trained(EVERYTHING)
    best = toy.optimal()
    for actions in torch.cartesian_prod(*[torch.arange(2)] * 3):
        for state in range(3):
            now, hidden = state, table.representation(TensorDict(observation=torch.eye(4)[state]))
            for action in actions:
                step = table.dynamics(hidden.set("action", action))
                assert abs(step["reward_pred"].item() - toy.reward[now, action].item()) < 0.1
                now = toy.following[now, action]
                if now == 3:
                    break
                hidden = table.prediction(TensorDict(hidden_state=step["next", "hidden_state"]))
                assert hidden["logits"].argmax() == best[now].argmax()
                assert abs(hidden["value_pred"].item() - best[now].max().item()) < 0.3
