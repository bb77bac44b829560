"""A momentum that begins late: Muon's, and Adam's first beta, against loops in float64."""

import copy
import io

import numpy as np
import pytest
import torch
from driving import assert_same_bits, gaussian
from torch import nn

from muon_rl.optim import MomentumSchedule, Muon, OptimizerConfig, build_optimizer
from muon_rl.optim.groups import next_momentum
from muon_rl.optim.schedules import momentum_at

BF16 = torch.bfloat16
# So many steps reach the polar factor itself.
EXACT = {"coefficients": "polar_express", "ns_steps": 16, "dtype": torch.float64}
DELAYS = [(3, 0), (0, 3), (2, 3), (0, 0)]


def scheduled(start, warmup):
    """Return a group's options for a delay and a warm-up."""
    return {"momentum_start_step": start, "momentum_warmup_steps": warmup}


def by_hand(momentum, step, start, warmup):
    """Return the momentum of a step, from the docs' words."""
    if step < start:
        return 0.0
    if warmup and step < start + warmup:
        return momentum * (step - start) / warmup
    return momentum


def polar(x):
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u @ vh).to(x.dtype)


def mixed(start=2, warmup=3, *, fused=None, on_nonfinite="propagate"):
    """Build a Muon and two Adam groups, all delayed; the same at each call."""
    shapes = [(2, 48, 32), (48, 32), (16,), (8, 4)]
    params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(shapes)]
    delay = scheduled(start, warmup)
    groups = [
        {"params": params[:2], "batch_dims": [1, 0], "weight_decay": 0.1, **delay},
        {"params": params[2:3], "algorithm": "adamw", "fused": fused, "lr": 0.01, **delay},
        {"params": params[3:], "algorithm": "adam", "fused": fused, "lr": 0.01, **delay},
    ]
    return Muon(groups, dtype=BF16, on_nonfinite=on_nonfinite), params


def drive(optimizer, params, *, start=0, steps=4):
    for step in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=1000 * step + i) + 0.1 * p.detach()
        optimizer.step()


# -------------------------------------------------------------------------- its values


@pytest.mark.parametrize(
    ("start", "warmup", "expected"),
    [
        (3, 0, [0.0, 0.0, 0.0, 0.8, 0.8, 0.8, 0.8, 0.8]),
        (0, 4, [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]),
        (2, 4, [0.0, 0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.8]),
        (1, 1, [0.0, 0.0, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]),
        (0, 0, [0.8] * 8),
    ],
)
@pytest.mark.parametrize("algorithm", ["muon", "adamw", "adam"])
def test_it_is_zero_before_its_start_then_rises_along_a_line(algorithm, start, warmup, expected):
    p = nn.Parameter(gaussian(4, 3))
    own = {"momentum": 0.8} if algorithm == "muon" else {"betas": (0.8, 0.99)}
    optimizer = Muon([{"params": [p], "algorithm": algorithm, **own, **scheduled(start, warmup)}])
    (group,) = optimizer.param_groups
    momenta = []
    for step in range(8):
        momenta.append(next_momentum(group))
        p.grad = gaussian(4, 3, seed=step)
        optimizer.step()
    assert momenta == pytest.approx(expected, abs=1e-15)
    assert group["momentum_step"] == start + warmup
    assert [group.get(option) for option in own] == list(own.values())


@pytest.mark.parametrize(
    ("step", "momentum"),
    [(0, 0.0), (9, 0.0), (10, 0.0), (15, 0.45), (19, 0.81), (20, 0.9), (21, 0.9), (1000, 0.9)],
)
def test_the_function_has_these_values_at_0_and_around_start_and_end(step, momentum):
    assert momentum_at(0.9, step, start_step=10, warmup_steps=10) == pytest.approx(momentum)


def test_of_two_parameters_the_counter_runs_once_a_step():
    optimizer, params = mixed(start=5, warmup=0)
    drive(optimizer, params, steps=3)
    assert [group["momentum_step"] for group in optimizer.param_groups] == [3, 3, 3]


