"""Lightning data modules that drive a TorchRL collector: replay, and rollouts."""

from muon_rl.data.base import AgentData
from muon_rl.data.evaluation import ends, length
from muon_rl.data.replay import ReplayData
from muon_rl.data.rollout import RolloutData

__all__ = ["AgentData", "ReplayData", "RolloutData", "ends", "length"]
