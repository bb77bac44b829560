"""The classes that a recipe may name, and those that their parameters are made of."""

from __future__ import annotations

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
