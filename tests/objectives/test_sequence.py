"""A sequence of losses: the same numbers as by hand, and what goes to all of them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from made_up_losses import fakes
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss, SoftUpdate, ValueEstimators
from torchrl.objectives.value import GAE

from muon_rl.objectives import CMPOLoss, MuesliPolicyLoss
from muon_rl.objectives.sequence import LossSequence
from muon_rl.optim import build_optimizer
from muon_rl.optim.roles import network_roles, parameter_roles


def networks(*, trunk: bool = False):
    torch.manual_seed(0)
    first = nn.Linear(4, 6)
    parts = [TensorDictModule(first if trunk else nn.Linear(4, 6), ["observation"], [f"h{i}"])
             for i in range(3)]  # fmt: skip
    heads = [
        TensorDictModule(nn.Linear(6, 3), ["h0"], ["logits"]),
        ValueOperator(nn.Linear(6, 1), in_keys=["h1"]),
        TensorDictModule(nn.Linear(6, 3), ["h2"], ["action_value"]),
    ]
    actor, critic, q_network = map(TensorDictSequential, parts, heads)
    actor = ProbabilisticActor(
        actor,
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return actor, critic, q_network


def real(first=ClipPPOLoss, *, trunk: bool = False):
    actor, critic, q_network = networks(trunk=trunk)
    losses = {"policy": first(actor, critic), "cmpo": CMPOLoss(actor, q_network)}
    if first is ClipPPOLoss:
        losses["policy"].make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.9)
    return losses


def targets(losses):
    found = [losses["cmpo"]]
    if isinstance(losses["policy"], MuesliPolicyLoss):
        found.append(losses["policy"])
    return [SoftUpdate(loss, tau=0.1) for loss in found]


def rollout(*batch):
    torch.manual_seed(5)
    flags = {key: torch.zeros(*batch, 1, dtype=torch.bool) for key in ("done", "terminated")}
    after = {"observation": torch.randn(*batch, 4), "reward": torch.randn(*batch, 1), **flags}
    now = {
        "observation": torch.randn(*batch, 4), "action": torch.randint(3, batch),
        "action_log_prob": -torch.rand(batch) - 0.5, "next": TensorDict(after, batch),
    }  # fmt: skip
    return TensorDict(now, batch)


def total(out):
    return sum(value for key, value in out.items() if key.startswith("loss_"))


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("first", [ClipPPOLoss, MuesliPolicyLoss])
def test_it_equals_the_losses_by_hand_to_the_bit(first, trunk):
    hand, inside = real(first, trunk=trunk), real(first, trunk=trunk)
    sequence = LossSequence(inside)
    updates, others = targets(hand), targets(inside)
    optimizers = [
        torch.optim.SGD(nn.ModuleList(hand.values()).parameters(), lr=0.1),
        torch.optim.SGD(sequence.parameters(), lr=0.1),
    ]
    for step in range(3):
        data, same = rollout(6), rollout(6)
        torch.manual_seed(step)
        one = {k: v for loss in hand.values() for k, v in loss(data).items()}
        torch.manual_seed(step)
        other = sequence(same)
        assert set(one) == set(other.keys())
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert (data == same).all()
        assert torch.equal(data["cmpo", "log_prob"], same["cmpo", "log_prob"])
        for optimizer, out in zip(optimizers, (one, other), strict=True):
            optimizer.zero_grad()
            total(out).backward()
            optimizer.step()
        for update in (*updates, *others):
            update.step()
    for left, right in zip(hand.values(), inside.values(), strict=True):
        for name, value in left.state_dict().items():
            assert torch.equal(value, right.state_dict()[name]), name


@pytest.mark.parametrize("first", [ClipPPOLoss, MuesliPolicyLoss])
@pytest.mark.parametrize("trunk", [False, True])
def test_an_optimizer_of_ours_trains_each_network_once(first, trunk):
    losses = real(first, trunk=trunk)
    sequence = LossSequence(losses)
    updates = targets(losses)
    expected = {"actor", "critic", "trunk"} if trunk else {"actor", "critic"}
    roles = network_roles(sequence)
    config = {"case": "muon", "muon": {"apply_first_layer": True, "apply_last_layer": True}}
    # Nothing of q_network gets a gradient here, and so nothing of it moves.
    assert set(roles) == {*expected, "q"}
    optimizer = build_optimizer(sequence, **dict.fromkeys(roles, config))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held) == len(list(sequence.parameters()))
    alone = parameter_roles(sequence)
    assert set(alone) == {name for name, _ in sequence.named_parameters()}
    before = [p.clone() for p in held]
    for _ in range(2):
        optimizer.zero_grad()
        total(sequence(rollout(8))).backward()
        optimizer.step()
        for update in updates:
            update.step()
    groups = [
        group["name"].split("/")[0] for group in optimizer.param_groups for _ in group["params"]
    ]
    for network, p, b in zip(groups, held, before, strict=True):
        assert torch.equal(p, b) == (network == "q"), network


@pytest.mark.parametrize("first", [ClipPPOLoss, MuesliPolicyLoss])
def test_the_state_dict_and_a_copy_restore_it(first):
    losses = real(first)
    sequence, updates = LossSequence(losses), targets(losses)
    for p in sequence.parameters():
        p.data.add_(0.1)
    sequence(rollout(6))
    updates[0].step()
    others = real(first)
    other = LossSequence(others)
    targets(others)
    other.load_state_dict(sequence.state_dict(), strict=True)
    copied = deepcopy(sequence)
    found = []
    for each in (sequence, other, copied):
        torch.manual_seed(0)
        found.append(each(rollout(6)))
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key
        assert torch.equal(value, found[2][key]), key


def test_one_soft_update_a_loss():
    losses = real(MuesliPolicyLoss)
    sequence = LossSequence(losses)
    with pytest.raises(RuntimeError, match="Did not find any target parameters"):
        SoftUpdate(sequence, tau=0.5)
    updates = targets(losses)
    start = losses["policy"].target_critic_network_params.clone()
    for p in sequence.parameters():
        p.data.add_(1.0)
    for update in updates:
        update.step()
    moved = losses["policy"].target_critic_network_params.data - start.data
    assert all((x - 0.1).abs().max() < 1e-6 for x in moved.values(True, True))


def test_it_runs_without_a_tensordict_on_several_axes():
    for enabled, terms in (({}, 3), ({"policy": False}, 1)):
        losses = real(MuesliPolicyLoss)
        sequence = LossSequence(losses, enabled=enabled)
        targets(losses)
        data = rollout(2, 4)
        expected = LossSequence(deepcopy(losses), enabled=enabled)(data.clone())
        flat = {
            key if isinstance(key, str) else "_".join(key): data[key] for key in sequence.in_keys
        }
        found = sequence(**flat)
        for key, value in zip(sequence.out_keys, found, strict=True):
            torch.testing.assert_close(value, expected[key])
        assert sum(key.startswith("loss_") for key in sequence.out_keys) == terms
    sequence.select_out_keys("loss_cmpo")
    sequence(**flat).backward()


def test_only_a_batch_without_a_size_is_given_one():
    """By name, TorchRL's dispatch knows of none; what the caller has chosen stays."""
    sequence = LossSequence(fakes("cmpo"))
    for batch in ([], [2], [2, 5]):
        flags = {"done": torch.zeros(2, 5, 1, dtype=torch.bool)}
        data = TensorDict({"observation": torch.randn(2, 5, 4), "next": flags}, batch)
        sequence(data)
        assert data.batch_size == torch.Size(batch or [2, 5])
    data = TensorDict({"observation": torch.randn(2, 5, 4)})
    sequence(data)
    assert data.batch_size == ()


