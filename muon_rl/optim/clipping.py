"""Clipping of gradients by their norm: of all networks together, or of each by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from muon_rl.optim.schedules import group_names


def clip_gradients(
    optimizer: Optimizer, max_norm: float | Mapping[str, float]
) -> dict[str, Tensor]:
    r"""Scale the gradients of an optimizer's parameters down to a bound on their Euclidean norm.

    .. math::
        g \leftarrow g \min\left(1, \frac{c}{\lVert g \rVert + 10^{-6}}\right)

    Without a sync with the device. A gradient that is not finite stays so, and makes no other one
    so: a NaN leaves all gradients of its norm as they are, an infinite norm turns finite ones to 0.

    Args:
        optimizer: any; the networks are those of its groups' names, ``<network>/<part>``.
        max_norm: :math:`c` > 0, in units of the gradients: a number for all of them together, or
            a mapping from networks to numbers, for each network by itself. Networks that are not
            named are left as they are.

    Returns:
        The norm of each network that has gradients before the clip, of shape ``()``.

    Raises:
        ValueError: if a bound is not above 0, or a network is none of the optimizer's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = torch.optim.SGD([{"params": [weight], "name": "actor/adam"}], lr=0.1)
        >>> weight.grad = weight.detach().clone()
        >>> clip_gradients(optimizer, {"actor": 1.0})
        {'actor': tensor(5.)}
        >>> weight.grad
        tensor([[0.6000, 0.8000]])
    """
    check_max_norm(optimizer, max_norm)
    members: dict[str, list[Tensor]] = {}
    for name, group in zip(group_names(optimizer), optimizer.param_groups, strict=True):
        params = [p for p in group["params"] if p.grad is not None]
        if params:
            members.setdefault(name.partition("/")[0], []).extend(params)
    norms = {
        network: get_total_norm([p.grad for p in params if p.grad is not None])
        for network, params in members.items()
    }
    if isinstance(max_norm, Mapping):
        for network, bound in max_norm.items():
            if network in norms:
                _clip(members[network], bound, norms[network])
    elif norms:
        device = next(iter(norms.values())).device
        together = torch.stack([norm.to(device) for norm in norms.values()])
        params = [p for network in members.values() for p in network]
        _clip(params, max_norm, torch.linalg.vector_norm(together))
    return norms


def check_max_norm(optimizer: Optimizer, max_norm: float | Mapping[str, float]) -> None:
    """Raise if a bound, or one of the bounds by network, cannot be an optimizer's.

    Args:
        optimizer: as :func:`clip_gradients` takes it.
        max_norm: as :func:`clip_gradients` takes it.

    Raises:
        ValueError: if a bound is not above 0, or a network is none of the optimizer's.
    """
    if not isinstance(max_norm, Mapping):
        if not max_norm > 0:
            raise ValueError(f"The bound of a norm must be above 0, but is {max_norm}.")
        return
    networks = dict.fromkeys(name.partition("/")[0] for name in group_names(optimizer))
    for network, bound in max_norm.items():
        if network not in networks:
            raise ValueError(
                f"There is no network {network!r} to clip the gradients of; there are "
                f"{', '.join(networks)}."
            )
        if not bound > 0:
            raise ValueError(f"The bound of {network}'s norm must be above 0, but is {bound}.")


def _clip(params: list[Tensor], bound: float, norm: Tensor) -> None:
    # Scaled by NaN, every gradient would look like the one that broke.
    clip_grads_with_norm_(params, bound, torch.where(norm.isnan(), 0.0, norm))
