"""What holds for every matrix, stack, convolution kernel and fused matrix that Muon is given."""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from muon_rl.optim import Muon

LR = 0.03
RATIOS = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    None: lambda rows, columns: 1.0,
}
modest = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def gaussian(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def layouts(draw):
    """Draw a parameter's shape, how it falls into matrices, and the shape of those."""
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    splits = draw(st.sampled_from([1, 1, 1, 2, 3]))
    rows = draw(st.integers(1, 20))
    columns = draw(st.integers(1, 20))
    kernel = draw(st.sampled_from([(), (), (3,), (2, 2)]))
    shape = (*batch, splits * rows, columns, *kernel)
    options = {"batch_dims": len(batch), "splits": splits}
    return shape, options, (rows, columns * math.prod(kernel))


options_of_the_rule = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.5, 0.95]),
        "nesterov": st.booleans(),
        "adjust_lr": st.sampled_from(list(RATIOS)),
        "weight_decay": st.sampled_from([0.0, 0.1]),
    }
)
seeds = st.integers(0, 2**31 - 10)


def run(p, layout, seed, steps=3, **options):
    """Step one parameter with gradients of ordinary and of tiny and large scale."""
    optimizer = Muon([{"params": [p], **layout}], lr=LR, **options)
    for step in range(steps):
        p.grad = 10.0 ** (4 * step - 4) * gaussian(*p.shape, seed=seed + step, dtype=p.dtype)
        optimizer.step()
    return p.detach()


def moving_average(p, seed, momentum, nesterov, steps):
    """Return what Muon orthogonalizes at its last step, by the formula."""
    average = torch.zeros(p.shape, dtype=torch.float64)
    for step in range(steps):
        gradient = 10.0 ** (4 * step - 4) * gaussian(*p.shape, seed=seed + step).double()
        average = momentum * average + (1 - momentum) * gradient
    return (1 - momentum) * gradient + momentum * average if nesterov else average


@modest
@given(layout=layouts(), options=options_of_the_rule, seed=seeds)
def test_no_singular_value_of_an_update_exceeds_its_rate_by_more_than_a_fifth(
    layout, options, seed
):
    shape, how, matrix = layout
    p = nn.Parameter(torch.zeros(shape))
    moved = run(p, how, seed, steps=1, **options).reshape(-1, *matrix)
    rate = LR * RATIOS[options["adjust_lr"]](*matrix)
    assert float(torch.linalg.matrix_norm(moved, 2).max()) <= 1.21 * rate


@modest
@given(layout=layouts(), options=options_of_the_rule, seed=seeds)
def test_every_matrix_moves_against_its_moving_average(layout, options, seed):
    shape, how, matrix = layout
    options = {**options, "weight_decay": 0.0}
    before = run(nn.Parameter(torch.zeros(shape)), how, seed, steps=2, **options)
    after = run(nn.Parameter(torch.zeros(shape)), how, seed, steps=3, **options)
    update = moving_average(before, seed, options["momentum"], options["nesterov"], steps=3)
    inner = ((before - after).double() * update).reshape(-1, *matrix).sum((1, 2))
    assert bool((inner > 0).all())


@modest
@given(layout=layouts(), options=options_of_the_rule, seed=seeds)
def test_a_parameter_of_any_layout_equals_its_matrices_one_by_one(layout, options, seed):
    shape, how, matrix = layout
    start = gaussian(*shape, seed=seed + 5, dtype=torch.float64)
    together = run(nn.Parameter(start.clone()), how, seed, **options, dtype=torch.float64)

    alone = [nn.Parameter(m.clone()) for m in start.reshape(-1, *matrix)]
    optimizers = [Muon([p], lr=LR, **options, dtype=torch.float64) for p in alone]
    for step in range(3):
        gradient = 10.0 ** (4 * step - 4) * gaussian(*shape, seed=seed + step, dtype=torch.float64)
        for p, own, optimizer in zip(alone, gradient.reshape(-1, *matrix), optimizers, strict=True):
            p.grad = own.clone()
            optimizer.step()
    expected = torch.stack([p.detach() for p in alone])
    torch.testing.assert_close(together.reshape(-1, *matrix), expected, rtol=0, atol=1e-10)


