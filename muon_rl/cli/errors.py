"""Mistakes in a config, told in a line or two: the key, what came and what is allowed."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Collection, Iterator

import lightning as L
from torch.optim import lr_scheduler

from muon_rl import modules
from muon_rl.agent import Agent
from muon_rl.callbacks import Checkpoints, EffectiveRank, LossHealth, PolicyAverage
from muon_rl.cli.parts import concrete_subclasses, hints_of, own_parts
from muon_rl.data import AgentData
from muon_rl.envs import EnvFactory

TOP = (
    "env", "data", "model", "trainer", "checkpoint", "effective_rank", "loss_health",
    "policy_average", "method_name", "seed_everything", "ckpt_path", "matmul_precision",
    "compile_optimizer", "config",
)  # fmt: skip
SUBCOMMANDS = ("fit", "validate")

_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<flag>\S+)"
    r"|(?:Group|Subcommand) '(?P<group>\S+)' does not accept option '(?P<key>\S+)'"
    r"|Option '(?P<option>\S+)' is not accepted"
)
_KEY = re.compile(r'^Parser key "(?P<key>\S+)":\s*(?P<rest>.*)', re.S)
_WRONG_VALUE = re.compile(
    r"^Expected (?:an? )?(?P<expected>.+?)(?:\. Got value: (?P<came>.*))?$", re.S
)
_NO_CLASS = re.compile(
    r"^(?:Expected a dot import path string|Unexpected import path format): (?P<name>\S+)"
)
_REQUIRED = re.compile(r"^the following arguments are required: (?P<keys>.+)")
_NO_FILE = re.compile(r"Unable to load config ['\"](?P<came>.*?)['\"]")
_ATTEMPTS = re.compile(
    r"Errors:\n(?P<errors>.*?)\n\s*Given value type:.*?Given value: (?P<came>.*)", re.S
)


def explain(message: str, keys: Collection[str] = ()) -> str:
    """Return a parser's message as a line or two.

    Args:
        message: jsonargparse's; it may nest the messages of several attempts.
        keys: that the parser takes.
    """
    if (unknown := _UNKNOWN.search(message)) and "Parser key" not in message:
        return _explain_key(unknown, keys)
    if required := _REQUIRED.match(message):
        lacking = [key.rpartition(".")[2] for key in required["keys"].split(", ")]
        if not {"env", "data", "model"} & set(lacking):
            return f"{lacking[0]} must be given."
        return "env, data or model is missing: name a recipe, --config=NAME (see muon-rl recipes)."
    keyed = _KEY.match(message.strip())
    key, rest = (keyed["key"], keyed["rest"]) if keyed else ("", message.strip())
    if no_file := _NO_FILE.match(rest):
        return (
            f"{key} has keys of its own, --{key}.KEY=VALUE, or takes a file of them; there is no "
            f"file {no_file['came']!r}."
        )
    came = None
    if attempts := _ATTEMPTS.search(rest):
        came = attempts["came"].strip()
        errors = re.split(r"(?:^|\n)\s*- ", attempts["errors"])
    else:
        errors = re.split(r"(?:^|\n)\s*- ", rest)
    errors = [error.strip() for error in errors if error.strip()]
    errors = [error for error in errors if "NoneType" not in error] or errors

    for error in errors:
        # A nested parser has explained it already; this one knows where it stands.
        if error.startswith("There is no key '"):
            return error.replace("'", f"'{key}.", 1) if key else error
        if key and (section := re.match(r"(\S+) has keys of its own", error)):
            return error.replace(section[1], f"{key}.{section[1]}")
        if error.startswith("There is no class '"):
            return error
        if re.match(r"[\w.]+ must be ", error):
            return f"{key}.{error}" if key else error
    for error in errors:
        if no_class := _NO_CLASS.match(error):
            return _explain_class(key, no_class["name"])
    wrong = [_WRONG_VALUE.match(error) for error in errors]
    if all(wrong):
        expected = " or ".join(_readable(match["expected"]) for match in wrong if match)
        came = next((match["came"] for match in wrong if match and match["came"]), came)
        return f"{key} must be {expected}, but is {(came or '').strip()!r}."
    # What says more than which type was expected.
    errors = [error for error in errors if not _WRONG_VALUE.match(error)]
    return f"{key}: " * bool(key) + " ".join(" ".join(errors).split())


def root_of(error: BaseException) -> BaseException:
    """Return what a constructor raised: the first exception below jsonargparse's own wrappers.

    Args:
        error: jsonargparse wraps what a constructor raises, once for each level.
    """
    while error.__cause__ is not None:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("jsonargparse"):
            break
        error = error.__cause__
    return error


def _readable(expected: str) -> str:
    """Return a type as a person would write it."""
    choices = re.search(r"Literal\[(.*?)\]", expected)
    if choices:
        return " or ".join(word.strip(" '") for word in choices[1].split(","))
    return re.sub(r"<class '(\S+)'>", r"\1", expected)


def _explain_key(found: re.Match[str], keys: Collection[str]) -> str:
    flag = (found["flag"] or "").lstrip("-").partition("=")[0]
    group = found["group"] if found["group"] not in (None, *SUBCOMMANDS) else ""
    key = ".".join(part for part in (group, flag or found["key"] or found["option"]) if part)
    # A class's own parser too calls a key an unrecognized argument.
    at_top = found["group"] in SUBCOMMANDS or (bool(flag) and {"data", "model"} <= set(keys))
    vocabulary = dict(_vocabulary())
    parts = [part for part in key.split(".") if part != "init_args"]
    if at_top and parts[0] not in (*TOP, *_words(vocabulary)):
        vocabulary = {"A recipe": TOP}
    known = {*_words(vocabulary), *(TOP if at_top else ())}
    # The first part that nobody knows is the mistake: of `critc.case` it is `critc`.
    wrong = next((part for part in parts if part not in known), parts[-1])
    close = difflib.get_close_matches(wrong, _words(vocabulary), n=1)
    if not close and "A recipe" not in vocabulary:
        return f"There is no key {key!r}: muon-rl fit --config NAME --help lists all keys."
    here = [owner for owner in vocabulary if set(keys).issuperset(vocabulary[owner])]
    if wrong in close and here:  # a key of another class
        close, owner = [], max(here, key=lambda owner: len(vocabulary[owner]))
    else:
        # Of the owners of such a key, the smallest that the parser knows is the likeliest.
        # One whose keys are some of another's, which it knows as well, is another recipe's.
        less = [a for a in here for b in here if set(vocabulary[a]) < set(vocabulary[b])]
        here = [o for o in here if o not in less]
        owners = sorted(vocabulary, key=lambda o: (o not in here, len(vocabulary[o])))
        owner = next(o for o in owners if not close or close[0] in vocabulary[o])
    few = len(vocabulary[owner]) <= 20
    allowed = f"{owner} takes {', '.join(vocabulary[owner])}." if few else "--help lists all keys."
    hint = f"did you mean {close[0]}? " if close else ""
    return f"There is no key {key!r}: {hint}{allowed}"


def _explain_class(key: str, name: str) -> str:
    if key.endswith("anneal_lr"):
        schedulers = [kind for kind in lr_scheduler.__all__ if kind.endswith("LR")]
        close = difflib.get_close_matches(name, schedulers, n=1)
        hint = f"did you mean {close[0]}?" if close else f"torch has {', '.join(schedulers)}."
        return f"There is no class {name!r} for {key}: true, false or a scheduler; {hint}"
    kinds = {"env": EnvFactory, "data": AgentData, "model": Agent}
    named = {
        key: [cls.__name__ for cls in concrete_subclasses(base)] for key, base in kinds.items()
    }
    known = [word for words in named.values() for word in words]
    known += [word for word in modules.__all__ if word not in known]
    if name in known:
        return f"{key} cannot be {name}: it is not of the kind that is needed there."
    close = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {close[0]}?" if close else f"muon_rl has {', '.join(named.get(key, known))}."
    )
    return f"There is no class {name!r} for {key}: {hint} Others need their path: package.Class."


def _words(vocabulary: dict[str, tuple[str, ...]]) -> list[str]:
    return [name for names in vocabulary.values() for name in names]


def _vocabulary() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every class that a config may name or set, with its keys."""
    seen: set[type] = set()
    for base in (EnvFactory, AgentData, Agent):
        for cls in concrete_subclasses(base):
            yield from _keys(cls, seen)
    yield from _keys(Checkpoints, seen)
    yield from _keys(EffectiveRank, seen)
    yield from _keys(LossHealth, seen)
    yield from _keys(PolicyAverage, seen)
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
    for hint in hints_of(cls).values():
        for part in own_parts(hint):
            yield from _keys(part, seen)
