"""Muesli in parts: losses, targets and estimators that any TorchRL loop can use."""

from muon_rl.objectives.cmpo import CMPOLoss
from muon_rl.objectives.lookahead import OneStepLookahead
from muon_rl.objectives.normalizer import AdvantageNormalizer
from muon_rl.objectives.retrace import RetraceEstimator

__all__ = ["AdvantageNormalizer", "CMPOLoss", "OneStepLookahead", "RetraceEstimator"]
