"""A comparison as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from muon_rl.experiments.comparison import Comparison
from muon_rl.experiments.tables import cells, duration, notes, number

_FIGURES = {
    "curves": "IQM over the seeds with its 95% interval as a band: over frames, and over time up "
    "to the end of the group's fastest run. On the right, after how many frames most runs had "
    "reached a score at least once.",
    "aggregate": "The table's scores, and where there is a baseline how probably a run scores "
    "above one of its runs. Bars are 95% intervals; a hollow point is a group of fewer than five "
    "seeds.",
}


def to_html(comparison: Comparison, folder: Path, facts: Mapping[str, str]) -> str:
    """Return the report.

    Args:
        comparison: with its rows.
        folder: in which ``curves.svg`` and ``aggregate.svg`` lie.
        facts: how it was made: command, commit, date and others.
    """
    header, lines = cells(comparison)
    options = comparison.options
    tasks = _list(list(comparison.tasks))
    runs = [
        {
            "group": group.label,
            "task": task,
            "seed": one.run.seed if one.run.seed is not None else "",
            "final": number(one.final(options.last)),
            "frames": f"{one.history.budget:,}",
            "time": duration(float(one.seconds[-1])),
            "commit": one.run.values.get("git_commit", "")[:10],
            "run_id": one.run.run_id,
        }
        for group in comparison.groups
        for task, members in group.tasks.items()
        for one in members
    ]
    # Escaped throughout: a run's tags are anybody's text.
    template = Environment(autoescape=True).from_string(
        resources.files(__package__).joinpath("report.html").read_text()
    )
    return template.render(
        title=f"{options.metric} on {tasks}, by {_list(list(options.group_by))}",
        lede=_lede(comparison),
        header=header[:-1],
        lines=[{"cells": [cell.partition(" [") for cell in line[:-1]],
                "remarks": [words for words in line[-1].split("; ") if words]} for line in lines],
        notes=notes(comparison),
        figures=[
            {
                "name": name,
                "data": base64.b64encode((folder / f"{name}.svg").read_bytes()).decode(),
                "alt": _alt(comparison, name),
                "caption": caption,
            }
            for name, caption in _FIGURES.items()
        ],
        facts=facts.items(),
        runs=runs,
    )  # fmt: skip


def _lede(comparison: Comparison) -> str:
    counted = sum(len(group.counted) for group in comparison.groups)
    said = f"{len(comparison.groups)} groups, {counted} runs that count."
    if len(comparison.groups) == 1:
        said = f"One group, {counted} runs that count."
    claims = [row.group for row in comparison.rows if "shown on" in row.remarks]
    claims += [row.group for row in comparison.rows if "shown over" in row.remarks]
    if comparison.options.baseline is None:
        return f"{said} Without a baseline nothing is claimed."
    if not claims:
        return f"{said} No difference from {comparison.options.baseline} is shown: see the remarks."
    return f"{said} A difference from {comparison.options.baseline} is shown for {_list(claims)}."


def _alt(comparison: Comparison, name: str) -> str:
    """Return a figure's content in words, for those who do not see it."""
    if name == "curves":
        return (
            f"Learning curves of {_list([row.group for row in comparison.rows])} over frames and "
            "over time, and the frames that each score takes. The table has the numbers."
        )
    scores = [
        f"{row.group} {number(row.final_iqm)}"
        + (
            f" ({number(row.final_iqm_low)} to {number(row.final_iqm_high)})"
            if row.final_iqm_low is not None
            else ""
        )
        for row in comparison.rows
        if row.final_iqm is not None
    ]
    return f"Final scores with intervals: {'; '.join(scores)}."


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
