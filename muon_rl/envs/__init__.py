"""Environments and their factories: specs, counters, seeds and exact state."""

from muon_rl.envs.arena import Arena
from muon_rl.envs.base import EnvFactory
from muon_rl.envs.dm_control import DMControl
from muon_rl.envs.gym import Gym
from muon_rl.envs.minatar import MinAtar
from muon_rl.envs.several import load_states, make_several, states_of
from muon_rl.envs.snake import Snake, SnakeEnv

__all__ = [
    "Arena",
    "DMControl",
    "EnvFactory",
    "Gym",
    "MinAtar",
    "Snake",
    "SnakeEnv",
    "load_states",
    "make_several",
    "states_of",
]
