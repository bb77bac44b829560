"""Muon against torch.optim.Muon, Adam and AdamW, and against its own definition."""

import copy
import io
import math
import pickle

import pytest
import torch
from driving import (
    assert_same_bits,
    assert_same_products,
    clones,
    drive,
    gaussian,
    give_gradients,
    parameters,
    snapshot,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from muon_rl.optim import Muon

BF16 = torch.bfloat16
SHAPES = [(1, 256), (256, 1), (64, 3), (64, 64), (96, 40), (40, 96), (33, 17)]
# Exact to 1e-3 in fp32, so that a result can be compared with the polar factor.
EXACT = {"coefficients": "polar_express", "ns_steps": 8, "dtype": torch.float32}


def polar(x):
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u @ vh).to(x.dtype)


# ------------------------------------------------------------------ equality with torch's Muon


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_follows_torch_muon_in_every_bit(shape, nesterov, adjust_lr, weight_decay):
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    start = parameters(shape)
    ours, theirs = clones(start), clones(start)
    drive(Muon(ours, **options, adjust_lr=adjust_lr, dtype=BF16), ours)
    drive(torch.optim.Muon(theirs, **options, adjust_lr_fn=adjust_lr), theirs)
    assert_same_products(ours, theirs)
    assert not torch.equal(ours[0], start[0])


def test_all_shapes_in_one_group_follow_torch_muon_in_every_bit():
    start = parameters(*SHAPES, (64, 64), (96, 40))
    ours, theirs = clones(start), clones(start)
    drive(Muon(ours, lr=0.03, weight_decay=0.1, dtype=BF16), ours)
    drive(torch.optim.Muon(theirs, lr=0.03, weight_decay=0.1), theirs)
    assert_same_products(ours, theirs)


def test_coefficients_steps_and_eps_reach_the_iteration():
    start = parameters((48, 32))
    ours, theirs = clones(start), clones(start)
    triple = (2.0, -1.5, 0.5)
    options = {"lr": 0.02, "weight_decay": 0.0, "ns_steps": 3, "eps": 100.0}
    drive(Muon(ours, **options, coefficients=triple, dtype=BF16), ours)
    drive(torch.optim.Muon(theirs, **options, ns_coefficients=triple), theirs)
    assert_same_products(ours, theirs)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("shape", "batch_dims"),
    [((2, 64, 64), 1), ((3, 96, 40), 1), ((2, 40, 96), 1), ((2, 3, 64, 48), 2), ((1, 64, 64), 1)],
    ids=str,
)
def test_a_stacked_parameter_equals_separate_matrices_in_every_bit(shape, batch_dims, nesterov):
    stacked = parameters(shape)
    matrices = stacked[0].detach().reshape(-1, *shape[-2:])
    separate = [nn.Parameter(m.clone()) for m in matrices]
    options = {"lr": 0.02, "nesterov": nesterov, "weight_decay": 0.1}
    ours = Muon([{"params": stacked, "batch_dims": batch_dims}], **options, dtype=BF16)
    theirs = torch.optim.Muon(separate, **options)
    for step in range(4):
        give_gradients(stacked, step)
        for p, grad in zip(separate, stacked[0].grad.reshape(-1, *shape[-2:]), strict=True):
            p.grad = grad.clone()
        ours.step()
        theirs.step()
    assert_same_products(stacked[0].reshape(-1, *shape[-2:]), separate)


