"""The presets are MUESLI's and the tuning guide's numbers, and the losses take them."""

from __future__ import annotations

import inspect
from copy import deepcopy

import pytest
from made_up import small_model

from muon_rl.modules import MuesliPolicy
from muon_rl.objectives import CMPOLoss, DynamicsLoss, MuesliModelLoss, OneStepLookahead
from muon_rl.objectives.presets import AGGRESSIVE, CONSERVATIVE, PAPER, PRESETS

LOSSES = {"cmpo": CMPOLoss, "dynamics": DynamicsLoss, "muesli_model": MuesliModelLoss}


@pytest.mark.parametrize("name", PRESETS)
def test_the_losses_take_them(name):
    model, preset = small_model(), PRESETS[name]
    cmpo = CMPOLoss(MuesliPolicy(model), OneStepLookahead(model), **preset["cmpo"])
    dynamics = DynamicsLoss(model, **preset["dynamics"])
    muesli = MuesliModelLoss(model, **preset["muesli_model"])
    assert set(preset) == set(LOSSES)
    for part, loss in {"cmpo": cmpo, "dynamics": dynamics, "muesli_model": muesli}.items():
        for key, value in preset[part].items():
            found = getattr(loss, key)
            assert (
                found == value if isinstance(value, str) else float(found) == pytest.approx(value)
            )


def test_the_paper_s_are_the_defaults():
    for part, options in PAPER.items():
        parameters = inspect.signature(LOSSES[part].__init__).parameters
        defaults = {key: parameters[key].default for key in options}
        if "policy_horizon" in defaults:
            assert defaults.pop("policy_horizon") is None  # all steps
            assert options["policy_horizon"] == options["unroll_steps"]
        assert defaults == {key: options[key] for key in defaults}


@pytest.mark.parametrize(
    ("preset", "policy", "horizon", "kl", "unroll"),
    [(CONSERVATIVE, 0.001, 1, 0.01, 3), (AGGRESSIVE, 0.005, 5, 0.05, 5)],
)
def test_the_guide_s_numbers(preset, policy, horizon, kl, unroll):
    assert preset["cmpo"] == {"kl_coef": kl, "divergence": "cross_entropy"}
    steps = {"unroll_steps": unroll, "policy_horizon": horizon}
    assert preset["dynamics"] == {"returns_pred_coef": 1.0, "reward_pred_coef": 1.0, **steps}
    assert preset["muesli_model"] == {
        "policy_pred_coef": policy, "value_pred_coef": 1.0, "reward_pred_coef": 1.0,
        "divergence": "cross_entropy", **steps,
    }  # fmt: skip


def test_they_are_plain_and_apart():
    for preset in PRESETS.values():
        assert deepcopy(preset) == preset
    parts = [id(part) for preset in PRESETS.values() for part in preset.values()]
    assert len(parts) == len(set(parts)) == 9
