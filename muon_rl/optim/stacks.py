"""Where Muon's matrices lie: those of one shape, of any group, in one stack; worked out once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muon_rl.optim import sharded
from muon_rl.optim.coefficients import Triple, resolve_coefficients
from muon_rl.optim.groups import matrix_shape, per_parameter, rate_ratio
from muon_rl.optim.orthogonalize import arithmetic, has_less_range, room


class Member(NamedTuple):
    """One parameter's matrices in a stack.

    Args:
        parameter: an ordinary or a sharded one.
        group: index of its group.
        rows: of each of its matrices.
        columns: likewise.
        ratio: of its rate to its group's.
        is_cut: whether its matrices are cut among processes, and have to be gathered.
        is_large: whether its numbers may be too large for the stack's dtype.
    """

    parameter: Any
    group: int
    rows: int
    columns: int
    ratio: float
    is_cut: bool
    is_large: bool


class Stack(NamedTuple):
    """Matrices that are orthogonalized as one batch.

    Args:
        members: the parameters, in their order in the stack.
        numbers: of matrices, of each member.
        shape: of all: number, rows and columns, those of the largest matrix.
        is_padded: whether there are smaller ones, which zeros fill up.
        dtype: of the arithmetic.
        device: of all members.
    """

    members: list[Member]
    numbers: list[int]
    shape: tuple[int, int, int]
    is_padded: bool
    dtype: torch.dtype
    device: torch.device

    def allocate(self) -> Tensor:
        """Return memory for the matrices."""
        make = torch.zeros if self.is_padded else torch.empty
        return make(self.shape, dtype=self.dtype, device=self.device)

    def parts(self, stack: Tensor) -> Sequence[Tensor]:
        """Return each member's matrices in a stack, ``(number, rows, columns)``: its memory."""
        if len(self.members) == 1:
            return (stack,)
        parts = stack.split_with_sizes(self.numbers)
        if not self.is_padded:
            return parts
        return [
            part[:, : member.rows, : member.columns]
            for part, member in zip(parts, self.members, strict=True)
        ]


class Iteration(NamedTuple):
    """Stacks that one kind of iteration runs on.

    Args:
        stacks: of one dtype, on one device.
        triples: coefficients of each step.
        eps: smallest norm that is scaled up.
    """

    stacks: list[Stack]
    triples: tuple[Triple, ...]
    eps: float


class Layout:
    """The iterations of an optimizer, kept until its groups ask for others.

    Which parameters have a gradient, what these are and the groups' options decide; rates and
    momenta do not, and may change at each step.
    """

    def __init__(self) -> None:
        self._signature: Any = None
        self._iterations: list[Iteration] = []

    def iterations(self, groups: list[dict[str, Any]]) -> list[Iteration]:
        """Return what is to be iterated in the next step.

        Args:
            groups: Muon groups; parameters without a gradient are left out.
        """
        if torch.compiler.is_compiling():
            return arrange(groups)
        signature = [
            (
                *(group[option] for option in _OPTIONS),
                [
                    (id(p), p.shape, p.device, p.dtype)
                    for p in group["params"]
                    if p.grad is not None
                ],
            )
            for group in groups
        ]
        if signature != self._signature:
            self._iterations = arrange(groups)
            # A copy: a list among the options may be changed in place.
            self._signature = deepcopy(signature)
        return self._iterations


_OPTIONS = ("batch_dims", "splits", "coefficients", "ns_steps", "eps", "dtype", "adjust_lr")


def arrange(groups: list[dict[str, Any]]) -> list[Iteration]:
    """Put each parameter that has a gradient beside those of its matrices' shape.

    Args:
        groups: Muon groups. Of all together: an actor's matrices and its critics' are often of one
            shape.
    """
    found: dict[tuple, dict[tuple[int, int, str], list[Member]]] = defaultdict(dict)
    for index, group in enumerate(groups):
        triples = resolve_coefficients(group["coefficients"], group["ns_steps"])
        options = (per_parameter(group, "batch_dims"), per_parameter(group, "splits"))
        for p, batch_dims, splits in zip(group["params"], *options, strict=True):
            if p.grad is None or p.numel() == 0:
                continue
            rows, columns = matrix_shape(p.shape, batch_dims, splits)
            dtype = group["dtype"] or arithmetic(p.device.type, rows, columns)
            is_cut = sharded.cuts_matrices(p, batch_dims)
            ratio = rate_ratio(group["adjust_lr"], rows, columns)
            is_large = has_less_range(dtype, p.dtype)
            member = Member(p, index, rows, columns, ratio, is_cut, is_large)
            shapes = found[(triples, group["eps"], dtype, p.device)]
            shapes.setdefault(room(rows, columns, dtype, triples), []).append(member)
    return [
        Iteration([_stack(members, *where) for members in shapes.values()], triples, eps)
        for (triples, eps, *where), shapes in found.items()
    ]


def _stack(members: list[Member], dtype: torch.dtype, device: torch.device) -> Stack:
    """Return a stack that has room for its largest member."""
    here = [m.parameter if m.is_cut else sharded.local(m.parameter) for m in members]
    numbers = [p.numel() // (m.rows * m.columns) for p, m in zip(here, members, strict=True)]
    rows, columns = max(m.rows for m in members), max(m.columns for m in members)
    is_padded = any((m.rows, m.columns) != (rows, columns) for m in members)
    return Stack(members, numbers, (sum(numbers), rows, columns), is_padded, dtype, device)
