"""Muon for reinforcement learning: the optimizer, who gets what, schedules and clipping."""

from muon_rl.optim.build import build_optimizer
from muon_rl.optim.clipping import clip_gradients
from muon_rl.optim.config import MomentumSchedule, MuonConfig, OptimizerConfig
from muon_rl.optim.muon import Muon
from muon_rl.optim.orthogonalize import orthogonalize
from muon_rl.optim.roles import ParameterRole, parameter_roles
from muon_rl.optim.schedules import (
    anneal_learning_rates,
    linear_annealing,
    momentum_at,
    refresh_learning_rates,
)
from muon_rl.optim.sharded import zero_groups

__all__ = [
    "MomentumSchedule",
    "Muon",
    "MuonConfig",
    "OptimizerConfig",
    "ParameterRole",
    "anneal_learning_rates",
    "build_optimizer",
    "clip_gradients",
    "linear_annealing",
    "momentum_at",
    "orthogonalize",
    "parameter_roles",
    "refresh_learning_rates",
    "zero_groups",
]
