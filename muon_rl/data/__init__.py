"""Lightning data modules that drive a TorchRL collector: replay now, rollouts on the same base."""

from muon_rl.data.base import AgentData
from muon_rl.data.evaluation import ends
from muon_rl.data.replay import ReplayData

__all__ = ["AgentData", "ReplayData", "ends"]