@pytest.mark.parametrize(
    ("kernel", "batch_dims", "matrix"),
    [
        ((32, 8, 3, 3), 0, (32, 72)),
        ((64, 3, 4, 4), 0, (64, 48)),
        ((80, 16, 2), 0, (80, 32)),
        ((2, 32, 8, 3, 3), 1, (32, 72)),
    ],
    ids=str,
)
def test_a_convolution_kernel_equals_its_flattened_matrix_in_every_bit(kernel, batch_dims, matrix):
    kernels = parameters(kernel)
    flat = [nn.Parameter(m.clone()) for m in kernels[0].detach().reshape(-1, *matrix)]
    ours = Muon([{"params": kernels, "batch_dims": batch_dims}], lr=0.02, dtype=BF16)
    theirs = torch.optim.Muon(flat, lr=0.02, weight_decay=0.0)
    for step in range(3):
        give_gradients(kernels, step)
        for p, grad in zip(flat, kernels[0].grad.reshape(-1, *matrix), strict=True):
            p.grad = grad.clone()
        ours.step()
        theirs.step()
    assert_same_products(kernels[0].reshape(-1, *matrix), flat)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(
    ("shape", "batch_dims", "splits", "part"),
    [
        ((96, 32), 0, 3, (32, 32)),
        ((128, 48), 0, 4, (32, 48)),
        ((192, 32), 0, 3, (64, 32)),
        ((2, 96, 32), 1, 3, (32, 32)),
    ],
    ids=str,
)
def test_splits_equal_separate_matrices_in_every_bit(shape, batch_dims, splits, part, adjust_lr):
    fused = parameters(shape)
    separate = [nn.Parameter(m.clone()) for m in fused[0].detach().reshape(-1, *part)]
    group = {"params": fused, "batch_dims": batch_dims, "splits": splits}
    ours = Muon([group], lr=0.02, weight_decay=0.1, adjust_lr=adjust_lr, dtype=BF16)
    theirs = torch.optim.Muon(separate, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust_lr)
    for step in range(3):
        give_gradients(fused, step)
        for p, grad in zip(separate, fused[0].grad.reshape(-1, *part), strict=True):
            p.grad = grad.clone()
        ours.step()
        theirs.step()
    assert_same_products(fused[0].reshape(-1, *part), separate)


def test_parameters_batched_together_equal_each_alone_in_every_bit():
    shapes = [(64, 48), (64, 48), (2, 64, 48), (48, 64), (192, 48), (64, 4, 3, 4), (32, 32)]
    batch_dims = [0, 0, 1, 0, 0, 0, 0]
    splits = [1, 1, 1, 1, 3, 1, 1]
    start = parameters(*shapes)
    together, alone = clones(start), clones(start)
    group = {"params": together, "batch_dims": batch_dims, "splits": splits}
    drive(Muon([group], weight_decay=0.1, dtype=BF16), together)
    optimizers = [
        Muon([{"params": [p], "batch_dims": b, "splits": s}], weight_decay=0.1, dtype=BF16)
        for p, b, s in zip(alone, batch_dims, splits, strict=True)
    ]
    for step in range(4):
        give_gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_products(together, alone)


def test_a_noncontiguous_parameter_follows_torch_muon():
    ours = [nn.Parameter(gaussian(40, 96).T)]
    theirs = [nn.Parameter(gaussian(40, 96).T)]
    assert not ours[0].is_contiguous()
    drive(Muon(ours, lr=0.02, dtype=BF16), ours)
    drive(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0), theirs)
    assert_same_products(ours, theirs)


# ------------------------------------------------------------------------- the rule by itself


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("adjust_lr", "ratio"),
    [
        ("original", lambda m, n: math.sqrt(max(1.0, m / n))),
        ("match_rms_adamw", lambda m, n: 0.2 * math.sqrt(max(m, n))),
        (None, lambda m, n: 1.0),
    ],
    ids=["original", "match_rms_adamw", "none"],
)
@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64), (3, 48, 24)], ids=str)
def test_two_steps_move_along_the_polar_factor_of_the_moving_average(
    shape, adjust_lr, ratio, nesterov
):
    lr, momentum, decay = 0.05, 0.8, 0.3
    params = parameters(shape)
    expected = params[0].detach().clone()
    options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    group = {"params": params, "batch_dims": len(shape) - 2}
    optimizer = Muon([group], **options, adjust_lr=adjust_lr, **EXACT)
    average = torch.zeros(shape)
    for seed in (1, 2):
        params[0].grad = gaussian(*shape, seed=seed)
        average = momentum * average + (1 - momentum) * params[0].grad
        look = momentum * average + (1 - momentum) * params[0].grad if nesterov else average
        rate = lr * ratio(*shape[-2:])
        expected = (1 - lr * decay) * expected - rate * polar(look)
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), expected, rtol=0, atol=2e-3 * lr)


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64)], ids=str)
def test_the_rate_is_the_spectral_norm_of_an_update(shape):
    params = parameters(shape)
    before = params[0].detach().clone()
    params[0].grad = 1e-3 * gaussian(*shape, seed=5)
    Muon(params, lr=0.02, adjust_lr=None, **EXACT).step()
    singular_values = torch.linalg.svdvals(params[0].detach() - before)
    torch.testing.assert_close(
        singular_values, torch.full_like(singular_values, 0.02), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64)], ids=str)
