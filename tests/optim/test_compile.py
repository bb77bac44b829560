"""A compiled step: the whole in one graph, the results of eager, and no recompilation."""

import copy

import pytest
import torch
from driving import gaussian
from torch import nn

from muon_rl.optim import Muon

STEPS = 6


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(**options):
    """Build an optimizer of a stack, a fused matrix, a kernel, an AdamW and an Adam group."""
    shapes = [(2, 24, 16), (24, 16), (48, 16), (16, 4, 3, 3), (2, 16), (8,), ()]
    params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(shapes)]
    groups = [
        {"params": params[:3], "batch_dims": [1, 0, 0], "splits": [1, 1, 3], "name": "muon"},
        {"params": params[3:4], "lr": 0.05, "nesterov": False, "name": "conv"},
        # As build_optimizer makes them: torch does not compile its fused Adam.
        {"params": params[4:5], "algorithm": "adamw", "name": "aux", "fused": True},
        {"params": params[5:], "algorithm": "adam", "lr": 3e-4, "name": "alpha"},
    ]
    return Muon(groups, weight_decay=0.1, **options), params


def run(step, params, *, idle=(), steps=STEPS):
    """Step with gradients that depend on the step and the parameter; ``idle`` ones have none."""
    for number in range(steps):
        for i, p in enumerate(params):
            p.grad = None if i in idle else gaussian(*p.shape, seed=100 * number + i)
        step()


