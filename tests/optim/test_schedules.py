"""Annealing of learning rates: the rate at each optimizer step, of each group."""

from __future__ import annotations

import io
import math
import pickle

import pytest
import torch

from muon_rl.optim import Muon
from muon_rl.optim.schedules import (
    anneal_learning_rates,
    linear_annealing,
    refresh_learning_rates,
)

MUON, ADAM = 0.02, 3e-4
NAMES = ["actor/muon", "actor/aux", "critic/adamw"]


def make(tensor_rates: bool = False) -> Muon:
    """Build an optimizer of three groups, one with Muon's rate and two with Adam's."""

    def rate(value):
        return torch.tensor(value) if tensor_rates else value

    algorithms = ("muon", "adamw", "adamw")
    rates = (MUON, ADAM, 2 * ADAM)
    return Muon(
        [
            {"params": [torch.nn.Parameter(torch.ones(2, 3))], "lr": rate(lr), "name": name,
             "algorithm": algorithm}
            for name, algorithm, lr in zip(NAMES, algorithms, rates, strict=True)
        ]
    )  # fmt: skip


def steps(optimizer, scheduler, number) -> dict[str, list[float]]:
    """Make optimizer steps and return the rates at which they were made, by group."""
    applied: dict[str, list[float]] = {group["name"]: [] for group in optimizer.param_groups}

    def note(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            applied[group["name"]].append(float(group["lr"]))

    handle = optimizer.register_step_post_hook(note)
    for _ in range(number):
        optimizer.step()
        scheduler.step()
    handle.remove()
    return applied


@pytest.mark.parametrize("updates", [1, 3, 10])
def test_rates_fall_along_a_line_to_0_and_stay_there(updates):
    optimizer = make()
    applied = steps(optimizer, anneal_learning_rates(optimizer, updates), updates + 5)
    for name, lr in zip(NAMES, (MUON, ADAM, 2 * ADAM), strict=True):
        line = [lr * (1 - k / updates) for k in range(updates)]
        assert applied[name] == line + [0.0] * 5
        assert applied[name][0] == lr


def test_without_annealing_rates_are_constant():
    optimizer = make()
    applied = steps(optimizer, anneal_learning_rates(optimizer, 4, False), 8)
    assert applied["actor/muon"] == [MUON] * 8
    assert applied["critic/adamw"] == [2 * ADAM] * 8


def test_a_share_is_reached_at_the_end_and_kept():
    optimizer = make()
    applied = steps(optimizer, anneal_learning_rates(optimizer, 4, 0.1), 7)["actor/muon"]
    expected = [MUON * share for share in (1.0, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1)]
    assert applied == pytest.approx(expected, rel=1e-12)
    assert applied[4] == MUON * 0.1


def test_a_function_of_progress_is_followed():
    optimizer = make()
    scheduler = anneal_learning_rates(optimizer, 4, lambda x: 0.5 + 0.5 * math.cos(math.pi * x))
    other = make()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=4)
    expected = steps(other, cosine, 5)["actor/muon"]
    assert steps(optimizer, scheduler, 5)["actor/muon"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("anneal", "falling"),
    [
        ({"actor/muon": True}, {"actor/muon"}),
        ({"muon": True}, {"actor/muon"}),
        ({"aux": True, "adamw": True}, {"actor/aux", "critic/adamw"}),
        ({"actor": True}, {"actor/muon", "actor/aux"}),
        ({"critic": True, "aux": True}, {"critic/adamw", "actor/aux"}),
        ({"actor": True, "muon": True, "actor/muon": False}, {"actor/aux"}),
        ({}, set()),
    ],
)
def test_each_rate_is_annealed_by_itself(anneal, falling):
    optimizer = make()
    applied = steps(optimizer, anneal_learning_rates(optimizer, 2, anneal), 2)
    for name, lr in zip(NAMES, (MUON, ADAM, 2 * ADAM), strict=True):
        assert applied[name] == [lr, lr / 2 if name in falling else lr]


def test_two_rates_can_follow_two_functions():
    optimizer = make()
    applied = steps(optimizer, anneal_learning_rates(optimizer, 2, {"muon": 0.5, "aux": 0.0}), 3)
    assert applied["actor/muon"] == [MUON, MUON * 0.75, MUON * 0.5]
    assert applied["actor/aux"] == [ADAM, ADAM * 0.5, 0.0]
    assert applied["critic/adamw"] == [2 * ADAM] * 3


def test_the_steps_of_one_update_share_a_rate():
    optimizer = make()
    scheduler = anneal_learning_rates(optimizer, 3, steps_per_update=4)
    applied = steps(optimizer, scheduler, 13)["actor/muon"]
    assert applied == [MUON] * 4 + [MUON * (1 - 1 / 3)] * 4 + [MUON * (1 - 2 / 3)] * 4 + [0.0]


