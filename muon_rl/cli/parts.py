"""The classes that a recipe may name, and those that their parameters are made of."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from muon_rl.envs import EnvFactory
from muon_rl.specs import Specs


def concrete_subclasses(base: type) -> Iterator[Any]:
    """Yield every class below a base that can be made.

    Args:
        base: such as ``Agent``; only imported subclasses are found.
    """
    cls: type
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls):
            yield cls
        yield from concrete_subclasses(cls)


def own_parts(hint: Any) -> list[type]:
    """Return the classes of this project in a type hint, such as a config or a network's class.

    Args:
        hint: ``OptimizerConfig``, ``Callable[[Specs], QCritic]``, ``int``, …
    """
    classes = filter(inspect.isclass, (*typing.get_args(hint), hint))
    ours = [cls for cls in classes if cls.__module__.startswith("muon_rl")]
    return [cls for cls in ours if not issubclass(cls, (EnvFactory, Specs))]


def hints_of(cls: type) -> dict[str, Any]:
    """Return the type hints of a class's parameters.

    Args:
        cls: a dataclass, or any class with an annotated ``__init__``, inherited ones included.
    """
    if dataclasses.is_dataclass(cls):
        return typing.get_type_hints(cls)
    makers = (vars(owner)["__init__"] for owner in cls.__mro__ if "__init__" in vars(owner))
    return typing.get_type_hints(next(makers))
