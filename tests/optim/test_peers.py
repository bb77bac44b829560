"""Muon against optax's, in float32; run where optax is installed (``pip install optax``)."""

import numpy as np
import pytest
import torch
from driving import gaussian
from torch import nn

from muon_rl.optim import Muon, orthogonalize

jax = pytest.importorskip("jax", reason="optax, the other side of the comparison, runs on jax")
optax = pytest.importorskip("optax", reason="optax is the other side of the comparison")

QUINTIC = (3.4445, -4.7750, 2.0315)
# optax adds its eps to the norm, torch and we bound the norm by it.
EPS = 1e-12


def to_jax(x):
    """Return a matrix as optax has it, inputs along the rows."""
    return jax.numpy.asarray(x.numpy().T)


def to_torch(x):
    return torch.from_numpy(np.array(x).T)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("quintic", QUINTIC), ([(1.5, -0.5, 0.0)] * 5, ((1.5, -0.5, 0.0),) * 5)],
    ids=["quintic", "list"],
)
@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64)], ids=str)
def test_newton_schulz_equals_that_of_optax_to_rounding(shape, ours, theirs):
    x = gaussian(*shape)
    # Without momentum its update is the orthogonalized gradient.
    transform = optax.contrib.scale_by_muon(theirs, beta=0.0, nesterov=False, eps=EPS)
    gradient = to_jax(x)
    update, _ = jax.jit(transform.update)(gradient, transform.init(gradient))
    result = orthogonalize(x, 5, ours, dtype=torch.float32)
    torch.testing.assert_close(result, to_torch(update), rtol=0, atol=2e-6)


def run_both(shape, *, nesterov, adjust_lr="original", weight_decay=0.0, steps=10):
    """Return what ten steps of ours and of optax's Muon move one matrix by."""
    start = gaussian(*shape)
    p, q = nn.Parameter(start.clone()), to_jax(start)
    options = {"nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = Muon([p], lr=0.02, adjust_lr=adjust_lr, dtype=torch.float32, **options)
    rms = {"original": None, "match_rms_adamw": 0.2}[adjust_lr]
    transform = optax.contrib.muon(0.02, eps=EPS, consistent_rms=rms, **options)
    state, update = transform.init(q), jax.jit(transform.update)
    for step in range(steps):
        p.grad = gaussian(*shape, seed=10 + step)
        updates, state = update(to_jax(p.grad), state, q)
        q = optax.apply_updates(q, updates)
        optimizer.step()
    return p.detach() - start, to_torch(q) - start


@pytest.mark.parametrize(
    ("adjust_lr", "weight_decay"), [("original", 0.1), ("match_rms_adamw", 0.0)]
)
@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64)], ids=str)
def test_ten_steps_without_nesterov_end_where_those_of_optax_end(shape, adjust_lr, weight_decay):
    options = {"adjust_lr": adjust_lr, "weight_decay": weight_decay}
    ours, theirs = run_both(shape, nesterov=False, **options)
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-5


def test_with_nesterov_optax_corrects_a_bias_and_ours_as_torchs_does_not():
    shape = (64, 24)
    ours, optaxs = run_both(shape, nesterov=True)
    p = nn.Parameter(gaussian(*shape))
    reference = torch.optim.Muon([p], lr=0.02, weight_decay=0.0)
    for step in range(10):
        p.grad = gaussian(*shape, seed=10 + step)
        reference.step()
    torchs = p.detach() - gaussian(*shape)
    # torch's runs in bfloat16.
    assert float((ours - torchs).norm() / torchs.norm()) < 0.01
    assert 0.02 < float((ours - optaxs).norm() / optaxs.norm()) < 0.06
