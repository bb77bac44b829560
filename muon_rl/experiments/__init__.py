"""Studies: what is varied, over which seeds, and what came out."""

from muon_rl.experiments.points import Sweep, grid_points, read_sweep

__all__ = ["Sweep", "grid_points", "read_sweep"]
