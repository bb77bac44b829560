"""Coefficients of Muesli's losses that belong together, as plain dictionaries.

Each holds the keyword arguments of a loss under its name: ``"cmpo"`` of
:class:`~muon_rl.objectives.CMPOLoss`, ``"dynamics"`` of :class:`~muon_rl.objectives.DynamicsLoss`
and ``"muesli_model"`` of :class:`~muon_rl.objectives.MuesliModelLoss`. All are dimensionless, and
what they leave out stays at its default.

Example:
    >>> from torchrl.data import Categorical, Unbounded
    >>> from muon_rl.modules import WorldModel
    >>> from muon_rl.objectives import DynamicsLoss
    >>> from muon_rl.specs import Specs
    >>> model = WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16)
    >>> DynamicsLoss(model, **CONSERVATIVE["dynamics"]).unroll_steps
    3
"""

from __future__ import annotations

from typing import Any

__all__ = ["AGGRESSIVE", "CONSERVATIVE", "PAPER", "PRESETS"]

Preset = dict[str, dict[str, Any]]


def _preset(
    *, divergence: str, policy: float, kl: float, value: float, steps: int, horizon: int
) -> Preset:
    common = {"reward_pred_coef": 1.0, "unroll_steps": steps, "policy_horizon": horizon}
    model = {"policy_pred_coef": policy, "value_pred_coef": value, "divergence": divergence}
    return {
        "cmpo": {"kl_coef": kl, "divergence": divergence},
        "dynamics": {"returns_pred_coef": value, **common},
        "muesli_model": {**model, **common},
    }


PAPER = _preset(divergence="kl", policy=1.0, kl=1.0, value=0.25, steps=5, horizon=5)
"""Hessel et al. 2021, arXiv:2104.06159: the losses' defaults."""

CONSERVATIVE = _preset(
    divergence="cross_entropy", policy=0.001, kl=0.01, value=1.0, steps=3, horizon=1
)
"""The tuning guide's first set, for a cross-entropy of about 5 beside PPO's terms of 0.001."""

AGGRESSIVE = _preset(
    divergence="cross_entropy", policy=0.005, kl=0.05, value=1.0, steps=5, horizon=5
)
"""The tuning guide's second set: five times the pull of the policies, over five steps."""

PRESETS: dict[str, Preset] = {
    "paper": PAPER, "conservative": CONSERVATIVE, "aggressive": AGGRESSIVE,
}  # fmt: skip
"""All three, by name."""
