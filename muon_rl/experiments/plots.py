"""The pictures of a comparison: learning curves, and the numbers of the table side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from muon_rl.experiments.comparison import Comparison
from muon_rl.experiments.curves import MOST_RESAMPLES, Curve, frames_needed, over_frames, over_time
from muon_rl.experiments.remarks import ENOUGH
from muon_rl.experiments.statistics import bootstrap_curves, performance_profile

# Okabe and Ito 2008, told apart by the colour-blind too; lines differ in their dashes as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
_STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#777777",
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "svg.hashsalt": "muon_rl", "text.parse_math": False,
}  # fmt: skip


def save(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``curves`` and ``aggregate`` as PNG and SVG.

    Args:
        comparison: to draw.
        folder: that exists.

    Returns:
        The files.
    """
    written = []
    with mpl.rc_context(_STYLE):
        for name, draw in (("curves", curves), ("aggregate", aggregate)):
            figure = draw(comparison)
            FigureCanvasAgg(figure)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{name}.{kind}"
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    return written


def curves(comparison: Comparison) -> Figure:
    """Return a row a task: the IQM over frames and over time, and the frames that a score takes.

    Args:
        comparison: of several tasks, all of them together are the first row.
    """
    tasks = list(comparison.tasks)
    rows = [tasks, *([task] for task in tasks)] if len(tasks) > 1 and comparison.bounds else [
        [task] for task in tasks
    ]  # fmt: skip
    figure = Figure(figsize=(12, 3.3 * len(rows) + 0.6), layout=ConstrainedLayoutEngine(h_pad=0.1))
    panels = figure.subplots(len(rows), 3, squeeze=False)
    for together, (frames, time, needed) in zip(rows, panels, strict=True):
        name = together[0] if len(together) == 1 else f"all {len(together)} tasks"
        score = comparison.options.metric
        if comparison.bounds:
            score = f"normalised {score}"
        _lines(comparison, frames, together, over_frames)
        frames.set(title=f"{name}: over frames", xlabel="frames", ylabel=f"{score} (IQM)")
        frames.xaxis.set_major_formatter(FuncFormatter(_thousands))
        unit = _lines(comparison, time, together, over_time, of_time=True)
        time.set(title=f"{name}: over time", xlabel=f"wall-clock time ({unit}), pauses left out")
        time.set_ylabel(f"{score} (IQM)")
        _lines(comparison, needed, together, frames_needed)
        needed.set(title=f"{name}: frames to a score", xlabel=f"{score} reached by most seeds")
        needed.set_ylabel("frames needed")
        needed.yaxis.set_major_formatter(FuncFormatter(_thousands))
    _legend(figure, comparison)
    return figure


def aggregate(comparison: Comparison) -> Figure:
    """Return the table's IQMs and probabilities with their intervals, and performance profiles.

    Args:
        comparison: of several tasks, it has profiles.
    """
    names = {"final_iqm": "final score (IQM)", "auc_iqm": "area under the curve (IQM)"}
    if comparison.options.baseline is not None:
        names["improvement"] = "probability of improvement"
    profiles = len(comparison.tasks) > 1 and bool(comparison.bounds)
    count = len(comparison.rows)
    # Tall enough for the labels of the groups, and for the curves of a profile.
    height = max(1.5 + 0.32 * count, 3.4 if profiles else 0)
    figure = Figure(figsize=(3.6 * (len(names) + profiles) + 1, height), layout="constrained")
    panels = figure.subplots(1, len(names) + profiles, squeeze=False)[0]
    for index, (panel, (name, title)) in enumerate(zip(panels, names.items(), strict=False)):
        _dots(comparison, panel, name)
        panel.set(title=title, ylim=(count - 0.4, -0.6))
        labels = [_short(row.group) for row in comparison.rows] if index == 0 else []
        panel.set_yticks(range(count), labels or [""] * count)
        panel.tick_params(axis="y", length=0)
        panel.grid(visible=False, axis="y")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        if name == "improvement":
            panel.axvline(0.5, color="#777777", linewidth=1, linestyle="--", zorder=1)
            panel.set_xlim(-0.03, 1.03)
    if profiles:
        _profiles(comparison, panels[-1])
        _legend(figure, comparison)
    figure.supxlabel(_footnote(comparison), fontsize=8, color="#555555")
    return figure


