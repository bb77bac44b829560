"""Muon's rule: moving averages, and one polar factor a matrix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muon_rl.optim import sharded
from muon_rl.optim.groups import next_momentum
from muon_rl.optim.orthogonalize import orthogonalize_, scaled_down
from muon_rl.optim.stacks import Layout, Member, Stack

State = dict[Any, dict[str, Any]]


class Move(NamedTuple):
    """What a group asks for in this step.

    Args:
        momentum: share of the average that is kept.
        lookahead: share of the average in the update; with 1 the update is the average itself.
        rate: of the group.
        weight_decay: per update and unit of rate.
    """

    momentum: float
    lookahead: float
    rate: float | Tensor
    weight_decay: float


def step_matrices(groups: list[dict[str, Any]], state: State, layout: Layout) -> None:
    """Make one step of Muon.

    Args:
        groups: Muon groups; parameters without a gradient are left as they are.
        state: of the optimizer, which holds each parameter's ``momentum_buffer``.
        layout: of the optimizer, which remembers where the groups' matrices lie.
    """
    moves = []
    for group in groups:
        momentum = next_momentum(group)
        lookahead = momentum if group["nesterov"] else 1.0
        moves.append(Move(momentum, lookahead, group["lr"], group["weight_decay"]))
    for stacks, triples, eps in layout.iterations(groups):
        updates = [stack.allocate() for stack in stacks]
        parts = [stack.parts(update) for stack, update in zip(stacks, updates, strict=True)]
        for stack, matrices in zip(stacks, parts, strict=True):
            _fill(matrices, stack, moves, state)
        orthogonalize_(updates, triples, eps)
        for stack, matrices in zip(stacks, parts, strict=True):
            _apply(matrices, stack, moves)


def _fill(parts: Sequence[Tensor], stack: Stack, moves: list[Move], state: State) -> None:
    """Move the averages, and write the updates into a stack's parts.

    ``average <- momentum * average + (1 - momentum) * gradient``, and the update is
    ``(1 - lookahead) * gradient + lookahead * average``.
    """
    # A foreach call on a CPU is a loop. This one reads what still lies in the cache.
    if stack.device.type == "cpu" and not torch.compiler.is_compiling():
        for part, member in zip(parts, stack.members, strict=True):
            gradient, average = _gradient_and_average(member, state)
            momentum, lookahead, _, _ = moves[member.group]
            average.lerp_(gradient, 1 - momentum)
            update = torch.lerp(gradient, average, lookahead)
            part.copy_(_as_matrices(update, part, member))
        return
    alike: dict[tuple[float, float], list[int]] = defaultdict(list)
    for index, member in enumerate(stack.members):
        alike[moves[member.group][:2]].append(index)
    for (momentum, lookahead), indices in alike.items():
        members, views = [stack.members[i] for i in indices], [parts[i] for i in indices]
        pairs = [_gradient_and_average(member, state) for member in members]
        gradients, averages = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, averages, lookahead)
        torch._foreach_copy_(views, list(map(_as_matrices, updates, views, members)))


def _gradient_and_average(member: Member, state: State) -> tuple[Tensor, Tensor]:
    """Return what lies here of a parameter's gradient and of the average of its gradients."""
    gradient = sharded.gradient(member.parameter)
    own = state[member.parameter]
    if "momentum_buffer" not in own:
        own["momentum_buffer"] = torch.zeros_like(gradient)
    return sharded.local(gradient), sharded.local(own["momentum_buffer"])


def _as_matrices(update: Tensor, part: Tensor, member: Member) -> Tensor:
    """Return a parameter's update as its part of a stack takes it: gathered, shaped, in range."""
    if member.is_cut:
        # Every process has the same stack then.
        update = sharded.gather(update, member.parameter, part.dtype)
    if update.shape != part.shape:
        update = update.reshape(part.shape)
    if member.is_large:
        # Polar factors do not tell the scale.
        update = scaled_down(update, part.dtype)
    return update


def _apply(parts: Sequence[Tensor], stack: Stack, moves: list[Move]) -> None:
    """Let parameters decay, and subtract their polar factors times their rates."""
    at_rate: dict[float, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for factors, member in zip(parts, stack.members, strict=True):
        _, _, lr, weight_decay = moves[member.group]
        parameter = sharded.local(member.parameter)
        if member.is_cut:
            factors = sharded.scatter(factors.reshape(member.parameter.shape), member.parameter)
        if factors.shape != parameter.shape:
            factors = factors.reshape(parameter.shape)
        if weight_decay != 0:
            parameter.mul_(1 - lr * weight_decay)
        rate = lr * member.ratio
        if isinstance(rate, Tensor):
            # Not in the update's own dtype: a rate of no dims would be rounded to it.
            parameter.sub_(factors.to(parameter.dtype) * rate)
        else:
            params, updates = at_rate[rate]
            params.append(parameter)
            updates.append(factors)
    for rate, (params, updates) in at_rate.items():
        torch._foreach_add_(params, updates, alpha=-rate)
