"""Muesli in parts: losses, targets and estimators that any TorchRL loop can use."""

from muon_rl.objectives.cmpo import CMPOLoss
from muon_rl.objectives.dynamics import DynamicsLoss
from muon_rl.objectives.lookahead import OneStepLookahead
from muon_rl.objectives.muesli_model import MuesliModelLoss
from muon_rl.objectives.muesli_policy import MuesliPolicyLoss
from muon_rl.objectives.normalizer import AdvantageNormalizer
from muon_rl.objectives.retrace import RetraceEstimator
from muon_rl.objectives.sequence import LossSequence

__all__ = [
    "AdvantageNormalizer",
    "CMPOLoss",
    "DynamicsLoss",
    "LossSequence",
    "MuesliModelLoss",
    "MuesliPolicyLoss",
    "OneStepLookahead",
    "RetraceEstimator",
]
