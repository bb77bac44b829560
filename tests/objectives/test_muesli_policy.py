"""Muesli's policy gradient and value loss: oracles, off-policy data, and the contract."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from loss_contract import LossContract
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torch.testing import assert_close
from torchrl.data import Categorical, OneHot, Unbounded
from torchrl.modules import (
    MaskedCategorical,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.objectives.value import GAE

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.objectives import RetraceEstimator
from muon_rl.objectives.functional import retrace_returns, two_hot_loss
from muon_rl.objectives.muesli_policy import MuesliPolicyLoss
from muon_rl.specs import Specs

SMALL = {"latent": 8, "hidden": (8,), "dynamics_hidden": (8,), "head_hidden": (8,)}
CLASSES = {
    "categorical": torch.distributions.Categorical,
    "one-hot": OneHotCategorical,
    "masked": MaskedCategorical,
}


def actor_of(kind: str, network: nn.Module | None = None, key: str = "observation"):
    if kind == "tanh":
        body = nn.Sequential(network or nn.Linear(4, 4), NormalParamExtractor())
        return ProbabilisticActor(
            TensorDictModule(body, [key], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            distribution_kwargs={"low": -2.0, "high": 2.0},
        )
    module = TensorDictModule(network or nn.Linear(4, 3), [key], ["logits"])
    keys = {"logits": "logits", "mask": "action_mask"} if kind == "masked" else ["logits"]
    return ProbabilisticActor(module, in_keys=keys, distribution_class=CLASSES[kind])


def critic_of(*out_keys: str) -> TensorDictModule:
    return ValueOperator(nn.Linear(4, 1), in_keys=["observation"], out_keys=list(out_keys))


class PolicyContract(LossContract):
    kind = "categorical"
    reaches = {"loss_policy": {"actor_network"}, "loss_value": {"critic_network"}}  # noqa: RUF012
    writes = set()  # noqa: RUF012
    coefficients = {"value_pred_coef": "loss_value"}  # noqa: RUF012
    renames = {"sample_log_prob": "behaviour", "action": "taken"}  # noqa: RUF012

    def make(self, **options):
        torch.manual_seed(0)
        loss = MuesliPolicyLoss(actor_of(self.kind), critic_of("state_value"), **options)
        SoftUpdate(loss, tau=0.5)
        return loss

    def make_shared(self):
        trunk = TensorDictModule(nn.Linear(4, 4), ["observation"], ["hidden"])
        head = actor_of(self.kind, key="hidden")
        module = TensorDictSequential(trunk, head.module[0])
        kwargs = {"in_keys": head.module[-1].in_keys}
        if self.kind == "masked":
            kwargs = {"in_keys": {"logits": "logits", "mask": "action_mask"}}
        actor = ProbabilisticActor(
            module, distribution_class=head.module[-1].distribution_class, **kwargs
        )
        value = ValueOperator(nn.Linear(4, 1), in_keys=["hidden"])
        return MuesliPolicyLoss(actor, TensorDictSequential(trunk, value))

    def action(self, *batch):
        if self.kind == "tanh":
            return torch.rand(*batch, 2) * 3 - 1.5
        action = torch.randint(2, batch) * 2
        return nn.functional.one_hot(action, 3) if self.kind == "one-hot" else action

    def data(self, *batch):
        flags = {key: torch.zeros(*batch, 1, dtype=torch.bool) for key in ("done", "terminated")}
        mask = torch.ones(*batch, 3, dtype=torch.bool)
        mask[..., 1] = torch.rand(batch) > 0.5
        after = {
            "observation": torch.randn(*batch, 4), "reward": torch.randn(*batch, 1), **flags,
        }  # fmt: skip
        now = {
            "observation": torch.randn(*batch, 4), "action_mask": mask,
            "action": self.action(*batch), "action_log_prob": -torch.rand(batch) - 0.5,
            "next": TensorDict(after, batch),
        }  # fmt: skip
        return TensorDict(now, batch)

    def test_ends_of_episodes(self):
        """A terminal state is worth 0, a truncated one its value; neither looks past the end."""
        for key in ("done", "terminated"):
            loss, data = self.make(), self.data(3)
            data["next", "done"][1] = data["next", key][1] = True
            other = data.clone()
            for td, row in ((other, 2), (other["next"], 2)):
                td["observation"][row] = 50.0
            if key == "terminated":
                other["next", "observation"][1] = 50.0
            each = [
                self.run(self.make(reduction="none"), td)["loss_value"][:2] for td in (data, other)
            ]
            assert_close(each[0], each[1])
            value = loss.critic_network_params.to_module
            with value(loss.critic_network, preserve_module_state=False), torch.no_grad():
                now = loss.critic_network(data.select("observation"))["state_value"][1]
                after = loss.critic_network(data["next"].select("observation"))["state_value"][1]
            wanted = data["next", "reward"][1] + (key == "done") * 0.99 * after
            assert_close(each[0][1], 0.25 * (now - wanted).square().squeeze())


class TestCategorical(PolicyContract):
    pass


class TestOneHot(PolicyContract):
    kind = "one-hot"


class TestMasked(PolicyContract):
    kind = "masked"


class TestContinuous(PolicyContract):
    kind = "tanh"


class TestGivenAdvantage(PolicyContract):
    """Of estimates that the data hold."""

    renames = {"advantage": ("my", "gain"), "value_target": ("my", "target")}  # noqa: RUF012

    def data(self, *batch):
        td = super().data(*batch)
        td["advantage"], td["value_target"] = torch.randn(*batch, 1), torch.randn(*batch, 1)
        return td

    def test_it_runs_without_a_tensordict(self):
        """The inputs by name never hold them: TestCategorical's are the same."""
        assert set(self.make().in_keys).isdisjoint({"advantage", "value_target"})

    def test_ends_of_episodes(self):
        """They change nothing: whoever made the estimates knew of them."""
        data = self.data(4)
        ended = data.clone()
        ended["next", "done"][:] = ended["next", "terminated"][:] = True
        assert_close(self.run(self.make(), data), self.run(self.make(), ended))