def test_match_rms_adamw_gives_an_update_of_rms_one_fifth_of_the_rate(shape):
    params = parameters(shape)
    before = params[0].detach().clone()
    params[0].grad = gaussian(*shape, seed=5)
    Muon(params, lr=0.02, adjust_lr="match_rms_adamw", **EXACT).step()
    rms = float((params[0].detach() - before).square().mean().sqrt())
    assert rms == pytest.approx(0.2 * 0.02, rel=1e-3)


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (2, 24, 64)], ids=str)
def test_a_zero_gradient_without_decay_leaves_the_parameter(shape):
    params = parameters(shape)
    before = clones(params)
    params[0].grad = torch.zeros(shape)
    optimizer = Muon([{"params": params, "batch_dims": len(shape) - 2}], lr=0.02)
    optimizer.step()
    assert_same_bits(params, before)
    assert optimizer.state[params[0]].keys() == {"momentum_buffer"}


def test_a_zero_gradient_with_decay_shrinks_the_parameter_by_rate_times_decay():
    params = parameters((32, 24))
    before = clones(params)
    params[0].grad = torch.zeros(32, 24)
    Muon(params, lr=0.02, weight_decay=0.5, adjust_lr="match_rms_adamw").step()
    torch.testing.assert_close(params[0], before[0] * (1 - 0.02 * 0.5))


def test_a_nan_in_a_stack_stays_in_its_own_matrix():
    start = parameters((3, 32, 24), (32, 24))
    spoiled, clean = clones(start), clones(start)
    for params, bad in ((spoiled, True), (clean, False)):
        optimizer = Muon([{"params": params, "batch_dims": [1, 0]}], lr=0.02)
        give_gradients(params, 0)
        if bad:
            params[0].grad[1, 2, 3] = float("nan")
        optimizer.step()
    assert spoiled[0][1].isnan().all()
    assert torch.equal(spoiled[0][[0, 2]], clean[0][[0, 2]])
    assert torch.equal(spoiled[1], clean[1])


