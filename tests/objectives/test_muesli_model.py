"""Muesli's model loss: its targets by hand, its minimum, its errors, and the contract of all."""

from __future__ import annotations

import math

import pytest
import torch
from loss_contract import LossContract
from made_up import OfOneModel, Table, Toy, end, line, sequences, small_model, steps_ahead
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.modules import TanhNormal

from muon_rl.modules import MuesliPolicy, SignedHyperbolicTwoHot
from muon_rl.objectives import CMPOLoss, DynamicsLoss, MuesliModelLoss, OneStepLookahead

TERMS = ("loss_muesli_policy", "loss_muesli_value", "loss_muesli_reward")


class MuesliContract(OfOneModel, LossContract):
    """Where it unrolls for itself."""

    loss = MuesliModelLoss
    reaches = {  # noqa: RUF012
        "loss_muesli_policy": {"encoder", "transition", "policy"},
        "loss_muesli_value": {"encoder", "transition", "value"},
        "loss_muesli_reward": {"encoder", "transition", "reward"},
    }
    writes = set()  # noqa: RUF012
    renames = {  # noqa: RUF012
        "value_target": "wanted", "action": "taken", "unroll_logits": ("ahead", "logits"),
    }  # fmt: skip
    coefficients = {  # noqa: RUF012
        "policy_pred_coef": "loss_muesli_policy", "value_pred_coef": "loss_muesli_value",
        "reward_pred_coef": "loss_muesli_reward",
    }  # fmt: skip

    def divergence(self, loss: MuesliModelLoss, target: TensorDict, out: TensorDict):
        """Return that of one state's target and one prediction."""
        wanted = target["cmpo", "log_prob"]
        return (wanted.exp() * (wanted - out["logits"].log_softmax(-1))).sum()

    @pytest.mark.parametrize("horizon", [1, 3])
    @pytest.mark.parametrize("seen", [True, False])
    def test_ends_of_episodes(self, horizon, seen):
        """Against a loop over states and steps; rewards and values are those of DynamicsLoss."""
        loss = self.make(unroll_steps=3, policy_horizon=horizon, policy_pred_coef=2.0)
        data = end(self.data(2, 7), terminated=((0, 2), (1, 0)), truncated=((0, 4), (1, 3)))
        if not seen:
            data = data.exclude(("next", "cmpo"), ("next", "observation"))
        model, found = loss.world_model, []
        for out, step, following in steps_ahead(model, data, horizon):
            if following is None and seen and not step["next", "terminated"]:
                following = step["next"]
            if following is not None:
                found.append(self.divergence(loss, following, out))
        out = self.run(loss, data)
        policy = torch.stack(found).mean()
        assert_close(out["muesli_policy_loss"], policy.detach())
        assert_close(out["loss_muesli_policy"], 2 * policy)
        beside = DynamicsLoss(model, unroll_steps=3)
        beside.load_state_dict(loss.state_dict(), strict=False)
        others = beside(data.clone())
        assert_close(out["loss_muesli_value"], others["loss_dynamics_returns"])
        assert_close(out["loss_muesli_reward"], others["loss_dynamics_reward"])
        assert_close(out["muesli_model_loss"], sum(out[term] for term in TERMS).detach())


class TestDiscrete(MuesliContract):
    pass


class TestOneHotCrossEntropy(MuesliContract):
    kind = "one-hot"
    options = {"divergence": "cross_entropy"}  # noqa: RUF012

    def divergence(self, loss, target, out):
        return -(target["cmpo", "log_prob"].exp() * out["logits"].log_softmax(-1)).sum()


class TestCurrent(MuesliContract):
    options = {"policy_target": "current"}  # noqa: RUF012

    def data(self, *batch):
        return super().data(*batch).exclude("cmpo", ("next", "cmpo"))

    def divergence(self, loss, target, out):
        model = loss.world_model
        with torch.no_grad():
            state = model.encode(target.select("observation"))["hidden_state"]
            wanted = model.predict(state)["logits"].log_softmax(-1)
        return (wanted.exp() * (wanted - out["logits"].log_softmax(-1))).sum()


