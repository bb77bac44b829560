"""A sequence of losses: order by keys, switches, and the same numbers as by hand."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss, LossModule, SoftUpdate, ValueEstimators
from torchrl.objectives.value import GAE

from muon_rl.objectives import (
    CMPOLoss,
    MuesliPolicyLoss,
)
from muon_rl.objectives.acting import next_key
from muon_rl.objectives.sequence import LossSequence
from muon_rl.optim import build_optimizer
from muon_rl.optim.roles import network_roles, parameter_roles


class Fake(LossModule):
    """Reads and writes what it is told, and adds the mean of the data to a parameter."""

    @dataclass
    class _AcceptedKeys:
        cmpo_log_prob: tuple = ("cmpo", "log_prob")

    default_keys = _AcceptedKeys

    def __init__(self, term, reads=(), writes=(), metrics=()):
        super().__init__()
        self.term, self.reads, self.writes = term, reads, writes
        self.out_keys = [f"loss_{term}", *metrics]
        self.weight = nn.Parameter(torch.ones(()))

    def named(self, names):
        return [vars(self.tensor_keys).get(name, name) for name in names]

    @property
    def in_keys(self):
        return ["observation", *self.named(self.reads)]

    @property
    def written_keys(self):
        return self.named(self.writes)

    def forward(self, tensordict):
        total = sum(tensordict.get(key).mean() for key in self.in_keys)
        for key in self.written_keys:
            tensordict.set(key, tensordict["observation"] + 1.0)
        out = {key: total.detach() for key in self.out_keys}
        return TensorDict({**out, f"loss_{self.term}": self.weight * total}, [])


class CMPO(Fake):
    def __init__(self, *, next_targets=True):
        super().__init__("cmpo", writes=["cmpo_log_prob"])
        self.next_targets = next_targets

    @property
    def written_keys(self):
        now = super().written_keys
        return [*now, *(map(next_key, now) if self.next_targets else ())]


class Unrolls(Fake):
    @dataclass
    class _AcceptedKeys(Fake._AcceptedKeys):
        cmpo_log_prob: tuple = ("cmpo", "log_prob")
        unroll_logits: tuple = ("unroll", "logits")

    default_keys = _AcceptedKeys


class Dynamics(Unrolls):
    def __init__(self):
        super().__init__("dynamics", writes=["unroll_logits"])


class Model(Unrolls):
    def __init__(self):
        super().__init__("model", reads=["cmpo_log_prob", "unroll_logits"])


class Alone(Unrolls):
    """Reads an unroll where one is, and else the reward and returns a term more."""

    def __init__(self):
        super().__init__("model", reads=["cmpo_log_prob", "reward"], metrics=["entropy"])

    def keys_after(self, written):
        unroll = self.tensor_keys.unroll_logits
        if unroll not in written:
            return self.in_keys, self.out_keys
        return ["observation", *self.named(["cmpo_log_prob"]), unroll], ["loss_model"]


def td(*batch):
    torch.manual_seed(3)
    return TensorDict(observation=torch.randn(*batch, 4), batch_size=batch)


RIGHT = ["cmpo", "dynamics", "muesli_model"]


def fakes(*names):
    made = {"cmpo": CMPO, "dynamics": Dynamics, "muesli_model": Model}
    return {name: made[name]() for name in names}


@pytest.mark.parametrize("order", [RIGHT, ["dynamics", "cmpo", "muesli_model"]])
def test_the_right_orders_run(order):
    sequence = LossSequence(fakes(*order))
    out = sequence(td(5))
    assert set(out.keys()) == {"loss_cmpo", "loss_dynamics", "loss_model"} == set(sequence.out_keys)
    assert sequence.in_keys == ["observation"]
    assert all(value.requires_grad for value in out.values())


@pytest.mark.parametrize(
    ("order", "key", "first"),
    [
        (["muesli_model", "cmpo", "dynamics"], r"\('cmpo', 'log_prob'\)", "cmpo"),
        (["dynamics", "muesli_model", "cmpo"], r"\('cmpo', 'log_prob'\)", "cmpo"),
        (["cmpo", "muesli_model", "dynamics"], r"\('unroll', 'logits'\)", "dynamics"),
    ],
)
def test_each_wrong_order_is_refused(order, key, first):
    message = rf"'muesli_model' reads {key}, which '{first}' .* writes later: move {first} before"
    with pytest.raises(ValueError, match=message):
        LossSequence(fakes(*order))


@pytest.mark.parametrize(
    ("order", "key", "producer"),
    [
        (["dynamics", "muesli_model"], r"\('cmpo', 'log_prob'\)", "CMPOLoss"),
        (["cmpo", "muesli_model"], r"\('unroll', 'logits'\)", "DynamicsLoss"),
    ],
)
def test_a_missing_producer_is_named(order, key, producer):
    message = rf"{key}, which no loss .* writes\. {producer} writes it: put one before muesli_model"
    with pytest.raises(ValueError, match=message):
        LossSequence(fakes(*order))


def test_a_producer_that_is_off_is_named():
    message = r"'cmpo' \(CMPO\) writes, but that is off: switch cmpo on, or muesli_model off"
    with pytest.raises(ValueError, match=message):
        LossSequence(fakes(*RIGHT), enabled={"cmpo": False})
    sequence = LossSequence(fakes(*RIGHT))
    with pytest.raises(ValueError, match=message):
        sequence.switch(cmpo=False)
    assert sequence.enabled == dict.fromkeys(RIGHT, True)
    sequence.switch(cmpo=False, muesli_model=False)
    assert set(sequence(td(5)).keys()) == {"loss_dynamics"} == set(sequence.out_keys)
    sequence.switch(cmpo=True, muesli_model=True)
    assert len(sequence(td(5)).keys()) == 3
    sequence.enabled["cmpo"] = False
    assert sequence.enabled["cmpo"]


def test_a_loss_that_can_unroll_for_itself_stands_after_an_unroll_or_without_one():
    losses = {"cmpo": CMPO(), "muesli_model": Alone()}
    sequence = LossSequence(losses)
    assert sequence.in_keys == ["observation", "reward"]
    assert sequence.out_keys == ["loss_cmpo", "loss_model", "entropy"]
    after = {**losses, "dynamics": Dynamics()}
    with pytest.raises(ValueError, match=r"'logits'.* move dynamics before muesli_model"):
        LossSequence(after)
    assert LossSequence(after, enabled={"dynamics": False}).in_keys == ["observation", "reward"]
    before = LossSequence({"dynamics": Dynamics(), **losses})
    assert before.in_keys == ["observation"]
    assert before.out_keys == ["loss_dynamics", "loss_cmpo", "loss_model"]
    before.switch(dynamics=False)
    assert before.in_keys == ["observation", "reward"]
    # What comes from without counts too, and is read from there.
    read, returned = before.keys_after([("unroll", "logits")])
    assert read == ["observation", ("unroll", "logits")]
    assert returned == ["loss_cmpo", "loss_model"]
    # A name that is not returned is none that two could have.
    metric = Fake("other", metrics=["entropy"])
    LossSequence({"dynamics": Dynamics(), **losses, "other": metric})
    with pytest.raises(ValueError, match="Both 'muesli_model' and 'other' return 'entropy'"):
        LossSequence({**losses, "other": metric})


def test_targets_of_the_next_state_that_are_not_written_are_missed():
    ahead = ("next", "cmpo", "log_prob")
    losses = {"cmpo": CMPO(next_targets=False), "reader": Fake("reader", reads=[ahead])}
    message = (
        r"'reader' reads \('next', 'cmpo', 'log_prob'\), but 'cmpo' \(CMPO\) writes "
        r"\('cmpo', 'log_prob'\) alone: build cmpo with next_targets=True"
    )
    with pytest.raises(ValueError, match=message):
        LossSequence(losses)
    with pytest.raises(ValueError, match=r"no loss of the sequence writes\. CMPOLoss writes it"):
        LossSequence(losses, enabled={"cmpo": False})
    LossSequence({**losses, "cmpo": CMPO()})
    LossSequence({**losses, "reader": Fake("reader", reads=["cmpo_log_prob"])})


def test_renamed_keys_count():
    losses = fakes(*RIGHT)
    losses["cmpo"].set_keys(cmpo_log_prob=("my", "target"))
    message = r"CMPOLoss writes it.*'cmpo' writes \('my', 'target'\).*set_keys"
    with pytest.raises(ValueError, match=message):
        LossSequence(losses)
    losses["muesli_model"].set_keys(cmpo_log_prob=("my", "target"))
    sequence = LossSequence(losses)
    data = td(5)
    sequence(data)
    assert data.get(("my", "target"), None) is not None
    assert data.get("cmpo", None) is None
    with pytest.raises(ValueError, match=r"reads \('my', 'target'\).*move cmpo before"):
        LossSequence({name: losses[name] for name in reversed(losses)})
    sequence.set_keys(cmpo_log_prob=("yours", "target"))
    assert {loss.tensor_keys.cmpo_log_prob for loss in losses.values()} == {("yours", "target")}
    losses["cmpo"].set_keys(cmpo_log_prob="lost")
    with pytest.raises(ValueError, match="no loss of the sequence writes"):
        sequence.check()
    with pytest.raises(ValueError, match="nonsense is not an accepted tensordict key of any"):
        sequence.set_keys(nonsense="a")


def test_what_the_data_hold_are_the_in_keys():
    reader = Fake("reader", reads=["reward", "cmpo_log_prob", ("next", "cmpo", "log_prob")])
    sequence = LossSequence({"cmpo": CMPO(), "reader": reader})
    assert sequence.in_keys == ["observation", "reward"]
    sequence.switch(reader=False)
    assert sequence.in_keys == ["observation"]


@pytest.mark.parametrize("key", ["hidden_state", "value_pred", "logits", "scale", "reward_pred"])
def test_a_policy_that_lacks_a_key_of_the_world_model_is_refused(key):
    actor = TensorDictModule(nn.Linear(4, 2), ["observation"], ["action"])
    losses = {"reader": Fake("reader", reads=[key])}
    with pytest.raises(
        ValueError, match=rf"'reader' reads '{key}'.*WorldModel.*before reader reads"
    ):
        LossSequence(losses, policy=actor)
    able = TensorDictModule(nn.Linear(4, 2), ["observation"], [key])
    assert key in LossSequence(losses, policy=able).in_keys
    LossSequence(losses)  # by whom the data were made is not known
    losses["reader"].__dict__["actor_network"] = actor
    with pytest.raises(ValueError, match="neither a loss nor the policy writes"):
        LossSequence(losses)
    writer = Fake("writer", writes=[key])
    LossSequence({"writer": writer, **losses})


def test_two_of_one_name_are_refused():
    with pytest.raises(ValueError, match="Both 'one' and 'two' return 'loss_same'"):
        LossSequence({"one": Fake("same"), "two": Fake("same")})
    pair = {"one": Fake("a", metrics=["entropy"]), "two": Fake("b", metrics=["entropy"])}
    with pytest.raises(ValueError, match="Both 'one' and 'two' return 'entropy'"):
        LossSequence(pair)
    sequence = LossSequence(pair, enabled={"two": False})
    with pytest.raises(ValueError, match="'entropy'"):
        sequence.switch(two=True)
    pair["two"].out_keys = ["loss_b"]  # as TorchRL's PPO, which does not say all
    sequence.switch(two=True)
    pair["two"].forward = lambda tensordict: TensorDict(entropy=torch.zeros(()))
    with pytest.raises(ValueError, match="Both 'one' and 'two' return 'entropy'"):
        sequence(td(2))


def test_mistakes_in_names_are_refused():
    with pytest.raises(ValueError, match="at least one loss, but has none"):
        LossSequence({})
    with pytest.raises(ValueError, match="No loss is named cmop; there are cmpo, dynamics"):
        LossSequence(fakes("cmpo", "dynamics"), enabled={"cmop": False})
    with pytest.raises(ValueError, match="all are off"):
        LossSequence(fakes("cmpo"), enabled={"cmpo": False})
    with pytest.raises(TypeError, match="'net' is a Linear"):
        LossSequence({"net": nn.Linear(2, 2)})


# -- with real losses ------------------------------------------------------------------------------


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