def test_a_policy_is_no_part_of_the_loss():
    policy = TensorDictModule(nn.Linear(4, 2), ["observation"], ["action"])
    sequence = LossSequence(fakes("cmpo"), policy=policy)
    assert sequence.policy is policy
    assert len(list(sequence.parameters())) == 1
    assert not any("policy" in key for key in sequence.state_dict())


def test_value_estimators_go_to_those_that_estimate():
    losses = real(ClipPPOLoss)
    sequence = LossSequence(losses)
    assert sequence.make_value_estimator(gamma=0.5) is sequence
    assert float(losses["policy"].value_estimator.gamma) == 0.5
    assert sequence.value_estimator is losses["policy"].value_estimator
    gae = GAE(gamma=0.7, lmbda=0.9, value_network=networks()[1])
    sequence.make_value_estimator(gae)
    assert losses["policy"].value_estimator is gae
    two = LossSequence({"ppo": losses["policy"], "muesli": real(MuesliPolicyLoss)["policy"]},
                       enabled={"muesli": False})  # fmt: skip
    with pytest.raises(ValueError, match=r"serves one loss, but ppo, muesli estimate"):
        two.make_value_estimator(gae)
    with pytest.raises(ValueError, match="there are ppo, muesli: ask"):
        _ = two.value_estimator
    two.make_value_estimator(gamma=0.3)
    assert {float(loss.value_estimator.gamma) for loss in two.losses.values()} == {
        float(torch.tensor(0.3))
    }
    with pytest.raises(ValueError, match="No loss of the sequence estimates"):
        LossSequence(fakes("cmpo")).make_value_estimator(gamma=0.5)
    with pytest.raises(ValueError, match="there are none"):
        _ = LossSequence({"cmpo": losses["cmpo"]}).value_estimator


