"""CMPO, Retrace, divergences, gradient scale: oracles of MUESLI.md, brute force, edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from muon_rl.objectives.functional import (
    cmpo_log_policy,
    cross_entropy,
    kl_divergence,
    retrace_returns,
    sampled_cmpo_weights,
    scale_gradient,
    total_variation,
    two_hot_loss,
    two_hot_value,
)

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
ADVANTAGE = torch.tensor([0.5, -0.25, -3.0], dtype=torch.float64)
POLICY = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
CMPO = [0.728506, 0.206473, 0.065021]


def near(expected, atol=1e-6):
    return pytest.approx(expected, abs=atol, rel=0)


def test_cmpo_of_two_even_actions():
    prior = torch.tensor([0.5, 0.5]).log()
    found = cmpo_log_policy(prior, torch.tensor([1.0, -1.0]), scale=1.0)
    assert found.exp().tolist() == near([0.880797, 0.119203])
    assert kl_divergence(found, prior).item() == near(0.327813)
    assert total_variation(found, prior).item() == near(0.380797)


def test_cmpo_of_three_actions_and_the_gradient_towards_it():
    logits = POLICY.log().requires_grad_()
    target = cmpo_log_policy(PRIOR.log(), ADVANTAGE, scale=1.0)
    assert target.exp().tolist() == near(CMPO)
    policy = logits.log_softmax(-1)
    loss = kl_divergence(target, policy)
    assert loss.item() == near(0.659690)
    assert cross_entropy(target, policy).item() == near(1.393885)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.tolist() == near([-0.528506, 0.293527, 0.234979])
    (same,) = torch.autograd.grad(cross_entropy(target, policy), logits)
    assert_close(same, gradient)


@pytest.mark.parametrize(
    "clip, bound", [(0.5, 0.244919), (1.0, 0.462117), (2.0, 0.761594), (4.0, math.tanh(2))]
)
def test_cmpo_moves_the_policy_by_at_most_tanh_half_clip(clip, bound):
    odds = torch.tensor([-clip, clip], dtype=torch.float64)
    extreme = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    prior = odds.sigmoid().log()
    found = cmpo_log_policy(prior, extreme, scale=1.0, clip=clip)
    assert total_variation(found, prior).item() == near(bound)
    priors = torch.randn(1000, 5, dtype=torch.float64).mul(3).log_softmax(-1)
    moved = cmpo_log_policy(priors, torch.randn(1000, 5).double() * 9, scale=1.0, clip=clip)
    assert total_variation(moved, priors).max() <= math.tanh(clip / 2) + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.floats(1e-3, 1e3), st.floats(-50, 50), st.integers(0, 2**16))
def test_an_advantage_that_is_the_same_for_all_actions_leaves_the_prior(
    actions, scale, shift, seed
):
    torch.manual_seed(seed)
    prior = torch.randn(4, actions, dtype=torch.float64).log_softmax(-1)
    found = cmpo_log_policy(prior, torch.full_like(prior, shift), scale=scale)
    assert_close(found, prior)


def test_a_lagging_prior_gives_a_gradient():
    logits = (torch.tensor([0.2, -0.1, 0.4])).requires_grad_()
    prior = (logits.detach() * 0.9).log_softmax(-1)
    target = cmpo_log_policy(prior, torch.tensor([0.3, -0.2, 0.0]), scale=1.0)
    kl_divergence(target, logits.log_softmax(-1)).backward()
    assert logits.grad.abs().min() > 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.1, 10), st.floats(0.1, 3))
def test_cmpo_is_normalised_and_free_of_units(seed, unit, clip):
    torch.manual_seed(seed)
    prior = torch.randn(3, 2, 6, dtype=torch.float64).log_softmax(-1)
    advantage = torch.randn(3, 2, 6, dtype=torch.float64)
    found = cmpo_log_policy(prior, advantage, scale=0.7, clip=clip)
    assert_close(found.logsumexp(-1), torch.zeros(3, 2, dtype=torch.float64))
    again = cmpo_log_policy(prior, unit * advantage, scale=torch.tensor(0.7 * unit), clip=clip)
    assert_close(again, found)
    weights = (advantage / 0.7).clip(-clip, clip).exp() * prior.exp()
    assert_close(found.exp(), weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("unread", [0.0, math.nan, math.inf, -math.inf])
def test_masked_actions_stay_masked_and_make_no_nan(unread):
    logits = torch.tensor([[0.3, -0.2, 0.1], [0.3, 0.2, 0.4]], requires_grad=True)
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    prior = torch.where(allowed, logits, -math.inf)
    prior = prior - torch.where(allowed.any(-1, keepdim=True), prior, 0.0).logsumexp(-1, True)
    advantage = torch.where(allowed, torch.tensor([0.5, 0.0, -0.5]), unread).requires_grad_()
    found = cmpo_log_policy(prior, advantage, scale=1.0)
    assert torch.equal(found == -math.inf, ~allowed)
    kept = cmpo_log_policy(prior[0, ::2], torch.tensor([0.5, -0.5]), scale=1.0)
    assert_close(found[0, ::2], kept)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        kl_divergence(found, prior.detach()).sum().backward()  # no NaN on the way either
    for leaf in (logits, advantage):
        assert leaf.grad.isfinite().all()
        assert torch.equal(leaf.grad[0] != 0, allowed[0])


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1), (1, 3), (2, 4, 3)])
def test_a_scalar_or_broadcastable_advantage_is_refused(shape):
    prior = torch.zeros(4, 3).log_softmax(-1)
    with pytest.raises(ValueError, match=r"one advantage for each action.*GAE is one number"):
        cmpo_log_policy(prior, torch.zeros(shape), scale=1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": 0.0}, "scale must be above 0"),
        ({"scale": math.nan}, "scale must be above 0"),
        ({"scale": torch.ones(4)}, "scale must broadcast"),
        ({"scale": torch.ones(2, 4, 3)}, "scale must broadcast"),
        ({"scale": 1.0, "clip": 0.0}, "clip must be above 0"),
        ({"scale": 1.0, "clip": math.nan}, "clip must be above 0"),
        ({"scale": 1.0, "clip": (1.0, -1.0)}, "min < max"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cmpo_log_policy(torch.zeros(4, 3), torch.zeros(4, 3), **options)
    with pytest.raises(ValueError, match=message):
        sampled_cmpo_weights(torch.zeros(4, 3), **options)


def test_bounds_may_differ_above_and_below():
    prior = torch.tensor([0.5, 0.5]).log()
    found = cmpo_log_policy(prior, torch.tensor([9.0, -9.0]), scale=3.0, clip=(-2.0, 1.0))
    assert_close(found, torch.tensor([1.0, -2.0]).log_softmax(-1))


@pytest.mark.parametrize("n, expected", [(1, 1.577288), (2, 1.588755)])
def test_the_sampled_estimate_has_its_exact_mean(n, expected):
    """Over all N-tuples of actions: biased at a finite N, so it is not the exact 1.3939."""
    total = 0.0
    for picks in itertools.product(range(3), repeat=n):
        index = torch.tensor(picks)
        weight = sampled_cmpo_weights(ADVANTAGE[index], scale=1.0)
        total += (PRIOR[index].prod() * -(weight * POLICY.log()[index]).mean()).item()
    assert total == near(expected)


@pytest.mark.parametrize("n, expected", [(4, 1.511), (16, 1.424), (64, 1.401), (256, 1.396)])
def test_the_sampled_estimate_comes_closer_with_more_samples(n, expected):
    torch.manual_seed(0)
    index = torch.multinomial(PRIOR, n * 1600, replacement=True).reshape(n, 1600)
    found = []
    for part in index.split(200, 1):
        weight = sampled_cmpo_weights(ADVANTAGE[part], scale=1.0)
        found.append(-(weight * POLICY.log()[part]).mean(0))
    found = torch.cat(found)
    assert found.mean().item() == near(expected, 4 * found.std().item() / 1600**0.5 + 5e-4)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_each_sample_is_left_out_of_its_own_normaliser(n, batch):
    advantage = torch.randn(n, *batch, dtype=torch.float64) * 20
    scale = torch.rand(batch, dtype=torch.float64) + 0.5
    found = sampled_cmpo_weights(advantage, scale=scale, clip=15.0, z_init=0.5)
    weight = np.exp(np.clip(advantage.numpy() / scale.numpy(), -15, 15))
    for i in range(n):
        z = (0.5 + np.delete(weight, i, 0).sum(0)) / n
        assert_close(found[i], torch.as_tensor(weight[i] / z), rtol=1e-9, atol=0)


def test_one_large_weight_does_not_swallow_the_others():
    found = sampled_cmpo_weights(torch.tensor([15.0, 0.3, 0.3]), scale=1.0, clip=15.0)
    assert found[0].item() == pytest.approx(3 * math.exp(15) / (1 + 2 * math.exp(0.3)), rel=1e-6)


def test_no_sample_and_no_first_guess_are_refused():
    for shape in ((), (0,), (0, 3)):
        with pytest.raises(ValueError, match=r"N >= 1 actions in shape \(N, \*batch\)"):
            sampled_cmpo_weights(torch.zeros(shape), scale=1.0)
    with pytest.raises(ValueError, match="z_init must be above 0, but is 0"):
        sampled_cmpo_weights(torch.zeros(2), scale=1.0, z_init=0)


def retrace_by_loop(reward, discount, value, q_value, trace):
    """Return what ``rlax.general_off_policy_returns_from_q_and_v`` computes, entry by entry."""
    returns = np.zeros_like(reward)
    returns[-1] = reward[-1] + discount[-1] * value[-1]
    for t in range(len(reward) - 2, -1, -1):
        returns[t] = reward[t] + discount[t] * (
            value[t] - trace[t] * q_value[t] + trace[t] * returns[t + 1]
        )
    return returns


def test_retrace_of_three_steps():
    r, v = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 6.0, 8.0])
    q, c = torch.tensor([10.0, 20.0]), torch.tensor([1.0, 0.5])
    assert retrace_returns(r, torch.full((3,), 0.5), v, q, c).tolist() == [-1.125, 1.75, 7.0]
    ends = torch.tensor([0.5, 0.0, 0.5])
    assert retrace_returns(r, ends, v, q, c).tolist() == [-1.0, 2.0, 7.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 21), st.integers(0, 2**16))
def test_retrace_is_its_recursion(steps, seed):
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(2, 2, 3, steps))
    q_value, trace = rng.normal(size=(2, 3, steps - 1)), rng.random((2, 3, steps - 1))
    discount = 0.97 * (rng.random((2, 3, steps)) > 0.2)
    trace *= rng.random(trace.shape) > 0.2
    found = retrace_returns(*map(torch.as_tensor, (reward, discount, value, q_value, trace)))
    for i, j in np.ndindex(2, 3):
        args = (x[i, j] for x in (reward, discount, value, q_value, trace))
        assert found[i, j].tolist() == pytest.approx(retrace_by_loop(*args), abs=1e-12)


def test_retrace_reads_nothing_beyond_an_end():
    reward, discount, value, trace = torch.ones(6), torch.full((6,), 0.5), torch.ones(6), None
    q_value, trace = torch.ones(5), torch.ones(5)
    discount[1], value[1], q_value[1], trace[1] = 0.0, math.nan, math.nan, math.nan
    trace[3] = 0.0
    reward[4:], q_value[3:], value[4:] = math.nan, math.nan, math.nan
    reward.requires_grad_()
    found = retrace_returns(reward, discount, value, q_value, trace)
    assert found[:4].tolist() == [1.5, 1.0, 1.75, 1.5]
    assert found[4:].isnan().all()
    found[:4].sum().backward()
    assert reward.grad.tolist() == [1.0, 1.5, 1.0, 1.5, 0.0, 0.0]


def test_retrace_over_a_thousand_steps_keeps_single_precision():
    torch.manual_seed(0)
    args = [torch.randn(2, 1000), torch.full((2, 1000), 0.999), torch.randn(2, 1000)]
    args += [torch.randn(2, 999), torch.ones(2, 999)]
    exact = retrace_returns(*(x.double() for x in args))
    assert_close(retrace_returns(*args).double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("wrong", range(1, 5))
def test_retrace_names_the_shape_that_does_not_fit(wrong):
    names = ["reward", "discount", "value", "q_value", "trace"]
    args = [torch.zeros(2, 3)] * 3 + [torch.zeros(2, 2)] * 2
    args[wrong] = torch.zeros(2, 3) if wrong > 2 else torch.zeros(1, 3)
    with pytest.raises(ValueError, match=rf"\(2, 3\) needs {names[wrong]} of shape"):
        retrace_returns(*args)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_retrace_of_no_step_is_refused(shape):
    with pytest.raises(ValueError, match="T >= 1"):
        retrace_returns(*[torch.zeros(shape)] * 5)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_gradient_of_an_unroll_is_scaled_on_the_recurrent_path(steps, scale):
    w, start = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.3, 0.7))
    hidden = start
    for step in range(steps):
        hidden = w * (hidden if step == 0 else scale_gradient(hidden, scale))
    assert hidden.item() == pytest.approx(1.3**steps * 0.7, rel=1e-14)
    hidden.backward()
    through = scale ** (steps - 1)
    total = sum(scale**k for k in range(steps))  # 2 - 2^(1 - K) at 0.5
    assert w.grad.item() == pytest.approx(1.3 ** (steps - 1) * 0.7 * total)
    assert start.grad.item() == pytest.approx(1.3**steps * through)
    if scale == 0.5:
        assert total == 2 - 2 ** (1 - steps)


def test_scaling_a_gradient_leaves_the_value_alone():
    x = torch.tensor([1e30, -3.1, 0.0, 1e-40], requires_grad=True)
    assert torch.equal(scale_gradient(x, 0.3), x)
    per_row = torch.vmap(lambda row: scale_gradient(row, 0.5))(x.detach().reshape(2, 2))
    assert torch.equal(per_row.flatten(), x.detach())


def test_everything_compiles_in_one_graph():
    def everything(prior, advantage, reward, logits):
        policy = cmpo_log_policy(prior, advantage, scale=advantage.std(), clip=(-1.0, 1.0))
        weights = sampled_cmpo_weights(advantage, scale=1.0)
        returns = retrace_returns(reward, reward, reward, reward[..., 1:], reward[..., 1:])
        scalar = two_hot_loss(logits, reward[..., 0]) + two_hot_value(scale_gradient(logits, 0.5))
        return policy, weights, returns, kl_divergence(prior, policy), scalar

    args = torch.randn(3, 4).log_softmax(-1), torch.randn(3, 4), torch.rand(3, 7), torch.randn(3, 9)
    explained = torch.compile(everything, backend="eager", fullgraph=True)
    assert_close(explained(*args), everything(*args))
