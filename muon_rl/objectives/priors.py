"""Log-probabilities of all actions, and the prior of CMPO that is mixed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Categorical, Distribution, OneHotCategorical

PRIOR_MIXTURE = (0.967, 0.03, 0.003)
"""Shares of the target policy, the behaviour and the uniform policy in large-scale Muesli."""


def is_discrete(policy: Distribution) -> bool:
    """Return whether a distribution is over one discrete action, all of which can be listed."""
    return isinstance(policy, (Categorical, OneHotCategorical))


def all_log_probs(policy: Any) -> Tensor:
    """Return the log-probabilities of all actions of a categorical or one-hot distribution.

    Args:
        policy: over one discrete action; may be masked.

    Returns:
        Nats, ``(*batch, actions)``; ``-inf`` where the mask forbids the action, be it all of them.

    Example:
        >>> all_log_probs(Categorical(logits=torch.zeros(2, 4)))
        tensor([[-1.3863, -1.3863, -1.3863, -1.3863],
                [-1.3863, -1.3863, -1.3863, -1.3863]])
    """
    mask = getattr(policy, "mask", None)
    if mask is None or mask.dtype != torch.bool or mask.shape != policy.logits.shape:
        return policy.logits
    return torch.where(mask, policy.logits, -math.inf)


class PriorMixture:
    r"""Mix the behaviour and the uniform policy into a prior.

    .. math::
        \pi = p\, \pi_\mathrm{prior} + b\, \pi_b + u / |A|

    Args:
        shares: :math:`(p, b, u)`, >= 0, which add up to 1.

    Raises:
        ValueError: if they are not such.

    Example:
        >>> prior = torch.tensor([1.0, 1e-9, 0.0]).log()
        >>> PriorMixture((0.5, 0.3, 0.2))(prior, torch.zeros(3)).exp()
        tensor([0.7500, 0.2500, 0.0000])
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = tuple(shares)
        if len(self.shares) != 3 or min(shares) < 0 or not math.isclose(sum(shares), 1.0):
            raise ValueError(
                "prior_mixture must be three shares >= 0 (prior, behaviour, uniform) that add up "
                f"to 1, but is {self.shares}."
            )

    def __call__(self, prior: Tensor, behaviour: Tensor | None) -> Tensor:
        """Return the log of the mixture, nats, ``(*batch, actions)``.

        Args:
            prior: log-probabilities, nats, same shape; what is ``-inf`` stays so.
            behaviour: logits, nats, same shape; its share goes to the prior if left out.
        """
        allowed = prior > -math.inf
        first, second, third = self.shares
        parts = [(torch.zeros_like(prior), third)]
        if behaviour is None:
            parts.append((prior, first + second))
        else:
            parts += [(prior, first), (behaviour, second)]
        logs = [
            torch.where(allowed, part, -math.inf).log_softmax(-1) + math.log(share)
            for part, share in parts
            if share > 0
        ]
        # Without any action, log_softmax is NaN.
        return torch.where(allowed, torch.stack(logs).logsumexp(0), -math.inf)

    def behaviour(
        self, tensordict: TensorDictBase, key: NestedKey, *, required: bool
    ) -> Tensor | None:
        """Return the logits of the policy that acted, where the data hold them.

        Raises:
            KeyError: if they are required, have a share, and are not there.
        """
        found = tensordict.get(key, None)
        if found is None and required and self.shares[1] > 0:
            raise KeyError(
                "prior_mixture needs the logits of the policy that acted, but the data hold no "
                f"{key!r}. Keep the actor's logits when collecting, name their key by "
                "set_keys(behaviour_logits=...), or give the behaviour no share."
            )
        return found
