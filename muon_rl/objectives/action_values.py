"""What a prior and a Q-network say of a batch: for all actions, or for some that were sampled."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution

from muon_rl.objectives.divergences import kl_divergence, total_variation
from muon_rl.objectives.functional import Clip, cmpo_log_policy, sampled_cmpo_weights
from muon_rl.objectives.lookahead import PRIOR_ACTION

REMEDY = (
    "Give a Q-network over all actions, or OneStepLookahead(world_model); for continuous actions a "
    "Q-network of observation and action. Name another key by set_keys()."
)


class ActionValues(NamedTuple):
    """Prior and values; over all A actions in the last axis, or over N samples in the first.

    Attributes:
        log_prob: of the prior, nats, ``(*batch, A)`` or ``(N, *batch)``.
        q_value: reward units, same shape.
        value: reward units, ``(*batch)``.
        action: those sampled, ``(N, *batch, a)``, or None for all.
    """

    log_prob: Tensor
    q_value: Tensor
    value: Tensor
    action: Tensor | None

    @property
    def actions(self) -> int:
        """The axis of the actions."""
        return -1 if self.action is None else 0

    @property
    def advantage(self) -> Tensor:
        """Reward units, like ``log_prob``; 0 where the prior forbids the action."""
        advantage = self.q_value - self.value.unsqueeze(self.actions)
        return torch.where(self.log_prob > -math.inf, advantage, 0.0)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of ``x``, like ``log_prob``, under the prior: ``(*batch)``."""
        return x.mean(0) if self.action is not None else _mean_of_all(x, self.log_prob)

    def spread(self, value_target: Tensor | None) -> Tensor:
        """Return numbers whose second moment advantages are divided by, ``(*batch, n)``.

        Args:
            value_target: whose distance from the state's value it is, reward units, ``(*batch)``
                or ``(*batch, 1)``. Without it they are two numbers that have the mean and the
                second moment of the state's advantages.

        Raises:
            ValueError: if there is not one target a state.
        """
        if value_target is not None:
            if value_target.numel() != self.value.numel():
                raise ValueError(
                    f"CMPO needs one value target a state, of shape {tuple(self.value.shape)} or "
                    f"with an axis of one more, but it has {tuple(value_target.shape)}."
                )
            return (value_target.reshape(self.value.shape) - self.value).unsqueeze(-1)
        mean = self.mean(self.advantage)
        deviation = self.mean((self.advantage - mean.unsqueeze(self.actions)).square()).sqrt()
        return torch.stack([mean + deviation, mean - deviation], -1)

    def reweighted(self, *, scale: Tensor, clip: Clip, z_init: float) -> Tensor:
        """Return CMPO's log-probabilities of all actions, or its weights of the samples."""
        if self.action is None:
            return cmpo_log_policy(self.log_prob, self.advantage, scale=scale, clip=clip)
        return sampled_cmpo_weights(self.advantage, scale=scale, clip=clip, z_init=z_init)

    def distances(
        self, log_prob: Tensor, *, scale: Tensor, clip: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Return KL from CMPO's policy to the actor's, and total variation from it to the prior.

        Of samples they are estimates, in which their weights add up to 1.

        Args:
            log_prob: the actor's, of the same actions, nats.
            scale: of the advantage.
            clip: of the advantage over its scale.

        Returns:
            Nats and probability, ``(*batch)`` each.
        """
        if self.action is None:
            target = cmpo_log_policy(self.log_prob, self.advantage, scale=scale, clip=clip)
            return kl_divergence(target, log_prob), total_variation(target, self.log_prob)
        count = len(self.action)
        share = (self.advantage / scale).clamp(*clip).softmax(0)
        nats = self.log_prob + (count * share).log() - log_prob
        return (share * nats).sum(0), 0.5 * (share - 1 / count).abs().sum(0)


def values_of_all(
    log_prob: Tensor, tensordict: TensorDictBase, q_network: TensorDictModuleBase, keys: Any
) -> ActionValues:
    """Return the values of all actions.

    Args:
        log_prob: of the prior, nats, ``(*batch, A)``.
        tensordict: with the Q-network's inputs; left as it is.
        q_network: writes ``action_value``, or a look-ahead's keys.
        keys: names of these keys, as CMPOLoss has them.

    Raises:
        KeyError: if there are no values.
        ValueError: if there is not one for each action.
    """
    found = q_network(tensordict.select(*q_network.in_keys, strict=False))
    q_value = found.get(keys.prior_action_value, None)
    if q_value is not None:
        q_value = _checked(q_value, keys.prior_action_value, log_prob.shape)
        value = found.get(keys.prior_state_value).squeeze(-1)
    else:
        q_value = _checked(found.get(keys.action_value, None), keys.action_value, log_prob.shape)
        value = _mean_of_all(q_value, log_prob)
    return ActionValues(log_prob, q_value, value, None)


def values_of_samples(
    prior: Distribution,
    count: int,
    tensordict: TensorDictBase,
    q_network: TensorDictModuleBase,
    keys: Any,
) -> ActionValues:
    """Return the values of actions that are sampled from the prior.

    Args:
        prior: over ``(*batch, a)``, with one log-probability an action.
        count: N.
        tensordict: with the Q-network's inputs; left as it is.
        q_network: writes ``state_action_value`` of ``action``, or a look-ahead's keys.
        keys: names of these keys, as CMPOLoss has them.

    Raises:
        KeyError: if there are no values.
        ValueError: if there is not one for each action.
    """
    action = prior.sample((count,))
    log_prob = prior.log_prob(action)
    if log_prob.shape != action.shape[:-1]:
        raise ValueError(
            f"CMPO needs one log-probability an action, of shape {tuple(action.shape[:-1])}, but "
            f"{type(prior).__name__} gives {tuple(log_prob.shape)}. Wrap it in Independent."
        )
    data = tensordict.select(*q_network.in_keys, strict=False)
    if keys.prior_action_value in q_network.out_keys:
        found = q_network(data.set(PRIOR_ACTION, action.movedim(0, -2)))
        q_value = found.get(keys.prior_action_value).movedim(-1, 0)
        q_value = _checked(q_value, keys.prior_action_value, log_prob.shape)
        value = found.get(keys.prior_state_value).squeeze(-1)
    else:
        key = keys.state_action_value
        if keys.action not in q_network.in_keys:
            raise ValueError(
                f"CMPO needs one value for each action, but q_network writes {key!r} without "
                f"reading {keys.action!r}: it reads {q_network.in_keys}. {REMEDY}"
            )
        data = data.expand(count, *data.batch_size).set(keys.action, action)
        q_value = q_network(data).get(key, None)
        q_value = _checked(q_value, key, torch.Size((*log_prob.shape, 1))).squeeze(-1)
        value = q_value.mean(0)
    return ActionValues(log_prob, q_value, value, action)


def _mean_of_all(x: Tensor, log_prob: Tensor) -> Tensor:
    """Return the mean under the prior, which does not read what the prior forbids."""
    return (log_prob.exp() * torch.where(log_prob > -math.inf, x, 0.0)).sum(-1)


def _checked(q_value: Tensor | None, key: NestedKey, shape: torch.Size) -> Tensor:
    """Return the values, if there is one for each action."""
    if q_value is None:
        raise KeyError(f"q_network wrote no {key!r}, which CMPO needs. {REMEDY}")
    if q_value.shape != shape:
        raise ValueError(
            f"CMPO needs one value for each action, of shape {tuple(shape)}, but {key!r} has "
            f"{tuple(q_value.shape)}. One number a state, such as GAE or a state value, leaves the "
            f"prior as it is. {REMEDY}"
        )
    return q_value
