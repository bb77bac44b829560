"""What Muon refuses, by name and value, and what it does with gradients that are not finite."""

import re

import pytest
import torch
from driving import assert_same_bits, clones, drive, gaussian, give_gradients, parameters, snapshot
from torch import nn

from muon_rl.optim import Muon

BF16 = torch.bfloat16


# --------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"algorithm": "sgd"}, r"algorithm must be one of .*'muon'.* but is 'sgd'"),
        ({"lrr": 0.1}, r"Unknown option\(s\) lrr in muon group 'group0'; allowed: adjust_lr, .*lr"),
        ({"betas": (0.9, 0.99)}, r"Unknown option\(s\) betas in muon group"),
        ({"algorithm": "adam", "momentum": 0.9}, r"Unknown option\(s\) momentum in adam group"),
        ({"algorithm": "adamw", "amsgrad": True}, r"Unknown option\(s\) amsgrad in adamw group"),
        ({"coefficients": "nonic"}, r"Unknown coefficients 'nonic'"),
        ({"coefficients": (1.0, 2.0)}, r"must hold 3 numbers, but got \(1.0, 2.0\)"),
        ({"adjust_lr": "keller"}, r"adjust_lr must be one of .*but is 'keller' in group 'group0'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), but is 1.0 in group 'group0'"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\), but is 1.5"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), but is -0.1"),
        ({"momentum": float("nan")}, r"momentum must be in \[0, 1\), but is nan"),
        ({"lr": -0.1}, r"lr must be at least 0, but is -0.1 in group 'group0'"),
        ({"lr": float("nan")}, r"lr must be at least 0, but is nan"),
        ({"weight_decay": -0.1}, r"weight_decay must be at least 0, but is -0.1 in group 'group0'"),
        ({"eps": -1e-7}, r"eps must be at least 0, but is -1e-07"),
        ({"ns_steps": 0}, r"ns_steps must be an integer of at least 1, but is 0"),
        ({"algorithm": "adam", "lr": -1.0}, r"lr must be at least 0, but is -1.0"),
        ({"algorithm": "adam", "weight_decay": -1.0}, r"weight_decay must be at least 0"),
        ({"algorithm": "adam", "betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"algorithm": "adam", "betas": (0.9,)}, r"betas must be two numbers in \[0, 1\)"),
        ({"splits": 3}, r"'group0\[0\]' has 8 rows, which do not fall into splits=3 equal parts"),
        ({"splits": 0}, r"splits=0"),
        ({"batch_dims": 1}, r"'group0\[0\]' has shape \(8, 6\) with batch_dims=1, leaving 1"),
        ({"batch_dims": [0, 0]}, r"batch_dims must be one number, or one a parameter"),
        ({"splits": [1, 1]}, r"splits must be one number, or one a parameter"),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_refused_and_named(group, message):
    with pytest.raises(ValueError, match=message):
        Muon([{"params": parameters((8, 6)), **group}])


@pytest.mark.parametrize("batch_dims", [-1, -2])
def test_a_negative_number_of_batch_dims_is_refused(batch_dims):
    with pytest.raises(ValueError, match="batch_dims"):
        Muon([{"params": parameters((8,)), "batch_dims": batch_dims}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_nonfinite": "ignore"}, r"on_nonfinite must be one of .*but is 'ignore'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"lr": -1.0}, r"lr must be at least 0"),
        ({"weight_decay": -1.0}, r"weight_decay must be at least 0"),
        ({"adjust_lr": "keller"}, r"adjust_lr must be one of"),
        ({"coefficients": "nonic"}, r"Unknown coefficients 'nonic'"),
    ],
    ids=str,
)
def test_an_argument_that_does_not_fit_is_refused_and_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Muon(parameters((8, 6)), **arguments)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_a_parameter_without_a_matrix_is_refused_by_name_and_shape(shape):
    shown = r"\(\)" if shape == () else r"\(5,\)"
    message = rf"needs matrices, but 'head.bias' has shape {shown} with batch_dims=0"
    with pytest.raises(ValueError, match=message + ".*AdamW group"):
        Muon([("head.bias", nn.Parameter(torch.zeros(shape)))])