def simple(*, logits=(0.3, -0.2, 0.1), behaviour=(0.2, 0.5, 0.3)):
    """Return a policy of three numbers, and off-policy data of four steps."""
    network = nn.Linear(1, 3, bias=False)
    network.weight.data = torch.tensor(logits).unsqueeze(-1)
    action = torch.tensor([0, 2, 1, 2])
    td = TensorDict(observation=torch.ones(4, 1), action=action, batch_size=[4])
    td["action_log_prob"] = torch.tensor(behaviour).log()[action]
    td["advantage"] = torch.tensor([[2.0], [-1.0], [0.5], [3.0]])
    td["value_target"] = torch.zeros(4, 1)
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    return network, actor, td


def test_the_gradient_is_the_importance_weighted_policy_gradient():
    network, actor, td = simple()
    MuesliPolicyLoss(actor)(td)["loss_policy"].backward()
    pi = torch.tensor([0.3, -0.2, 0.1]).softmax(0)
    behaviour, advantage = torch.tensor([0.2, 0.5, 0.3]), [2.0, -1.0, 0.5, 3.0]
    sigma = math.sqrt(sum(a * a for a in advantage) / 4)
    expected = torch.zeros(3)
    for action, a in zip([0, 2, 1, 2], advantage, strict=True):
        one = torch.eye(3)[action]
        expected -= pi[action] / behaviour[action] * a / sigma * (one - pi) / 4
    assert_close(network.weight.grad.squeeze(-1), expected)


