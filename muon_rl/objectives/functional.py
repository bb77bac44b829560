r"""The maths of CMPO and Muesli: pure functions of tensors, free of keys, networks and state.

A log-probability of ``-inf`` is an action that may not be taken. All functions keep a gradient
where their arguments have one: detach targets and priors where they are made. What stands in other
modules can be imported from here too: :mod:`~muon_rl.objectives.divergences` between policies,
:mod:`~muon_rl.objectives.windows` of an unrolled model, :mod:`~muon_rl.two_hot` as categories, and
the gradient's scale of :mod:`~muon_rl.unroll`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from muon_rl.objectives.divergences import cross_entropy, kl_divergence, total_variation
from muon_rl.objectives.windows import UnrollMasks, unroll_masks, unroll_targets, unroll_windows
from muon_rl.two_hot import two_hot_bins, two_hot_loss, two_hot_value
from muon_rl.unroll import scale_gradient

__all__ = [
    "UnrollMasks",
    "cmpo_log_policy",
    "cross_entropy",
    "kl_divergence",
    "retrace_returns",
    "sampled_cmpo_weights",
    "scale_gradient",
    "total_variation",
    "two_hot_bins",
    "two_hot_loss",
    "two_hot_value",
    "unroll_masks",
    "unroll_targets",
    "unroll_windows",
]

Clip = float | tuple[float, float]


def cmpo_log_policy(
    prior_log_prob: Tensor, advantage: Tensor, *, scale: Tensor | float, clip: Clip = 1.0
) -> Tensor:
    r"""Return the log of the CMPO target policy over discrete actions.

    .. math::
        \log \pi_\mathrm{cmpo}(a|s) = \log \pi_\mathrm{prior}(a|s)
        + \mathrm{clip}(\mathrm{adv}(s, a) / \sigma, -c, c) - \log z(s)

    It is at most :math:`\tanh(c / 2)` away from the prior in total variation.

    Args:
        prior_log_prob: :math:`\log \pi_\mathrm{prior}(a|s)`, nats, ``(*batch, actions)``; ``-inf``
            for an action that may not be taken, whose advantage is then not read.
        advantage: :math:`q(s, a) - v(s)`, reward units, same shape: one number for each action.
        scale: :math:`\sigma`, root of the advantage's second moment, reward units, > 0: a number
            or a tensor that broadcasts to the advantage's shape.
        clip: bound :math:`c`, dimensionless, > 0; or its pair ``(min, max)``.

    Returns:
        Normalised log-probabilities, nats, ``(*batch, actions)``; ``-inf`` where the prior is.

    Raises:
        ValueError: if the shapes differ, or ``scale`` or ``clip`` is out of its range.

    Example:
        >>> prior, advantage = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, -1.0])
        >>> cmpo_log_policy(prior, advantage, scale=1.0).exp()
        tensor([0.8808, 0.1192])

    Source: Hessel et al. 2021, arXiv:2104.06159, eq. 7.
    """
    if advantage.shape != prior_log_prob.shape:
        raise ValueError(
            f"CMPO needs one advantage for each action: shape {tuple(prior_log_prob.shape)} like "
            f"prior_log_prob, but advantage has {tuple(advantage.shape)}. GAE is one number a "
            "state: added to every action alike it leaves the prior as it is. Use q(s, a) - v(s) "
            "of all actions, from a Q-network or from the model (OneStepLookahead)."
        )
    masked = prior_log_prob == -math.inf
    none_left = masked.all(-1, keepdim=True)
    exponent = _clipped(torch.where(masked, 0.0, advantage), scale, clip)
    # Rows without any action get numbers until the end: log_softmax would make NaN of them.
    logits = torch.where(none_left, 0.0, prior_log_prob + exponent)
    return torch.where(masked, -math.inf, logits.log_softmax(-1))


def sampled_cmpo_weights(
    advantage: Tensor, *, scale: Tensor | float, clip: Clip = 1.0, z_init: float = 1.0
) -> Tensor:
    r"""Return the weights of actions sampled from the prior in the estimate of CMPO's loss.

    .. math::
        w_i = \exp(\mathrm{clip}(\mathrm{adv}_i / \sigma, -c, c)), \qquad
        \frac{w_i}{\tilde z_i} \;\text{with}\;
        \tilde z_i = \frac{1}{N} \Bigl( z_\mathrm{init} + \sum_{k \ne i} w_k \Bigr)

    The regulariser is then :math:`-\frac{1}{N} \sum_i \frac{w_i}{\tilde z_i} \log \pi(a_i|s)`. The
    estimate is biased at a finite :math:`N` and consistent.

    Args:
        advantage: :math:`q(s, a_i) - v(s)` of the :math:`N` samples, reward units,
            ``(N, *batch)``.
        scale: :math:`\sigma`, reward units, > 0: a number or a tensor that broadcasts to the
            advantage's shape.
        clip: bound :math:`c`, dimensionless, > 0; or its pair ``(min, max)``.
        z_init: prior guess of one sample's weight, dimensionless, > 0.

    Returns:
        Weights, dimensionless, positive, ``(N, *batch)``.

    Raises:
        ValueError: if there is no sample, or ``scale``, ``clip`` or ``z_init`` is out of its range.

    Example:
        >>> sampled_cmpo_weights(torch.tensor([0.0, 0.0, 5.0]), scale=1.0)
        tensor([0.6358, 0.6358, 2.7183])

    Source: Hessel et al. 2021, arXiv:2104.06159, eqs. 11 and 12.
    """
    if advantage.ndim < 1 or len(advantage) < 1:
        raise ValueError(
            "Sampled CMPO needs the advantages of N >= 1 actions in shape (N, *batch), but "
            f"advantage has {tuple(advantage.shape)}."
        )
    if not z_init > 0:
        raise ValueError(f"z_init must be above 0, but is {z_init}.")
    weight = _clipped(advantage, scale, clip).exp()
    count = len(weight)
    itself = torch.eye(count, dtype=torch.bool, device=weight.device)
    itself = itself.reshape(count, count, *(1,) * (weight.ndim - 1))
    # The sum of all less its own would lose the others beside one large weight.
    others = torch.where(itself, 0.0, weight).sum(1)
    return weight * count / (z_init + others)


def retrace_returns(
    reward: Tensor, discount: Tensor, value: Tensor, q_value: Tensor, trace: Tensor
) -> Tensor:
    r"""Return Retrace's multi-step estimates of the values of the actions taken.

    .. math::
        G_t = r_{t+1} + \gamma_{t+1} \bigl( V_{t+1} + c_{t+1} (G_{t+1} - Q_{t+1}) \bigr), \qquad
        G_{T-1} = r_T + \gamma_T V_T

    Where :math:`\gamma` is 0 (termination) nothing after the reward is read, and where :math:`c` is
    0 (the end of an episode, padding) nothing after :math:`V`: a NaN beyond stays there.

    Args:
        reward: index t holds :math:`r_{t+1}`, reward units, ``(*batch, T)``, T >= 1.
        discount: index t holds :math:`\gamma_{t+1}`, dimensionless, same shape.
        value: index t holds :math:`V_{t+1}` of the state that the step truly led to, reward units,
            same shape.
        q_value: index t holds :math:`Q_{t+1}` of the action taken there, reward units,
            ``(*batch, T - 1)``.
        trace: index t holds :math:`c_{t+1} = \lambda \min(1, \pi / \mu)`, dimensionless,
            ``(*batch, T - 1)``.

    Returns:
        :math:`G_t`, reward units, ``(*batch, T)``.

    Raises:
        ValueError: if a shape is another.

    Example:
        >>> reward, discount = torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 0.5)
        >>> value, q_value = torch.tensor([4.0, 6.0, 8.0]), torch.tensor([10.0, 20.0])
        >>> retrace_returns(reward, discount, value, q_value, torch.tensor([1.0, 0.5])).tolist()
        [-1.125, 1.75, 7.0]

    Source: Munos et al. 2016, arXiv:1606.02647, eqs. 3 and 4.
    """
    steps = reward.shape[-1] if reward.ndim else 0
    if steps < 1:
        raise ValueError(
            f"Retrace needs (*batch, T) with T >= 1, but reward has {tuple(reward.shape)}."
        )
    shorter = (*reward.shape[:-1], steps - 1)
    for name, tensor, shape in (
        ("discount", discount, reward.shape), ("value", value, reward.shape),
        ("q_value", q_value, shorter), ("trace", trace, shorter),
    ):  # fmt: skip
        if tensor.shape != torch.Size(shape):
            raise ValueError(
                f"Retrace over rewards of shape {tuple(reward.shape)} needs {name} of shape "
                f"{tuple(shape)}, but it has {tuple(tensor.shape)}."
            )
    trace = pad(trace, (0, 1))
    bracket = value - _product(trace, pad(q_value, (0, 1)))
    # G_t = x_t + w_t G_{t+1}: a scan by doubling joins windows of 1, 2, 4, … steps.
    returns, weight = reward + _product(discount, bracket), _product(discount, trace)
    shift = 1
    while shift < steps:
        returns = returns + _product(weight, pad(returns[..., shift:], (0, shift)))
        weight = _product(weight, pad(weight[..., shift:], (0, shift)))
        shift *= 2
    return returns


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """Return their product, where 0 times anything is 0."""
    return weight * torch.where(weight == 0, 0.0, x)


def _clipped(advantage: Tensor, scale: Tensor | float, clip: Clip) -> Tensor:
    """Return the advantage over its scale, within the bounds."""
    low, high = clip if isinstance(clip, (tuple, list)) else (-clip, clip)
    if not low < high:
        raise ValueError(f"clip must be above 0, or a pair (min, max) with min < max, not {clip}.")
    if not isinstance(scale, Tensor):
        if not scale > 0:
            raise ValueError(f"scale must be above 0, but is {scale}.")
    elif scale.ndim > advantage.ndim or any(
        size not in (1, wanted)
        for size, wanted in zip(scale.shape[::-1], advantage.shape[::-1], strict=False)
    ):
        raise ValueError(
            f"scale must broadcast to the advantage's shape {tuple(advantage.shape)}, but has "
            f"{tuple(scale.shape)}."
        )
    return (advantage / scale).clamp(low, high)
