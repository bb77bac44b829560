r"""The K steps after each state of a sequence: which are there, and what stands in them.

Index t of a sequence ``(*batch, T)`` is the transition from :math:`s_t` by :math:`a_t`; its reward,
flags and next observation are TorchRL's ``("next", ...)`` at t. Step k = 1 … K of an unroll that
starts at :math:`s_t` takes :math:`a_{t+k-1}` and is compared with the reward of that transition
and with :math:`v` and :math:`\pi` of :math:`s_{t+k}`. Flags come without TorchRL's trailing axis
of one: ``td["next", "terminated"].squeeze(-1)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class UnrollMasks(NamedTuple):
    """Which steps of an unroll have a target, bool, ``(*batch, T, K)`` each.

    ``reward`` is also the mask of the steps that lie within the episode at all.
    """

    reward: Tensor
    value: Tensor
    policy: Tensor


def unroll_masks(
    terminated: Tensor,
    truncated: Tensor,
    steps: int,
    *,
    valid: Tensor | None = None,
    next_observed: bool | Tensor = True,
) -> UnrollMasks:
    r"""Return which of the K steps from each state have a reward, a value and a policy target.

    - reward: no episode ended between :math:`s_t` and :math:`a_{t+k-1}`, which is in the sequence;
    - policy: besides, :math:`s_{t+k}` is no terminal state, and its observation is there;
    - value: as the policy's, and terminal states too, whose value is known to be 0.

    Within an episode the observation of :math:`s_{t+k}` is the sequence's own. At a truncation and
    at the end of the sequence it is the true next observation.

    Args:
        terminated: the step ended in a terminal state, bool, ``(*batch, T)``.
        truncated: the episode, or the slice, was cut after the step, bool, same shape; where both
            are set, it terminated.
        steps: K, >= 1; may exceed T.
        valid: ``False`` for padding, bool, same shape; all valid if left out.
        next_observed: whether the true next observation is there where the sequence breaks off,
            for all or as bool of the same shape; ``False`` without ``("next", observation)``.

    Returns:
        The three masks.

    Raises:
        ValueError: if the shapes differ, or ``steps < 1``.

    Example:
        >>> terminated = torch.tensor([False, False, True, False, False, False])
        >>> masks = unroll_masks(terminated, torch.zeros(6, dtype=torch.bool), 3)
        >>> [mask.sum().item() for mask in masks]
        [12, 12, 9]
        >>> masks.reward.int()
        tensor([[1, 1, 1],
                [1, 1, 0],
                [1, 0, 0],
                [1, 1, 1],
                [1, 1, 0],
                [1, 0, 0]], dtype=torch.int32)

    Source: Hessel et al. 2021, arXiv:2104.06159, eq. 13.
    """
    if isinstance(next_observed, Tensor):
        _check(terminated, next_observed=next_observed)
    cut = _cuts(terminated, truncated, valid)
    here = torch.ones_like(cut) if valid is None else valid
    # A step is reached if as many sequences were broken off before its transition as before the
    # first; one past the end has a number of its own.
    broken = pad(cut.long().cumsum(-1)[..., :-1], (1, 0))
    inside = _index(cut.shape[-1], steps, cut.device, clamp=False) < cut.shape[-1]
    reached = unroll_windows(broken, steps) == broken.unsqueeze(-1)
    reward = inside & reached & here.unsqueeze(-1) & unroll_windows(here, steps)
    policy = ~terminated & (~cut | next_observed)
    return UnrollMasks(
        reward,
        reward & unroll_windows(policy | terminated, steps),
        reward & unroll_windows(policy, steps),
    )


def unroll_windows(x: Tensor, steps: int, *, feature_dims: int = 0) -> Tensor:
    r"""Return the K transitions from each index on: ``out[t, k - 1] = x[t + k - 1]``.

    So actions give the unroll's inputs, and TorchRL's ``("next", "reward")`` its reward targets.
    Past the end the last entry repeats, which :func:`unroll_masks` says to leave out.

    Args:
        x: any type and unit, ``(*batch, T, *features)``.
        steps: K, >= 1; may exceed T.
        feature_dims: number of axes after T.

    Returns:
        ``(*batch, T, K, *features)``.

    Raises:
        ValueError: if there is no axis of time, or ``steps < 1``.

    Example:
        >>> unroll_windows(torch.arange(4), 3)
        tensor([[0, 1, 2],
                [1, 2, 3],
                [2, 3, 3],
                [3, 3, 3]])
    """
    dim = x.ndim - 1 - feature_dims
    if dim < 0 or feature_dims < 0 or x.shape[dim] < 1:
        raise ValueError(
            f"Windows need (*batch, T, *features) with T >= 1 and feature_dims={feature_dims}, but "
            f"the shape is {tuple(x.shape)}."
        )
    index = _index(x.shape[dim], steps, x.device)
    return x.index_select(dim, index.flatten()).unflatten(dim, tuple(index.shape))


def unroll_targets(
    root: Tensor,
    bootstrap: Tensor | None,
    terminated: Tensor,
    truncated: Tensor,
    steps: int,
    *,
    valid: Tensor | None = None,
    feature_dims: int = 0,
) -> Tensor:
    r"""Return what is known of the states that the K steps from each state lead to.

    .. math::
        y_{t,k} = \begin{cases}
            0 & s_{t+k} \text{ is terminal} \\
            b_{t+k-1} & \text{the sequence breaks off after } a_{t+k-1} \\
            x_{t+k} & \text{otherwise}
        \end{cases}

    For values, with the mask ``value`` of :func:`unroll_masks`; for policies with ``policy``.

    Args:
        root: :math:`x_t` of the states :math:`s_t`: a value target (reward units), a
            log-policy (nats), …, ``(*batch, T, *features)``.
        bootstrap: :math:`b_t` of the true next states (``("next", ...)``), same shape; read only
            where the sequence breaks off. ``None``: 0 there, to be masked by
            ``next_observed=False``.
        terminated: as in :func:`unroll_masks`, bool, ``(*batch, T)``.
        truncated: as in :func:`unroll_masks`, bool, ``(*batch, T)``.
        steps: K, >= 1; may exceed T.
        valid: as in :func:`unroll_masks`, bool, ``(*batch, T)``.
        feature_dims: number of axes after T.

    Returns:
        ``(*batch, T, K, *features)``, in the unit of ``root``.

    Raises:
        ValueError: if the shapes do not fit, or ``steps < 1``.

    Example:
        >>> value, following = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([20.0, 30.0, 40.0])
        >>> never, at_1 = torch.zeros(3).bool(), torch.tensor([False, True, False])
        >>> unroll_targets(value, following, never, at_1, 2)  # truncated after a_1
        tensor([[ 2., 30.],
                [30., 40.],
                [40., 40.]])
        >>> unroll_targets(value, following, at_1, never, 2)  # terminated
        tensor([[ 2.,  0.],
                [ 0., 40.],
                [40., 40.]])
    """
    cut = _cuts(terminated, truncated, valid)
    if root.shape[: root.ndim - feature_dims] != cut.shape:
        raise ValueError(
            f"With feature_dims={feature_dims} root needs {tuple(cut.shape)} before its features, "
            f"but has the shape {tuple(root.shape)}."
        )
    if bootstrap is None:
        bootstrap = torch.zeros_like(root)
    elif bootstrap.shape != root.shape:
        raise ValueError(
            f"bootstrap needs the shape {tuple(root.shape)} of root, but has "
            f"{tuple(bootstrap.shape)}."
        )
    cut, terminated = (
        flag.reshape(*flag.shape, *(1,) * feature_dims) for flag in (cut, terminated)
    )
    after = torch.where(cut, bootstrap, root.roll(-1, root.ndim - 1 - feature_dims))
    return unroll_windows(torch.where(terminated, 0, after), steps, feature_dims=feature_dims)


def _index(length: int, steps: int, device: torch.device, *, clamp: bool = True) -> Tensor:
    """Return the transition of each step from each index, ``(T, K)``."""
    if steps < 1:
        raise ValueError(f"An unroll needs steps >= 1, but has {steps}.")
    index = torch.arange(length, device=device).unsqueeze(-1) + torch.arange(steps, device=device)
    return index.clamp(max=length - 1) if clamp else index


def _cuts(terminated: Tensor, truncated: Tensor, valid: Tensor | None) -> Tensor:
    """Return after which transitions the next index is another state than the one they led to."""
    _check(terminated, truncated=truncated, **({} if valid is None else {"valid": valid}))
    cut = terminated | truncated
    following = torch.ones_like(cut) if valid is None else valid
    # After the last index, and before padding.
    return cut | ~pad(following[..., 1:], (0, 1), value=False)


def _check(terminated: Tensor, **flags: Tensor) -> None:
    for name, flag in flags.items():
        if flag.shape != terminated.shape:
            raise ValueError(
                f"terminated and {name} need the same shape (*batch, T), but have "
                f"{tuple(terminated.shape)} and {tuple(flag.shape)}."
            )
