"""Clipping by norm, against torch's own clip of the same gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from muon_rl.optim import build_optimizer
from muon_rl.optim.clipping import check_max_norm, clip_gradients


def make(scale: float = 1.0):
    """Build an agent of three networks with gradients, and its optimizer."""
    torch.manual_seed(0)
    agent = nn.ModuleDict(
        {
            "actor": nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 8)),
            "critic": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)),
            "model": nn.Linear(4, 4),
        }
    )
    networks = {"actor": {}, "critic": {}, "model": {"case": "adam"}}
    optimizer = build_optimizer(agent, **networks)
    for p in agent.parameters():
        p.grad = scale * torch.randn_like(p)
    return agent, optimizer


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def assert_equal(module: nn.Module, expected: nn.Module):
    torch.testing.assert_close(gradients(module), gradients(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bound", [0.01, 5.0, 1e9])
def test_a_number_clips_all_gradients_together(bound):
    agent, optimizer = make()
    expected = copy_of(agent)
    total = clip_grad_norm_(expected.parameters(), bound)
    norms = clip_gradients(optimizer, bound)
    assert_equal(agent, expected)
    assert math.hypot(*map(float, norms.values())) == pytest.approx(float(total), rel=1e-6)
    clipped = float(get_total_norm(gradients(agent)))
    assert clipped == pytest.approx(min(bound, float(total)), rel=1e-5)


def copy_of(agent: nn.Module) -> nn.Module:
    other = copy.deepcopy(agent)
    for p, q in zip(agent.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    return other


@pytest.mark.parametrize(
    "bounds", [{"critic": 0.5}, {"actor": 1e-3, "critic": 2.0}, {"critic": 1e9}, {}]
)
def test_a_mapping_clips_each_network_by_itself(bounds):
    agent, optimizer = make()
    expected = copy_of(agent)
    norms = {name: get_total_norm(gradients(agent[name])) for name in agent}
    for name, bound in bounds.items():
        clip_grad_norm_(expected[name].parameters(), bound)
    torch.testing.assert_close(clip_gradients(optimizer, bounds), norms)
    assert_equal(agent, expected)


@pytest.mark.parametrize("max_norm", [1.0, {"actor": 1.0, "critic": 1.0}])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stays_the_only_one(value, max_norm):
    agent, optimizer = make()
    agent["critic"][1].weight.grad[0, 0] = value
    norms = clip_gradients(optimizer, max_norm)
    broken = [name for name, p in agent.named_parameters() if not p.grad.isfinite().all()]
    assert broken == ["critic.1.weight"]
    assert not norms["critic"].isfinite()
    assert norms["actor"].isfinite()


def test_gradients_whose_norm_overflows_are_not_let_through():
    agent, optimizer = make(scale=1e30)
    clip_gradients(optimizer, 1.0)
    assert float(get_total_norm(gradients(agent))) <= 1.0


def test_parameters_without_a_gradient_keep_none():
    agent, optimizer = make()
    for p in [*agent["actor"].parameters(), agent["critic"][0].bias]:
        p.grad = None
    assert set(clip_gradients(optimizer, {"actor": 1.0, "critic": 1.0})) == {"critic", "model"}
    assert agent["critic"][0].bias.grad is None
    optimizer.zero_grad()
    assert clip_gradients(optimizer, 1.0) == {}


@pytest.mark.parametrize("max_norm", [1.0, {"actor": 1.0}])
def test_nothing_is_read_from_the_device(max_norm):
    """On the meta device there are no values: to read one raises."""
    weight = nn.Parameter(torch.ones(3, 3, device="meta"))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([{"params": [weight], "name": "actor/sgd"}], lr=1.0)
    assert clip_gradients(optimizer, max_norm)["actor"].is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("max_norm", [1.0, {"actor": 1.0, "critic": 0.1}])
def test_a_clip_makes_no_sync_on_cuda(max_norm):
    agent, _ = make()
    optimizer = build_optimizer(agent.cuda(), actor={}, critic={}, model={"case": "adam"})
    for p in agent.parameters():
        p.grad = torch.randn_like(p)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms = clip_gradients(optimizer, max_norm)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(norm.is_cuda for norm in norms.values())


@pytest.mark.parametrize(
    ("max_norm", "message"),
    [
        (0.0, "above 0, but is 0.0"),
        (-1.0, "above 0, but is -1.0"),
        (math.nan, "above 0, but is nan"),
        ({"critic": 0.0}, "critic's norm must be above 0, but is 0.0"),
        ({"critic": math.nan}, "critic's norm must be above 0, but is nan"),
        ({"critc": 1.0}, "no network 'critc' .* there are actor, critic, model"),
        ({"actor/muon": 1.0}, "no network 'actor/muon'"),
    ],
)
def test_a_wrong_bound_is_named_before_anything_changes(max_norm, message):
    agent, optimizer = make()
    before = gradients(agent)
    for check in (check_max_norm, clip_gradients):
        with pytest.raises(ValueError, match=message):
            check(optimizer, max_norm)
    torch.testing.assert_close(gradients(agent), before, rtol=0, atol=0)
