"""The look-ahead's values against a loop over actions, under its own and other parameters."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.objectives import SoftUpdate

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.objectives import CMPOLoss, OneStepLookahead
from muon_rl.specs import Specs

SMALL = {"latent": 8, "hidden": (8,), "dynamics_hidden": (8,), "head_hidden": (8,)}
BOX = Bounded(-2 * torch.ones(2), torch.ones(2))


def model_of(action, **options) -> WorldModel:
    model = WorldModel(Specs(Unbounded(4), action), **SMALL, **options)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


def data_of(*batch) -> TensorDict:
    return TensorDict(observation=torch.randn(*batch, 4), batch_size=batch)


@pytest.mark.parametrize("action", [Categorical(3), OneHot(3)], ids=["categorical", "one-hot"])
@pytest.mark.parametrize("options", [{}, {"bins": None}, {"lstm": True}])
@pytest.mark.parametrize("batch", [(5,), (2, 3), ()])
def test_values_are_those_of_one_action_after_another(action, options, batch):
    if options.get("lstm") and len(batch) != 1:
        batch = (4,)
    model, data = model_of(action, **options), data_of(*batch)
    if options.get("lstm"):
        data["is_init"] = torch.zeros(*batch, 1, dtype=torch.bool)
    before = set(data.keys())
    found = OneStepLookahead(model, gamma=0.7)(data)
    assert found is data
    assert set(data.keys()) == before | {"prior"}
    assert set(data["prior"].keys()) == {"action_value", "state_value"}
    clean = data.exclude("prior")
    state = model.encode(clean.clone())["hidden_state"]
    for number, one in enumerate(action.enumerate()):
        step = model.step(state, one.expand((*batch, *action.shape)))
        value = step["reward_pred"] + 0.7 * model.predict(step["hidden_state"])["value_pred"]
        assert_close(data["prior", "action_value"][..., number], value.squeeze(-1))
    assert_close(data["prior", "state_value"], model.predict(state)["value_pred"])


def test_a_continuous_model_values_the_actions_it_is_given():
    model, data = model_of(BOX), data_of(2, 3)
    actions = BOX.rand((2, 3, 5))
    data["prior", "action"] = actions
    OneStepLookahead(model, gamma=0.9)(data)
    assert torch.equal(data["prior", "action"], actions)
    assert data["prior", "action_value"].shape == (2, 3, 5)
    state = model.encode(data.select("observation"))["hidden_state"]
    for number in range(5):
        step = model.step(state, actions[:, :, number])
        value = step["reward_pred"] + 0.9 * model.predict(step["hidden_state"])["value_pred"]
        assert_close(data["prior", "action_value"][..., number], value.squeeze(-1))


def test_a_continuous_model_samples_what_it_is_not_given():
    model, data = model_of(BOX), data_of(7)
    OneStepLookahead(model, num_samples=300)(data)
    actions = data["prior", "action"]
    assert actions.shape == (7, 300, 2)
    assert BOX.is_in(actions[0])
    assert data["prior", "action_value"].shape == (7, 300)
    policy = MuesliPolicy(model).get_dist(data.select("observation"))
    wanted = policy.sample((3000,))
    assert_close(actions.mean(1), wanted.mean(0), atol=0.3, rtol=0)


def test_the_loss_looks_ahead_with_the_target_parameters():
    """The model is trained meanwhile; the targets are what it was."""
    model, data = model_of(Categorical(3)), data_of(6)
    policy = MuesliPolicy(model)
    lookahead = OneStepLookahead(policy, gamma=0.9)
    loss = CMPOLoss(policy, lookahead).eval()
    targets = SoftUpdate(loss, tau=1.0)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in model.parameters()}
    old = lookahead(data.clone())["prior"].detach()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    new = lookahead(data.clone())["prior"].detach()
    assert not torch.allclose(old["action_value"], new["action_value"])
    for prior in (old, new):
        td = data.clone()
        out = loss(td)
        log_prob = td["cmpo", "log_prob"]
        advantage = prior["action_value"] - prior["state_value"]
        before = log_prob - advantage.clamp(-1, 1)
        assert_close(out["cmpo_adv_mean"], (advantage * before.softmax(-1)).sum(-1).mean())
        assert "prior" not in td.keys()  # noqa: SIM118
        targets.step()


def test_gradients_are_kept_outside_of_the_loss():
    model = model_of(Categorical(3))
    OneStepLookahead(model)(data_of(4))["prior", "action_value"].sum().backward()
    for part in (model.representation, model.dynamics):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())


def test_sampled_cmpo_reads_the_lookahead():
    model, data = model_of(BOX), data_of(4)
    loss = CMPOLoss(MuesliPolicy(model), OneStepLookahead(model), num_samples=6)
    SoftUpdate(loss, tau=0.1)
    out = loss(data)
    out["loss_cmpo"].backward()
    assert data["cmpo", "weight"].shape == (4, 6)
    data["prior", "action"] = data["cmpo", "action"]
    OneStepLookahead(model)(data)
    advantage = data["prior", "action_value"] - data["prior", "state_value"]
    weight = (advantage / out["cmpo_adv_variance_ema"].sqrt()).clamp(-1, 1).exp()
    others = (1 + weight.sum(-1, keepdim=True) - weight) / 6
    assert_close(data["cmpo", "weight"], (weight / others).detach())


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="Linear lacks representation, dynamics, prediction, specs"):
        OneStepLookahead(nn.Linear(2, 2))
    model = model_of(Categorical(3))
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], but is 1.5"):
        OneStepLookahead(model, gamma=1.5)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        OneStepLookahead(model, num_samples=0)
