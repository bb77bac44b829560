"""CMPO as a loss: its oracles, its targets, its errors, and the contract of all losses."""

from __future__ import annotations

import math

import pytest
import torch
from loss_contract import LossContract
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torch.testing import assert_close
from torchrl.data import Categorical, Unbounded
from torchrl.modules import (
    MaskedCategorical,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import SoftUpdate

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.objectives import CMPOLoss, OneStepLookahead
from muon_rl.specs import Specs

SMALL = {"latent": 8, "hidden": (8,), "dynamics_hidden": (8,), "head_hidden": (8,)}


def actor_of(kind: str, network: nn.Module | None = None) -> ProbabilisticActor:
    if kind == "tanh":
        body = nn.Sequential(network or nn.Linear(4, 4), NormalParamExtractor())
        module = TensorDictModule(body, ["observation"], ["loc", "scale"])
        return ProbabilisticActor(
            module,
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            distribution_kwargs={"low": -2.0, "high": 2.0},
        )
    module = TensorDictModule(network or nn.Linear(4, 3), ["observation"], ["logits"])
    keys = {"logits": "logits", "mask": "action_mask"} if kind == "masked" else ["logits"]
    classes = {
        "categorical": torch.distributions.Categorical,
        "one-hot": OneHotCategorical,
        "masked": MaskedCategorical,
    }
    return ProbabilisticActor(module, in_keys=keys, distribution_class=classes[kind])


class Values(nn.Module):
    """Of observation and action."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(6, 1)

    def forward(self, observation, action):
        return self.network(torch.cat([observation, action], -1))


class DiscreteContract(LossContract):
    kind = "categorical"
    reaches = {"loss_cmpo": {"actor_network"}}  # noqa: RUF012
    writes = {"cmpo", ("cmpo", "log_prob"), ("next", "cmpo"), ("next", "cmpo", "log_prob")}  # noqa: RUF012
    coefficients = {"kl_coef": "loss_cmpo"}  # noqa: RUF012
    renames = {"value_target": "wanted", "cmpo_log_prob": ("target", "log")}  # noqa: RUF012

    def make(self, **options):
        torch.manual_seed(0)
        q_network = TensorDictModule(nn.Linear(4, 3), ["observation"], ["action_value"])
        loss = CMPOLoss(actor_of(self.kind), q_network, **options)
        SoftUpdate(loss, tau=0.5)
        return self.lagging(loss)

    def lagging(self, loss):
        for p in loss.actor_network_params.parameters():
            p.data.add_(0.5 * torch.randn_like(p))
        return loss

    def make_shared(self):
        trunk = TensorDictModule(nn.Linear(4, 4), ["observation"], ["hidden"])
        head = actor_of(self.kind)
        head.module[0].in_keys = ["hidden"]
        q_head = TensorDictModule(nn.Linear(4, 3), ["hidden"], ["action_value"])
        actor = type(head)(
            TensorDictSequential(trunk, head.module[0]),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
        )
        return CMPOLoss(actor, TensorDictSequential(trunk, q_head))

    def data(self, *batch):
        flags = {key: torch.zeros(*batch, 1, dtype=torch.bool) for key in ("done", "terminated")}
        mask = torch.ones(*batch, 3, dtype=torch.bool)
        mask[..., 1] = torch.rand(batch) > 0.5
        after = {
            "observation": torch.randn(*batch, 4), "action_mask": mask.flip(-1),
            "reward": torch.randn(*batch, 1), **flags,
        }  # fmt: skip
        now = {
            "observation": torch.randn(*batch, 4), "action_mask": mask,
            "value_target": torch.randn(*batch, 1), "next": TensorDict(after, batch),
        }  # fmt: skip
        return TensorDict(now, batch)

    def test_ends_of_episodes(self):
        """They change nothing: the target is of the state that was acted in."""
        one, other = self.pair()
        data, ended = self.data(4), self.data(4)
        ended.update(data.clone())
        ended["next", "terminated"][:2] = ended["next", "done"][:2] = True
        ended["next", "action_mask"][:2] = False
        assert_close(self.run(one, data), self.run(other, ended))

    def test_what_is_written_has_no_gradient_though_the_data_have(self):
        data = self.data(4)
        for td in (data, data["next"]):
            td["observation"].requires_grad_()
        self.run(self.make(), data)["loss_cmpo"].backward()
        found = [x for x in map(data.get, self.writes) if isinstance(x, torch.Tensor)]
        assert len(found) >= 2
        assert not any(x.requires_grad for x in found)


class TestCategorical(DiscreteContract):
    def test_the_next_state_gets_the_target_of_a_state(self):
        loss, data = self.make().eval(), self.data(3, 4)
        self.run(loss, data)
        alone = data["next"].select("observation")
        self.run(loss, alone)
        assert_close(data["next", "cmpo", "log_prob"], alone["cmpo", "log_prob"])
        assert not torch.allclose(data["cmpo", "log_prob"], alone["cmpo", "log_prob"])

    def test_nothing_is_written_where_no_next_state_is_seen(self):
        for data in (self.data(4).exclude("next"), self.data(4).exclude(("next", "observation"))):
            self.run(self.make(), data)
            assert data.get(("next", "cmpo"), None) is None
            assert data.get(("cmpo", "log_prob"), None) is not None
        data = self.data(4)
        self.run(self.make(next_targets=False), data)
        assert data.get(("next", "cmpo"), None) is None


class TestOneHot(DiscreteContract):
    kind = "one-hot"


class TestMasked(DiscreteContract):
    kind = "masked"

    def test_forbidden_actions_are_not_read(self):
        loss, data = self.make(), self.data(6)
        self.run(loss, data)
        for td in (data, data["next"]):
            assert (td["cmpo", "log_prob"][~td["action_mask"]] == -math.inf).all()
            total = td["cmpo", "log_prob"].exp().sum(-1)
            assert_close(total, torch.ones(6))

    def test_a_state_without_actions_adds_nothing(self):
        loss, data = self.make(), self.data(4)
        data["action_mask"][1] = data["next", "action_mask"][2] = False
        out = self.run(loss, data)
        out["loss_cmpo"].backward()
        assert all(value.isfinite() for value in out.values())
        assert all(p.grad.isfinite().all() for p in loss.actor_network_params.parameters())


class TestLookahead(DiscreteContract):
    def make(self, **options):
        torch.manual_seed(0)
        model = WorldModel(Specs(Unbounded(4), Categorical(3)), **SMALL)
        loss = CMPOLoss(actor_of(self.kind), OneStepLookahead(model, gamma=0.9), **options)
        SoftUpdate(loss, tau=0.5)
        return self.lagging(loss)

    def make_shared(self):
        model = WorldModel(Specs(Unbounded(4), Categorical(3)), **SMALL)
        return CMPOLoss(MuesliPolicy(model), OneStepLookahead(model))


class TestContinuous(DiscreteContract):
    kind = "tanh"
    writes = {  # noqa: RUF012
        *("cmpo", ("cmpo", "action"), ("cmpo", "weight"), ("next", "cmpo")),
        *(("next", "cmpo", "action"), ("next", "cmpo", "weight")),
    }
    renames = {  # noqa: RUF012
        "value_target": "wanted", "cmpo_action": ("to", "take"), "cmpo_weight": ("to", "weigh"),
    }  # fmt: skip

    def make(self, **options):
        torch.manual_seed(0)
        q_network = ValueOperator(
            Values(), in_keys=["observation", "action"], out_keys=["state_action_value"]
        )
        loss = CMPOLoss(actor_of(self.kind), q_network, num_samples=5, **options)
        SoftUpdate(loss, tau=0.5)
        return self.lagging(loss)

    def make_shared(self):
        trunk = TensorDictModule(nn.Linear(4, 4), ["observation"], ["hidden"])
        head = actor_of(self.kind)
        head.module[0].in_keys = ["hidden"]
        actor = ProbabilisticActor(
            TensorDictSequential(trunk, head.module[0]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
        )
        q_head = ValueOperator(
            Values(), in_keys=["hidden", "action"], out_keys=["state_action_value"]
        )
        return CMPOLoss(actor, TensorDictSequential(trunk, q_head))

    def test_samples_stand_after_the_batch(self):
        data = self.data(2, 3)
        self.run(self.make(), data)
        for td in (data, data["next"]):
            assert td["cmpo", "action"].shape == (2, 3, 5, 2)
            assert td["cmpo", "weight"].shape == (2, 3, 5)
            assert (td["cmpo", "weight"] > 0).all()


def test_a_value_target_of_several_numbers_is_refused():
    suite = TestCategorical()
    data = suite.data(4)
    data["value_target"] = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"one value target a state, of shape .* has \(4, 2\)"):
        suite.run(suite.make(), data)


@pytest.mark.parametrize("kind", ["categorical", "tanh"])
def test_one_number_a_state_is_refused(kind):
    key = "action_value" if kind == "categorical" else "state_action_value"
    data = TensorDict(observation=torch.randn(5, 4), batch_size=[5])
    number = TensorDictModule(nn.Linear(4, 1), ["observation"], [key])
    with pytest.raises(ValueError, match=rf"one value for each action.*'{key}'.*OneStepLookahead"):
        CMPOLoss(actor_of(kind), number)(data)
    names = ["observation"] if kind == "categorical" else ["observation", "action"]
    other = TensorDictModule(lambda obs, *_: obs, names, ["state_value"])
    with pytest.raises(KeyError, match=f"wrote no '{key}'"):
        CMPOLoss(actor_of(kind), other)(data)