def test_a_change_of_the_optimizers_own_value_is_followed_by_the_schedule():
    p = nn.Parameter(gaussian(4, 3))
    optimizer = Muon([{"params": [p], **scheduled(1, 4)}], momentum=0.8)
    drive(optimizer, [p], steps=3)
    (group,) = optimizer.param_groups
    assert next_momentum(group) == pytest.approx(0.8 * 2 / 4)
    group["momentum"] = 0.6
    assert next_momentum(group) == pytest.approx(0.6 * 2 / 4)


# ------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("start", "warmup"), DELAYS)
@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (2, 24, 48)], ids=str)
def test_muon_moves_along_the_polar_factor_of_the_delayed_average(shape, start, warmup, nesterov):
    lr, decay, momentum = 0.05, 0.3, 0.8
    p = nn.Parameter(gaussian(*shape))
    options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    group = {"params": [p], "batch_dims": len(shape) - 2, **scheduled(start, warmup)}
    optimizer = Muon([group], adjust_lr=None, **options, **EXACT)
    expected, average = p.detach().clone(), torch.zeros(shape)
    for step in range(8):
        p.grad = gaussian(*shape, seed=100 + step)
        mu = by_hand(momentum, step, start, warmup)
        average = mu * average + (1 - mu) * p.grad
        update = mu * average + (1 - mu) * p.grad if nesterov else average
        expected = (1 - lr * decay) * expected - lr * polar(update)
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-5 * lr)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], average)


def test_before_its_start_muon_equals_torch_muon_without_momentum_in_every_bit():
    ours, theirs = (nn.Parameter(gaussian(48, 32)) for _ in range(2))
    optimizer = Muon([{"params": [ours], **scheduled(5, 0)}], lr=0.02, momentum=0.95, dtype=BF16)
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.0, weight_decay=0.0)
    drive(optimizer, [ours], steps=5)
    drive(reference, [theirs], steps=5)
    assert torch.equal(ours, theirs)
    drive(optimizer, [ours], start=5, steps=1)
    drive(reference, [theirs], start=5, steps=1)
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, scheduled(0, 0), {**scheduled(3, 2), "momentum_step": 5}], ids=str
)
def test_without_a_schedule_or_after_its_end_muon_equals_torch_muon_in_every_bit(options):
    ours, theirs = (nn.Parameter(gaussian(48, 32)) for _ in range(2))
    optimizer = Muon([{"params": [ours], **options}], lr=0.02, dtype=BF16)
    drive(optimizer, [ours], steps=5)
    drive(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0), [theirs], steps=5)
    assert torch.equal(ours, theirs)


def average_and_sum(momenta):
    """Return how far Muon ends from itself with the sum ``m <- mu m + g`` for the average."""
    ends = []
    for of_sums in (False, True):
        p = nn.Parameter(torch.zeros(48, 32))
        optimizer = Muon([p], lr=0.02, **EXACT)
        (group,) = optimizer.param_groups
        total = torch.zeros(48, 32)
        for step, momentum in enumerate(momenta):
            p.grad = gaussian(48, 32, seed=step)
            total = momentum * total + p.grad
            if of_sums:
                # Without momentum Muon takes what it is given as it is.
                p.grad += momentum * total
            group["momentum"] = 0.0 if of_sums else momentum
            optimizer.step()
        ends.append(p.detach())
    return float((ends[0] - ends[1]).norm() / ends[1].norm())


@pytest.mark.parametrize(
    ("momenta", "low", "high"),
    [
        ([0.95] * 20, 0.0, 1e-6),
        ([0.85 + 0.1 * step / 19 for step in range(20)], 0.15, 0.21),
        ([0.0] * 10 + [0.95] * 10, 1.15, 1.25),
    ],
    ids=["constant", "ramp", "delayed"],
)
def test_an_average_is_a_sum_at_constant_momentum_and_far_from_it_on_a_schedule(momenta, low, high):
    assert low <= average_and_sum(momenta) < high


# ------------------------------------------------------------------------------- Adam


