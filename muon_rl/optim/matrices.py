"""Muon's rule: moving averages, stacks of all matrices of one shape, one polar factor each."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muon_rl.optim import sharded
from muon_rl.optim.coefficients import resolve_coefficients
from muon_rl.optim.groups import matrix_shape, next_momentum, per_parameter, rate_ratio
from muon_rl.optim.orthogonalize import (
    arithmetic,
    has_less_range,
    orthogonalize_,
    scaled_down,
)


class Matrices(NamedTuple):
    """What one parameter brings to a stack, and where the polar factors go.

    Args:
        parameter: an ordinary or a sharded one.
        gradient: of the parameter, or of the part of it that lies here.
        average: the moving average of the gradients, of the same shape. Where matrices were cut,
            both are the whole update, which has moved already.
        momentum: share of the average that is kept.
        lookahead: share of the average in the update; with 1 the update is the average itself.
        rate: what the polar factors are multiplied by.
        number: of matrices.
    """

    parameter: Any
    gradient: Tensor
    average: Tensor
    momentum: float
    lookahead: float
    rate: float | Tensor
    number: int

    @property
    def is_gathered(self) -> bool:
        """Whether the matrices were cut among processes, and gathered."""
        return self.average is self.gradient


def step_matrices(groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> None:
    """Make one step of Muon.

    Args:
        groups: Muon groups; parameters without a gradient are left as they are.
        state: of the optimizer, which holds each parameter's ``momentum_buffer``.
    """
    # Of all groups together: an actor's matrices and its critics' are often of one shape.
    kinds: dict[tuple, dict[tuple[int, int], list[Matrices]]] = defaultdict(dict)
    for group in groups:
        _collect(group, state, kinds)
    for (triples, eps, dtype, device), shapes in kinds.items():
        stacks = []
        for shape, matrices in shapes.items():
            counts = [member.number for member in matrices]
            stack = torch.empty(sum(counts), *shape, dtype=dtype, device=device)
            _fill(stack.split_with_sizes(counts), matrices)
            stacks.append(stack)
        polar = orthogonalize_(stacks, triples, eps)
        for stack, matrices in zip(polar, shapes.values(), strict=True):
            _apply(stack.split_with_sizes([m.number for m in matrices]), matrices)


def _collect(
    group: dict[str, Any],
    state: dict[Any, dict[str, Any]],
    kinds: dict[tuple, dict[tuple[int, int], list[Matrices]]],
) -> None:
    """Put each parameter beside those of its matrices' shape, and let it decay."""
    momentum = next_momentum(group)
    lookahead = momentum if group["nesterov"] else 1.0
    triples = resolve_coefficients(group["coefficients"], group["ns_steps"])
    lr, weight_decay = group["lr"], group["weight_decay"]
    options = (per_parameter(group, "batch_dims"), per_parameter(group, "splits"))
    for p, batch_dims, splits in zip(group["params"], *options, strict=True):
        if p.grad is None or p.numel() == 0:
            continue
        gradient = sharded.gradient(p)
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(gradient)
        average = sharded.local(state[p]["momentum_buffer"])
        gradient = sharded.local(gradient)
        if weight_decay != 0:
            sharded.local(p).mul_(1 - lr * weight_decay)
        rows, columns = matrix_shape(p.shape, batch_dims, splits)
        dtype = group["dtype"] or arithmetic(gradient.device.type, rows, columns)
        if sharded.cuts_matrices(p, batch_dims):
            # Moved here, and gathered as its own update: every process has the same stack then.
            average.lerp_(gradient, 1 - momentum)
            update = torch.lerp(gradient, average, lookahead)
            gradient = average = sharded.gather(update, p, dtype)
        if gradient.numel() == 0:  # fewer critics than processes
            continue
        rate = lr * rate_ratio(group["adjust_lr"], rows, columns)
        number = gradient.numel() // (rows * columns)
        shapes = kinds[(triples, group["eps"], dtype, gradient.device)]
        shapes.setdefault((rows, columns), []).append(
            Matrices(p, gradient, average, momentum, lookahead, rate, number)
        )


def _fill(parts: tuple[Tensor, ...], matrices: list[Matrices]) -> None:
    """Move the averages, and write the updates into a stack's parts.

    ``average <- momentum * average + (1 - momentum) * gradient``, and the update is
    ``(1 - lookahead) * gradient + lookahead * average``.
    """
    # A foreach call on a CPU is a loop. This one reads what still lies in the cache, and writes
    # the arithmetic's dtype at once.
    if parts[0].device.type == "cpu" and not torch.compiler.is_compiling():
        for part, member in zip(parts, matrices, strict=True):
            gradient, average = member.gradient, member.average
            if not member.is_gathered:
                average.lerp_(gradient, 1 - member.momentum)
            if has_less_range(part.dtype, gradient.dtype):
                update = torch.lerp(gradient, average, member.lookahead).reshape(part.shape)
                part.copy_(_within(update, part.dtype))
            else:
                torch.lerp(gradient, average, member.lookahead, out=part.view(gradient.shape))
        return
    alike: dict[tuple[float, float, bool], list[int]] = defaultdict(list)
    for index, member in enumerate(matrices):
        alike[(member.momentum, member.lookahead, member.is_gathered)].append(index)
    for (momentum, lookahead, is_gathered), indices in alike.items():
        gradients = [matrices[i].gradient for i in indices]
        averages = [matrices[i].average for i in indices]
        if not is_gathered:
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, averages, lookahead)
        views = [parts[i] for i in indices]
        shaped = [_within(u.reshape(v.shape), v.dtype) for u, v in zip(updates, views, strict=True)]
        torch._foreach_copy_(views, shaped)


def _within(update: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices whose numbers another dtype can hold: polar factors do not tell the scale."""
    return scaled_down(update, dtype) if has_less_range(dtype, update.dtype) else update


def _apply(polar: tuple[Tensor, ...], matrices: list[Matrices]) -> None:
    """Subtract each parameter's polar factors times its rate, at one rate all at once."""
    at_rate: dict[float, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for factors, member in zip(polar, matrices, strict=True):
        update = factors.view(member.gradient.shape)
        if member.is_gathered:
            update = sharded.scatter(update, member.parameter)
        parameter = sharded.local(member.parameter)
        if isinstance(member.rate, Tensor):
            # Not in the update's own dtype: a rate of no dims would be rounded to it.
            parameter.sub_(update.to(parameter.dtype) * member.rate)
        else:
            params, updates = at_rate[member.rate]
            params.append(parameter)
            updates.append(update)
    for rate, (params, updates) in at_rate.items():
        torch._foreach_add_(params, updates, alpha=-rate)