def _lines(
    comparison: Comparison, panel: Axes, tasks: Sequence[str], of: Callable[..., Curve | None],
    of_time: bool = False,
) -> str:  # fmt: skip
    found = [of(comparison, group, tasks) for group in comparison.groups]
    unit, scale = "s", 1.0
    longest = max((curve.x[-1] for curve in found if curve and curve.x.size), default=0.0)
    if of_time and longest > 300:
        unit, scale = ("min", 60.0) if longest < 3 * 3600 else ("h", 3600.0)
    for index, curve in enumerate(found):
        if curve is None or not curve.x.size:
            continue
        colour, dash = _look(index)
        panel.plot(curve.x / scale, curve.middle, dash, color=colour, linewidth=1.8)
        if curve.low is not None and curve.high is not None:
            panel.fill_between(
                curve.x / scale, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0
            )
    if not any(curve is not None and curve.x.size for curve in found):
        panel.text(0.5, 0.5, "too few evaluations\nin common", transform=panel.transAxes,
                   ha="center", va="center", color="#777777")  # fmt: skip
    panel.margins(x=0.02)
    return unit


def _dots(comparison: Comparison, panel: Axes, name: str) -> None:
    middle = "improvement_probability" if name == "improvement" else name
    for index, row in enumerate(comparison.rows):
        value, low, high = (getattr(row, key) for key in (middle, f"{name}_low", f"{name}_high"))
        if value is None:
            continue
        colour, _ = _look(index)
        if low is not None:
            panel.hlines(index, low, high, color=colour, alpha=0.45, linewidth=5)
        pilot = row.seeds < ENOUGH
        panel.plot(value, index, "o", color=colour, markersize=6,
                   markerfacecolor="white" if pilot else colour)  # fmt: skip


def _profiles(comparison: Comparison, panel: Axes) -> None:
    scores = [np.concatenate(list(final.values())) for final in comparison.finals if final]
    levels = np.linspace(min(map(np.min, scores)), max(map(np.max, scores)), 60)
    for index, final in enumerate(comparison.finals):
        if set(final) != set(comparison.tasks):
            continue  # over other tasks it would be another profile
        colour, dash = _look(index)
        tasks = [final[task] for task in comparison.tasks]
        panel.plot(levels, performance_profile(tasks, levels), dash, color=colour, linewidth=1.8)
        if min(map(len, tasks)) > 1:
            low, high = bootstrap_curves(
                [task[:, None] > levels for task in tasks],
                lambda above: above.mean(axis=1),
                resamples=min(comparison.options.resamples, MOST_RESAMPLES),
                generator=np.random.default_rng(comparison.options.seed),
            )
            panel.fill_between(levels, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(title="performance profile", xlabel="normalised score", ylabel="share of runs above")
    panel.set_ylim(-0.02, 1.02)


def _legend(figure: Figure, comparison: Comparison) -> None:
    handles = []
    for index, row in enumerate(comparison.rows):
        colour, dash = _look(index)
        seeds = f"{row.seeds} seed{'s' * (row.seeds != 1)}"
        label = f"{_short(row.group)} ({seeds})"
        handles.append(Line2D([], [], color=colour, linestyle=dash, linewidth=1.8, label=label))
    widest = max(len(str(handle.get_label())) for handle in handles) + 8
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 13 / widest)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _footnote(comparison: Comparison) -> str:
    pilots = any(row.seeds < ENOUGH for row in comparison.rows if row.final_iqm is not None)
    said = "bars: 95% bootstrap intervals"
    if comparison.options.baseline is not None:
        said += f"; improvement over {_short(comparison.options.baseline)}"
    return said + "; hollow: fewer than five seeds, no claim" * pilots


def _look(index: int) -> tuple[str, Any]:
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def _short(label: str, most: int = 44) -> str:
    """Return a label whose keys are their last words, cut in its middle where it is long."""
    parts = [part.rpartition("=") for part in label.split(", ")]
    label = ", ".join(key.split(".")[-1] + equals + value for key, equals, value in parts)
    half = (most - 1) // 2
    return label if len(label) <= most else f"{label[:half]}…{label[-half:]}"


def _thousands(value: float, _position: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