@pytest.mark.parametrize("on_nonfinite", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("scale", [1e20, 1e30])
@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64), (2, 24, 64)], ids=str)
def test_large_finite_gradients_move_the_parameter_as_ordinary_ones(shape, scale, on_nonfinite):
    params = parameters(shape)
    before = params[0].detach().clone()
    gradient = gaussian(*shape, seed=3)
    params[0].grad = scale * gradient
    group = {"params": params, "batch_dims": len(shape) - 2}
    optimizer = Muon([group], lr=0.02, adjust_lr=None, on_nonfinite=on_nonfinite, **EXACT)
    optimizer.step()
    moved = (before - params[0].detach()) / 0.02
    exact = polar(gradient)
    assert float((moved - exact).norm() / exact.norm()) < 0.01
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("delay", [{}, {"momentum_start_step": 1, "momentum_warmup_steps": 2}])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("muon", {"dtype": BF16}),
        ("adam", {}),
        ("adamw", {}),
        ("adam", {"fused": True}),
        ("adamw", {"fused": True}),
    ],
    ids=str,
)
def test_a_rate_in_a_tensor_does_what_the_number_does(algorithm, options, delay):
    start = parameters((32, 24), (24, 32))
    number, tensor = clones(start), clones(start)
    for params, lr in ((number, 0.02), (tensor, torch.tensor(0.02))):
        group = {"params": params, "algorithm": algorithm, **options, **delay}
        drive(Muon([{**group, "lr": lr, "weight_decay": 0.1}]), params, steps=6)
    for a, b, before in zip(tensor, number, start, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert not torch.allclose(a, before, atol=1e-3)


# ---------------------------------------------------------------------------------- Adam groups


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("algorithm", ["adam", "adamw"])
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.2}],
    ids=["defaults", "given"],
)
def test_an_adam_group_beside_muon_equals_torch_in_every_bit(algorithm, options, fused):
    matrices = parameters((48, 32), seed=50)
    start = parameters((), (7,), (2, 5), (20, 4), (2, 16, 8))
    ours, theirs = clones(start), clones(start)
    adam_group = {"params": ours, "algorithm": algorithm, "fused": fused, **options}
    # Values that Adam would show if it inherited them.
    muon = {"lr": 0.5, "eps": 0.1, "weight_decay": 0.3, "momentum": 0.1}
    optimizer = Muon([{"params": matrices}, adam_group], **muon, dtype=BF16)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[algorithm]
    reference = kind(theirs, fused=fused, **options)
    muon_reference = clones(matrices)
    torch_muon = torch.optim.Muon(muon_reference, **muon)
    for step in range(5):
        give_gradients([*ours, *matrices], step)
        for p, twin in zip([*ours, *matrices], [*theirs, *muon_reference], strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        torch_muon.step()
    assert_same_bits(ours, theirs)
    assert_same_bits(matrices, muon_reference)


@pytest.mark.parametrize("algorithm", ["adam", "adamw"])
def test_an_adam_group_takes_torch_defaults_and_never_those_of_muon(algorithm):
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[algorithm]
    expected = kind(parameters((3,))).defaults
    matrix, bias = parameters((8, 8), (8,))
    optimizer = Muon(
        [{"params": [matrix]}, {"params": [bias], "algorithm": algorithm}],
        lr=0.5,
        momentum=0.1,
        eps=0.2,
        weight_decay=0.3,
    )
    group = optimizer.param_groups[1]
    for option in ("lr", "betas", "eps", "weight_decay", "fused"):
        assert group[option] == expected[option]
    assert not {"momentum", "nesterov", "ns_steps", "coefficients", "adjust_lr"} & set(group)
    assert optimizer.param_groups[0]["lr"] == 0.5


# ----------------------------------------------------------------------- saving and continuing


def mixed():
    """Build one optimizer with every kind of group; the same at each call."""
    params = parameters((48, 32), (2, 48, 32), (96, 32), (16, 4, 3, 3), (2, 16), (8,), ())
    muon = {"params": params[:3], "batch_dims": [0, 1, 0], "splits": [1, 1, 3], "name": "muon"}
    optimizer = Muon(
        [
            muon,
            {"params": params[3:4], "lr": 0.05, "coefficients": [[1.5, -0.5, 0.0]], "name": "conv"},
            {"params": params[4:5], "algorithm": "adamw", "fused": True, "name": "aux"},
            {"params": params[5:], "algorithm": "adam", "lr": 3e-4, "name": "alpha"},
        ],
        weight_decay=0.1,
        dtype=BF16,
        on_nonfinite="skip",
    )
    return optimizer, params


def test_a_state_dict_loaded_in_the_middle_continues_in_every_bit():
    optimizer, params = mixed()
    drive(optimizer, params, steps=3)
    optimizer.param_groups[0]["lr"] = 0.07
    optimizer.param_groups[0]["momentum"] = 0.6
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    drive(optimizer, params, start=3, steps=3)

    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    resumed, resumed_params = mixed()
    for p, value in zip(resumed_params, values, strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.07
    drive(resumed, resumed_params, start=3, steps=3)
    assert_same_bits(resumed_params, params)
    assert_same_bits(snapshot(resumed), snapshot(optimizer))


def test_forgetting_the_state_changes_the_continuation():
    optimizer, params = mixed()
    drive(optimizer, params, steps=3)
    forgetful, forgetful_params = mixed()
    for p, twin in zip(forgetful_params, params, strict=True):
        p.data.copy_(twin.detach())
    drive(optimizer, params, start=3, steps=1)
    drive(forgetful, forgetful_params, start=3, steps=1)
    for p, twin in zip(forgetful_params, params, strict=True):
        assert not torch.equal(p, twin)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_keeps_on_nonfinite_and_continues_in_every_bit(copied):
    optimizer, params = mixed()
    drive(optimizer, params, steps=2)
    params[0].grad.fill_(float("nan"))
    optimizer.step()
    twin = copied(optimizer)
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    assert twin.on_nonfinite == "skip"
    assert twin.skipped_steps == 1
    drive(twin, twin_params, start=2, steps=2)
    drive(optimizer, params, start=2, steps=2)
    assert_same_bits(twin_params, params)


# ------------------------------------------------------------------------- gradients and closure


@pytest.mark.parametrize("on_nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_gradients_are_never_modified(nesterov, on_nonfinite):
    matrix, stack, bias, decayed = params = parameters((48, 32), (2, 16, 32), (16,), (8,))
    optimizer = Muon(
        [
            {"params": [matrix, stack], "batch_dims": [0, 1]},
            {"params": [bias], "algorithm": "adamw"},
            {"params": [decayed], "algorithm": "adam", "weight_decay": 0.5},
        ],
        nesterov=nesterov,
        weight_decay=0.1,
        on_nonfinite=on_nonfinite,
    )
    for step in range(3):
        give_gradients(params, step)
        gradients = [p.grad for p in params]
        before = [gradient.clone() for gradient in gradients]
        values = clones(params)
        optimizer.step()
        assert all(p.grad is gradient for p, gradient in zip(params, gradients, strict=True))
        assert_same_bits(gradients, before)
        assert not any(torch.equal(p, value) for p, value in zip(params, values, strict=True))


def test_a_parameter_without_a_gradient_neither_decays_nor_gets_a_state():
    unused_matrix, unused_bias, *used = parameters((48, 32), (16,), (48, 32), (16,))
    before = clones([unused_matrix, unused_bias])
    optimizer = Muon(
        [
            {"params": [unused_matrix, used[0]]},
            {"params": [unused_bias, used[1]], "algorithm": "adamw", "weight_decay": 0.5},
        ],
        weight_decay=0.5,
        dtype=BF16,
    )
    values = clones(used)
    drive(optimizer, used, steps=3)
    assert_same_bits([unused_matrix, unused_bias], before)
    assert unused_matrix not in optimizer.state
    assert unused_bias not in optimizer.state
    assert not any(torch.equal(p, value) for p, value in zip(used, values, strict=True))

    late = clones(before)
    reference = Muon(
        [
            {"params": late[:1]},
            {"params": late[1:], "algorithm": "adamw", "weight_decay": 0.5},
        ],
        weight_decay=0.5,
        dtype=BF16,
    )
    optimizer.zero_grad()
    assert_same_bits(
        drive(optimizer, [unused_matrix, unused_bias], start=3), drive(reference, late, start=3)
    )


def test_a_step_without_any_gradient_changes_nothing():
    optimizer, params = mixed()
    before = clones(params)
    assert optimizer.step() is None
    assert_same_bits(params, before)
    assert not optimizer.state


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_comes_back():
    torch.manual_seed(0)
    net = nn.Linear(8, 4)
    twin = copy.deepcopy(net)
    groups = [
        [{"params": [n.weight]}, {"params": [n.bias], "algorithm": "adam"}] for n in (net, twin)
    ]
    optimizer, reference = Muon(groups[0]), Muon(groups[1])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.ones(3, 8)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    expected = twin(torch.ones(3, 8)).square().sum()
    expected.backward()
    reference.step()
    assert calls == [True]
    assert torch.equal(loss, expected)
    assert_same_bits(list(net.parameters()), list(twin.parameters()))


# ------------------------------------------------------------------------ schedulers and groups


def test_each_group_follows_its_own_schedule_as_torch_optimizers_do():
    muon_schedule, adam_schedule = (lambda t: 0.5**t), (lambda t: 1.0 + t)
    start = parameters((48, 32), (16,))
    ours, theirs = clones(start), clones(start)
    optimizer = Muon(
        [
            {"params": ours[:1], "lr": 0.02},
            {"params": ours[1:], "algorithm": "adamw", "lr": 1e-3},
        ],
        dtype=BF16,
    )
    scheduler = LambdaLR(optimizer, [muon_schedule, adam_schedule])
    muon = torch.optim.Muon(theirs[:1], lr=0.02, weight_decay=0.0)
    adamw = torch.optim.AdamW(theirs[1:], lr=1e-3)
    schedulers = [LambdaLR(muon, muon_schedule), LambdaLR(adamw, adam_schedule)]
    for step in range(4):
        drive(optimizer, ours, start=step, steps=1)
        give_gradients(theirs, step)
        muon.step()
        adamw.step()
        for each in (scheduler, *schedulers):
            each.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.02 * 0.5**4, 1e-3 * 5]
    assert_same_bits(ours, theirs)


def test_one_cycle_moves_the_momentum_of_muon_and_leaves_the_betas_of_adam():
    matrix, bias = params = parameters((8, 8), (8,))
    groups = [{"params": [matrix]}, {"params": [bias], "algorithm": "adam"}]
    optimizer = Muon(groups)
    assert "betas" not in optimizer.defaults
    scheduler = OneCycleLR(optimizer, max_lr=[0.05, 1e-3], total_steps=10)
    momenta = []
    for step in range(3):
        drive(optimizer, params, start=step, steps=1)
        scheduler.step()
        momenta.append(optimizer.param_groups[0]["momentum"])
    assert momenta[-1] == pytest.approx(0.85, abs=0.011)
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("reloaded", [False, True])
def test_a_group_added_later_trains_as_one_given_from_the_start(reloaded):
    start = parameters((48, 32), (2, 48, 32), (16,))
    late, early = clones(start), clones(start)
    groups = [
        [
            {"params": params[1:2], "batch_dims": 1, "name": "stack"},
            {"params": params[2:], "algorithm": "adam", "name": "aux"},
        ]
        for params in (late, early)
    ]
    optimizer = Muon(late[:1], lr=0.05, dtype=BF16)
    if reloaded:
        optimizer.load_state_dict(optimizer.state_dict())
    for group in groups[0]:
        optimizer.add_param_group(group)
    reference = Muon([{"params": early[:1]}, *groups[1]], lr=0.05, dtype=BF16)
    assert [g["name"] for g in optimizer.param_groups] == ["group0", "stack", "aux"]
    assert optimizer.param_groups[1]["lr"] == 0.05
    assert optimizer.param_groups[2]["lr"] == 1e-3
    assert_same_bits(drive(optimizer, late), drive(reference, early))


def test_a_refused_group_leaves_the_optimizer_and_the_given_dict_as_they_were():
    matrix, bias = parameters((8, 8), (8,))
    optimizer = Muon([matrix])
    defaults = dict(optimizer.defaults)
    for group in (
        {"params": [bias]},
        {"params": [bias], "algorithm": "adam", "betas": (0.9, 1.0)},
        {"params": [matrix], "algorithm": "adam"},
    ):
        given = dict(group)
        with pytest.raises(ValueError, match=r"matrices|betas|more than one parameter group"):
            optimizer.add_param_group(group)
        assert group == given
        assert len(optimizer.param_groups) == 1
        assert optimizer.defaults == defaults


@pytest.mark.parametrize("adjust_lr", [None, "original", "match_rms_adamw"])
def test_a_run_of_torch_muon_goes_on_from_its_state_dict(adjust_lr):
    start = parameters((80, 70), (70, 96))
    theirs = clones(start)
    options = {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": adjust_lr}
    optimizer = torch.optim.Muon(theirs, **options, ns_coefficients=(2.0, -1.5, 0.5))
    drive(optimizer, theirs, steps=3)
    ours = clones(theirs)
    ahead = Muon(ours, dtype=BF16)
    ahead.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    drive(optimizer, theirs, start=3, steps=3)
    drive(ahead, ours, start=3, steps=3)
    assert_same_products(ours, theirs)
