"""Why each parameter is where it is: a table of names, shapes, roles, groups and reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Explanation(NamedTuple):
    """A line of the table.

    Args:
        name: of the parameter.
        shape: of the parameter; what stacks copies of a network comes first.
        role: in its network (see :func:`~muon_rl.optim.parameter_roles`), ``-`` if not known.
        group: of the optimizer.
        reason: why the parameter is in that group.
    """

    name: str
    shape: str
    role: str
    group: str
    reason: str


def explanations(
    groups: Iterable[Mapping[str, Any]], reasons: Mapping[Any, tuple[str, str]]
) -> list[Explanation]:
    """Return a line for each parameter of each group.

    Args:
        groups: of an optimizer.
        reasons: role and reason of the parameters that have one.
    """
    lines = []
    for group in groups:
        names = group.get("param_names") or [
            f"{group['name']}[{index}]" for index in range(len(group["params"]))
        ]
        for name, p in zip(names, group["params"], strict=True):
            role, reason = reasons.get(p, ("-", f"given to {group['algorithm']}"))
            lines.append(Explanation(name, str(tuple(p.shape)), role, group["name"], reason))
    return lines


def table(lines: Iterable[Explanation]) -> str:
    """Return the lines as text in columns, under a heading.

    Args:
        lines: in the order to show them.
    """
    rows = [Explanation._fields, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
