"""Studies: what is varied, over which seeds, and what came out."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from muon_rl.experiments.points import Sweep, expand, grid_points, read_sweep
from muon_rl.experiments.ranges import Choice, Interval, corner_points, draw_point, read_ranges

# Lazily: what reads and draws needs MLflow, scipy and matplotlib.
_STATISTICS = (
    "bootstrap_improvement", "iqm", "percentile_interval", "performance_profile",
    "probability_of_improvement", "stratified_bootstrap",
)  # fmt: skip
__all__ = [
    "Choice", "Interval", "Sweep", "corner_points", "draw_point", "expand", "grid_points",
    "read_ranges", "read_sweep", *_STATISTICS,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _STATISTICS:
        return getattr(import_module("muon_rl.experiments.statistics"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
