"""The layout of stacks is worked out once, and anew where the groups ask for another."""

import copy

import pytest
import torch
from driving import assert_same_bits, clones, drive, gaussian, parameters
from torch.utils._python_dispatch import TorchDispatchMode

from muon_rl.optim import Muon, stacks
from muon_rl.optim.coefficients import resolve_coefficients
from muon_rl.optim.orthogonalize import room

BF16 = torch.bfloat16


@pytest.fixture
def arranged(monkeypatch):
    """Return a list that grows with each layout that is worked out."""
    calls, arrange = [], stacks.arrange
    monkeypatch.setattr(stacks, "arrange", lambda groups: (calls.append(1), arrange(groups))[1])
    return calls


def test_steps_of_moving_rates_and_momenta_share_one_layout(arranged):
    params = parameters((8, 6), (2, 8, 6), (6, 8))
    optimizer = Muon([{"params": params, "batch_dims": [0, 1, 0]}])
    for step in range(4):
        drive(optimizer, params, start=step, steps=1)
        optimizer.param_groups[0].update(lr=0.01 * step, momentum=0.1 * step, weight_decay=0.1)
    assert len(arranged) == 1


CHANGES = {
    "ns_steps": {"ns_steps": 3},
    "coefficients": {"coefficients": "cubic"},
    "eps": {"eps": 1000.0},
    "adjust_lr": {"adjust_lr": "match_rms_adamw"},
    "dtype": {"dtype": torch.float64},
    "splits": {"splits": 2},
    "batch_dims": {"batch_dims": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_option_that_changes_in_a_run_holds_from_the_next_step_on(change):
    start = parameters((80, 64, 2, 2), (80, 64, 2, 2))
    ours, fresh = clones(start), clones(start)
    options = {"momentum": 0.0, "splits": 1, "batch_dims": 0, "dtype": torch.float32}
    optimizer = Muon([{"params": ours, **options}])
    drive(optimizer, ours, steps=2)
    optimizer.param_groups[0].update(change)
    for p, moved in zip(fresh, ours, strict=True):
        p.data.copy_(moved)
    unchanged = clones(ours)
    drive(optimizer, ours, start=2, steps=1)
    drive(Muon([{"params": fresh, **options, **change}]), fresh, start=2, steps=1)
    assert_same_bits(ours, fresh)
    drive(Muon([{"params": unchanged, **options}]), unchanged, start=2, steps=1)
    assert not torch.equal(ours[0], unchanged[0])


@pytest.mark.parametrize("shape", [(16, 16), (16, 32)], ids=str)
def test_a_parameter_of_another_shape_is_orthogonalized_in_it(shape):
    (p,) = params = parameters((8, 32))
    optimizer = Muon(params, momentum=0.0, dtype=torch.float32, adjust_lr=None)
    drive(optimizer, params, steps=1)
    p.grad, p.data = None, gaussian(*shape)
    optimizer.state.clear()
    before = p.detach().clone()
    p.grad = gaussian(*shape, seed=3)
    optimizer.step()
    values = torch.linalg.svdvals(p.detach() - before) / 0.02
    assert 0.6 < values.min() < values.max() < 1.3


def test_a_list_of_coefficients_that_is_changed_in_place_is_seen():
    start = parameters((8, 8))
    ours, fresh = clones(start), clones(start)
    triples = [[3.4445, -4.7750, 2.0315]]
    optimizer = Muon(ours, coefficients=triples, momentum=0.0)
    drive(optimizer, ours, steps=1)
    optimizer.param_groups[0]["coefficients"][0][0] = 2.0
    fresh[0].data.copy_(ours[0])
    drive(optimizer, ours, start=1, steps=1)
    other = Muon(fresh, coefficients=[[2.0, -4.7750, 2.0315]], momentum=0.0)
    drive(other, fresh, start=1, steps=1)
    assert_same_bits(ours, fresh)


def test_gradients_that_come_and_go_are_followed():
    start = parameters((8, 8), (8, 8), (8, 8))
    ours, alone = clones(start), clones(start)
    optimizer = Muon(ours, dtype=BF16)
    each = [Muon([p], dtype=BF16) for p in alone]
    for step, present in enumerate([{0, 1}, {1, 2}, {0}, {0, 1, 2}, set(), {1}]):
        for i, (p, q) in enumerate(zip(ours, alone, strict=True)):
            grad = gaussian(8, 8, seed=10 * step + i) if i in present else None
            p.grad, q.grad = grad, None if grad is None else grad.clone()
        for any_optimizer in (optimizer, *each):
            any_optimizer.step()
    for p, q in zip(ours, alone, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=5e-3)


def test_a_copy_steps_its_own_parameters():
    params = parameters((8, 8))
    optimizer = Muon(params)
    drive(optimizer, params, steps=1)
    twin = copy.deepcopy(optimizer)
    theirs = twin.param_groups[0]["params"]
    before = clones(params)
    drive(twin, theirs, start=1, steps=1)
    assert_same_bits(params, before)
    drive(optimizer, params, start=1, steps=1)
    assert_same_bits(params, theirs)


def test_after_a_move_to_another_dtype_the_updates_still_fit():
    (p,) = params = parameters((8, 8))
    optimizer = Muon(params, momentum=0.0, dtype=torch.float32)
    drive(optimizer, params, steps=1)
    p.data, p.grad = p.data.double(), None
    optimizer.state.clear()
    before = p.detach().clone()
    p.grad = 1e200 * gaussian(8, 8).double()  # beyond float32
    optimizer.step()
    norm = torch.linalg.matrix_norm(p.detach() - before, 2)
    assert 0.6 * 0.02 < norm < 1.3 * 0.02


# ------------------------------------------------------------------ small skinny matrices


class Grams(TorchDispatchMode):
    """Records the shapes of all products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            self.shapes.append((tuple(args[0].shape), tuple(args[1].shape)))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "shapes", [[(96, 17), (2, 96, 23), (96, 20)], [(17, 96), (2, 23, 96), (20, 96)]], ids=str
)
def test_skinny_ones_of_similar_sides_share_a_padded_stack_and_equal_each_alone(shapes):
    start = parameters(*shapes)
    ours, alone = clones(start), clones(start)
    dims = [len(shape) - 2 for shape in shapes]
    with Grams() as grams:
        drive(Muon([{"params": ours, "batch_dims": dims}]), ours, steps=1)
    # One Gram matrix and one last product for all four.
    assert [shape[0][0] for shape in grams.shapes] == [4, 4]
    for p, d in zip(alone, dims, strict=True):
        single = Muon([{"params": [p], "batch_dims": d}])
        for i, other in enumerate(alone):
            other.grad = gaussian(*other.shape, seed=i) + 0.1 * start[i].detach()
        single.step()
    for p, q, before in zip(ours, alone, start, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)
        assert not torch.equal(p, before)


@pytest.mark.parametrize(
    "shapes",
    [[(64, 40), (40, 64)], [(32, 20), (20, 32), (32, 32)], [(48, 20), (48, 32)],
     [(50, 33), (50, 64)]],
    ids=str,
)  # fmt: skip
def test_skinny_ones_do_not_share_a_stack_with_a_shape_that_is_not_padded(shapes):
    params = parameters(*shapes)
    for p in params:
        p.grad = gaussian(*p.shape)
    groups = [{"params": params, "algorithm": "muon", **OPTIONS}]
    found = [stack for iteration in stacks.arrange(groups) for stack in iteration.stacks]
    assert sorted(stack.shape[1:] for stack in found) == sorted(shapes)
    assert not any(stack.is_padded for stack in found)


OPTIONS = {
    "batch_dims": 0, "splits": 1, "coefficients": "quintic", "ns_steps": 5, "eps": 1e-7,
    "dtype": None, "adjust_lr": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("side", "padded"), [(16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 65)]
)
def test_skinny_ones_are_padded_to_less_than_twice_their_side(side, padded):
    triples = resolve_coefficients("quintic", 5)
    tall, wide = ("tall", "wide") if side <= 64 else ["unpadded"] * 2
    assert room(256, side, torch.float32, triples) == (256, padded, tall)
    assert room(side, 256, torch.float32, triples) == (padded, 256, wide)
    assert room(256, side, BF16, triples) == (256, side, "unpadded")


def test_a_padded_kernel_and_fused_matrices_equal_their_matrices_apart():
    kernel, fused = start = parameters((96, 5, 2, 2), (3 * 96, 23))
    ours = clones(start)
    groups = [{"params": ours[:1]}, {"params": ours[1:], "splits": 3}]
    for i, p in enumerate(ours):
        p.grad = gaussian(*p.shape, seed=i)
    Muon(groups).step()
    apart = [kernel.detach().reshape(96, 20), *fused.detach().reshape(3, 96, 23)]
    grads = [ours[0].grad.reshape(96, 20), *ours[1].grad.reshape(3, 96, 23)]
    for matrix, grad in zip(apart, grads, strict=True):
        p = torch.nn.Parameter(matrix.clone())
        p.grad = grad.clone()
        Muon([p]).step()
        matrix.copy_(p.detach())
    torch.testing.assert_close(ours[0].detach().reshape(96, 20), apart[0], rtol=0, atol=1e-6)
    together = ours[1].detach().reshape(3, 96, 23)
    torch.testing.assert_close(together, torch.stack(apart[1:]), rtol=0, atol=1e-6)