def test_a_stacked_bias_is_refused_by_name_and_shape():
    group = {"params": [("critic.bias", nn.Parameter(torch.zeros(2, 16)))], "batch_dims": 1}
    with pytest.raises(ValueError, match=r"'critic.bias' has shape \(2, 16\) with batch_dims=1"):
        Muon([group])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("algorithm", ["muon", "adam", "adamw"])
def test_other_than_real_floating_point_parameters_are_refused_by_name(algorithm, dtype):
    weight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
    message = f"takes real floating-point parameters only, but 'x' is {dtype}."
    with pytest.raises(TypeError, match=re.escape(message)):
        Muon([{"params": [("x", weight)], "algorithm": algorithm}])


@pytest.mark.parametrize("on_nonfinite", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("algorithm", ["muon", "adam"])
def test_sparse_gradients_are_refused_by_name(algorithm, on_nonfinite):
    table = nn.Embedding(6, 4, sparse=True)
    group = {"params": table.named_parameters(), "algorithm": algorithm}
    optimizer = Muon([group], on_nonfinite=on_nonfinite)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"dense gradients only, but 'weight' has a torch.spar"):
        optimizer.step()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "empty parameter list"),
        ([{"params": []}], "no parameters in any of its groups"),
        ([{"params": []}, {"params": [], "algorithm": "adam"}], "no parameters in any"),
    ],
)
def test_an_optimizer_without_parameters_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Muon(params)


@pytest.mark.parametrize("empty", ["muon", "adam"])
def test_one_empty_group_is_accepted_and_the_others_train(empty):
    start = parameters((48, 32))
    ours, theirs = clones(start), clones(start)
    groups = [{"params": [], "algorithm": empty}, {"params": ours}]
    drive(Muon(groups, on_nonfinite="raise", dtype=BF16), ours)
    drive(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0), theirs)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("value", [-1, 1.5, 2.0, True, None, "3"], ids=repr)
@pytest.mark.parametrize(
    "option", ["momentum_start_step", "momentum_warmup_steps", "momentum_step"]
)
@pytest.mark.parametrize("algorithm", ["muon", "adam", "adamw"])
def test_a_number_of_steps_that_is_no_count_is_refused_and_named(algorithm, option, value):
    group = {"params": parameters((8, 6)), "algorithm": algorithm, "name": "hidden"}
    message = f"{option} must be an integer of at least 0, not {value!r}, in group 'hidden'."
    with pytest.raises(ValueError, match=re.escape(message)):
        Muon([{**group, option: value}])


@pytest.mark.parametrize("option", ["momentum_start_step", "momentum_warmup_steps"])
@pytest.mark.parametrize("algorithm", ["muon", "adam", "adamw"])
def test_a_schedule_that_a_captured_graph_would_freeze_is_refused(algorithm, option):
    group = {"params": parameters((8, 6)), "algorithm": algorithm, option: 3}
    with pytest.raises(ValueError, match=r"'group0' has a momentum schedule, which a captured gra"):
        Muon([group], capturable=True)
    assert Muon([group]).param_groups[0][option] == 3


# -------------------------------------------------------------------- what it takes nonetheless


