"""Matrices of one shape are worked on together, across groups and in parts: no result shows it."""

import importlib
import io

import pytest
import torch
from driving import assert_same_bits, assert_same_products, clones, gaussian, parameters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from muon_rl.optim import Muon, orthogonalize

BF16 = torch.bfloat16
aten = torch.ops.aten
iteration = importlib.import_module("muon_rl.optim.orthogonalize")
newton_schulz = importlib.import_module("muon_rl.optim.newton_schulz")


def drive(optimizers, params, *, start=0, steps=4):
    """Step optimizers with gradients that depend on the step, the position and the parameter."""
    for step in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=1000 * step + i) + 0.1 * p.detach()
        for optimizer in optimizers:
            optimizer.step()


class Products(TorchDispatchMode):
    """Records how many matrices each product ``A B + C`` multiplies at once."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (aten.addmm, aten.baddbmm):
            self.sizes.append(args[1].shape[:-2].numel())
        return op(*args, **(kwargs or {}))


# A step of the quintic has two such products.
QUINTIC = 2 * 5


# --------------------------------------------------------------------- a stack in parts


@pytest.mark.parametrize("working_set", [1, 2**16])
@pytest.mark.parametrize("shape", [(7, 64, 64), (7, 96, 40), (2, 3, 40, 96), (7, 80, 70)], ids=str)
def test_in_bfloat16_a_stack_in_parts_equals_the_whole_in_every_bit(
    monkeypatch, shape, working_set
):
    x = gaussian(*shape)
    whole = orthogonalize(x, dtype=BF16)
    monkeypatch.setattr(iteration, "_WORKING_SET", working_set)
    with Products() as products:
        assert torch.equal(orthogonalize(x, dtype=BF16), whole)
    assert len(products.sizes) > QUINTIC
    assert sum(products.sizes) == QUINTIC * x[..., 0, 0].numel()
    assert working_set > 1 or set(products.sizes) == {1}


@pytest.mark.parametrize("working_set", [1, 2**17])
@pytest.mark.parametrize(
    "shape", [(7, 64, 64), (7, 96, 80), (2, 3, 80, 150), (7, 150, 80)], ids=str
)
def test_in_float32_a_stack_in_parts_equals_the_whole_to_rounding(monkeypatch, shape, working_set):
    x = gaussian(*shape)
    whole = orthogonalize(x, dtype=torch.float32)
    with Products() as products:
        orthogonalize(x, dtype=torch.float32)
    at_once = len(products.sizes)
    monkeypatch.setattr(iteration, "_WORKING_SET", working_set)
    with Products() as products:
        result = orthogonalize(x, dtype=torch.float32)
    torch.testing.assert_close(result, whole, rtol=0, atol=2e-6)
    assert len(products.sizes) > at_once


def test_a_working_set_holds_input_gram_polynomial_and_result_of_each_matrix(monkeypatch):
    # One 32x48 matrix in bfloat16: two of 32x48 and two of 32x32, 2 bytes each.
    monkeypatch.setattr(iteration, "_WORKING_SET", 3 * (2 * 32 * 48 + 2 * 32 * 32) * 2)
    with Products() as products:
        orthogonalize(gaussian(7, 48, 32), dtype=BF16)
    assert products.sizes == [3] * QUINTIC + [3] * QUINTIC + [1] * QUINTIC


def test_a_run_continued_on_another_working_set_keeps_every_bit(monkeypatch):
    shapes = [(3, 64, 48), (48, 64), (64, 48), (40, 40)]
    config = {"batch_dims": [1, 0, 0, 0], "dtype": BF16, "lr": 0.02}
    params = parameters(*shapes)
    optimizer = Muon([{"params": params, **config}])
    drive([optimizer], params, steps=2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = clones(params)
    drive([optimizer], params, start=2, steps=2)

    monkeypatch.setattr(iteration, "_WORKING_SET", 1)
    again = Muon([{"params": resumed, **config}])
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    drive([again], resumed, start=2, steps=2)
    assert_same_bits(resumed, params)


# ------------------------------------------------------------ symmetric products by strips


def flop_of(x, **options):
    """Count the operations of matrix products."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(x, **options)
    return counter.get_total_flops()


@pytest.fixture
def strips_of_64(monkeypatch):
    monkeypatch.setattr(newton_schulz, "_STRIP", 64)
    monkeypatch.setattr(newton_schulz, "_LARGE", 128)


