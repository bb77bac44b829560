"""Environment factories: one flat float32 observation, action repeat, counters, exact state."""

from muon_rl.envs.base import EnvFactory
from muon_rl.envs.dm_control import DMControl
from muon_rl.envs.gym import Gym

__all__ = ["DMControl", "EnvFactory", "Gym"]