@pytest.mark.parametrize("on_nonfinite", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("algorithm", ["muon", "adam", "adamw"])
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 4, 3), (2, 0, 3)], ids=str)
def test_a_parameter_without_elements_is_passed_over(shape, algorithm, on_nonfinite):
    start = parameters((24, 16))
    ours, alone = clones(start), clones(start)
    (empty,) = parameters(shape)
    batch_dims = {} if algorithm != "muon" else {"batch_dims": len(shape) - 2}
    groups = [{"params": ours}, {"params": [empty], "algorithm": algorithm, **batch_dims}]
    optimizer = Muon(groups, on_nonfinite=on_nonfinite, dtype=BF16)
    drive(optimizer, [*ours, empty])
    drive(Muon(alone, dtype=BF16), alone)
    assert_same_bits(ours, alone)
    assert empty.shape == shape
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("on_nonfinite", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("shape", [(3, 0), (0, 3)], ids=str)
def test_gradients_without_any_element_make_a_step_that_changes_nothing(shape, on_nonfinite):
    (empty,) = parameters(shape)
    optimizer = Muon([empty], on_nonfinite=on_nonfinite)
    drive(optimizer, [empty])
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("on_nonfinite", ["propagate", "raise"])
@pytest.mark.parametrize(
    "group",
    [
        {"algorithm": "muon", "lr": 0.1},
        {"algorithm": "adam", "lr": 0.1, "eps": 1e-3},
        {"algorithm": "adamw", "lr": 0.1, "eps": 1e-3},
    ],
    ids=["muon", "adam", "adamw"],
)
def test_parameters_of_other_precisions_reach_the_minimum_of_a_parabola(group, dtype, on_nonfinite):
    p = nn.Parameter(gaussian(2, 24, 16).to(dtype))
    target = gaussian(2, 24, 16, seed=1).to(dtype)
    batch_dims = {"batch_dims": 1} if group["algorithm"] == "muon" else {}
    optimizer = Muon([{"params": [p], **group, **batch_dims}], on_nonfinite=on_nonfinite)
    before = float((p.detach() - target).square().mean())
    for _ in range(100):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
    assert float((p.detach() - target).square().mean()) < 0.02 * before
    assert p.dtype == dtype
    tensors = [v for v in optimizer.state[p].values() if v.ndim > 0]
    assert {t.dtype for t in tensors} == {dtype}


def test_capturable_changes_no_bit_on_a_cpu():
    start = parameters((24, 16), (2, 24, 16), (16,), (5,))
    runs = []
    for capturable in (False, True):
        params = clones(start)
        groups = [
            {"params": params[:2], "batch_dims": [0, 1]},
            {"params": params[2:3], "algorithm": "adamw", "fused": True},
            {"params": params[3:], "algorithm": "adam"},
        ]
        optimizer = Muon(groups, weight_decay=0.1, capturable=capturable)
        runs.append(snapshot_after(optimizer, params))
    assert_same_bits(*runs)


def snapshot_after(optimizer, params):
    drive(optimizer, params)
    return snapshot(optimizer)


def test_the_gradient_that_a_closure_makes_is_the_one_that_is_checked():
    net = nn.Linear(8, 4)
    optimizer = Muon([("w", net.weight)], on_nonfinite="raise")
    before = net.weight.detach().clone()

    def closure(scale):
        optimizer.zero_grad()
        loss = (scale * net(torch.ones(3, 8))).square().sum()
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError, match="'w'"):
        optimizer.step(lambda: closure(float("inf")))
    assert torch.equal(net.weight, before)
    assert float(optimizer.step(lambda: closure(1.0)).detach()) > 0
    assert not torch.equal(net.weight, before)


# -------------------------------------------------------------------------- non-finite gradients

BAD = [float("nan"), float("inf"), -float("inf")]


def two_groups(on_nonfinite, *, named=True):
    """Build a Muon group of two matrices and an Adam group of a bias, warmed up by two steps."""
    params = parameters((24, 16), (2, 24, 16), (16,))
    names = ["actor.weight", "critic.weight", "actor.bias"]
    entries = list(zip(names, params, strict=True)) if named else params
    optimizer = Muon(
        [
            {"params": entries[:2], "batch_dims": [0, 1], "name": "hidden"},
            {"params": entries[2:], "algorithm": "adamw", "name": "rest"},
        ],
        weight_decay=0.1,
        on_nonfinite=on_nonfinite,
    )
    drive(optimizer, params, steps=2)
    return optimizer, params


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("index", "name", "place", "group"),
    [
        (0, "actor.weight", r"hidden\[0\]", "hidden"),
        (1, "critic.weight", r"hidden\[1\]", "hidden"),
        (2, "actor.bias", r"rest\[0\]", "rest"),
    ],
)
def test_raise_names_the_parameter_and_changes_nothing(index, name, place, group, bad, named):
    optimizer, params = two_groups("raise", named=named)
    give_gradients(params, 2)
    params[index].grad.view(-1)[5] = bad
    before = snapshot(optimizer)
    message = rf"gradient of '{name if named else place}' \(group '{group}'\) is not finite"
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