def adam_in_float64(p, grads, *, lr, betas, eps, weight_decay, decoupled, start, warmup):
    """Run Adam on numbers, dividing the first moment by 1 - the product of the beta1s used."""
    p = p.numpy()
    m, v = np.zeros_like(p), np.zeros_like(p)
    product, count = 1.0, 0
    for step, gradient in enumerate(grads):
        if gradient is None:
            continue
        g = gradient.numpy()
        beta1, count = by_hand(betas[0], step, start, warmup), count + 1
        if decoupled:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        product *= beta1
        m = beta1 * m + (1 - beta1) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * (m / (1 - product)) / (np.sqrt(v / (1 - betas[1] ** count)) + eps)
    return p


ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("algorithm", ["adam", "adamw"])
@pytest.mark.parametrize(("start", "warmup"), [*DELAYS, (5, 0), (5, 10)])
def test_adam_divides_the_delayed_average_by_its_own_weights(start, warmup, algorithm, fused):
    p = nn.Parameter(gaussian(6, 5, dtype=torch.float64))
    grads = [gaussian(6, 5, seed=50 + step, dtype=torch.float64) for step in range(20)]
    before = p.detach().clone()
    group = {"params": [p], "algorithm": algorithm, "fused": fused, **scheduled(start, warmup)}
    optimizer = Muon([{**group, **ADAM}])
    for gradient in grads:
        p.grad = gradient.clone()
        optimizer.step()
    expected = adam_in_float64(
        before, grads, **ADAM, decoupled=algorithm == "adamw", start=start, warmup=warmup
    )
    # torch counts steps, hence divides by 1 - beta^t, in fp32 where it is fused.
    atol = 1e-7 if fused else 1e-12
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("algorithm", ["adam", "adamw"])
def test_steps_without_a_gradient_do_not_enter_a_parameters_average(algorithm, fused):
    """One parameter has gradients at every step, one from the warm-up on, one now and then."""
    gaps = [lambda step: False, lambda step: step < 4, lambda step: step % 3 == 0]
    params = [nn.Parameter(gaussian(5, seed=i, dtype=torch.float64)) for i in range(len(gaps))]
    befores = [p.detach().clone() for p in params]
    delay = scheduled(3, 6)
    group = {"params": params, "algorithm": algorithm, "fused": fused, **ADAM, **delay}
    optimizer = Muon([group])
    grads = [
        [None if gap(step) else gaussian(5, seed=step, dtype=torch.float64) for step in range(15)]
        for gap in gaps
    ]
    for step in range(15):
        for p, own in zip(params, grads, strict=True):
            p.grad = own[step]
        optimizer.step()
    for p, before, own in zip(params, befores, grads, strict=True):
        expected = adam_in_float64(
            before, own, **ADAM, decoupled=algorithm == "adamw", start=3, warmup=6
        )
        atol = 1e-7 if fused else 1e-12
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=atol)


def steps_on_a_constant_gradient(start):
    """Return what ours and torch's Adam move by, in units of the rate, with a beta1 from start."""
    ours, theirs = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    delay = scheduled(start, 0)
    optimizer = Muon([{"params": [ours], "algorithm": "adam", "lr": 1.0, **delay}])
    reference = torch.optim.Adam([theirs], lr=1.0)
    lengths = []
    for step in range(start + 30):
        reference.param_groups[0]["betas"] = (0.0 if step < start else 0.9, 0.999)
        before = [p.tolist()[0] for p in (ours, theirs)]
        for p in (ours, theirs):
            p.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
        reference.step()
        lengths.append([b - p.tolist()[0] for b, p in zip(before, (ours, theirs), strict=True)])
    return [list(each) for each in zip(*lengths, strict=True)]


def test_at_the_switch_adam_on_a_constant_gradient_still_moves_by_its_rate():
    """torch's own correction, 1 - 0.9^6, would make the sixth step 2.13 times too long."""
    ours, theirs = steps_on_a_constant_gradient(start=5)
    assert ours == pytest.approx([1.0] * 35, abs=1e-6)
    assert theirs[:5] == pytest.approx([1.0] * 5, abs=1e-6)
    assert theirs[5] == max(theirs) == pytest.approx(1 / (1 - 0.9**6), abs=1e-6)
    assert max(theirs) == pytest.approx(2.13, abs=0.01)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(("start", "warmup"), DELAYS)