class TestContinuous(MuesliContract):
    kind = "box"
    renames = {  # noqa: RUF012
        "value_target": "wanted", "cmpo_action": "to_take", "cmpo_weight": "to_weigh",
    }  # fmt: skip

    def divergence(self, loss, target, out):
        policy = TanhNormal(out["loc"], out["scale"], low=-2.0, high=2.0)
        log_prob = torch.stack([policy.log_prob(a) for a in target["cmpo", "action"]])
        return -(target["cmpo", "weight"] * log_prob).mean()

    def test_keys_can_be_renamed(self):
        """Under "next" too."""
        one, other = self.pair()
        data = self.data(4)
        renamed = data.clone()
        other.set_keys(**self.renames)
        renamed.rename_key_("value_target", "wanted")
        for td in (renamed, renamed["next"]):
            td.rename_key_(("cmpo", "action"), "to_take").rename_key_(
                ("cmpo", "weight"), "to_weigh"
            )
        assert_close(self.run(one, data), self.run(other, renamed))
        with pytest.raises(ValueError, match="not an accepted tensordict key"):
            other.set_keys(nonsense="a")


def uniform(**options) -> MuesliModelLoss:
    """Return a loss whose model says that all of two actions are alike."""
    return MuesliModelLoss(Table(1, 2), **options)


def six(*, terminated: tuple = (), truncated: tuple = ()) -> tuple[TensorDict, list[float]]:
    """Return six steps, and the divergence of the targets of s_0 to s_6 from uniform."""
    p = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
    targets = torch.stack([p, 1 - p], -1).log()
    far = [math.log(2) + float((t.exp() * t).sum()) for t in targets]
    zero = torch.zeros(6, 1)
    now = {"observation": zero, "value_target": zero, "cmpo": {"log_prob": targets[:6]}}
    after = {"observation": zero, "reward": zero, "cmpo": {"log_prob": targets[1:]}}
    return line(now, after, terminated=terminated, truncated=truncated), far


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(
    ("ends", "seen", "states"),
    [
        ({"terminated": (2,)}, True, [1, 2, 2, 4, 5, 6, 5, 6, 6]),
        ({"truncated": (2,)}, True, [1, 2, 3, 2, 3, 3, 4, 5, 6, 5, 6, 6]),
        ({"terminated": (2,)}, False, [1, 2, 2, 4, 5, 5]),
        ({}, True, [1, 2, 3, 2, 3, 4, 3, 4, 5, 4, 5, 6, 5, 6, 6]),
    ],
)
def test_policy_masks_at_an_end(ahead, ends, seen, states):
    """T = 6, an end after step 2, K = 3: the states whose policy is predicted."""
    data, far = six(**ends)
    if not seen:
        data = data.exclude(("next", "cmpo"))
    loss = uniform(unroll_steps=3)
    if ahead:
        DynamicsLoss(loss.world_model, unroll_steps=3)(data)
    out = loss(data)
    expected = sum(far[index] for index in states) / len(states)
    assert_close(out["muesli_policy_loss"], torch.tensor(expected))