class Counter:
    """A backend that counts its graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def assert_equal_runs(optimizer, params, twin, twin_params, *, atol):
    assert not any(torch.equal(p, gaussian(*p.shape, seed=i)) for i, p in enumerate(params))
    for p, other in zip(params, twin_params, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=atol)
        mine, others = optimizer.state[p], twin.state[other]
        assert mine.keys() == others.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], others[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_step_in_one_graph_equals_eager_and_compiles_at_most_twice(dtype):
    optimizer, params = build(dtype=dtype)
    twin, twin_params = build(dtype=dtype)
    counter = Counter()
    run(torch.compile(optimizer.step, fullgraph=True, backend=counter), params)
    run(twin.step, twin_params)
    assert 1 <= counter.graphs <= 2
    atol = 2e-3 if dtype == torch.bfloat16 else 1e-5
    assert_equal_runs(optimizer, params, twin, twin_params, atol=atol)


def test_through_aot_autograd_it_equals_eager_too():
    optimizer, params = build()
    twin, twin_params = build()
    run(torch.compile(optimizer.step, fullgraph=True, backend="aot_eager"), params)
    run(twin.step, twin_params)
    assert_equal_runs(optimizer, params, twin, twin_params, atol=1e-5)


def test_a_rate_in_a_tensor_may_change_without_another_graph():
    rate, counter = torch.tensor(0.02), Counter()
    optimizer, params = build(lr=rate)
    step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    run(step, params)
    graphs = counter.graphs
    rate.fill_(0.01)
    run(step, params)
    assert counter.graphs == graphs


def test_parameters_without_a_gradient_stay_as_they_are():
    optimizer, params = build()
    before = [p.detach().clone() for p in params]
    step = torch.compile(optimizer.step, fullgraph=True, backend=Counter())
    idle = (1, 4)
    run(step, params, idle=idle)
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, old) == (i in idle)


def test_a_delayed_momentum_equals_eager():
    delay = {"momentum_start_step": 1, "momentum_warmup_steps": 2}
    runs = []
    for compiled in (False, True):
        params = [nn.Parameter(gaussian(*shape, seed=1)) for shape in ((24, 16), (5,))]
        groups = [
            {"params": params[:1], **delay},
            {"params": params[1:], "algorithm": "adamw", **delay},
        ]
        optimizer = Muon(groups)
        run(torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step, params)
        assert [group["momentum_step"] for group in optimizer.param_groups] == [3, 3]
        runs.append(params)
    for p, other in zip(*runs, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_by_inductor_a_step_equals_eager(in_place):
    optimizer, params = build()
    twin, twin_params = build()
    if in_place:
        optimizer.compile(fullgraph=True)
        run(optimizer.step, params)
    else:
        run(torch.compile(optimizer.step, fullgraph=True), params)
    run(twin.step, twin_params)
    assert_equal_runs(optimizer, params, twin, twin_params, atol=1e-5)


# ------------------------------------------------------------------ Muon.compile


def compiled(counter, **options):
    optimizer, params = build(**options)
    optimizer.compile(backend=counter, fullgraph=True)
    return optimizer, params


def test_a_step_compiled_in_place_equals_eager_and_counts_its_steps():
    counter = Counter()
    optimizer, params = compiled(counter)
    twin, twin_params = build()
    run(optimizer.step, params)
    run(twin.step, twin_params)
    assert counter.graphs == 1
    assert_equal_runs(optimizer, params, twin, twin_params, atol=1e-5)
    assert [group["step"] for group in optimizer.param_groups] == [STEPS] * 4


def test_rates_may_move_at_each_step_of_it_and_stay_numbers():
    counter = Counter()
    runs = []
    for optimizer, params in (compiled(counter), build()):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
        for _ in range(2):
            run(optimizer.step, params)
            schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.8 * 0.02, 0.8 * 0.05, 0.8 * 1e-3, 0.8 * 3e-4], abs=1e-12
        )
        assert all(type(group["lr"]) is float for group in optimizer.param_groups)
        runs.append((optimizer, params))
    assert counter.graphs == 1
    (optimizer, params), (twin, twin_params) = runs
    assert_equal_runs(optimizer, params, twin, twin_params, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({}, {"options": {"size_asserts": False}}),
        ({"fullgraph": True}, {"fullgraph": True, "options": {"size_asserts": False}}),
        ({"options": {"size_asserts": True}}, {"options": {"size_asserts": True}}),
        ({"options": {"cpp_wrapper": True}},
         {"options": {"size_asserts": False, "cpp_wrapper": True}}),
        ({"mode": "reduce-overhead"}, {"mode": "reduce-overhead"}),  # torch takes one of the two
        ({"backend": "eager"}, {"backend": "eager"}),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_the_compiler_are_passed_on(given, passed, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda update, **options: seen.append(options))
    build()[0].compile(**given)
    assert seen == [passed]


def test_a_step_of_it_takes_a_closure_and_refuses_what_is_not_finite():
    optimizer, params = compiled(Counter(), on_nonfinite="raise")

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    before = [p.detach().clone() for p in params]
    params[0].grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="optimizer step 4"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_its_steps_of_a_moving_momentum_are_not_compiled():
    delay = {"momentum_start_step": 1, "momentum_warmup_steps": 3}
    counter, runs = Counter(), []
    for compile_it in (True, False):
        params = [nn.Parameter(gaussian(*shape, seed=1)) for shape in ((24, 16), (5,))]
        groups = [
            {"params": params[:1], **delay},
            {"params": params[1:], "algorithm": "adam", **delay},
        ]
        optimizer = Muon(groups)
        if compile_it:
            optimizer.compile(backend=counter)
        run(optimizer.step, params, steps=4)
        assert counter.graphs == 0 or not compile_it
        run(optimizer.step, params)
        runs.append(params)
    assert 1 <= counter.graphs <= 2  # the count of a delayed beta1 goes on
    for p, other in zip(*runs, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-5)


def test_under_a_cycle_of_momenta_it_is_not_compiled_and_after_it_is():
    counter, runs = Counter(), []
    for optimizer, params in (compiled(counter), build()):
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=12)
        for number in range(10):
            for i, p in enumerate(params):
                p.grad = gaussian(*p.shape, seed=100 * number + i)
            optimizer.step()
            cycle.step()
        assert counter.graphs == 0 or runs
        for group in optimizer.param_groups:
            group.update(momentum=0.9) if "momentum" in group else group.update(betas=(0.9, 0.99))
        run(optimizer.step, params)
        runs.append((optimizer, params))
    assert counter.graphs == 1
    (optimizer, params), (twin, twin_params) = runs
    assert_equal_runs(optimizer, params, twin, twin_params, atol=1e-5)


def test_decay_after_a_delayed_beta1_does_not_compile_anew_at_each_step():
    counter = Counter()
    params = [nn.Parameter(gaussian(*shape, seed=1)) for shape in ((24, 16), (5,))]
    delay = {"momentum_start_step": 1, "momentum_warmup_steps": 2}
    optimizer = Muon(
        [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw", **delay}]
    )
    optimizer.compile(backend=counter)
    for _ in range(3):
        run(optimizer.step, params)
    assert counter.graphs <= 2


def test_a_matrix_that_eager_multiplies_by_strips_is_compiled():
    runs = []
    for is_compiled in (False, True):
        param = nn.Parameter(gaussian(448, 448))
        optimizer = Muon([param])
        if is_compiled:
            optimizer.compile(backend="aot_eager", fullgraph=True)
        run(optimizer.step, [param], steps=2)
        runs.append(param.detach())
    torch.testing.assert_close(*runs, rtol=0, atol=5e-3)


def test_two_momenta_on_one_stack_equal_eager():
    runs = []
    for compile_it in (True, False):
        params = [nn.Parameter(gaussian(24, 16, seed=i)) for i in range(2)]
        optimizer = Muon(
            [{"params": [p], "momentum": m} for p, m in zip(params, (0.5, 0.95), strict=True)]
        )
        if compile_it:
            optimizer.compile(backend="eager")
        run(optimizer.step, params)
        runs.append(params)
    for p, other in zip(*runs, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-5)


def test_it_goes_on_after_a_state_is_loaded_and_a_copy_is_not_compiled():
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph.forward(*args)

    optimizer, params = compiled(backend)
    run(optimizer.step, params)
    assert len(calls) == STEPS - 1  # the first makes the state
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer.step, params)
    assert len(calls) == 2 * STEPS - 1
    twin = copy.deepcopy(optimizer)
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    run(twin.step, twin_params)
    assert len(calls) == 2 * STEPS - 1
    run(optimizer.step, params)
    assert len(calls) == 3 * STEPS - 1
    assert_equal_runs(optimizer, params, twin, twin_params, atol=1e-5)
