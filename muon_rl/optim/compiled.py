"""An optimizer's update as a compiled graph that its learning rates do not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from muon_rl.optim.groups import is_moving, is_scheduled, next_momentum


class CompiledUpdate:
    """Runs an update compiled, with the groups' rates as tensors while it runs, and no count.

    A graph holds numbers as constants, and one that moves would have it compiled anew. So rates
    become tensors, and counts of steps, which no update reads, stand at 0; outside, in schedulers,
    logs and checkpoints, they stay what they are.
    The first update, which makes the state, and those in which a momentum moves are not compiled.

    Args:
        update: reads the groups, changes parameters and state, returns nothing.
        options: of ``torch.compile``; inductor's ``size_asserts`` is off unless it is given.
    """

    def __init__(self, update: Callable[[], None], options: dict[str, Any]) -> None:
        if options.get("backend", "inductor") == "inductor" and options.get("mode") is None:
            # Dynamo has looked at all sizes: a look again at each costs 1% of a small step.
            inductor = {"size_asserts": False, **(options.get("options") or {})}
            options = {**options, "options": inductor}
        self._plain = update
        self._compiled = torch.compile(update, **options)
        self._rates: list[Tensor] = []
        self._momenta: list[float] = []

    def __call__(self, groups: list[dict[str, Any]]) -> None:
        """Make one update.

        Args:
            groups: of the optimizer.
        """
        momenta = [next_momentum(group) for group in groups]
        if momenta != self._momenta or any(map(_moves, groups)):
            self._momenta = momenta
            self._plain()
            return
        given = [(group["lr"], group["step"]) for group in groups]
        for _ in range(len(self._rates), len(groups)):
            self._rates.append(torch.zeros((), dtype=torch.float64))
        for group, rate in zip(groups, self._rates, strict=False):
            if not isinstance(group["lr"], Tensor):
                group["lr"] = rate.fill_(group["lr"])
            group["step"] = 0
        try:
            self._compiled()
        finally:
            for group, (lr, step) in zip(groups, given, strict=True):
                group["lr"], group["step"] = lr, step


def _moves(group: dict[str, Any]) -> bool:
    """Tell whether numbers of a group differ from step to step, its rate aside."""
    # After a schedule of beta1 AdamW's decay goes on to move: it gives back what corrects the rate.
    decays = group["algorithm"] == "adamw" and group["weight_decay"] != 0
    return is_moving(group) or (decays and is_scheduled(group))