def test_one_step_and_no_step():
    data, far = six()
    loss = uniform(unroll_steps=4)
    assert_close(loss(data[2:3])["muesli_policy_loss"], torch.tensor(far[3]))
    data, _ = six(terminated=(2,))
    out = loss(data[2:3])
    assert out["loss_muesli_policy"].item() == 0.0
    sum(out[term] for term in TERMS).backward()
    assert all(p.grad is None or not p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize("kind", ["categorical", "box"])
def test_after_the_dynamics_loss_its_policies_are_trained(kind):
    """The same loss and gradient as of an unroll of its own, and no other loss."""
    torch.manual_seed(0)
    model, data = small_model(kind), sequences(2, 6, kind=kind)
    dynamics, loss = DynamicsLoss(model, policy_horizon=4), MuesliModelLoss(model)
    shorter = MuesliModelLoss(model, policy_horizon=4)
    own = shorter(data)
    own["loss_muesli_policy"].backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dynamics(data)
    out = loss(data)
    assert set(out.keys()) == {"loss_muesli_policy", "muesli_policy_loss", "muesli_model_loss"}
    assert_close(out["loss_muesli_policy"], own["loss_muesli_policy"])
    out["loss_muesli_policy"].backward()
    for key, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (key in gradients)
        if key in gradients:
            assert_close(p.grad, gradients[key])


def test_who_unrolls_can_be_settled():
    torch.manual_seed(0)
    model, data = small_model(), sequences(2, 6)
    alone, after = (MuesliModelLoss(model, own_unroll=own) for own in (True, False))
    with pytest.raises(KeyError, match=r"no \('unroll', 'logits'\)\. DynamicsLoss writes it"):
        after(data)
    own = alone(data.clone())
    DynamicsLoss(model)(data)
    data["unroll", "logits"] = data["unroll", "logits"] + torch.randn(3)
    assert_close(alone(data), own)
    assert set(own.keys()) == set(alone.out_keys) == set(MuesliModelLoss(model).out_keys)
    assert set(own.keys()) >= set(TERMS)
    out = after(data)
    assert set(out.keys()) == set(after.out_keys)
    assert out["muesli_policy_loss"] != own["muesli_policy_loss"]
    flat = {key if isinstance(key, str) else "_".join(key): data[key] for key in after.in_keys}
    assert_close(dict(zip(after.out_keys, after(**flat), strict=True)), out.to_dict())
    assert "value_target" not in flat
    assert not [key for key in after.state_dict() if key.startswith("target_")]


@pytest.mark.parametrize("kind", ["categorical", "box"])
@pytest.mark.parametrize("target", ["cmpo", "current"])
def test_one_that_does_not_unroll_reads_its_in_keys_and_each_of_them(kind, target):
    torch.manual_seed(0)
    data = end(sequences(2, 6, kind=kind), terminated=((0, 2),), truncated=((1, 3),))
    loss = MuesliModelLoss(small_model(kind), own_unroll=False, policy_target=target)
    DynamicsLoss(loss.world_model)(data)
    data["unroll", "mask"][1, 0, 1] = False

    def policy_loss(data: TensorDict):
        torch.manual_seed(1)
        flat = {
            key if isinstance(key, str) else "_".join(key): data[key]
            for key in loss.in_keys
            if key in data.keys(True)
        }
        return dict(zip(loss.out_keys, loss(**flat), strict=True))["muesli_policy_loss"]

    torch.manual_seed(1)
    whole = loss(data.clone())
    assert set(whole.keys()) == set(loss.out_keys)
    assert_close(policy_loss(data), whole["muesli_policy_loss"])
    for key in loss.in_keys:
        try:
            found = policy_loss(data.exclude(key))
        except KeyError:
            continue
        assert not torch.equal(found, whole["muesli_policy_loss"]), key


def test_the_mask_of_the_unroll_is_kept():
    data, far = six()
    loss = uniform(unroll_steps=1)
    DynamicsLoss(loss.world_model, unroll_steps=1)(data)
    data["unroll", "mask"][:5] = False
    assert_close(loss(data)["muesli_policy_loss"], torch.tensor(far[6]))


@pytest.mark.parametrize("kind", ["categorical", "box"])
def test_padding_may_be_nan(kind):
    torch.manual_seed(0)
    model, data = small_model(kind), sequences(3, 4, kind=kind)
    mask = torch.ones(3, 4, 1, dtype=torch.bool)
    mask[0, 2:] = mask[2] = False
    data["collector", "mask"] = mask
    gradients = []
    for _ in range(2):
        model.zero_grad()
        out = MuesliModelLoss(model)(data)
        sum(out[term] for term in TERMS).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        for name, value in data.items(True, True):
            if value.is_floating_point():
                data[name][~mask.squeeze(-1)] = torch.nan
    assert_close(gradients[0], gradients[1])


def test_no_gradient_reaches_the_targets():
    for kind in ("categorical", "box"):
        data = sequences(2, 4, kind=kind)
        leaves = [data["value_target"], *data["cmpo"].values(), *data["next", "cmpo"].values()]
        for x in leaves:
            x.requires_grad_()
        out = MuesliModelLoss(small_model(kind))(data)
        sum(out[term] for term in TERMS).backward()
        assert all(x.grad is None for x in leaves)


def test_the_current_policy_as_target_has_no_gradient():
    """One state after another: the gradient is that of a constant target."""
    torch.manual_seed(0)
    model, data = small_model(), sequences(2, 4)
    loss = MuesliModelLoss(model, policy_target="current")
    loss(data.clone())["loss_muesli_policy"].backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with torch.no_grad():
        for td in (data, data["next"]):
            seen = model.encode(td.select("observation"))["hidden_state"]
            td["cmpo", "log_prob"] = model.predict(seen)["logits"].log_softmax(-1)
    MuesliModelLoss(model)(data)["loss_muesli_policy"].backward()
    assert_close([p.grad for p in model.parameters() if p.grad is not None], found)


def test_many_samples_of_the_current_policy_are_the_policy():
    """Where the model's next state is the same, the cross-entropy is the policy's entropy."""
    torch.manual_seed(0)
    model = small_model("box", latent_norm="none")
    for p in model.dynamics.module.network.parameters():
        p.data.zero_()
    data = sequences(1, 3, kind="box")
    data["observation"][:] = data["next", "observation"][:] = torch.randn(4)
    loss = MuesliModelLoss(model, policy_target="current", num_samples=20_000, unroll_steps=2)
    out = loss(data)
    seen = model.predict(model.encode(data[0, 0].select("observation"))["hidden_state"])
    policy = TanhNormal(seen["loc"], seen["scale"], low=-2.0, high=2.0)
    entropy = -policy.log_prob(policy.sample((100_000,))).mean()
    assert_close(out["muesli_policy_loss"], entropy.detach(), atol=0.02, rtol=0.0)
    # At its minimum, which is flat.
    out["loss_muesli_policy"].backward()
    head = model.prediction.module.policy[-1].bias
    assert head.grad.abs().max() < 0.03


@pytest.mark.parametrize("bins", [None, 61])
def test_the_exact_model_of_a_toy_is_the_minimum(bins):
    torch.manual_seed(0)
    toy = Toy()
    model = toy.exact(bins=None if bins is None else SignedHyperbolicTwoHot(bins))
    loss = MuesliModelLoss(model, unroll_steps=4, dynamics_grad_scale=1.0)
    out = loss(toy.data(16, 8, 3))
    sum(out[term] for term in TERMS).backward()
    assert out["muesli_policy_loss"].abs() < 1e-6
    if bins is None:
        assert out["muesli_model_loss"].abs() < 1e-6
    for p in loss.parameters():
        assert p.grad is not None
        assert p.grad.abs().max() < 1e-4
    with torch.no_grad():
        model.prediction.module.policy.add_(0.1 * torch.randn(4, 2))
    assert loss(toy.data(16, 8, 3))["muesli_policy_loss"] > 1e-4


def test_training_from_random_init_learns_the_toy():
    torch.manual_seed(0)
    before, after = Toy().learned(MuesliModelLoss, 3e-3)
    for key in ("muesli_policy_loss", "muesli_value_loss", "muesli_reward_loss"):
        assert after[key] < 0.03 * before[key]


@pytest.mark.parametrize("kind", ["categorical", "one-hot", "box"])
def test_cmpo_dynamics_and_model_loss_train_one_network(kind):
    torch.manual_seed(0)
    model = small_model(kind)
    data = sequences(2, 6, kind=kind).exclude("cmpo", ("next", "cmpo"))
    losses = [
        CMPOLoss(MuesliPolicy(model), OneStepLookahead(model)),
        DynamicsLoss(model),
        MuesliModelLoss(model),
    ]
    outs = [loss(data) for loss in losses]
    terms = [out[key] for out in outs for key in out.keys() if key.startswith("loss_")]  # noqa: SIM118
    assert len(terms) == 4
    sum(terms).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_is_missing_is_named():
    loss, data = MuesliModelLoss(small_model()), sequences(2, 3)
    missing = r"no \('cmpo', 'log_prob'\)\. CMPOLoss writes it: .* put it first.*'current'"
    with pytest.raises(KeyError, match=missing):
        loss(data.exclude("cmpo"))
    with pytest.raises(KeyError, match="no 'value_target'"):
        loss(data.exclude("value_target"))
    box = sequences(2, 3, kind="box")
    with pytest.raises(KeyError, match=r"\('cmpo', 'weight'\)"):
        MuesliModelLoss(small_model("box"))(box.exclude(("cmpo", "weight")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_target": "prior"}, "policy_target must be one of cmpo, current"),
        ({"divergence": "l2"}, "divergence must be one of kl, cross_entropy"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MuesliModelLoss(Table(1, 2), **options)
