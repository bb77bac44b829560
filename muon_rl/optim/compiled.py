"""An optimizer's update as a compiled graph that its learning rates do not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CompiledUpdate:
    """Runs an update compiled, with the groups' rates as tensors while it runs.

    A graph holds numbers as constants, and a rate that moves would have it compiled anew at each
    step. Outside, in schedulers, logs and checkpoints, rates stay what they are.

    Args:
        update: reads the groups, changes parameters and state, returns nothing.
        options: of ``torch.compile``.
    """

    def __init__(self, update: Callable[[], None], options: dict[str, Any]) -> None:
        self._update = torch.compile(update, **options)
        self._rates: list[Tensor] = []

    def __call__(self, groups: list[dict[str, Any]]) -> None:
        """Make one update.

        Args:
            groups: of the optimizer.
        """
        given = [group["lr"] for group in groups]
        for _ in range(len(self._rates), len(groups)):
            self._rates.append(torch.zeros((), dtype=torch.float64))
        for group, rate in zip(groups, self._rates, strict=False):
            if not isinstance(group["lr"], Tensor):
                group["lr"] = rate.fill_(group["lr"])
        try:
            self._update()
        finally:
            for group, rate in zip(groups, given, strict=True):
                group["lr"] = rate
