"""Faults found in other implementations of Muon, which ours must not have."""

import pytest
import torch
from driving import gaussian
from torch import nn

from muon_rl.optim import Muon, build_optimizer, orthogonalize

# In float64 so many steps reach the polar factor itself.
EXACT = {"coefficients": "polar_express", "ns_steps": 16, "dtype": torch.float64}


def polar(x):
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("apply_last_layer", [False, True])
def test_the_stacked_biases_and_norms_of_critics_are_not_orthogonalized(sac, apply_last_layer):
    """torch.optim.Muon, optax and timm take ``(critics, out)`` for a matrix."""
    muon = {"apply_last_layer": apply_last_layer}
    optimizer = build_optimizer(sac, actor={}, critic={"muon": muon, "lr": 1e-3})
    named = {n: p for n, p in sac.named_parameters() if n.startswith("qvalue")}
    vectors = [p for p in named.values() if p.ndim == 2]
    assert len(vectors) == 7
    before = [p.detach().clone() for p in vectors]
    for p in named.values():
        p.grad = gaussian(*p.shape, seed=1)
    optimizer.step()
    for p, old in zip(vectors, before, strict=True):
        # Adam's first step moves each entry by the rate; a polar factor's entries differ.
        moved = (p.detach() - old).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)


def test_each_critic_of_a_stack_is_orthogonalized_by_itself():
    """HeavyBall and, flattening, timm and dion orthogonalize across the stack."""
    p = nn.Parameter(torch.zeros(3, 24, 16, dtype=torch.float64))
    p.grad = gaussian(3, 24, 16, dtype=torch.float64)
    Muon([{"params": [p], "batch_dims": 1}], lr=1.0, adjust_lr=None, **EXACT).step()
    torch.testing.assert_close(-p.detach(), polar(p.grad), rtol=0, atol=1e-8)


def test_a_critic_does_not_see_the_gradients_of_another():
    """HeavyBall, timm and dion again: scaling one critic's loss would move the others."""
    runs = []
    for scale in (1.0, 1000.0):
        p = nn.Parameter(gaussian(2, 24, 16))
        p.grad = gaussian(2, 24, 16, seed=1)
        p.grad[1] *= scale
        Muon([{"params": [p], "batch_dims": 1}]).step()
        runs.append(p.detach())
    assert torch.equal(runs[0][0], runs[1][0])


def test_the_nan_of_one_critic_stays_its_own_over_many_steps():
    """A norm of the whole stack would spread it, as clipping by one global norm does."""
    spoiled, clean = (nn.Parameter(gaussian(3, 24, 16)) for _ in range(2))
    for p in (spoiled, clean):
        optimizer = Muon([{"params": [p], "batch_dims": 1}], dtype=torch.bfloat16)
        for step in range(4):
            p.grad = gaussian(3, 24, 16, seed=step)
            if p is spoiled and step == 0:
                p.grad[1, 0, 0] = float("nan")
            optimizer.step()
    assert bool(spoiled[1].isnan().all())
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


def test_the_gradient_is_not_overwritten():
    """Keller Jordan's, timm and pytorch_optimizer keep the nesterov step in ``p.grad``."""
    p = nn.Parameter(gaussian(24, 16))
    p.grad = gaussian(24, 16, seed=1)
    optimizer = Muon([p], momentum=0.9, nesterov=True)
    for _ in range(3):
        optimizer.step()
        assert torch.equal(p.grad, gaussian(24, 16, seed=1))


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_parameter_without_a_gradient_does_not_decay(algorithm):
    """Keller Jordan's takes a missing gradient for zeros: the momentum goes on, and the decay."""
    unused, used = (nn.Parameter(gaussian(24, 16, seed=i)) for i in range(2))
    groups = [{"params": [unused, used], "algorithm": algorithm, "weight_decay": 0.5}]
    optimizer = Muon(groups)
    for p in (unused, used):
        p.grad = gaussian(24, 16, seed=5)
    optimizer.step()
    before = [unused.detach().clone(), *[v.clone() for v in optimizer.state[unused].values()]]
    unused.grad = None
    optimizer.step()
    after = [unused.detach(), *optimizer.state[unused].values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("momentum", [1.0, 1.5, -0.1, float("nan")])
def test_a_momentum_that_is_no_share_is_refused(momentum):
    """torch.optim.Muon accepts 1.5, and diverges."""
    weight = nn.Parameter(torch.zeros(4, 4))
    torch.optim.Muon([weight], momentum=1.5)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        Muon([weight], momentum=momentum)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_momentum_is_an_average_of_gradients_and_not_of_orthogonalized_matrices(nesterov):
    """The JAX seed stores the orthogonalized matrix back; torch documents a sum."""
    p = nn.Parameter(gaussian(24, 16, dtype=torch.float64))
    optimizer = Muon([p], momentum=0.8, nesterov=nesterov)
    average = torch.zeros(24, 16, dtype=torch.float64)
    for step in range(4):
        p.grad = 100.0 * gaussian(24, 16, seed=step, dtype=torch.float64)
        average = 0.8 * average + 0.2 * p.grad
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], average)


def test_nesterov_adds_the_new_gradient_at_its_share():
    """The JAX seed adds it raw, 1 / (1 - momentum) times too much."""
    p = nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    first, second = (gaussian(24, 16, seed=i, dtype=torch.float64) for i in range(2))
    optimizer = Muon([p], lr=1.0, momentum=0.8, adjust_lr=None, **EXACT)
    p.grad = first
    optimizer.step()
    p.data.zero_()
    p.grad = second
    optimizer.step()
    ahead = 0.8 * (0.8 * 0.2 * first + 0.2 * second) + 0.2 * second
    torch.testing.assert_close(-p.detach(), polar(ahead), rtol=0, atol=1e-8)


def test_a_closure_is_taken_and_its_loss_returned():
    """NVIDIA Emerging-Optimizers raise on one, so automatic optimization cannot drive them."""
    net = nn.Linear(4, 3, bias=False)
    before = net.weight.detach().clone()
    optimizer = Muon(net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert not torch.equal(net.weight, before)


def test_a_stack_is_taken_and_bfloat16_is_not_forced():
    """torch.optim.Muon refuses a stack, and iterates in bfloat16 whatever it is given."""
    stack = nn.Parameter(torch.zeros(2, 80, 72, dtype=torch.float64))
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([stack])
    stack.grad = gaussian(2, 80, 72, dtype=torch.float64)
    Muon([{"params": [stack], "batch_dims": 1}], lr=1.0, adjust_lr=None, **EXACT).step()
    torch.testing.assert_close(-stack.detach(), polar(stack.grad), rtol=0, atol=1e-8)


def test_huge_finite_gradients_do_not_become_a_zero_update():
    """In torch.optim.Muon the norm of entries of 1e20 overflows, and the update is zero."""
    p = nn.Parameter(torch.zeros(24, 16))
    theirs = nn.Parameter(torch.zeros(24, 16))
    p.grad = 1e20 * gaussian(24, 16)
    theirs.grad = p.grad.clone()
    torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0).step()
    Muon([p], lr=1.0, adjust_lr=None).step()
    expected = -orthogonalize(gaussian(24, 16))
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-3)
    assert not bool((theirs.abs() > 1e-3).any())
