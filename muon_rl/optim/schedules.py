"""Momentum and learning rate over the updates of a run: pure functions of their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Annealing = bool | float | Callable[[float], float]


def momentum_at(momentum: float, step: int, *, start_step: int = 0, warmup_steps: int = 0) -> float:
    r"""Return the momentum of one optimizer step under a delay and a linear warm-up.

    .. math::
        \mu_t = \mu \cdot \mathrm{clip}\!\left(\frac{t - t_0}{w}, 0, 1\right), \qquad
        \mu_t = \mu \, [t \ge t_0] \;\text{without warm-up}

    Args:
        momentum: the optimizer's own value, dimensionless, in [0, 1).
        step: number of optimizer steps made before this one, >= 0.
        start_step: :math:`t_0`, optimizer steps with momentum 0 at the beginning, >= 0.
        warmup_steps: :math:`w`, optimizer steps from there until ``momentum`` is reached, >= 0.

    Example:
        >>> [momentum_at(0.9, step, start_step=2, warmup_steps=2) for step in range(6)]
        [0.0, 0.0, 0.0, 0.45, 0.9, 0.9]
    """
    if step < start_step:
        return 0.0
    return momentum * min(1.0, (step - start_step) / warmup_steps) if warmup_steps else momentum


def linear_annealing(progress: float, *, end: float = 0.0) -> float:
    r"""Return the share of its initial value that a rate has, falling along a line.

    .. math::
        f(x) = (1 - x) + x f_1

    Args:
        progress: :math:`x`, updates made over updates in all, dimensionless, in [0, 1].
        end: :math:`f_1`, the share at the end, dimensionless, in [0, 1].

    Example:
        >>> [linear_annealing(progress) for progress in (0.0, 0.25, 1.0)]
        [1.0, 0.75, 0.0]
    """
    return (1.0 - progress) + end * progress


def anneal_learning_rates(
    optimizer: Optimizer,
    num_updates: int,
    anneal: Annealing | Mapping[str, Annealing] = True,
    *,
    steps_per_update: int = 1,
) -> LambdaLR:
    r"""Return a scheduler that anneals the rate of each group over the updates of a run.

    .. math::
        \gamma_t = \gamma_0 \, f\!\left(\min\left(1, \frac{u}{n}\right)\right), \qquad
        u = \left\lfloor t / k \right\rfloor

    Its ``step`` follows each step :math:`t` of the optimizer. The horizon is no part of its state:
    a run that is continued with more updates follows the new one, from its first step on if
    :func:`refresh_learning_rates` is called after the load.

    Args:
        optimizer: whose groups' ``lr`` is :math:`\gamma_0`; any of torch's kind.
        num_updates: :math:`n`, updates of the whole run, >= 1.
        anneal: :math:`f`: ``True`` for a line down to 0, ``False`` for a constant, a float in
            [0, 1] for a line down to that share, or a function from progress in [0, 1] to the
            share of :math:`\gamma_0`. A mapping gives one to each group (``actor/muon``), to each
            part of that kind (``muon``, ``aux``, ``adam``, ``adamw``) or to each network
            (``actor``); a group's own name goes before the other two, and what is not named stays
            constant.
        steps_per_update: :math:`k`, optimizer steps in a row with one rate (PPO: epochs times
            minibatches), >= 1.

    Raises:
        ValueError: if a number is out of its range, or a name fits no group or two fit one.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.8)
        >>> scheduler = anneal_learning_rates(optimizer, num_updates=4)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.8, 0.6000000000000001, 0.4, 0.2, 0.0]
    """
    for name, number in (("num_updates", num_updates), ("steps_per_update", steps_per_update)):
        if not number >= 1:
            raise ValueError(f"{name} must be at least 1, but is {number}.")
    names = group_names(optimizer)
    chosen = _choose(anneal if isinstance(anneal, Mapping) else dict.fromkeys(names, anneal), names)
    # Of a partial the scheduler's state_dict holds an empty dict: no code for a checkpoint to
    # load, and no horizon to win over that of the run that goes on.
    return LambdaLR(
        optimizer,
        [
            partial(
                _factor_at,
                factor=_factor(chosen[name], name),
                num_updates=num_updates,
                steps_per_update=steps_per_update,
            )
            for name in names
        ],
    )


def refresh_learning_rates(scheduler: LambdaLR) -> None:
    """Set the rates that a scheduler's own functions have for its step, as after a load.

    A checkpoint brings the rates of the horizon that it was saved under.

    Args:
        scheduler: whose state and whose optimizer's state have been loaded.
    """
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        rate = base * factor(scheduler.last_epoch)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = [
        group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"] for group in groups
    ]


def group_names(optimizer: Optimizer) -> list[str]:
    """Return the names of an optimizer's groups: ``group0``, ``group1``, … where they have none.

    Args:
        optimizer: any; one of :func:`~muon_rl.optim.build_optimizer` has ``<network>/<part>``.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    return [group.get("name", f"group{index}") for index, group in enumerate(groups)]


def _choose(anneal: Mapping[str, Annealing], names: list[str]) -> dict[str, Annealing]:
    """Return what a mapping from groups, parts and networks says for each group."""
    keys = {name: [name, *name.split("/", 1)] for name in names}
    known = dict.fromkeys(key for name in names for key in keys[name])
    if unknown := [key for key in anneal if key not in known]:
        raise ValueError(
            f"No group, part or network of the optimizer is named "
            f"{', '.join(map(repr, unknown))}; there are {', '.join(known)}."
        )
    chosen: dict[str, Annealing] = {}
    for name in names:
        given = [key for key in keys[name] if key in anneal]
        if len(given) > 1 and given[0] != name:
            raise ValueError(
                f"The learning rate of {name!r} is annealed both as {' and as '.join(given)}: "
                f"give {name!r} itself."
            )
        chosen[name] = anneal[given[0]] if given else False
    return chosen


def _factor(anneal: Annealing, name: str) -> Callable[[float], float]:
    """Return the function from progress to the share of the initial rate."""
    if isinstance(anneal, bool):
        return linear_annealing if anneal else _constant
    if isinstance(anneal, float) and 0.0 <= anneal <= 1.0:
        return partial(linear_annealing, end=anneal)
    if callable(anneal):
        return anneal
    raise ValueError(
        f"The annealing of {name!r} must be True, False, the share at the end as a float in "
        f"[0, 1], or a function of progress, but is {anneal!r}."
    )


def _constant(progress: float) -> float:
    return 1.0


def _factor_at(
    step: int, *, factor: Callable[[float], float], num_updates: int, steps_per_update: int
) -> float:
    return factor(min(1.0, step // steps_per_update / num_updates))