def test_the_decay_of_adamw_is_not_delayed(start, warmup, fused):
    before = gaussian(6, dtype=torch.float64)
    p = nn.Parameter(before.clone())
    group = {"params": [p], "algorithm": "adamw", "fused": fused, **scheduled(start, warmup)}
    optimizer = Muon([{**group, "lr": 0.1, "weight_decay": 0.5}])
    for _ in range(9):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach(), before * (1 - 0.1 * 0.5) ** 9, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("algorithm", ["adam", "adamw"])
@pytest.mark.parametrize("options", [{}, scheduled(0, 0)], ids=["none", "zero"])
def test_without_a_schedule_adam_equals_torch_in_every_bit(algorithm, fused, options):
    ours, theirs = (nn.Parameter(gaussian(6, 5)) for _ in range(2))
    optimizer = Muon(
        [{"params": [ours], "algorithm": algorithm, "fused": fused, **ADAM, **options}]
    )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[algorithm]
    drive(optimizer, [ours], steps=8)
    drive(kind([theirs], fused=fused, **ADAM), [theirs], steps=8)
    assert torch.equal(ours, theirs)
    assert optimizer.param_groups[0]["momentum_step"] == 0
    assert optimizer.state[ours].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_adam_groups_of_different_delays_do_not_share_a_moment():
    delays = [(0, 0), (2, 0), (0, 4), (4, 4)]
    params = [nn.Parameter(gaussian(5, seed=3)) for _ in delays]
    alone = [nn.Parameter(gaussian(5, seed=3)) for _ in delays]
    groups, single = (
        [
            {"params": [p], "algorithm": "adam", **ADAM, **scheduled(*delay)}
            for p, delay in zip(each, delays, strict=True)
        ]
        for each in (params, alone)
    )
    together, apart = Muon(groups), [Muon([group]) for group in single]
    for step in range(10):
        gradient = gaussian(5, seed=step)
        for p in [*params, *alone]:
            p.grad = gradient.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    assert_same_bits(params, alone)
    assert len({tuple(p.tolist()) for p in params}) == len(delays)


# --------------------------------------------------------------------- skips and reloads


def test_a_skipped_step_does_not_count():
    optimizer, params = mixed(on_nonfinite="skip")
    reference, reference_params = mixed(on_nonfinite="skip")
    drive(optimizer, params, steps=1)
    drive(reference, reference_params, steps=1)
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert [group["momentum_step"] for group in optimizer.param_groups] == [1, 1, 1]
    drive(optimizer, params, start=1, steps=6)
    drive(reference, reference_params, start=1, steps=6)
    assert_same_bits(params, reference_params)


