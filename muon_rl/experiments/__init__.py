"""Studies: what is varied, over which seeds, and what came out."""

from muon_rl.experiments.points import Sweep, expand, grid_points, read_sweep
from muon_rl.experiments.ranges import Choice, Interval, corner_points, draw_point, read_ranges

__all__ = [
    "Choice", "Interval", "Sweep", "corner_points", "draw_point", "expand", "grid_points",
    "read_ranges", "read_sweep",
]  # fmt: skip
