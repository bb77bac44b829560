"""CMPO's oracles, as losses and gradients, and what it refuses."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torch.testing import assert_close
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SoftUpdate

from muon_rl.objectives import CMPOLoss


def table(prior, policy, q_value, v=None, **options) -> tuple[CMPOLoss, TensorDict]:
    """Return a loss of scale 1 whose prior, policy and values are the given numbers."""
    actions = len(prior)
    line = nn.Linear(1, actions, bias=False)
    line.weight.data = torch.tensor(prior).log().unsqueeze(-1)
    actor = ProbabilisticActor(
        TensorDictModule(line, ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    number = nn.Linear(1, actions, bias=False)
    number.weight.data = torch.tensor(q_value).unsqueeze(-1)
    q_network = TensorDictModule(number, ["observation"], ["action_value"])
    if v is not None:
        constant = nn.Linear(1, 1, bias=False)
        constant.weight.data.fill_(v)
        q_network.out_keys = [("prior", "action_value")]
        state = TensorDictModule(constant, ["observation"], [("prior", "state_value")])
        q_network = TensorDictSequential(q_network, state)
    loss = CMPOLoss(actor, q_network, **options).eval()
    if loss.use_target_network:
        SoftUpdate(loss, tau=0.1)
    line.weight.data.copy_(torch.tensor(policy).log().unsqueeze(-1))
    return loss, TensorDict(observation=torch.ones(1, 1), batch_size=[1])


def weight_of(loss: CMPOLoss) -> torch.Tensor:
    (weight,) = loss.actor_network_params.parameters()
    return weight


def test_oracle_two_actions():
    loss, data = table([0.5, 0.5], [0.5, 0.5], [1.0, -1.0])
    out = loss(data)
    assert data["cmpo", "log_prob"].exp()[0].tolist() == pytest.approx([0.880797, 0.119203])
    assert out["loss_cmpo"].item() == pytest.approx(0.327813, abs=1e-6)
    assert out["cmpo_tv"].item() == pytest.approx(0.380797, abs=1e-6)


@pytest.mark.parametrize("divergence, wanted", [("kl", 0.659690), ("cross_entropy", 1.393885)])
@pytest.mark.parametrize("kl_coef", [1.0, 0.3])
def test_oracle_three_actions(divergence, wanted, kl_coef):
    loss, data = table(
        [0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.5, -0.25, -3.0], 0.0, divergence=divergence,
        kl_coef=kl_coef,
    )  # fmt: skip
    out = loss(data)
    out["loss_cmpo"].backward()
    target = data["cmpo", "log_prob"].exp()[0].tolist()
    assert target == pytest.approx([0.728506, 0.206473, 0.065021], abs=1e-6)
    assert out["cmpo_kl_loss"].item() == pytest.approx(wanted, abs=1e-6)
    assert out["cmpo_kl"].item() == pytest.approx(0.659690, abs=1e-6)
    for key in ("loss_cmpo", "cmpo_loss"):
        assert out[key].item() == pytest.approx(kl_coef * wanted, abs=1e-6)
    gradient = (weight_of(loss).grad.squeeze(-1) / kl_coef).tolist()
    assert gradient == pytest.approx([-0.528506, 0.293527, 0.234979], abs=1e-6)
    adv_mean, square = 0.25 - 0.075 - 0.6, 0.125 + 0.01875 + 1.8
    assert out["cmpo_adv_mean"].item() == pytest.approx(adv_mean)
    assert out["cmpo_adv_std"].item() == pytest.approx(math.sqrt(square - adv_mean**2))


def test_the_value_of_a_q_network_is_its_mean_under_the_prior():
    """v = .25 - .075 - .6; the last advantage is clipped."""
    loss, data = table([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.5, -0.25, -3.0])
    assert loss(data)["cmpo_adv_mean"].item() == pytest.approx(0.0, abs=1e-6)
    shares = [p * math.exp(x) for p, x in ((0.5, 0.925), (0.3, 0.175), (0.2, -1.0))]
    wanted = [share / sum(shares) for share in shares]
    assert data["cmpo", "log_prob"].exp()[0].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("c, wanted", [(0.5, 0.244919), (1.0, 0.462117), (2.0, 0.761594)])
def test_the_policy_moves_by_at_most_tanh_half_clip(c, wanted):
    low = 1 / (1 + math.exp(c))
    bounds = {"advantage_clip_min": -c, "advantage_clip_max": c}
    loss, data = table([low, 1 - low], [0.5, 0.5], [1e9, -1e9], 0.0, **bounds)
    assert loss(data)["cmpo_tv"].item() == pytest.approx(wanted, abs=1e-6)
    for seed in range(20):
        torch.manual_seed(seed)
        prior, q_value = torch.randn(4).softmax(0).tolist(), (5 * torch.randn(4)).tolist()
        loss, data = table(prior, prior, q_value, **bounds)
        assert loss(data)["cmpo_tv"].item() <= wanted + 1e-6


def test_a_lagging_prior_teaches_only_what_differs_between_actions():
    loss, data = table([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [7.0, 7.0, 7.0])
    loss(data)["loss_cmpo"].backward()
    assert_close(data["cmpo", "log_prob"].exp()[0], torch.tensor([0.5, 0.3, 0.2]))
    alone = weight_of(loss).grad.clone()
    loss, data = table([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [7.0, 7.0, 7.0])
    loss(data)["loss_cmpo"].backward()
    assert_close(weight_of(loss).grad, torch.zeros(3, 1))
    loss, data = table([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [9.0, 7.0, 5.0])
    loss(data)["loss_cmpo"].backward()
    assert (weight_of(loss).grad - alone).abs().max() > 0.1


def test_the_prior_follows_the_actor_at_the_rate_of_soft_update():
    loss, data = table([0.5, 0.5], [0.5, 0.5], [1.0, -1.0])
    target = SoftUpdate(loss, tau=0.1)
    start = weight_of(loss).data.clone()
    expected = start.clone()
    for step in range(10):
        weight_of(loss).data.copy_(start + torch.tensor([[step + 1.0], [-2.0 * step]]))
        target.step()
    rates = torch.tensor([0.1 * 0.9 ** (9 - step) for step in range(10)])
    steps = torch.arange(10.0)
    expected += torch.stack([(rates * (steps + 1)).sum(), (rates * -2 * steps).sum()]).unsqueeze(-1)
    loss.q_network_params.data.apply_(lambda x: x.zero_())
    loss.target_q_network_params.data.apply_(lambda x: x.zero_())
    loss(data)
    assert_close(data["cmpo", "log_prob"][0], expected.squeeze(-1).log_softmax(-1))


def test_without_targets_the_actor_is_its_own_prior():
    loss, data = table([0.5, 0.5], [0.9, 0.1], [2.0, 2.0], use_target_network=False)
    assert loss(data)["loss_cmpo"].item() == pytest.approx(0.0, abs=1e-7)
    assert not [name for name, _ in loss.named_children() if name.startswith("target_")]


def test_the_scale_is_that_of_value_targets_or_of_advantages():
    loss, data = table([0.5, 0.5], [0.5, 0.5], [3.0, -3.0], 0.0)
    loss.train()
    assert deepcopy(loss)(data)["cmpo_adv_variance_ema"].item() == pytest.approx(9.0)
    data["value_target"] = torch.tensor([[4.0]])
    assert loss(data)["cmpo_adv_variance_ema"].item() == pytest.approx(16.0)
    assert data["cmpo", "log_prob"].exp()[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1.5)))


def test_the_behaviour_and_the_uniform_policy_mix_into_the_prior():
    shares = (0.967, 0.03, 0.003)
    loss, data = table([0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.0] * 3, prior_mixture=shares)
    with pytest.raises(KeyError, match=r"hold no 'logits'.*set_keys"):
        loss(data)
    data["logits"] = torch.tensor([[0.2, 0.2, 0.6]]).log() + 3.0
    loss(data)
    wanted = [0.967 * p + 0.03 * b + 0.001 for p, b in ((0.7, 0.2), (0.2, 0.2), (0.1, 0.6))]
    assert data["cmpo", "log_prob"].exp()[0].tolist() == pytest.approx(wanted)
    # By keyword, a TorchRL loss is given what its in_keys name.
    assert "logits" in loss.in_keys
    by_keyword = loss(**{key: data[key] for key in loss.in_keys})
    assert by_keyword[0].item() == loss(data)["loss_cmpo"].item() > 0
    assert "logits" not in table([1.0], [1.0], [0.0], prior_mixture=(0.9, 0.0, 0.1))[0].in_keys


def test_samples_estimate_the_cross_entropy_to_the_reweighted_prior():
    """The oracle is a quadrature; adv is the action itself, v its mean, 0."""
    policy = nn.Linear(1, 2, bias=False)
    policy.weight.data.zero_()
    module = TensorDictModule(
        nn.Sequential(policy, NormalParamExtractor("exp")), ["observation"], ["loc", "scale"]
    )

    class Normal(torch.distributions.Independent):
        def __init__(self, loc, scale):
            super().__init__(torch.distributions.Normal(loc, scale), 1)

    actor = ProbabilisticActor(module, in_keys=["loc", "scale"], distribution_class=Normal)
    q_network = TensorDictModule(lambda action: action, ["action"], ["state_action_value"])
    loss = CMPOLoss(actor, q_network, num_samples=1000).eval()
    SoftUpdate(loss, tau=0.1)
    policy.weight.data.copy_(torch.tensor([[0.7], [-0.2]]))
    out = loss(TensorDict(observation=torch.ones(30, 1), batch_size=[30]))
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(x)
    target = prior + x.clamp(-1, 1)
    target = (target.exp() / target.exp().sum()).clamp_min(1e-300)
    online = torch.distributions.Normal(0.7, math.exp(-0.2)).log_prob(x)
    assert out["loss_cmpo"].item() == pytest.approx(-(target * online).sum().item(), rel=0.02)
    density = target / (x[1] - x[0])
    kl = (target * (density.log() - online)).sum().item()
    assert out["cmpo_kl"].item() == pytest.approx(kl, abs=0.02)
    tv = 0.5 * (target - prior.exp() * (x[1] - x[0])).abs().sum().item()
    assert out["cmpo_tv"].item() == pytest.approx(tv, rel=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"divergence": "js"}, "divergence must be one of kl, cross_entropy, but is 'js'"),
        ({"advantage_clip_min": 1.0}, "must be below advantage_clip_max"),
        ({"num_samples": 0}, "num_samples >= 1"),
        ({"prior_mixture": (0.5, 0.5)}, "three shares"),
        ({"normalizer": "std"}, "normalizer must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        table([0.5, 0.5], [0.5, 0.5], [0.0, 0.0], **options)
