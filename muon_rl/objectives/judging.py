"""What a policy and a critic are like: their entropy, their errors, and where a value stands."""

from __future__ import annotations

import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictSequential,
    set_composite_lp_aggregate,
)
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution

from muon_rl.objectives.priors import all_log_probs, is_discrete

VALUE_KEYS = ("state_value", "value_pred")


def own_critic(actor: ProbabilisticTensorDictSequential) -> TensorDictModuleBase | None:
    """Return the part of an actor that comes before its distribution, if it writes a value."""
    parts = [part for part in actor.module if not isinstance(part, ProbabilisticTensorDictModule)]
    if not {key for part in parts for key in part.out_keys} & set(VALUE_KEYS):
        return None
    return parts[0] if len(parts) == 1 else TensorDictSequential(*parts)


def value_key(critic: TensorDictModuleBase) -> NestedKey:
    """Return where a critic writes its value.

    Raises:
        ValueError: if that is none of :data:`VALUE_KEYS`.
    """
    for key in VALUE_KEYS:
        if key in critic.out_keys:
            return key
    raise ValueError(
        f"Needs a critic that writes {' or '.join(map(repr, VALUE_KEYS))}, but "
        f"{type(critic).__name__} writes {', '.join(map(repr, critic.out_keys))}. Give it one of "
        "the two as out_key."
    )


@torch.no_grad()
def entropy_of(policy: Distribution) -> Tensor:
    """Return the entropy of discrete actions, of others its estimate from one sample.

    Returns:
        Nats, ``(*batch,)``; 0 where no action is allowed.

    Example:
        >>> from torch.distributions import Categorical
        >>> entropy_of(Categorical(probs=torch.tensor([[0.5, 0.5], [1.0, 0.0]]))).round(decimals=4)
        tensor([0.6931, 0.0000])
    """
    if is_discrete(policy):
        return torch.special.entr(all_log_probs(policy).exp()).sum(-1)
    with set_composite_lp_aggregate(True):
        return -policy.log_prob(policy.sample())


def masked_variance(x: Tensor, here: Tensor) -> Tensor:
    """Return the variance, about their own mean, of what counts; 0 of nothing.

    Args:
        x: any unit and shape.
        here: ``False`` for what does not count, bool, same shape; what lies there is not read.

    Example:
        >>> masked_variance(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.)
    """
    count = here.sum().clamp(min=1)
    mean = torch.where(here, x, 0.0).sum() / count
    return torch.where(here, x - mean, 0.0).square().sum() / count


@torch.no_grad()
def explained_variance(value: Tensor, target: Tensor, here: Tensor) -> Tensor:
    """Return the share of the targets' variance that values explain: at most 1; 0 if it is none.

    Args:
        value: units of return, any shape.
        target: same unit and shape.
        here: as of :func:`masked_variance`.

    Example:
        >>> target = torch.tensor([0.0, 2.0])
        >>> explained_variance(0.5 * target, target, torch.ones(2).bool())
        tensor(0.7500)
    """
    spread, left = masked_variance(target, here), masked_variance(target - value, here)
    some = spread > 0
    return torch.where(some, 1.0 - left / torch.where(some, spread, 1.0), 0.0)
