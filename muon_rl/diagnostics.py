r"""What a layer's features tell of a network's health: ranks, dormant units.

Pure functions of features ``(*batch, samples, width)``: one matrix for each network or layer, a row
for each sample, a column for each unit. All are free of the features' scale, compute in float64
(float32 where a device has no float64), and keep matrices apart: one that holds a NaN or an
infinity gives NaN, the others of its batch their numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP_K = 10
DORMANT_BELOW = 0.025  # of the layer's mean


def effective_rank(features: Tensor) -> Tensor:
    r"""Return the effective rank: over how many directions the features spread.

    :math:`\exp(-\sum_i p_i \ln p_i)` with :math:`p_i = \sigma_i / \sum_j \sigma_j`, of the singular
    values :math:`\sigma`. It lies between 1, for rank one, and the rank, which equal singular
    values reach.

    Args:
        features: activations, any unit, floating point, ``(*batch, samples, width)``.

    Returns:
        Number of directions, ``(*batch,)``; 0 for all-zero features, NaN where not all are finite.

    Raises:
        TypeError: if the features are not floating point.
        ValueError: if there are no samples, no units or no matrices.

    Example:
        >>> effective_rank(torch.eye(5)).item()
        5.0
        >>> effective_rank(torch.ones(2, 7, 3)).round(decimals=4).tolist()
        [1.0, 1.0]

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    return measures(features)["effective_rank"]


def stable_rank(features: Tensor) -> Tensor:
    r"""Return the stable rank, which small singular values move less than the effective rank.

    :math:`\lVert A \rVert_F^2 / \lVert A \rVert_2^2 = \sum_i \sigma_i^2 / \sigma_1^2`

    Args:
        features: activations, any unit, floating point, ``(*batch, samples, width)``.

    Returns:
        Number of directions, ``(*batch,)``, between 1 and the rank; 0 for all-zero features, NaN
        where not all are finite.

    Raises:
        TypeError: if the features are not floating point.
        ValueError: if there are no samples, no units or no matrices.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item()
        1.5

    Source: Rudelson and Vershynin 2007, arXiv:math/0503442, section 1.
    """
    return measures(features)["stable_rank"]


def topk_mass(features: Tensor, k: int = TOP_K) -> Tensor:
    r"""Return the share of the k largest singular values in the sum of all.

    :math:`\sum_{i \le k} \sigma_i / \sum_i \sigma_i`

    Args:
        features: activations, any unit, floating point, ``(*batch, samples, width)``.
        k: how many; with as many as there are, or more, the share is 1.

    Returns:
        Share, ``(*batch,)``, in (0, 1]; 0 for all-zero features, NaN where not all are finite.

    Raises:
        TypeError: if the features are not floating point.
        ValueError: if there are no samples, no units or no matrices, or ``k < 1``.

    Example:
        >>> topk_mass(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=1).item()
        0.5
    """
    return measures(features, k=k)["topk_mass"]


def dormant_share(features: Tensor, threshold: float = DORMANT_BELOW) -> Tensor:
    r"""Return the share of units that hardly ever answer, compared to the others of their layer.

    Unit :math:`i` is dormant if :math:`E|h_i| / \frac{1}{H} \sum_k E|h_k| \le \tau`, with means
    over the samples and the layer's :math:`H` units. A layer that is zero throughout has no score
    by this formula (0/0): it gives 0, as the other measures do, and they tell it apart.

    Args:
        features: activations :math:`h`, any unit, floating point, ``(*batch, samples, width)``.
        threshold: :math:`\tau`, dimensionless, >= 0.

    Returns:
        Share of units, ``(*batch,)``, in [0, 1); 0 for all-zero features, NaN where not all are
        finite.

    Raises:
        TypeError: if the features are not floating point.
        ValueError: if there are no samples, no units or no matrices, or ``threshold < 0``.

    Example:
        >>> dormant_share(torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, -1.0, 0.0, 4.0]])).item()
        0.5

    Source: Sokar et al. 2023, arXiv:2302.12902, eq. 1 and definition 3.1.
    """
    scaled, finite = _scaled(features)
    return _where(finite, _dormant_share(scaled, threshold), features)


def measures(
    features: Tensor, *, k: int = TOP_K, threshold: float = DORMANT_BELOW
) -> dict[str, Tensor]:
    """Return all measures of the features by name, for the price of one decomposition.

    Args:
        features: activations, any unit, floating point, ``(*batch, samples, width)``.
        k: of :func:`topk_mass`.
        threshold: of :func:`dormant_share`, dimensionless, >= 0.

    Returns:
        ``effective_rank``, ``stable_rank``, ``topk_mass`` and ``dormant_share``, each ``(*batch,)``
        in float32, or float64 for float64 features.

    Raises:
        TypeError: if the features are not floating point.
        ValueError: if there are no samples, no units or no matrices, ``k < 1`` or
            ``threshold < 0``.

    Example:
        >>> {name: value.item() for name, value in measures(torch.eye(4), k=1).items()}
        {'effective_rank': 4.0, 'stable_rank': 4.0, 'topk_mass': 0.25, 'dormant_share': 0.0}
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, but is {k}.")
    scaled, finite = _scaled(features)
    values = torch.linalg.svdvals(scaled)
    total, largest = values.sum(-1), values[..., 0]
    # Where all are zero, any divisor makes 0 of them; the entropy of zeros is 0 and its exp 1.
    safe_total, safe_largest = (torch.where(v > 0, v, 1.0) for v in (total, largest))
    entropy = torch.special.entr(values / safe_total[..., None]).sum(-1)
    found = {
        "effective_rank": torch.where(total > 0, entropy.exp(), 0.0),
        "stable_rank": (values / safe_largest[..., None]).square().sum(-1),
        "topk_mass": values[..., :k].sum(-1) / safe_total,
        "dormant_share": _dormant_share(scaled, threshold),
    }
    return {name: _where(finite, value, features) for name, value in found.items()}


def _dormant_share(scaled: Tensor, threshold: float) -> Tensor:
    """Return the share of dormant units of finite features."""
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, but is {threshold}.")
    activity = scaled.abs().mean(-2)
    mean = activity.mean(-1, keepdim=True)
    score = activity / torch.where(mean > 0, mean, 1.0)
    return ((score <= threshold) & (mean > 0)).to(scaled.dtype).mean(-1)


def _scaled(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of largest magnitude 1, and which of the matrices are finite.

    Those that are not become zeros, on which a decomposition neither fails nor warns.
    """
    if not features.is_floating_point():
        raise TypeError(f"Features must be floating point, but are {features.dtype}.")
    if features.ndim < 2 or features.numel() == 0:
        raise ValueError(
            "Features need the shape (*batch, samples, width) with at least one of each, but have "
            f"{tuple(features.shape)}."
        )
    has_double = features.device.type != "mps"
    features = features.detach().to(torch.float64 if has_double else torch.float32)
    scale = features.abs().amax((-2, -1), keepdim=True)
    finite = scale.isfinite()
    scaled = torch.where(finite, features / torch.where(scale > 0, scale, 1.0), 0.0)
    return scaled, finite[..., 0, 0]


def _where(finite: Tensor, value: Tensor, features: Tensor) -> Tensor:
    """Return a measure in the precision of its features, at least float32, NaN where not finite."""
    value = torch.where(finite, value, torch.nan)
    return value.to(torch.promote_types(features.dtype, torch.float32))
