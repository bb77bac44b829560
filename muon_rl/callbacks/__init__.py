"""What is watched and kept while an agent trains."""

from muon_rl.callbacks.checkpoints import Checkpoints
from muon_rl.callbacks.compiled_optimizer import CompiledOptimizer
from muon_rl.callbacks.effective_rank import EffectiveRank
from muon_rl.callbacks.film import Film
from muon_rl.callbacks.graceful_stop import GracefulStop
from muon_rl.callbacks.loss_health import LossHealth, RedFlagError
from muon_rl.callbacks.policy_average import PolicyAverage
from muon_rl.callbacks.progress import FramesProgressBar

__all__ = [
    "Checkpoints", "CompiledOptimizer", "EffectiveRank", "Film", "FramesProgressBar",
    "GracefulStop", "LossHealth", "PolicyAverage", "RedFlagError",
]  # fmt: skip
