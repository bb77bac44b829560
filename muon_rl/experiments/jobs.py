"""The jobs of a study, one training each, and what they are called."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_SHORT = 60  # characters of a point's name in file names


@dataclass(frozen=True)
class Point:
    """What is varied, without the seed.

    Args:
        values: keys and values, as text.
        task: name of the task that goes on top of the recipe; empty for the recipe's own.
        trial: number of the search's trial that it is; ``None`` outside a search.
    """

    values: tuple[tuple[str, str], ...] = ()
    task: str = ""
    trial: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], task: str = "", trial: int | None = None) -> Point:
        """Return the point of values of any kind; in which order they come makes no difference."""
        return cls(tuple((key, written(values[key])) for key in sorted(values)), task, trial)

    @property
    def text(self) -> str:
        """Every key and value; keys that move together are one, in braces."""
        words = [f"{_braced(keys)}={value}" for keys, value in self._together()]
        return " ".join(words) or "default"

    @property
    def name(self) -> str:
        """A few words that tell it: the ends of keys, and four digits of a number."""
        groups = self._together()
        parts = [key.split(".") for (key, *_), _ in groups]
        words = [self.task] if self.task else []
        words += [] if self.trial is None else [f"trial{self.trial}"]
        for own, (_, value) in zip(parts, groups, strict=True):
            # As many of a key's last words as no other key ends with.
            count = next(
                (n for n in range(1, len(own)) if sum(p[-n:] == own[-n:] for p in parts) == 1),
                len(own),
            )
            words.append(f"{'.'.join(own[-count:])}={_rounded(value)}")
        return " ".join(words) or "default"

    @property
    def short(self) -> str:
        """What it is called while it runs: the number of a search's trial, or its name."""
        return self.name if self.trial is None else f"trial{self.trial}"

    @property
    def slug(self) -> str:
        """A name for files, as no other point has."""
        whole = json.dumps([self.values, self.task, self.trial])
        readable = re.sub(r"[^\w.=+-]+", "_", self.name)[:_SHORT].strip("_")
        return f"{readable}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"

    def options(self) -> list[str]:
        """Return the values as options of the command line."""
        return [f"--{key}={value}" for key, value in self.values]

    def _together(self) -> list[tuple[list[str], str]]:
        """Return the keys, those with one value that differ in one word together."""
        groups, left = [], dict(self.values)
        while left:
            first, value = next(iter(left.items()))
            same = [key for key in left if left[key] == value]
            mates = (_mates(first, same, place) for place in range(first.count(".") + 1))
            keys = max(mates, key=len)
            groups.append((keys, value))
            left = {key: value for key, value in left.items() if key not in keys}
        return groups


class Job(NamedTuple):
    """One training: a point and a seed."""

    point: Point
    seed: int

    @property
    def name(self) -> str:
        """A few words that tell it: the name of its run."""
        return f"{self.point.name} seed={self.seed}"

    @property
    def short(self) -> str:
        """What it is called while it runs."""
        return f"{self.point.short} seed={self.seed}"

    @property
    def slug(self) -> str:
        """A name for files, as no other job has."""
        return f"{self.point.slug}_seed{self.seed}"


def jobs_of(points: Iterable[Point], seeds: Iterable[int]) -> list[Job]:
    """Return every point with every seed, seed by seed, so that a stopped study is a balanced one.

    Args:
        points: of the study.
        seeds: of each point.
    """
    points = list(dict.fromkeys(points))
    return [Job(point, seed) for seed in dict.fromkeys(seeds) for point in points]


def written(value: Any) -> str:
    """Return a value as the command line takes it.

    Args:
        value: text, or what JSON has.

    Example:
        >>> written("muon"), written([0.9, 0.999]), written(True)
        ('muon', '[0.9,0.999]', 'true')
    """
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _mates(key: str, others: Iterable[str], place: int) -> list[str]:
    """Return those keys that are like one but for the word at a place; the key itself is one."""

    def rest(other: str) -> list[str]:
        words = other.split(".")
        return [*words[:place], "", *words[place + 1 :]]

    return [other for other in others if rest(other) == rest(key)]


def _braced(keys: list[str]) -> str:
    """Return keys that differ in one word as one."""
    columns = zip(*(key.split(".") for key in keys), strict=True)
    words = [list(dict.fromkeys(column)) for column in columns]
    return ".".join(word[0] if len(word) == 1 else f"{{{','.join(word)}}}" for word in words)


def _rounded(value: str) -> str:
    """Return a number with four digits, and any other text as it is."""
    if len(value) <= 6:
        return value
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