@modest
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    batch=st.lists(st.integers(1, 3), max_size=2),
    options=options_of_the_rule,
    precision=st.sampled_from([(torch.float64, 1e-11), (torch.float32, 1e-4)]),
    seed=seeds,
)
def test_a_transposed_parameter_moves_as_the_transpose(
    rows, columns, batch, options, precision, seed
):
    dtype, tolerance = precision
    options = {**options, "adjust_lr": None, "batch_dims": len(batch), "dtype": dtype}
    start = gaussian(*batch, rows, columns, seed=seed, dtype=torch.float64)
    pair = [nn.Parameter(start.clone()), nn.Parameter(start.mT.clone())]
    groups = [{"params": [p], **options} for p in pair]
    optimizer = Muon(groups, lr=LR)
    for step in range(3):
        gradient = gaussian(*batch, rows, columns, seed=seed + 1 + step, dtype=torch.float64)
        pair[0].grad, pair[1].grad = gradient, gradient.mT.clone()
        optimizer.step()
    moved = [p.detach() - before for p, before in zip(pair, (start, start.mT), strict=True)]
    torch.testing.assert_close(moved[1].mT, moved[0], rtol=0, atol=tolerance * LR * 3)


@modest
@given(
    members=st.lists(st.tuples(layouts(), st.booleans()), min_size=1, max_size=4),
    algorithm=st.sampled_from(["muon", "adamw"]),
    seed=seeds,
)
def test_a_parameter_without_a_gradient_is_not_touched_and_touches_no_other(
    members, algorithm, seed
):
    shapes = [layout[0] for layout, _ in members]
    used = [has_gradient for _, has_gradient in members]

    def build():
        params = [
            nn.Parameter(gaussian(*shape, seed=seed + i, dtype=torch.float64))
            for i, shape in enumerate(shapes)
        ]
        groups = [
            {"params": [p], "algorithm": algorithm, "weight_decay": 0.5}
            | (layout[1] | {"dtype": torch.float64} if algorithm == "muon" else {})
            for p, (layout, _) in zip(params, members, strict=True)
        ]
        return params, groups

    params, groups = build()
    others, other_groups = build()
    optimizer = Muon(groups)
    for i, (p, other) in enumerate(zip(params, others, strict=True)):
        gradient = gaussian(*p.shape, seed=seed + 50 + i, dtype=torch.float64)
        p.grad = gradient if used[i] else None
        other.grad = gradient.clone()
    optimizer.step()
    for each in other_groups:
        Muon([each]).step()
    for i, (p, other) in enumerate(zip(params, others, strict=True)):
        if used[i]:
            torch.testing.assert_close(p, other, rtol=0, atol=1e-11)
        else:
            assert torch.equal(p, gaussian(*p.shape, seed=seed + i, dtype=torch.float64))
            assert p not in optimizer.state


@modest
@given(
    layout=layouts(),
    options=options_of_the_rule,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    arithmetic=st.sampled_from([None, torch.float32, torch.bfloat16]),
    on_nonfinite=st.sampled_from(["propagate", "raise", "skip"]),
    seed=seeds,
)
def test_a_step_changes_the_parameter_in_place_and_not_its_gradient(
    layout, options, dtype, arithmetic, on_nonfinite, seed
):
    shape, how, _ = layout
    p = nn.Parameter(gaussian(*shape, seed=seed).to(dtype))
    before, address = p.detach().clone(), p.data_ptr()
    p.grad = gradient = gaussian(*shape, seed=seed + 1).to(dtype)
    copy = gradient.clone()
    group = {"params": [p], **how, "lr": 1.0}
    Muon([group], **options, dtype=arithmetic, on_nonfinite=on_nonfinite).step()
    assert p.grad is gradient
    assert torch.equal(gradient, copy)
    assert (p.dtype, tuple(p.shape), p.data_ptr()) == (dtype, shape, address)
    assert not torch.equal(p, before)
    assert bool(p.isfinite().all())


@modest
@given(layout=layouts(), options=options_of_the_rule, seed=seeds)
def test_decay_shrinks_a_parameter_at_rest_by_rate_times_decay(layout, options, seed):
    shape, how, _ = layout
    p = nn.Parameter(gaussian(*shape, seed=seed, dtype=torch.float64))
    expected = p.detach() * (1 - LR * options["weight_decay"])
    p.grad = torch.zeros_like(p)
    Muon([{"params": [p], **how}], lr=LR, **options).step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=0)