def test_raise_finds_the_nan_beside_gradients_whose_norm_overflows():
    optimizer, params = two_groups("raise")
    give_gradients(params, 2)
    params[0].grad *= 1e30
    params[1].grad[1, 3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match=r"'critic.weight'"):
        optimizer.step()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_skip_counts_the_step_and_continues_as_if_it_had_not_been(index, bad):
    optimizer, params = two_groups("skip")
    reference, reference_params = two_groups("skip")
    give_gradients(params, 2)
    params[index].grad.view(-1)[5] = bad
    before = snapshot(optimizer)
    optimizer.step()
    optimizer.step()
    assert optimizer.skipped_steps == 2
    assert_same_bits(snapshot(optimizer), before)
    drive(optimizer, params, start=3, steps=2)
    drive(reference, reference_params, start=3, steps=2)
    assert optimizer.skipped_steps == 2
    assert_same_bits(params, reference_params)


@pytest.mark.parametrize("bad", BAD)
def test_propagate_is_the_default_and_spoils_what_the_gradient_belongs_to(bad):
    assert Muon(parameters((4, 4))).on_nonfinite == "propagate"
    optimizer, params = two_groups("propagate")
    give_gradients(params, 2)
    params[1].grad[1, 3, 4] = bad
    optimizer.step()
    assert params[1][1].isnan().all()
    assert params[1][0].isfinite().all()
    assert params[0].isfinite().all()
    assert optimizer.skipped_steps == 0


def test_skip_returns_the_loss_of_the_closure():
    optimizer, params = two_groups("skip")

    def closure():
        params[0].grad.fill_(float("nan"))
        return 1.25

    assert optimizer.step(closure) == 1.25
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("reloaded", [False, True])
def test_the_message_tells_the_number_of_the_step_skipped_ones_left_out(reloaded):
    params = parameters((4, 3), (4,))
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adam"}]
    optimizer = Muon(groups, on_nonfinite="skip")
    drive(optimizer, params, steps=5)
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    if reloaded:
        again = Muon(groups, on_nonfinite="raise")
        again.load_state_dict(optimizer.state_dict())
        optimizer = again
    optimizer.on_nonfinite = "raise"
    with pytest.raises(FloatingPointError, match=r"'group0\[0\]' .* in optimizer step 6;"):
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "arithmetic", "large"),
    [(torch.float64, None, 1e40), (torch.float32, torch.float16, 1e30), (BF16, None, 1e20)],
)
def test_gradients_beyond_the_arithmetic_move_the_parameter_as_ordinary_ones(
    dtype, arithmetic, large
):
    moved = []
    for scale in (1.0, large):
        params = [nn.Parameter(torch.zeros(2, 80, 70, dtype=dtype))]
        params[0].grad = gaussian(2, 80, 70).to(dtype) * scale
        params[0].grad[1] /= scale  # the second critic's is an ordinary one
        group = {"params": params, "batch_dims": 1, "dtype": arithmetic}
        Muon([group], on_nonfinite="raise").step()
        moved.append(params[0].detach())
    for critic in range(2):
        ordinary, other = (move[critic].double().flatten() for move in moved)
        torch.testing.assert_close(other.norm(), ordinary.norm(), rtol=0.01, atol=0)
        assert torch.cosine_similarity(ordinary, other, dim=0) > 0.999


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "bfloat16"), ("dtype", torch.int32), ("splits", 2.0), ("batch_dims", 0.0)],
)
def test_an_option_of_another_type_is_refused_and_named(option, value):
    with pytest.raises(TypeError, match=rf"{option} must be .* in group 'group0'"):
        Muon([{"params": parameters((4, 4)), option: value}])


def test_an_infinite_rate_is_refused():
    with pytest.raises(ValueError, match="lr must be finite, but is inf"):
        Muon(parameters((4, 4)), lr=torch.inf)