def test_what_goes_to_all_goes_into_a_sequence_within():
    losses = real(MuesliPolicyLoss)
    inner = LossSequence({"cmpo": losses["cmpo"]})
    outer = LossSequence({"inner": inner, "policy": losses["policy"]})
    outer.set_keys(value_target="wanted", cmpo_log_prob="better")
    assert {loss.tensor_keys.value_target for loss in losses.values()} == {"wanted"}
    assert losses["cmpo"].tensor_keys.cmpo_log_prob == "better"
    outer.make_value_estimator(gamma=0.5)
    assert float(outer.value_estimator.gamma) == 0.5
    outer = LossSequence(
        {"inner": LossSequence({"policy": losses["policy"]}), "cmpo": losses["cmpo"]}
    )
    outer.make_value_estimator(gamma=0.25)
    assert float(losses["policy"].value_estimator.gamma) == 0.25
    two = LossSequence(
        {"inner": outer.losses["inner"], "ppo": real(ClipPPOLoss)["policy"]}, enabled={"ppo": False}
    )
    with pytest.raises(ValueError, match=r"there are inner\.policy, ppo: ask"):
        _ = two.value_estimator
    targets(losses)
    data = rollout(2, 4)
    total(outer(data)).backward()
    assert "better" in data


def test_keys_that_break_a_sequence_within_are_refused():
    inner = LossSequence(fakes("cmpo", "dynamics", "muesli_model"))
    outer = LossSequence({"inner": inner})
    outer.check()
    inner.losses["muesli_model"].set_keys(cmpo_log_prob=("my", "target"))
    with pytest.raises(ValueError, match=r"'muesli_model' reads .*'my', 'target'"):
        outer.check()
    outer.set_keys(cmpo_log_prob=("my", "target"))


def test_masks_and_resets_go_to_all():
    losses = real(MuesliPolicyLoss)
    sequence = LossSequence(losses)
    targets(losses)
    data = rollout(2, 4)
    data["valid"] = torch.zeros(2, 4, 1, dtype=torch.bool)
    sequence.loss_mask_key = "valid"
    out = sequence(data)
    assert [out[key].item() for key in ("loss_policy", "loss_value", "loss_cmpo")] == [0, 0, 0]
    assert sequence.loss_mask_key == "valid"
    before = [p.clone() for p in sequence.parameters()]
    sequence.reset_parameters_recursive()
    assert not any(torch.equal(p, b) for p, b in zip(sequence.parameters(), before, strict=True))
    sequence.loss_mask_key = None
    sequence.set_vmap_randomness("different")
    assert {loss.vmap_randomness for loss in losses.values()} == {"different"}
    assert all(value.isfinite() for value in sequence(data).values())


def test_a_move_keeps_what_the_losses_share():
    losses = real(MuesliPolicyLoss, trunk=True)
    sequence, updates = LossSequence(losses), targets(losses)
    count = len(list(sequence.parameters()))
    sequence.double()
    assert len(list(sequence.parameters())) == count
    for p in sequence.parameters():
        p.data.add_(1.0)
    data = rollout(5).apply(lambda x: x.double() if x.is_floating_point() else x)
    total(sequence(data)).backward()
    for update in updates:
        update.step()
    one, other = (dict(losses[name].actor_network_params.items(True, True)) for name in losses)
    assert all(torch.equal(one[key], other[key]) for key in one)
