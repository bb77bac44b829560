"""Lightning data modules that drive a TorchRL collector: replay, rollouts and sequences."""

from muon_rl.data.base import AgentData
from muon_rl.data.evaluation import ends, length
from muon_rl.data.replay import ReplayData
from muon_rl.data.rollout import RolloutData
from muon_rl.data.sequences import SequenceData

__all__ = ["AgentData", "ReplayData", "RolloutData", "SequenceData", "ends", "length"]