def test_a_refused_step_does_not_count():
    optimizer, params = mixed(on_nonfinite="raise")
    drive(optimizer, params, steps=1)
    params[0].grad = torch.full_like(params[0], float("nan"))
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert [group["momentum_step"] for group in optimizer.param_groups] == [1, 1, 1]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("saved_at", [1, 2, 3, 4, 5, 7])
def test_a_run_continued_in_its_delay_or_warm_up_keeps_every_bit(saved_at, fused):
    optimizer, params = mixed(start=2, warmup=3, fused=fused)
    drive(optimizer, params, steps=saved_at)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    drive(optimizer, params, start=saved_at, steps=5)

    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    resumed, resumed_params = mixed(start=2, warmup=3, fused=fused)
    for p, value in zip(resumed_params, values, strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(state)
    drive(resumed, resumed_params, start=saved_at, steps=5)
    assert_same_bits(resumed_params, params)


@pytest.mark.parametrize("saved_at", [1, 3, 5])
def test_forgetting_the_counter_would_change_the_run(saved_at):
    optimizer, params = mixed(start=4, warmup=3)
    drive(optimizer, params, steps=saved_at)
    forgetful, forgetful_params = copy.deepcopy((optimizer, params))
    forgetful_params = [p for group in forgetful.param_groups for p in group["params"]]
    for group in forgetful.param_groups:
        group["momentum_step"] = 0
    drive(optimizer, params, start=saved_at, steps=5)
    drive(forgetful, forgetful_params, start=saved_at, steps=5)
    for p, other in zip(params, forgetful_params, strict=True):
        assert not torch.equal(p, other)


def test_a_deep_copy_continues_in_its_warm_up():
    optimizer, params = mixed(start=1, warmup=4)
    drive(optimizer, params, steps=3)
    twin = copy.deepcopy(optimizer)
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    drive(optimizer, params, start=3, steps=4)
    drive(twin, twin_params, start=3, steps=4)
    assert_same_bits(twin_params, params)


def test_a_checkpoint_from_before_there_were_schedules_loads_and_continues():
    optimizer, params = mixed(start=0, warmup=0)
    drive(optimizer, params, steps=3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for option in ("momentum_start_step", "momentum_warmup_steps", "momentum_step"):
            del group[option]
    values = [p.detach().clone() for p in params]
    drive(optimizer, params, start=3, steps=3)

    resumed, resumed_params = mixed(start=0, warmup=0)
    for p, value in zip(resumed_params, values, strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(old)
    drive(resumed, resumed_params, start=3, steps=3)
    assert_same_bits(resumed_params, params)


# ------------------------------------------------------------------------ from a config

DELAY = {"enabled": True, "start_step": 3, "warmup_steps": 4}


def schedules(optimizer):
    """Return each group's start and warm-up by its name."""
    options = ("momentum_start_step", "momentum_warmup_steps")
    return {group["name"]: tuple(group[o] for o in options) for group in optimizer.param_groups}


@pytest.mark.parametrize("given", [DELAY, MomentumSchedule(**DELAY)], ids=["dict", "dataclass"])
def test_only_the_network_that_asks_for_it_is_delayed(sac, given):
    critic = {"case": "muon", "momentum_schedule": given}
    assert schedules(build_optimizer(sac, actor={"case": "muon"}, critic=critic)) == {
        "actor/muon": (0, 0),
        "actor/aux": (0, 0),
        "critic/muon": (3, 4),
        "critic/aux": (3, 4),
        "alpha/adam": (0, 0),
    }


@pytest.mark.parametrize("case", ["adamw", "adam"])
def test_a_network_on_adam_is_delayed_too(sac, case):
    actor = OptimizerConfig(case=case, momentum_schedule=MomentumSchedule(**DELAY))
    given = schedules(build_optimizer(sac, actor=actor, critic={}))
    assert given[f"actor/{case}"] == (3, 4)
    assert given["critic/muon"] == (0, 0)


def test_a_delayed_critic_leaves_the_bits_of_the_actor(sac):
    runs = []
    for critic in ({}, {"momentum_schedule": DELAY}):
        loss = copy.deepcopy(sac)
        named = dict(loss.named_parameters())
        optimizer = build_optimizer(loss, actor={}, critic=critic)
        drive(optimizer, list(named.values()), steps=6)
        runs.append({name: p.detach() for name, p in named.items()})
    plain, delayed = runs
    equal = {name for name in plain if torch.equal(plain[name], delayed[name])}
    assert equal == {name for name in plain if not name.startswith("qvalue")}


@pytest.mark.parametrize("given", [{}, {"enabled": False, "start_step": 3, "warmup_steps": 4}])
def test_a_schedule_that_is_not_enabled_keeps_the_plain_bits(sac, given):
    runs = []
    for config in ({}, {"momentum_schedule": given}):
        loss = copy.deepcopy(sac)
        optimizer = build_optimizer(loss, actor=config, critic=config)
        assert set(schedules(optimizer).values()) == {(0, 0)}
        drive(optimizer, list(loss.parameters()), steps=5)
        runs.append(list(loss.parameters()))
    assert_same_bits(*runs)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"start": 3}, ValueError, r"Unknown option\(s\) start for critic.momentum_schedule; allo"),
        (3, TypeError, "critic.momentum_schedule must hold the settings of MomentumSchedule"),
        (
            {"enabled": True, "start_step": -1},
            ValueError,
            "momentum_start_step must be an integer of at least 0, not -1, in group 'critic/muon'",
        ),
        (
            {"enabled": True, "warmup_steps": 2.5},
            ValueError,
            "momentum_warmup_steps must be an integer of at least 0, not 2.5, in group",
        ),
    ],
    ids=["unknown", "type", "negative", "fraction"],
)
def test_a_schedule_that_does_not_fit_is_refused_and_named(sac, given, kind, message):
    with pytest.raises(kind, match=message):
        build_optimizer(sac, actor={}, critic={"momentum_schedule": given})