def test_the_ratio_can_be_cut_and_keeps_the_gradient_of_the_log_probability():
    network, actor, td = simple()
    out = MuesliPolicyLoss(actor, max_importance_ratio=0.9)(td)
    out["loss_policy"].backward()
    pi = torch.tensor([0.3, -0.2, 0.1]).softmax(0)
    behaviour, advantage = torch.tensor([0.2, 0.5, 0.3]), [2.0, -1.0, 0.5, 3.0]
    sigma = math.sqrt(sum(a * a for a in advantage) / 4)
    expected, loss = torch.zeros(3), 0.0
    for action, a in zip([0, 2, 1, 2], advantage, strict=True):
        weight = min(0.9, float(pi[action] / behaviour[action]))
        expected -= weight * a / sigma * (torch.eye(3)[action] - pi) / 4
        loss -= weight * a / sigma / 4
    assert_close(network.weight.grad.squeeze(-1), expected)
    assert out["loss_policy"].item() == pytest.approx(loss)
    assert out["ratio_max"] == pytest.approx(float((pi / behaviour).max()))
    assert out["ratio_mean"] == pytest.approx(float((pi / behaviour)[td["action"]].mean()))
    huge = td.clone()
    huge["action_log_prob"] = torch.full((4,), -1e4)
    bounded = MuesliPolicyLoss(actor, max_importance_ratio=0.9)(huge)["loss_policy"]
    assert bounded.isfinite()


def test_off_policy_data_give_the_gradient_of_the_policys_own():
    """Every action once, weighed by the behaviour: the mean does not depend on who acted."""
    gradients = []
    for behaviour in [(0.2, 0.5, 0.3), (0.8, 0.1, 0.1), None]:
        network, actor, _ = simple()
        chosen = torch.tensor(behaviour or network.weight.squeeze(-1).softmax(0).tolist())
        td = TensorDict(
            observation=torch.ones(3, 1), action=torch.arange(3),
            action_log_prob=chosen.log(), advantage=torch.tensor([[1.0], [-2.0], [0.5]]),
            batch_size=[3],
        )  # fmt: skip
        each = MuesliPolicyLoss(actor, reduction="none")(td)["loss_policy"]
        (chosen * each).sum().backward()
        gradients.append(network.weight.grad)
    assert gradients[0].abs().max() > 0.1
    assert_close(gradients[0], gradients[1])
    assert_close(gradients[0], gradients[2])


def test_the_advantage_is_retraces_with_the_target_critic():
    contract = TestCategorical()
    loss, data = contract.make(reduction="none"), contract.data(5)
    data["action_log_prob"] -= 2.0 * torch.rand(5)
    prior = loss.target_critic_network_params.clone()
    for p in loss.critic_network_params.parameters():
        p.data.add_(0.5)
    weight, bias = prior["module", "weight"], prior["module", "bias"]
    value = (data["observation"] @ weight.T + bias).squeeze(-1)
    following = (data["next", "observation"] @ weight.T + bias).squeeze(-1)
    logits = loss.actor_network_params["module", "0", "module"]
    logits = data["observation"] @ logits["weight"].T + logits["bias"]
    log_prob = logits.log_softmax(-1).gather(-1, data["action"][:, None]).squeeze(-1)
    ratio = (log_prob - data["action_log_prob"]).exp()
    returns = retrace_returns(
        data["next", "reward"].squeeze(-1), torch.full((5,), 0.99), following,
        following[:-1], 0.95 * ratio.clamp(max=1.0)[1:],
    )  # fmt: skip
    advantage = returns - value
    out = contract.run(loss, data)
    sigma = advantage.square().mean().sqrt()
    assert_close(out["loss_policy"], -ratio * advantage / sigma)
    assert_close(out["advantage_variance_ema"], sigma.square())
    assert_close(out["advantage_std"], advantage.std(correction=0))
    online = value + 0.5 * data["observation"].sum(-1) + 0.5
    assert_close(out["loss_value"], 0.25 * (online - returns).square())
    share = 1 - (returns - online).var() / returns.var()
    assert_close(out["explained_variance"], share.detach())
    assert_close(out["entropy"], torch.distributions.Categorical(logits=logits).entropy().mean())


