"""A parameter group of Muon: its options, their defaults and what they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muon_rl.optim.coefficients import resolve_coefficients
from muon_rl.optim.schedules import momentum_at

ALGORITHMS = ("muon", "adamw", "adam")
ADJUSTMENTS = ("original", "match_rms_adamw", None)

_COMMON = {"params", "param_names", "algorithm", "name", "lr", "initial_lr"}
SCHEDULE = {"momentum_start_step": 0, "momentum_warmup_steps": 0, "momentum_step": 0, "step": 0}
_SHARED = _COMMON | SCHEDULE.keys() | {"eps", "weight_decay", "batch_dims"}
_MUON_OPTIONS = _SHARED | {
    "momentum", "nesterov", "ns_steps", "coefficients", "adjust_lr", "dtype", "splits",
}  # fmt: skip
_ADAM_OPTIONS = _SHARED | {"betas", "fused"}


def fill_group(group: dict[str, Any], index: int) -> dict[str, Any]:
    """Return a group with its algorithm's own defaults, Muon's common ones aside.

    Args:
        group: as the user gave it.
        index: its place among the groups, which names it where the user has not.

    Raises:
        ValueError: for an unknown algorithm or option.
    """
    group = dict(group)
    algorithm = group.setdefault("algorithm", "muon")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, but is {algorithm!r}.")
    group.setdefault("name", f"group{index}")
    allowed = _MUON_OPTIONS if algorithm == "muon" else _ADAM_OPTIONS
    if unknown := sorted(set(group) - allowed):
        raise ValueError(
            f"Unknown option(s) {', '.join(unknown)} in {algorithm} group {group['name']!r}; "
            f"allowed: {', '.join(sorted(allowed - _COMMON | {'lr', 'name'}))}."
        )
    if algorithm == "muon":
        return {"batch_dims": 0, "splits": 1, **SCHEDULE, **group}
    weight_decay = 0.01 if algorithm == "adamw" else 0.0
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    return {**adam, "fused": None, **SCHEDULE, **group}


def is_scheduled(group: dict[str, Any]) -> bool:
    """Tell whether a group's momentum begins late or is warmed up."""
    return group["momentum_start_step"] + group["momentum_warmup_steps"] > 0


def is_moving(group: dict[str, Any]) -> bool:
    """Tell whether a group's momentum has not yet come to the end of its schedule."""
    return group["momentum_step"] < group["momentum_start_step"] + group["momentum_warmup_steps"]


def next_momentum(group: dict[str, Any]) -> float:
    """Return the momentum, or Adam's beta1, that a group's next step applies.

    Args:
        group: of a :class:`~muon_rl.optim.Muon`.
    """
    own = group["momentum"] if group["algorithm"] == "muon" else group["betas"][0]
    if not is_scheduled(group):
        return own
    return momentum_at(
        own,
        group["momentum_step"],
        start_step=group["momentum_start_step"],
        warmup_steps=group["momentum_warmup_steps"],
    )


def count_step(group: dict[str, Any]) -> None:
    """Count a step of a group, and one of its momentum schedule up to the schedule's end."""
    # What moves would have a compiled step compiled anew: the schedule's count stands still after
    # its end, and the other one, which only messages tell, is left out there.
    if not torch.compiler.is_compiling():
        group["step"] += 1
    if is_moving(group):
        group["momentum_step"] += 1


def per_parameter(group: dict[str, Any], option: str) -> list[int]:
    """Return an option's value for each parameter of a group."""
    value = group[option]
    return list(value) if isinstance(value, Sequence) else [value] * len(group["params"])


def matrix_shape(shape: torch.Size, batch_dims: int, splits: int) -> tuple[int, int]:
    """Return rows and columns of the matrices that a parameter holds.

    Args:
        shape: of the parameter, ``(*batch, out, in, *k)``.
        batch_dims: number of leading dims that stack matrices.
        splits: equal parts along the rows that are matrices of their own.
    """
    return shape[batch_dims] // splits, shape[batch_dims + 1 :].numel()


def rate_ratio(adjust_lr: str | None, rows: int, columns: int) -> float:
    """Return the factor on the rate of a ``(rows, columns)`` matrix."""
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return 1.0


def name_of(group: dict[str, Any], parameter: Tensor) -> str:
    """Return a parameter's name for messages: its own if given, else its place in the group."""
    index = next(i for i, p in enumerate(group["params"]) if p is parameter)
    return group["param_names"][index] if "param_names" in group else f"{group['name']}[{index}]"


def check_group(group: dict[str, Any]) -> None:
    """Raise if a group holds a value or a parameter that its algorithm cannot take."""
    where = f"group {group['name']!r}"
    for option in ("lr", "weight_decay", "eps", "momentum"):
        value = group.get(option, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(
                f"{option} must be a number, but is {value!r} in {where} (YAML reads 3e-4 as a "
                "word: write 3.0e-4)."
            )
    if not float(group["lr"]) >= 0.0:
        raise ValueError(f"lr must be at least 0, but is {group['lr']} in {where}.")
    if math.isinf(group["lr"]):
        raise ValueError(f"lr must be finite, but is {group['lr']} in {where}.")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(
            f"weight_decay must be at least 0, but is {group['weight_decay']} in {where}."
        )
    if not group["eps"] >= 0.0:
        raise ValueError(f"eps must be at least 0, but is {group['eps']} in {where}.")
    for option in SCHEDULE:
        count = group[option]
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(
                f"{option} must be an integer of at least 0, not {count!r}, in {where}."
            )
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(
                f"Muon takes real floating-point parameters only, but {name_of(group, p)!r} is "
                f"{p.dtype}."
            )

    if group["algorithm"] != "muon":
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), but are {betas} in {where}.")
        return

    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"momentum must be in [0, 1), but is {group['momentum']} in {where}.")
    if group["adjust_lr"] not in ADJUSTMENTS:
        raise ValueError(
            f"adjust_lr must be one of {ADJUSTMENTS}, but is {group['adjust_lr']!r} in {where}."
        )
    if not group["eps"] > 0.0:  # a matrix of zeros is divided by it
        raise ValueError(f"eps must be above 0, but is {group['eps']} in {where}.")
    dtype = group["dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, not {dtype!r}, in {where}.")
    resolve_coefficients(group["coefficients"], group["ns_steps"])
    for option in ("batch_dims", "splits"):
        if not all(isinstance(number, int) for number in per_parameter(group, option)):
            raise TypeError(f"{option} must be integers, but is {group[option]!r} in {where}.")
        if len(per_parameter(group, option)) != len(group["params"]):
            raise ValueError(f"{option} must be one number, or one a parameter, in {where}.")
    options = (per_parameter(group, "batch_dims"), per_parameter(group, "splits"))
    for p, batch_dims, splits in zip(group["params"], *options, strict=True):
        if batch_dims < 0:
            raise ValueError(f"batch_dims must be at least 0, but is {batch_dims} in {where}.")
        if p.ndim - batch_dims < 2:
            raise ValueError(
                f"Muon needs matrices, but {name_of(group, p)!r} has shape {tuple(p.shape)} with "
                f"batch_dims={batch_dims}, leaving {max(0, p.ndim - batch_dims)} matrix axes. "
                "Put it in an AdamW group."
            )
        if splits < 1 or p.shape[batch_dims] % splits:
            raise ValueError(
                f"{name_of(group, p)!r} has {p.shape[batch_dims]} rows, which do not fall into "
                f"splits={splits} equal parts."
            )
