"""Mistakes in a config, told in a line or two: the key, what came and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import lightning as L

from muon_rl.agent import Agent
from muon_rl.callbacks import Checkpoints
from muon_rl.data import AgentData
from muon_rl.envs import EnvFactory

TOP = (
    "env", "data", "model", "trainer", "checkpoint", "method_name", "seed_everything",
    "ckpt_path", "matmul_precision", "config",
)  # fmt: skip

_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<flag>\S+)"
    r"|(?:Group|Subcommand) '(?P<group>\S+)' does not accept option '(?P<key>\S+)'"
    r"|Option '(?P<option>\S+)' is not accepted"
)
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_WRONG_VALUE = re.compile(r'Parser key "(\S+)":\s*Expected (?:an? )?(.+?)\. Got value: (.*)', re.S)


class ConfigError(Exception):
    """A mistake in what was asked for, told in a line or two."""


def explain(message: str) -> str:
    """Return a parser's message as a line or two.

    Args:
        message: jsonargparse's; it may nest the messages of several attempts.
    """
    if unknown := _UNKNOWN.search(message):
        return _explain_key(unknown)
    if no_class := _NO_CLASS.search(message):
        return _explain_class(no_class[1])
    if wrong := _WRONG_VALUE.search(message):
        key, expected, came = wrong.groups()
        choices = re.search(r"Literal\[(.*?)\]", expected)
        expected = choices[1] if choices else re.sub(r"<class '(\S+)'>", r"\1", expected)
        return f"{key} must be {expected.replace(', ', ' or ')}, but is {came.strip()!r}."
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def root_of(error: BaseException) -> BaseException:
    """Return the exception at the bottom of the chain of causes.

    Args:
        error: jsonargparse wraps what a constructor raises, once for each level.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain_key(found: re.Match[str]) -> str:
    flag = (found["flag"] or "").lstrip("-").partition("=")[0]
    key = flag or found["key"] or found["option"]
    vocabulary = dict(_vocabulary())
    parts = [part for part in key.split(".") if part != "init_args"]
    if parts[0] in TOP and len(parts) > 1:
        parts = parts[1:]
    elif found["group"] in (None, "fit", "validate") and not found["option"] and len(parts) == 1:
        vocabulary = {"a recipe": TOP}
    elif found["group"] in ("fit", "validate") or (flag and parts[0] not in _words(vocabulary)):
        vocabulary = {"a recipe": TOP, **vocabulary}
    # The first part that nobody knows is the mistake: of `critc.case` it is `critc`.
    wrong = next((part for part in parts if part not in _words(vocabulary)), parts[-1])
    close = difflib.get_close_matches(wrong, _words(vocabulary), n=1)
    if not close:
        return f"There is no key {key!r}. muon-rl fit --config NAME --help lists all keys."
    owner, allowed = next((o, names) for o, names in vocabulary.items() if close[0] in names)
    listed = ", ".join(allowed if len(allowed) <= 20 else [close[0], "…"])
    return f"There is no key {key!r}: did you mean {close[0]}? {owner} takes {listed}."


def _explain_class(name: str) -> str:
    known = [cls.__name__ for base in (EnvFactory, AgentData, Agent) for cls in _subclasses(base)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)};"
    return f"There is no class {name!r}: {hint} Give another one with its path, as package.Class."


def _words(vocabulary: dict[str, tuple[str, ...]]) -> list[str]:
    return [name for names in vocabulary.values() for name in names]


def _vocabulary() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every class that a config may name or set, with its keys."""
    seen: set[type] = set()
    for base in (EnvFactory, AgentData, Agent):
        for cls in _subclasses(base):
            yield from _keys(cls, seen)
    yield from _keys(Checkpoints, seen)
    yield from _keys(L.Trainer, seen)


def _keys(cls: type, seen: set[type]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a class with its keys, then the classes that its parameters are typed with."""
    if cls in seen:
        return
    seen.add(cls)
    names = [name for name in inspect.signature(cls).parameters if name not in ("env", "specs")]
    yield cls.__name__, tuple(names)
    if cls is L.Trainer:
        return
    typed = cls if dataclasses.is_dataclass(cls) else cls.__init__
    for hint in typing.get_type_hints(typed).values():
        for part in (hint, *typing.get_args(hint)):
            ours = inspect.isclass(part) and part.__module__.startswith("muon_rl")
            if ours and not issubclass(part, EnvFactory):
                yield from _keys(part, seen)


def _subclasses(base: type) -> Iterator[Any]:
    """Yield every concrete class below a base."""
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls):
            yield cls
        yield from _subclasses(cls)
