"""How far apart categorical distributions are, where probabilities of 0 make no NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Return the KL divergence between categorical distributions.

    .. math::
        \mathrm{KL}(p, q) = \sum_a p(a) \, (\log p(a) - \log q(a))

    Args:
        log_p: normalised log-probabilities, nats, ``(*batch, actions)``.
        log_q: the same of :math:`q`.

    Returns:
        Nats, ``(*batch,)``. An action that :math:`p` never takes adds nothing, whatever
        :math:`q` says; one that :math:`q` alone never takes makes it infinite.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> kl_divergence(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.6931)
    """
    return _expectation(log_p, log_q, log_p - log_q)


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Return the cross-entropy of categorical distributions, :math:`-\sum_a p(a) \log q(a)`.

    Its gradient in :math:`q` is that of :func:`kl_divergence`, and it is above it by the entropy
    of :math:`p`.

    Args:
        log_p: normalised log-probabilities, nats, ``(*batch, actions)``.
        log_q: the same of :math:`q`.

    Returns:
        Nats, ``(*batch,)``.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> cross_entropy(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.6931)
    """
    return _expectation(log_p, log_q, -log_q)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Return the total variation between categorical distributions.

    .. math::
        \mathrm{TV}(p, q) = \tfrac{1}{2} \sum_a |p(a) - q(a)|

    Args:
        log_p: normalised log-probabilities, nats, ``(*batch, actions)``.
        log_q: the same of :math:`q`.

    Returns:
        Probability, in [0, 1], ``(*batch,)``.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> total_variation(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.5000)
    """
    _same_shape(log_p, log_q)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


DIVERGENCES = {"kl": kl_divergence, "cross_entropy": cross_entropy}


def _expectation(log_p: Tensor, log_q: Tensor, nats: Tensor) -> Tensor:
    """Return the mean of ``nats`` under p, where 0 times anything is 0, its gradient too."""
    _same_shape(log_p, log_q)
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, nats)).sum(-1)


def _same_shape(log_p: Tensor, log_q: Tensor) -> None:
    if log_p.shape != log_q.shape:
        raise ValueError(
            "Two distributions over the same actions have the same shape (*batch, actions), but "
            f"log_p has {tuple(log_p.shape)} and log_q {tuple(log_q.shape)}."
        )
