r"""Rewards and values as categories: TorchRL's two-hot over signed-hyperbolic bins.

A scalar :math:`x` is seen as :math:`h(x) = \mathrm{sign}(x)(\sqrt{|x| + 1} - 1) + \epsilon x` with
:math:`\epsilon = 10^{-3}`, and shared out between the two bins beside it. A network's last axis
says how many bins there are: 61 on ±30 reach ±904.7. :class:`torchrl.modules.SymExpTwoHot` is
something else: its bins lie at raw values, far apart, and it interpolates between those.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.modules.functional import signed_hyperbolic, signed_parabolic
from torchrl.objectives import two_hot_cross_entropy, two_hot_decode

LIMIT = 30.0


def two_hot_bins(logits: Tensor, *, limit: float = LIMIT) -> Tensor:
    r"""Return the bins that logits stand for: evenly spaced in transformed space.

    Args:
        logits: whose last axis counts the bins, >= 2, ``(*batch, bins)``.
        limit: the last bin, in transformed units, > 0.

    Returns:
        Ascending, ``(bins,)``, on the logits' device and at least in float32.

    Raises:
        ValueError: if there are fewer than two bins, or ``limit <= 0``.

    Example:
        >>> two_hot_bins(torch.zeros(4, 7))
        tensor([-30., -20., -10.,   0.,  10.,  20.,  30.])
    """
    bins = logits.shape[-1] if logits.ndim else 0
    if bins < 2:
        raise ValueError(
            f"Two-hot needs logits of at least 2 bins in the last axis, but they have the shape "
            f"{tuple(logits.shape)}; give the network an output of 61, or use the squared error."
        )
    if not limit > 0:
        raise ValueError(f"limit must be above 0, but is {limit}.")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.linspace(-limit, limit, bins, device=logits.device, dtype=dtype)


def two_hot_loss(logits: Tensor, target: Tensor, *, limit: float = LIMIT) -> Tensor:
    r"""Return the cross-entropy of logits to the two-hot of scalar targets.

    .. math::
        -\sum_i \mathrm{twohot}_i(h(x)) \log \mathrm{softmax}_i(l)

    Args:
        logits: :math:`l`, ``(*batch, bins)``, computed in at least float32.
        target: :math:`x`, raw units, ``(*batch,)`` or ``(*batch, 1)``; what lies beyond the last
            bin counts as that bin.
        limit: the last bin, in transformed units, > 0.

    Returns:
        Nats, ``(*batch,)``.

    Raises:
        ValueError: if the shapes do not fit, there are fewer than two bins, or ``limit <= 0``.

    Example:
        >>> two_hot_loss(torch.zeros(2, 61), torch.tensor([3.0, -900.0]))
        tensor([4.1109, 4.1109])

    Source: Schrittwieser et al. 2020, arXiv:1911.08265, appendix F.
    """
    bins = two_hot_bins(logits, limit=limit)
    transformed = signed_hyperbolic(target.to(bins.dtype))
    return two_hot_cross_entropy(logits.to(bins.dtype), transformed, bins)


def two_hot_value(logits: Tensor, *, limit: float = LIMIT) -> Tensor:
    r"""Return the scalar that logits say: :math:`h^{-1}` of their mean over the bins.

    Args:
        logits: ``(*batch, bins)``, computed in at least float32.
        limit: the last bin, in transformed units, > 0.

    Returns:
        Raw units, ``(*batch,)``, at least in float32.

    Raises:
        ValueError: if there are fewer than two bins, or ``limit <= 0``.

    Example:
        >>> two_hot_value(torch.zeros(3, 61))
        tensor([0., 0., 0.])

    Source: Schrittwieser et al. 2020, arXiv:1911.08265, appendix F.
    """
    bins = two_hot_bins(logits, limit=limit)
    return signed_parabolic(two_hot_decode(logits.to(bins.dtype), bins))
