"""All four losses of Muesli as one, on discrete and on continuous actions."""

from __future__ import annotations

import pytest
import torch
from made_up import ACTIONS, SMALL, sequences, small_model
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.modules import OneHotCategorical, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SoftUpdate

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.objectives import (
    CMPOLoss,
    DynamicsLoss,
    LossSequence,
    MuesliModelLoss,
    MuesliPolicyLoss,
    OneStepLookahead,
)
from muon_rl.optim import build_optimizer
from muon_rl.optim.roles import network_roles

KINDS = ["categorical", "one-hot", "box"]
TERMS = {
    "policy": {"loss_policy", "loss_value"},
    "cmpo": {"loss_cmpo"},
    "dynamics": {"loss_dynamics_reward", "loss_dynamics_returns"},
    "muesli_model": {"loss_muesli_policy"},
}
OWN = {"loss_muesli_policy", "loss_muesli_value", "loss_muesli_reward"}


def networks(kind: str, *, one: bool) -> dict[str, nn.Module]:
    """Return actor, critic and world model: three networks, or one that is all."""
    model = small_model(kind)
    if one:
        policy = MuesliPolicy(model)
        return {"actor": policy, "critic": None, "model": policy}
    if kind == "box":
        body = nn.Sequential(nn.Linear(4, 4), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(body, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            distribution_kwargs={"low": -2.0, "high": 2.0},
        )
    else:
        plain = torch.distributions.Categorical
        actor = ProbabilisticActor(
            TensorDictModule(nn.Linear(4, 3), ["observation"], ["logits"]),
            in_keys=["logits"],
            distribution_class=plain if kind == "categorical" else OneHotCategorical,
        )
    critic = ValueOperator(nn.Linear(4, 1), in_keys=["observation"])
    return {"actor": actor, "critic": critic, "model": model}


def four(actor, critic, model, **options) -> dict:
    return {
        "policy": MuesliPolicyLoss(actor, critic),
        "cmpo": CMPOLoss(actor, OneStepLookahead(model, gamma=0.9)),
        "dynamics": DynamicsLoss(model, unroll_steps=2),
        "muesli_model": MuesliModelLoss(model, unroll_steps=2, **options),
    }


def data_of(kind: str, *batch: int) -> TensorDict:
    data = sequences(*batch, kind=kind).exclude("cmpo", ("next", "cmpo"))
    return data.set("action_log_prob", -torch.rand(batch) - 0.5)


def terms_of(out: TensorDict) -> set[str]:
    return {key for key in out.keys() if key.startswith("loss_")}  # noqa: SIM118


def total(out: TensorDict) -> torch.Tensor:
    return sum(out[key] for key in terms_of(out))


def targets_of(losses: dict) -> dict[tuple[str, str], TensorDict]:
    """Return the target parameters, by the names of the loss and of the network's parameters."""
    return {
        (name, key.removeprefix("target_")): getattr(loss, key)
        for name, loss in losses.items()
        for key, _ in loss.named_children()
        if key.startswith("target_")
    }


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_move_every_network_and_every_target(kind, one):
    parts = networks(kind, one=one)
    losses = four(**parts)
    updates = [SoftUpdate(loss, tau=0.25) for loss in losses.values()]
    sequence = LossSequence(losses)
    held = dict(sequence.named_parameters())
    used = {id(p) for part in parts.values() if part is not None for p in part.parameters()}
    assert {id(p) for p in held.values()} == used
    roles = network_roles(sequence)
    optimizer = build_optimizer(sequence, **{name: {"case": "adamw"} for name in roles})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(held)
    before = {name: p.clone() for name, p in held.items()}
    expected = {key: params.data.clone() for key, params in targets_of(losses).items()}
    assert {key for _, key in expected} == {
        "actor_network_params", "critic_network_params", "q_network_params", "world_model_params",
    }  # fmt: skip
    for _ in range(3):
        out = sequence(data_of(kind, 4, 5))
        assert terms_of(out) == set().union(*TERMS.values())
        optimizer.zero_grad()
        total(out).backward()
        optimizer.step()
        for update in updates:
            update.step()
        for (name, key), target in expected.items():
            target.apply(lambda t, online: t.lerp_(online, 0.25), getattr(losses[name], key).data)
    still = [name for name, p in held.items() if torch.equal(p, before[name])]
    assert not still
    for key, params in targets_of(losses).items():
        assert_close(params.data.to_dict(), expected[key].to_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_restores_them(kind):
    found, state = [], None
    for _ in range(2):
        parts = networks(kind, one=False)
        losses = four(**parts)
        updates = [SoftUpdate(loss, tau=0.25) for loss in losses.values()]
        sequence = LossSequence(losses)
        if state is None:
            optimizer = torch.optim.SGD(sequence.parameters(), lr=0.1)
            total(sequence(data_of(kind, 2, 5))).backward()
            optimizer.step()
            for update in updates:
                update.step()
            state = {key: value.clone() for key, value in sequence.state_dict().items()}
        else:
            assert any(
                not torch.equal(value, state[key]) for key, value in sequence.state_dict().items()
            )
            sequence.load_state_dict(state, strict=True)
        torch.manual_seed(7)
        found.append(sequence(data_of(kind, 2, 5)).to_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_each_can_be_switched_off(kind):
    losses = four(**networks(kind, one=True))
    for loss in losses.values():
        SoftUpdate(loss, tau=0.25)
    sequence = LossSequence(losses)

    def terms() -> set[str]:
        out = sequence(data_of(kind, 2, 5))
        assert set(out.keys()) == set(sequence.out_keys)
        total(out).backward()
        return terms_of(out)

    everything = set().union(*TERMS.values())
    for name in ("policy", "muesli_model"):
        sequence.switch(**{name: False})
        assert terms() == everything - TERMS[name]
        sequence.switch(**{name: True})
    # Without the dynamics loss the model's own unroll trains rewards and values.
    sequence.switch(dynamics=False)
    assert terms() == everything - TERMS["dynamics"] | OWN
    sequence.switch(dynamics=True)
    with pytest.raises(ValueError, match="but that is off: switch cmpo on, or muesli_model off"):
        sequence.switch(cmpo=False)
    sequence.switch(cmpo=False, muesli_model=False)
    assert terms() == TERMS["policy"] | TERMS["dynamics"]
    for name in ("policy", "cmpo", "dynamics"):
        sequence.switch(**{other: other == name for other in losses})
        assert terms() == TERMS[name]
    current = four(**networks(kind, one=True), policy_target="current")["muesli_model"]
    SoftUpdate(current, tau=0.25)
    sequence = LossSequence({"muesli_model": current})
    assert terms() == OWN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", [(), ("dynamics",), ("cmpo", "muesli_model")])
def test_they_run_without_a_tensordict(kind, off):
    losses = four(**networks(kind, one=False))
    for loss in losses.values():
        SoftUpdate(loss, tau=0.25)
    sequence = LossSequence(losses, enabled=dict.fromkeys(off, False))
    data = data_of(kind, 2, 5).select(*sequence.in_keys)
    flat = {key if isinstance(key, str) else "_".join(key): data[key] for key in sequence.in_keys}
    found = []
    for given in ((data.clone(),), ()):
        for loss in losses.values():  # its running moment, as at first
            if hasattr(loss, "normalizer"):
                loss.normalizer.moment.zero_()
                loss.normalizer.weight.zero_()
        torch.manual_seed(1)
        found.append(sequence(*given) if given else sequence(**flat))
    assert set(found[0].keys()) == set(sequence.out_keys)
    assert_close(dict(zip(sequence.out_keys, found[1], strict=True)), found[0].to_dict())


@pytest.mark.parametrize("kind", ["categorical", "box"])
def test_the_order_is_that_of_their_keys(kind):
    losses = four(**networks(kind, one=True))
    for order, first in (
        (["muesli_model", "cmpo"], "cmpo"),
        (["cmpo", "muesli_model", "dynamics"], "dynamics"),
    ):
        with pytest.raises(ValueError, match=f"move {first} before muesli_model"):
            LossSequence({name: losses[name] for name in order})
    with pytest.raises(ValueError, match=r"CMPOLoss writes it: put one before muesli_model"):
        LossSequence({"muesli_model": losses["muesli_model"]})
    losses["cmpo"].next_targets = False
    message = r"reads \('next', 'cmpo', .*'cmpo' \(CMPOLoss\).*build cmpo with next_targets=True"
    with pytest.raises(ValueError, match=message):
        LossSequence(losses)
    # Neither writes nor reads them: the state after the last step has no target, as if unobserved.
    losses["muesli_model"].next_targets = False
    sequence, data = LossSequence(losses), data_of(kind, 2, 5)
    keys = [key for key in sequence.in_keys if key[0] == "next" and key[1] == "cmpo"]
    assert not keys
    found = sequence(data)["loss_muesli_policy"]
    assert ("next", "cmpo") not in data.keys(include_nested=True)
    losses["muesli_model"].next_targets = True
    assert_close(losses["muesli_model"](data)["loss_muesli_policy"], found)
    losses["cmpo"].next_targets = True
    assert not torch.isclose(LossSequence(losses)(data)["loss_muesli_policy"], found)
    losses["muesli_model"].next_targets = False  # they are there, and left alone
    expected = losses["muesli_model"](data.exclude(("next", "cmpo")))["loss_muesli_policy"]
    assert_close(losses["muesli_model"](data)["loss_muesli_policy"], expected)


@pytest.mark.parametrize("kind", ["categorical", "box"])
def test_one_that_always_unrolls_for_itself_stands_anywhere(kind):
    losses = four(**networks(kind, one=True), own_unroll=True)
    for loss in losses.values():
        SoftUpdate(loss, tau=0.25)
    for order in (list(losses), ["cmpo", "muesli_model", "dynamics"]):
        sequence = LossSequence({name: losses[name] for name in order})
        data = data_of(kind, 2, 5)
        out = sequence(data)
        assert set(out.keys()) == set(sequence.out_keys)
        assert terms_of(out) >= OWN | TERMS["dynamics"]
    needs = four(**networks(kind, one=True), own_unroll=False)
    with pytest.raises(ValueError, match="switch dynamics on, or muesli_model off"):
        LossSequence(needs, enabled={"dynamics": False})
    with pytest.raises(ValueError, match=r"DynamicsLoss writes it: put one before muesli_model"):
        LossSequence({name: needs[name] for name in ("cmpo", "muesli_model")})


@pytest.mark.parametrize("kind", KINDS)
def test_the_world_model_may_be_another_of_the_same_keys(kind):
    """Three TensorDictModules are enough; an unroll asks for no method."""

    class Foreign(nn.Module):
        def __init__(self, model: WorldModel) -> None:
            super().__init__()
            self.specs = model.specs
            self.representation, self.dynamics = model.representation, model.dynamics
            self.prediction = model.prediction

    torch.manual_seed(0)
    model = WorldModel(small_model(kind).specs, **SMALL, bins=None)
    assert model.specs.action == ACTIONS[kind]
    data, outs = data_of(kind, 2, 5), []
    for given in (model, MuesliPolicy(model), Foreign(model)):
        losses = {
            "cmpo": CMPOLoss(MuesliPolicy(model), OneStepLookahead(given)),
            "dynamics": DynamicsLoss(given), "muesli_model": MuesliModelLoss(given),
        }  # fmt: skip
        for loss in losses.values():
            SoftUpdate(loss, tau=0.25)
        torch.manual_seed(1)
        outs.append(LossSequence(losses)(data.clone()).to_dict())
    assert_close(outs[0], outs[1])
    assert_close(outs[0], outs[2])