def test_a_value_target_alone_is_compared_with_the_values_of_the_data_or_the_target_critic():
    contract = TestCategorical()
    data = contract.data(4).exclude("next")
    data["value_target"], data["state_value"] = torch.randn(4, 1), torch.randn(4, 1)
    loss = contract.make(reduction="none")
    given = loss(data)
    assert_close(
        given["advantage_std"], (data["value_target"] - data["state_value"]).std(correction=0)
    )
    with loss.target_critic_network_params.to_module(loss.critic_network):
        value = loss.critic_network(data.select("observation"))["state_value"]
    for p in loss.critic_network_params.parameters():
        p.data.mul_(-3.0)
    found = loss(data.exclude("state_value"))
    assert_close(found["advantage_std"], (data["value_target"] - value).std(correction=0))


@pytest.mark.parametrize("scalar_loss", [None, "two_hot", "mse"])
@pytest.mark.parametrize("action", ["categorical", "one-hot"])
def test_an_actor_that_writes_its_value_needs_no_critic(scalar_loss, action):
    torch.manual_seed(0)
    spec = Categorical(3) if action == "categorical" else OneHot(3)
    policy = MuesliPolicy(WorldModel(Specs(Unbounded(4), spec), limit=10.0, **SMALL))
    loss = MuesliPolicyLoss(policy, scalar_loss=scalar_loss)
    SoftUpdate(loss, tau=0.5)
    td = policy(TensorDict(observation=torch.randn(6, 4), batch_size=[6])).detach()
    td["next"] = TestCategorical().data(6)["next"]
    td["value_target"] = torch.randn(6, 1)
    out = loss(td)
    seen = policy.world_model(td.select("observation"))
    expected = (seen["value_pred"] - td["value_target"]).square().mean()
    if scalar_loss != "mse":
        expected = two_hot_loss(seen["value_logits"], td["value_target"], limit=10.0).mean()
    assert_close(out["loss_value"], 0.25 * expected)
    assert_close(out["ratio_mean"], torch.tensor(1.0))
    (out["loss_policy"] + out["loss_value"]).backward()
    parts = dict(policy.world_model.named_parameters())
    assert all(p.grad is not None for n, p in parts.items() if n.startswith("representation"))
    assert loss(td.exclude("value_target"))["loss_value"].isfinite()


def test_both_losses_reach_a_shared_trunk():
    loss = TestCategorical().make_shared()
    data = TestCategorical().data(4)
    for term in ("loss_policy", "loss_value"):
        loss.zero_grad()
        with pytest.warns(UserWarning, match="target"):
            loss(data)[term].backward()
        trunk = loss.actor_network_params["module", "0", "module", "0", "module", "weight"]
        assert trunk.grad.any(), term


def test_without_a_critic_the_data_hold_the_advantage():
    _, actor, td = simple()
    loss = MuesliPolicyLoss(actor)
    assert "advantage" in loss.in_keys
    assert set(loss(td).keys()) == set(loss.out_keys)
    assert "loss_value" not in loss.out_keys
    with pytest.raises(KeyError, match="state_value"):
        loss(td.exclude("advantage", "value_target"))


@pytest.mark.parametrize(
    "kind", [None, RetraceEstimator, "instance", ValueEstimators.GAE, ValueEstimators.TD0]
)
def test_any_estimator_can_make_the_advantage(kind):
    contract = TestCategorical()
    loss, data = contract.make(), contract.data(2, 3)
    options = {"gamma": 0.5}
    if kind == "instance":
        kind, options = GAE(gamma=0.5, lmbda=0.9, value_network=critic_of("state_value")), {}
    loss.make_value_estimator(kind, **options)
    assert float(loss.value_estimator.gamma) == 0.5
    loss.set_keys(sample_log_prob="behaviour", advantage="gain")
    data.rename_key_("action_log_prob", "behaviour")
    out = contract.run(loss, data)
    assert all(x.isfinite() for x in out.values())
    assert "gain" not in data
    loss.value_estimator(data)
    assert data["gain"].shape == (2, 3, 1)


