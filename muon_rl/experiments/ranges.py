"""The ranges that a search draws its values from."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FIELDS = ("low", "high", "log", "step", "int")


@dataclass(frozen=True)
class Interval:
    """Numbers from ``low`` to ``high``, both included.

    Args:
        low: smallest value.
        high: largest value, above ``low``.
        log: whether the logarithm is uniform, in place of the number itself.
        step: distance of one value to the next; ``None`` for any number between.
        whole: whether the values are integers; their step is then 1 if there is none.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return self.low, self.high

    def draw(self, generator: random.Random) -> float:
        """Return a value at random.

        Args:
            generator: of random numbers.
        """
        if self.log:
            # Whole numbers have half a unit to either side, so that both ends are as likely.
            half = 0.5 if self.whole else 0.0
            low, high = math.log(self.low - half), math.log(self.high + half)
            value = math.exp(generator.uniform(low, high))
            value = round(value) if self.whole else value
        elif self.step is not None:
            places = round((self.high - self.low) / self.step)
            value = self.low + generator.randint(0, places) * self.step
        else:
            value = generator.uniform(self.low, self.high)
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """Values of which one is taken.

    Args:
        values: at least one, of any kind.
    """

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, Any]:
        """First and last value."""
        return self.values[0], self.values[-1]

    def draw(self, generator: random.Random) -> Any:
        """Return a value at random.

        Args:
            generator: of random numbers.
        """
        return generator.choice(self.values)


Ranges = Mapping[str, Interval | Choice]


def read_ranges(content: Mapping[str, Any]) -> dict[str, Interval | Choice]:
    """Return the ranges of a sweep's file.

    Args:
        content: by dotted key, ``{low: 0.01, high: 0.05, log: true}`` for numbers between two,
            with ``int: true`` for integers and ``step`` for equal distances, or a list of values.

    Raises:
        ValueError: if a range is none; the message names the key.

    Example:
        >>> read_ranges({"a.lr": {"low": 0.01, "high": 0.05, "log": True}, "b": [2, 4]})
        {'a.lr': Interval(low=0.01, high=0.05, log=True, step=None, whole=False), \
'b': Choice(values=(2, 4))}
    """
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"ranges must be keys with a range each, but is {content!r}.")
    return {str(key): _range(key, given) for key, given in content.items()}


def draw_point(ranges: Ranges, generator: random.Random) -> dict[str, Any]:
    """Return a value at random for each key.

    Args:
        ranges: by dotted key, as :func:`read_ranges` returns them.
        generator: of random numbers.
    """
    return {key: given.draw(generator) for key, given in ranges.items()}


def corner_points(ranges: Ranges) -> Iterator[dict[str, Any]]:
    """Yield every combination of the ranges' ends: 2 to the number of keys.

    Args:
        ranges: by dotted key, as :func:`read_ranges` returns them.
    """
    for values in itertools.product(*(given.ends for given in ranges.values())):
        yield dict(zip(ranges, values, strict=True))


def _range(key: str, given: Any) -> Interval | Choice:
    if isinstance(given, list):
        if not given:
            raise ValueError(f"The range of {key} is a list, but an empty one: give its values.")
        return Choice(tuple(given))
    if not isinstance(given, Mapping) or not {"low", "high"} <= set(given) <= set(FIELDS):
        raise ValueError(
            f"The range of {key} must be a list of values, or have low and high (and log, step, "
            f"int where wanted), but is {given!r}."
        )
    for flag in ("log", "int"):
        if not isinstance(given.get(flag, False), bool):
            raise ValueError(f"{flag} of {key} must be true or false, but is {given[flag]!r}.")
    low, high = (_number(key, name, given[name]) for name in ("low", "high"))
    step = _number(key, "step", given["step"]) if given.get("step") is not None else None
    log, numbers = given.get("log", False), [low, high] if step is None else [low, high, step]
    whole = given.get("int", step is not None and all(type(n) is int for n in numbers))
    if whole and any(n != int(n) for n in numbers):
        raise ValueError(f"{key} has int: true, but {', '.join(map(str, numbers))} are not whole.")
    if not low < high:
        raise ValueError(f"low must be below high, but {key} has low {low} and high {high}.")
    if log and low <= 0:
        raise ValueError(f"log needs a low above 0, but {key} has low {low}.")
    if step is not None and log:
        raise ValueError(f"{key} has both log and step: equal distances have no logarithms.")
    if step is not None and not (step > 0 and _divides(step, high - low)):
        raise ValueError(
            f"step must divide the way from low to high, but {key} has low {low}, high {high} and "
            f"step {step}."
        )
    if whole:
        step = 1 if step is None and not log else step
        low, high, step = int(low), int(high), None if step is None else int(step)
    return Interval(low, high, log=log, step=step, whole=whole)


def _number(key: str, name: str, given: Any) -> float:
    """Return a number; YAML 1.1 takes 1e-3, without a point, for text."""
    try:
        number = float(given) if isinstance(given, str) else given
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"{name} of {key} must be a number, but is {given!r}.")
    if not math.isfinite(number):
        raise ValueError(f"{name} of {key} must be finite, but is {given!r}.")
    return number


def _divides(step: float, length: float) -> bool:
    return math.isclose(length / step, round(length / step), abs_tol=1e-9)
