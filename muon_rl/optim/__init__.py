"""Muon for reinforcement learning: the optimizer, parameter roles, and one config a network."""

from muon_rl.optim.build import MuonConfig, OptimizerConfig, build_optimizer
from muon_rl.optim.muon import Muon
from muon_rl.optim.orthogonalize import orthogonalize
from muon_rl.optim.roles import ParameterRole, parameter_roles

__all__ = [
    "Muon",
    "MuonConfig",
    "OptimizerConfig",
    "ParameterRole",
    "build_optimizer",
    "orthogonalize",
    "parameter_roles",
]