def test_a_copy_of_the_loss_estimates_by_its_own_policy():
    contract = TestCategorical()
    data = contract.data(5)
    loss = contract.make()
    expected = contract.run(loss, data)
    copied = deepcopy(loss)
    for p in loss.actor_network_params.parameters():
        p.data.mul_(-20.0)
    assert_close(contract.run(copied, data)["loss_value"], expected["loss_value"])
    moved = contract.run(loss, data)["loss_value"]
    assert not torch.allclose(moved, expected["loss_value"])
    copied.load_state_dict(loss.state_dict())
    assert_close(contract.run(copied, data)["loss_value"], moved)


def test_an_actor_that_is_given_to_the_estimator_is_kept():
    contract = TestCategorical()
    data, other = contract.data(5), actor_of("categorical")
    found = []
    for actor in (other, None):
        loss = contract.make()
        options = {} if actor is None else {"actor_network": actor}
        loss.make_value_estimator(gamma=0.9, **options)
        weight = other.module[0].module.weight.clone()
        found.append(contract.run(loss, data)["loss_value"].item())
        assert torch.equal(other.module[0].module.weight, weight)
    assert found[0] != found[1]


def test_a_target_or_behaviour_with_a_gradient_gets_none():
    contract = TestGivenAdvantage()
    data = contract.data(4)
    names = ("advantage", "value_target", "action_log_prob")
    for name in names:
        data[name].requires_grad_()
    out = contract.run(contract.make(), data)
    (out["loss_policy"] + out["loss_value"]).backward()
    assert all(data[name].grad is None for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scalar_loss": "huber"}, "scalar_loss must be one of None, two_hot, mse, but is 'huber'"),
        ({"scalar_loss": "two_hot"}, "needs a critic that writes 'value_logits'"),
        ({"max_importance_ratio": 0.0}, "max_importance_ratio must be above 0"),
        ({"two_hot_limit": -1.0}, "two_hot_limit must be above 0"),
        ({"advantage_decay": 1.0}, "decay must be in"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MuesliPolicyLoss(actor_of("categorical"), critic_of("state_value"), **options)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"writes 'state_value' or 'value_pred', but .*'other'"):
        MuesliPolicyLoss(actor_of("categorical"), critic_of("other"))
    contract = TestCategorical()
    with pytest.raises(KeyError, match=r"no 'action_log_prob'.*return_log_prob=True"):
        contract.make()(contract.data(3).exclude("action_log_prob"))
    with pytest.raises(NotImplementedError, match="VTrace"):
        contract.make().make_value_estimator(ValueEstimators.VTrace)


def test_an_actor_that_values_states_by_itself_is_run_once(monkeypatch):
    torch.manual_seed(0)
    policy = MuesliPolicy(WorldModel(Specs(Unbounded(4), Categorical(3)), **SMALL))
    critic = policy.module[0]
    data = policy(TensorDict(observation=torch.randn(5, 4), batch_size=[5])).detach()
    data = data.select("observation", "action", "action_log_prob")
    data["advantage"], data["value_target"] = torch.randn(5, 1), torch.randn(5, 1)
    runs, forward = [], type(critic).forward

    def counted(self, *args, **kwargs):
        runs.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(critic), "forward", counted)
    found = []
    for given, expected in ((None, 1), (critic, 2)):
        loss = MuesliPolicyLoss(policy, given)
        runs.clear()
        out = loss(data.clone())
        assert len(runs) == expected
        policy.zero_grad()
        (out["loss_policy"] + out["loss_value"]).backward()
        grads = {
            name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None
        }
        found.append((out["loss_policy"], out["loss_value"], out["explained_variance"], grads))
    assert_close(*found)