def test_a_rate_that_is_a_tensor_falls_in_place():
    optimizer = make(tensor_rates=True)
    rate = optimizer.param_groups[0]["lr"]
    applied = steps(optimizer, anneal_learning_rates(optimizer, 4), 3)["actor/muon"]
    assert applied == pytest.approx([MUON, MUON * 0.75, MUON * 0.5])
    assert optimizer.param_groups[0]["lr"] is rate


def test_any_optimizer_of_torch_is_annealed():
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([{"params": [weight], "name": "net"}], lr=0.5)
    assert steps(optimizer, anneal_learning_rates(optimizer, 2), 2) == {"net": [0.5, 0.25]}
    unnamed = torch.optim.AdamW([weight], lr=0.5)
    anneal_learning_rates(unnamed, 2, {"group0": True})


def save_and_load(*states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(states, updates, anneal=True):
    optimizer = make()
    scheduler = anneal_learning_rates(optimizer, updates, anneal, steps_per_update=2)
    for part, state in zip((optimizer, scheduler), save_and_load(*states), strict=True):
        part.load_state_dict(state)
    refresh_learning_rates(scheduler)
    return optimizer, scheduler


@pytest.mark.parametrize("anneal", [True, 0.25, lambda x: 1 - x * x, {"muon": lambda x: 1 - x}])
def test_a_resumed_schedule_goes_on_exactly(anneal):
    whole = make()
    expected = steps(whole, anneal_learning_rates(whole, 5, anneal, steps_per_update=2), 12)

    optimizer = make()
    scheduler = anneal_learning_rates(optimizer, 5, anneal, steps_per_update=2)
    before = steps(optimizer, scheduler, 5)
    again = resume((optimizer.state_dict(), scheduler.state_dict()), 5, anneal)
    after = steps(*again, 7)
    assert {name: before[name] + after[name] for name in NAMES} == expected
    assert again[1].get_last_lr() == [after[name][-1] for name in NAMES]


def test_a_finished_schedule_with_more_updates_follows_the_new_horizon_at_once():
    optimizer = make()
    scheduler = anneal_learning_rates(optimizer, 4, steps_per_update=2)
    assert steps(optimizer, scheduler, 8)["actor/muon"][-1] == MUON / 4
    assert optimizer.param_groups[0]["lr"] == 0.0
    states = optimizer.state_dict(), scheduler.state_dict()

    again = resume(states, 8)
    assert again[1].get_last_lr()[0] == MUON / 2
    expected = [MUON * (1 - k / 8) for k in (4, 4, 5, 5, 6, 6, 7, 7)] + [0.0, 0.0]
    assert steps(*again, 10)["actor/muon"] == expected


def test_a_refreshed_rate_that_is_a_tensor_stays_one():
    optimizer = make(tensor_rates=True)
    scheduler = anneal_learning_rates(optimizer, 4)
    rate = optimizer.param_groups[0]["lr"].fill_(7.0)
    refresh_learning_rates(scheduler)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(MUON)
    rate.fill_(7.0)
    assert float(scheduler.get_last_lr()[0]) == pytest.approx(MUON)


def test_the_functions_of_a_schedule_can_be_pickled():
    scheduler = anneal_learning_rates(make(), 4, {"muon": 0.5, "aux": True})
    functions = pickle.loads(pickle.dumps(scheduler.lr_lambdas))
    assert [function(2) for function in functions] == [0.75, 0.5, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_updates": 0}, "num_updates must be at least 1, but is 0"),
        ({"num_updates": math.nan}, "num_updates must be at least 1, but is nan"),
        ({"steps_per_update": 0}, "steps_per_update must be at least 1, but is 0"),
        ({"anneal": 1.5}, r"'actor/muon' must be .* in \[0, 1\].* but is 1.5"),
        ({"anneal": -0.1}, "but is -0.1"),
        ({"anneal": math.nan}, "but is nan"),
        ({"anneal": 0}, "True, False, the share at the end as a float .* but is 0"),
        ({"anneal": "linear"}, "but is 'linear'"),
        ({"anneal": {"critic": None}}, "'critic/adamw' must be .* but is None"),
        ({"anneal": {"adam": True}}, "named 'adam'; there are actor/muon, actor, muon, .* critic"),
        ({"anneal": {"actor": True, "muon": False}}, "'actor/muon' .* as actor and as muon"),
    ],
)
def test_a_wrong_setting_is_named(options, message):
    optimizer = make()
    with pytest.raises(ValueError, match=message):
        anneal_learning_rates(optimizer, **{"num_updates": 4, **options})
    assert "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_line_is_1_minus_progress(progress):
    assert linear_annealing(progress) == 1 - progress
    assert linear_annealing(progress, end=1.0) == 1.0
