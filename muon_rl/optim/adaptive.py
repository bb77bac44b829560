"""Adam and AdamW for what is no matrix: torch's own step, with a beta1 that may begin late."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from muon_rl.optim import sharded
from muon_rl.optim.groups import is_scheduled, next_momentum


def step_adam(
    groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]], *, capturable: bool
) -> None:
    """Make one step of Adam or AdamW.

    Args:
        groups: Adam groups; parameters without a gradient are left as they are.
        state: of the optimizer, which holds each parameter's moments and count of steps.
        capturable: whether the counts of steps lie on the device.
    """
    # Groups of equal settings, such as the heads of actor and critic, are one call.
    calls: dict[tuple, list[tuple[Any, dict[str, Any]]]] = defaultdict(list)
    for group in groups:
        pairs = [(p, state[p]) for p in group["params"] if p.grad is not None]
        if not pairs:
            continue
        for p, own in pairs:
            if "exp_avg" not in own:
                _begin(p, own, on_device=capturable or bool(group["fused"]))
            elif capturable and own["step"].device != p.device:
                own["step"] = own["step"].to(p.device)  # loaded from another device
        settings = _settings(group, pairs[0][0].device.type)
        if is_scheduled(group):
            for p, own in pairs:
                calls[settings + _corrected(group, own, settings[2])].append((p, own))
        else:
            key = (*settings, group["lr"], group["weight_decay"])
            calls[key] += pairs
    for (device, fused, beta1, beta2, eps, decoupled, lr, decay), pairs in calls.items():
        params, grads, averages, squares, steps = _tensors(pairs)
        adam(
            params,
            grads,
            averages,
            squares,
            [],
            steps,
            # torch does not compile its fused Adam; the compiler fuses the other.
            fused=None if torch.compiler.is_compiling() else fused,
            # torch takes it on accelerators only; on a CPU there is no graph to capture.
            capturable=capturable and device != "cpu",
            decoupled_weight_decay=decoupled,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=decay,
            eps=eps,
        )


def _tensors(pairs: list[tuple[Any, dict[str, Any]]]) -> Sequence[list[Tensor]]:
    """Return parameters, gradients, first and second moments and counts of steps."""
    params = [p for p, _ in pairs]
    averages = [own["exp_avg"] for _, own in pairs]
    squares = [own["exp_avg_sq"] for _, own in pairs]
    steps = [own["step"] for _, own in pairs]
    if not sharded.any_of(params):
        return params, [p.grad for p in params], averages, squares, steps
    gradients = map(sharded.gradient, params)
    params, grads, averages, squares = (
        [sharded.local(tensor) for tensor in tensors]
        for tensors in (params, gradients, averages, squares)
    )
    return params, grads, averages, squares, steps


def _settings(group: dict[str, Any], device: str) -> tuple:
    # Without decay Adam and AdamW are one, and share a call.
    decoupled = group["algorithm"] == "adamw" and group["weight_decay"] != 0
    return (
        device,
        group["fused"],
        next_momentum(group),
        group["betas"][1],
        group["eps"],
        decoupled,
    )


def _begin(p: Any, state: dict[str, Any], *, on_device: bool) -> None:
    """Give a parameter its state at its first step."""
    state["step"] = torch.zeros((), device=p.device if on_device else "cpu")
    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _corrected(group: dict[str, Any], state: dict[str, Any], beta1: float) -> tuple[Any, Any]:
    """Return rate and decay with which torch's step is right for a beta1 that has moved.

    After steps with ``b_1 … b_t`` the first moment must be divided by ``1 - b_1 * … * b_t``; torch
    divides by ``1 - b_t^t``. The rate takes the ratio of the two, and the decay gives it back.
    """
    state["updates"] = state.get("updates", 0) + 1
    state["beta1_product"] = state.get("beta1_product", 1.0) * beta1
    ratio = (1 - beta1 ** state["updates"]) / (1 - state["beta1_product"])
    decay = group["weight_decay"]
    return group["lr"] * ratio, decay / ratio if group["algorithm"] == "adamw" else decay
