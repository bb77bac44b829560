"""Options that are one of a few names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

REDUCTIONS = ("none", "mean", "sum")


def check_choice(name: str, given: Any, known: Iterable[Any]) -> None:
    """Raise if an option is none of those there are.

    Args:
        name: of the option, for the error.
        given: its value.
        known: what it may be, in the order in which the error lists them.

    Raises:
        ValueError: naming the option, what it may be, and what it is.

    Example:
        >>> check_choice("reduction", "median", REDUCTIONS)
        Traceback (most recent call last):
        ValueError: reduction must be one of none, mean, sum, but is 'median'.
    """
    known = list(known)
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, but is {given!r}.")
