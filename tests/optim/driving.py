"""What the tests of the optimizer share: parameters, gradients for them, and comparisons."""

import torch
from torch import nn

from muon_rl.optim.orthogonalize import computes_bf16


def gaussian(*shape, seed=0, dtype=torch.float32):
    """Return normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(*shapes, seed=0):
    """Return a parameter of each shape."""
    return [nn.Parameter(gaussian(*shape, seed=seed + i)) for i, shape in enumerate(shapes)]


def clones(params):
    """Return parameters of equal values."""
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_gradients(params, step):
    """Set gradients that depend on the step, the position and the parameter itself."""
    for i, p in enumerate(params):
        p.grad = gaussian(*p.shape, seed=1000 * step + i).to(p.dtype) + 0.1 * p.detach()


def drive(optimizer, params, *, start=0, steps=4):
    """Step an optimizer with such gradients."""
    for step in range(start, start + steps):
        give_gradients(params, step)
        optimizer.step()
    return params


def assert_same_bits(left, right):
    """Compare tensors one by one."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def assert_same_products(left, right):
    """Compare what different kernels multiplied: equal in every bit where bfloat16 is native."""
    # Emulated, the products of one matrix, of a stack and of a transpose are rounded differently.
    atol = 0.0 if computes_bf16("cpu") else 5e-3
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=atol)


def snapshot(optimizer):
    """Copy every parameter and every tensor of the state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for p in params for v in optimizer.state.get(p, {}).values()]
    return [torch.as_tensor(t).detach().clone() for t in params + state]
