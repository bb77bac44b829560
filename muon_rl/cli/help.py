"""``muon-rl fit --help``: every key of a recipe's own classes, with a sentence and its value."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import docstring_parser
import lightning as L
import yaml

from muon_rl.agent import Agent
from muon_rl.callbacks import Checkpoints, EffectiveRank, LossHealth, PolicyAverage
from muon_rl.cli.parts import concrete_subclasses, hints_of, own_parts
from muon_rl.data import AgentData
from muon_rl.envs import EnvFactory

TOP_KEYS = {
    "method_name": "names the run and its checkpoint folder; ${key} in it is that key's value, "
    "as in sac_${env.domain}; left out: model class and task.",
    "seed_everything": "seed of weights, environment, sampling.",
    "ckpt_path": "last or best of the newest run of this method and seed, or a file.",
    "compile_optimizer": "whether torch.compile takes the optimizer's step (10 to 20 s at first).",
    "matmul_precision": "highest, high or medium: torch.set_float32_matmul_precision.",
}
HEAD = {
    "fit": "usage: muon-rl fit --config RECIPE [--KEY=VALUE ...]\n\n"
    "Train an agent as a recipe says.",
    "validate": "usage: muon-rl validate --config RECIPE --ckpt_path=best [--KEY=VALUE ...]\n\n"
    "Play evaluation episodes with a checkpoint, by the deterministic policy.",
}
TAIL = """
In YAML the same keys are nested, those of env, data, model, actor and critic under init_args.
Another class goes in as --env=CLASS, --model.actor=CLASS, …; --trainer.logger=false tracks nothing.
"""

Row = tuple[str, str, Any]


def render(command: str, config: dict[str, Any] | None) -> str:
    """Return the help of a subcommand.

    Args:
        command: fit or validate.
        config: the recipe that was given, whose own classes and values are shown; without one,
            all classes that are shipped, and their defaults.
    """
    lines = [HEAD[command], ""]
    if config is None:
        lines += ["With --config, the keys of that recipe's own classes and its values.", ""]
    config = config or {}
    for key, base in (("env", EnvFactory), ("data", AgentData), ("model", Agent)):
        part = config.get(key) or {}
        for cls in concrete_subclasses(base):
            if not part or part.get("class_path", "").split(".")[-1] == cls.__name__:
                lines += _section(f"{key}: {cls.__name__}", cls, key, part.get("init_args") or {})
    rows = [(name, text, config.get(name)) for name, text in TOP_KEYS.items()]
    lines += ["the run", *_table(rows), ""]
    lines += _section("checkpoint: Checkpoints", Checkpoints, "checkpoint", {})
    for key, callback in (
        ("effective_rank", EffectiveRank),
        ("loss_health", LossHealth),
        ("policy_average", PolicyAverage),
    ):
        given = config.get(key) or {}
        lines += _section(f"{key}: {callback.__name__}", callback, key, given)
    lines += _section("trainer: Lightning's Trainer", L.Trainer, "trainer", {})
    return "\n".join(lines) + TAIL


def load(paths: list[str]) -> dict[str, Any] | None:
    """Return the recipes of several files as one, or ``None`` without any.

    Args:
        paths: of YAML files, the later ones winning.
    """
    merged: dict[str, Any] | None = None
    for path in paths:
        with open(path) as file:
            merged = _merge(merged or {}, yaml.safe_load(file) or {})
    return merged


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return two nested dicts as one, the new values winning."""
    both = {k: _merge(old[k], v) for k, v in new.items() if isinstance(v, dict) and k in old}
    return {**old, **new, **both}


def _section(title: str, cls: type, prefix: str, given: dict[str, Any]) -> list[str]:
    summary = docstring_parser.parse(cls.__doc__ or "").short_description or ""
    return [f"{title} - {summary}", *_table(list(_rows(cls, prefix, given))), ""]


def _rows(cls: type, prefix: str, given: dict[str, Any]) -> Iterator[Row]:
    """Yield key, sentence and value for each parameter of a class and of its parts."""
    docs: dict[str, str | None] = {}
    for owner in reversed(cls.__mro__):
        for text in (owner.__doc__, vars(owner).get("__init__", owner).__doc__):
            docs |= {p.arg_name: p.description for p in docstring_parser.parse(text or "").params}
    hints = hints_of(cls)
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in ("env", "specs"):
            continue
        sentence = " ".join((docs.get(name) or "").replace("``", "").split()).split(". ")[0]
        parts = [] if cls is L.Trainer else own_parts(hints.get(name))
        value = given.get(name, parameter.default)
        if not parts:
            yield f"{prefix}.{name}", sentence, value
            continue
        part = _chosen(parts[0], value)
        if not dataclasses.is_dataclass(part):
            yield f"{prefix}.{name}", sentence, part.__name__
        nested: dict[str, Any] = value if isinstance(value, dict) else {}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            nested = dataclasses.asdict(value)
        yield from _rows(part, f"{prefix}.{name}", nested.get("init_args", nested))


def _chosen(base: type, value: Any) -> type:
    """Return the class that a value names, by its path or itself, where that is below the base."""
    named = (
        value.get("class_path", "") if isinstance(value, dict) else getattr(value, "__name__", "")
    )
    below = (cls for cls in concrete_subclasses(base) if cls.__name__ == named.rpartition(".")[2])
    return next(below, base)


def _table(rows: list[Row]) -> list[str]:
    width = min(110, shutil.get_terminal_size().columns)
    lines = []
    for key, sentence, value in rows:
        missing = value in (inspect.Parameter.empty, None) or repr(value).startswith("<factory")
        text = sentence.rstrip(".") + ("" if missing else f" [{value}]")
        if len(key) > 38:
            lines.append(f"  --{key}")
            key = ""
        first = f"  --{key:<38}" if key else " " * 42
        lines += textwrap.wrap(
            text, width, initial_indent=first + " ", subsequent_indent=" " * 43
        ) or [first]
    return lines