@pytest.mark.parametrize("coefficients", ["quintic", "cubic"])
@pytest.mark.parametrize("shape", [(192, 192), (200, 200), (160, 230), (230, 160)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_symmetric_products_by_strips_equal_whole_ones(
    strips_of_64, monkeypatch, shape, coefficients, dtype
):
    x = gaussian(*shape)
    options = {"coefficients": coefficients, "dtype": dtype}
    by_strips, flop = orthogonalize(x, **options), flop_of(x, **options)
    monkeypatch.setattr(newton_schulz, "_LARGE", 10**9)
    whole = orthogonalize(x, **options)
    assert flop < flop_of(x, **options)
    if dtype == BF16:
        assert_same_products([by_strips], [whole])
    else:
        torch.testing.assert_close(by_strips, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("strips", "share"), [(2, 3 / 4), (3, 2 / 3), (4, 5 / 8)])
def test_strips_halve_the_symmetric_products_the_more_there_are(strips_of_64, strips, share):
    side = 64 * strips
    product = 2 * side**3
    # A step of the quintic has two symmetric products and one that is none.
    assert flop_of(gaussian(side, side), dtype=BF16) == pytest.approx(5 * product * (2 * share + 1))


def test_a_stack_of_more_than_one_matrix_at_a_time_is_not_cut_into_strips(strips_of_64):
    x = gaussian(3, 128, 128)
    assert flop_of(x, dtype=BF16) == 3 * 15 * 2 * 128**3


@pytest.mark.parametrize("shape", [(512, 512), (600, 450), (450, 600), (2, 512, 448)], ids=str)
def test_large_matrices_equal_torch_muon_in_every_bit(shape):
    [ours] = parameters(shape)
    theirs = [nn.Parameter(matrix.clone()) for matrix in ours.detach().reshape(-1, *shape[-2:])]
    optimizer = Muon([{"params": [ours], "batch_dims": ours.ndim - 2}], lr=0.02, dtype=BF16)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    for step in range(2):
        ours.grad = gaussian(*shape, seed=step)
        for p, gradient in zip(theirs, ours.grad.reshape(-1, *shape[-2:]), strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        reference.step()
    assert_same_products(list(ours.detach().reshape(-1, *shape[-2:])), theirs)


# -------------------------------------------------------------- one stack for several groups

SHAPE = (48, 32)
OPTIONS = [
    {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
    {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.0},
    {"lr": 0.02, "momentum": 0.0, "weight_decay": 0.3, "nesterov": False},
    {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.1},
]
ADJUSTMENTS = ["original", "match_rms_adamw", "match_rms_adamw", "original"]


def test_one_shape_in_groups_of_different_rates_equals_torch_muon_on_each_in_every_bit():
    start = parameters(*[SHAPE] * len(OPTIONS))
    ours, theirs = clones(start), clones(start)
    groups = [
        {"params": [p], "adjust_lr": adjust_lr, **options}
        for p, adjust_lr, options in zip(ours, ADJUSTMENTS, OPTIONS, strict=True)
    ]
    references = [
        torch.optim.Muon([p], adjust_lr_fn=adjust_lr, **options)
        for p, adjust_lr, options in zip(theirs, ADJUSTMENTS, OPTIONS, strict=True)
    ]
    with Products() as products:
        drive([Muon(groups, dtype=BF16)], ours, steps=4)
    assert products.sizes == [4] * QUINTIC * 4
    drive(references, theirs, steps=4)
    assert_same_bits(ours, theirs)
    assert not any(torch.equal(p, before) for p, before in zip(ours, start, strict=True))


def test_without_adjustment_a_group_on_a_shared_stack_moves_at_its_own_rate():
    exact = {"coefficients": "polar_express", "ns_steps": 8, "dtype": torch.float32}
    square, tall, stacked = params = parameters((32, 32), (64, 32), (2, 64, 32))
    before = clones(params)
    for i, p in enumerate(params):
        p.grad = gaussian(*p.shape, seed=9 + i)
    groups = [
        {"params": [square], "lr": 0.1, "adjust_lr": None},
        {"params": [tall], "lr": 0.02, "adjust_lr": None},
        {"params": [stacked], "lr": 0.03, "adjust_lr": "original", "batch_dims": 1},
    ]
    Muon(groups, **exact).step()
    norms = [
        torch.linalg.matrix_norm((p - b).detach(), 2) for p, b in zip(params, before, strict=True)
    ]
    torch.testing.assert_close(norms[0], torch.tensor(0.1), rtol=1e-3, atol=0)
    torch.testing.assert_close(norms[1], torch.tensor(0.02), rtol=1e-3, atol=0)
    torch.testing.assert_close(norms[2], torch.full((2,), 0.03 * 2**0.5), rtol=1e-3, atol=0)


def test_wide_tall_split_and_flattened_matrices_together_equal_torch_muon_in_every_bit():
    start = parameters((48, 32), (32, 48), (2, 48, 32), (96, 32), (32, 12, 2, 2))
    ours = clones(start)
    groups = [
        {"params": ours[:3], "batch_dims": [0, 0, 1], "lr": 0.02},
        {"params": ours[3:], "splits": [2, 1], "lr": 0.05},
    ]
    matrices = [m for p in start for m in p.detach().reshape(-1, *shape_of(p))]
    theirs = [nn.Parameter(m.clone()) for m in matrices]
    # The wide one, the two halves of 96x32 and the kernel are all 48x32 or 32x48.
    references = [
        torch.optim.Muon(theirs[:4], lr=0.02, weight_decay=0.0),
        torch.optim.Muon(theirs[4:], lr=0.05, weight_decay=0.0),
    ]
    optimizer = Muon(groups, dtype=BF16)
    for step in range(4):
        for i, p in enumerate(ours):
            p.grad = gaussian(*p.shape, seed=100 * step + i)
        grads = [g for p in ours for g in p.grad.reshape(-1, *shape_of(p))]
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        for each in (optimizer, *references):
            each.step()
    ours_apart = [m for p in ours for m in p.detach().reshape(-1, *shape_of(p))]
    assert_same_products(ours_apart, theirs)


def shape_of(p):
    """Return the shape of one matrix of a parameter: 96x32 is two, a kernel is flattened."""
    return (48, 32) if p.shape[-1] == 32 and p.shape[-2] != 32 else (32, 48)


@pytest.mark.parametrize(
    "options",
    [
        [{"ns_steps": 5}, {"ns_steps": 3}],
        [{"coefficients": (3.4445, -4.7750, 2.0315)}, {"coefficients": (2.0, -1.5, 0.5)}],
        [{"eps": 1e-7}, {"eps": 100.0}],
    ],
    ids=["ns_steps", "coefficients", "eps"],
)
def test_groups_of_different_iterations_do_not_mix(options):
    start = parameters(*[SHAPE] * 2)
    ours, theirs = clones(start), clones(start)
    groups = [{"params": [p], **each} for p, each in zip(ours, options, strict=True)]
    with Products() as products:
        drive([Muon(groups, lr=0.02, dtype=BF16)], ours)
    assert set(products.sizes) == {1}
    renamed = [
        {"ns_coefficients" if name == "coefficients" else name: value for name, value in o.items()}
        for o in options
    ]
    references = [
        torch.optim.Muon([p], lr=0.02, weight_decay=0.0, **each)
        for p, each in zip(theirs, renamed, strict=True)
    ]
    drive(references, theirs)
    assert_same_bits(ours, theirs)


def test_groups_of_different_arithmetic_do_not_mix():
    start = parameters(*[SHAPE] * 2)
    together, alone = clones(start), clones(start)
    dtypes = [BF16, torch.float32]
    groups = [{"params": [p], "dtype": dtype} for p, dtype in zip(together, dtypes, strict=True)]
    with Products() as products:
        drive([Muon(groups)], together)
    assert set(products.sizes) == {1}
    drive([Muon([p], dtype=dtype) for p, dtype in zip(alone, dtypes, strict=True)], alone)
    assert_same_bits(together, alone)


def test_equal_coefficients_by_name_and_by_number_share_a_stack():
    params = parameters(*[SHAPE] * 2)
    options = [{"coefficients": "quintic"}, {"coefficients": [[3.4445, -4.7750, 2.0315]]}]
    groups = [{"params": [p], **each} for p, each in zip(params, options, strict=True)]
    with Products() as products:
        drive([Muon(groups, dtype=BF16)], params, steps=1)
    assert products.sizes == [2] * QUINTIC


# ---------------------------------------------------------------------------- the arithmetic


def test_small_matrices_are_worked_on_in_float32_by_default(monkeypatch):
    monkeypatch.setattr(iteration, "computes_bf16", lambda device_type: True)
    start = parameters((64, 24), (2, 24, 64), (65, 80))
    runs = {}
    for dtype in (None, torch.float32, BF16):
        runs[dtype] = clones(start)
        drive([Muon([{"params": runs[dtype], "batch_dims": [0, 1, 0]}], dtype=dtype)], runs[dtype])
    assert_same_bits(runs[None][:2], runs[torch.float32][:2])
    assert_same_bits(runs[None][2:], runs[BF16][2:])
    assert not torch.equal(runs[BF16][0], runs[torch.float32][0])


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)], ids=str)
def test_20_steps_in_bfloat16_end_half_a_percent_from_those_in_float32(shape):
    ends = []
    for dtype in (torch.float32, BF16):
        (p,) = parameters(shape)
        start = p.detach().clone()
        drive([Muon([p], dtype=dtype)], [p], steps=20)
        ends.append(p.detach() - start)
    distance = float((ends[1] - ends[0]).norm() / ends[0].norm())
    assert 4.0e-3 < distance < 6.5e-3
