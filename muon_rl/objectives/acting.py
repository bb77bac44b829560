"""What the data, a policy and its values say of the actions that were taken."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictSequential,
    set_composite_lp_aggregate,
)
from tensordict.utils import NestedKey, expand_right
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import LossModule

COLLECTED = "A TorchRL collector writes it; name another key by set_keys()."


def log_prob_taken(
    actor: ProbabilisticTensorDictSequential, tensordict: TensorDictBase, action_key: NestedKey
) -> Tensor:
    r"""Return :math:`\log \pi(a|s)` of the actions that the data hold.

    Args:
        actor: with ``get_dist``; its own outputs in the data are not read.
        tensordict: the actor's inputs and the action, ``(*batch,)``; left as it is.
        action_key: of the action; not read by a composite distribution, which knows its keys.

    Returns:
        Nats, ``(*batch,)``; of a composite distribution the sum over its parts.

    Example:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torch.distributions import Categorical
        >>> from torchrl.modules import ProbabilisticActor
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(torch.nn.Identity(), ["observation"], ["logits"]),
        ...     in_keys=["logits"],
        ...     distribution_class=Categorical,
        ... )
        >>> observation = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
        >>> td = TensorDict(observation=observation, action=torch.tensor([1, 0]), batch_size=[2])
        >>> log_prob_taken(actor, td, "action").exp()
        tensor([0.7500, 0.5000])
    """
    policy = actor.get_dist(tensordict.select(*actor.in_keys, strict=False))
    return log_prob_of(policy, tensordict, action_key)


def log_prob_of(policy: Distribution, data: TensorDictBase, action: NestedKey) -> Tensor:
    """Return the log-probability of the actions that the data hold, nats, ``(*batch,)``.

    Args:
        policy: over actions; of a composite one the sum over its parts.
        data: with the actions, ``(*batch,)``; one-hot ones may be bool, as their spec's are, and
            numbers may have an axis of one more.
        action: their key; not read by a composite distribution, which knows its keys.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import OneHotCategorical
        >>> data = TensorDict(action=torch.tensor([[False, True], [True, False]]), batch_size=[2])
        >>> log_prob_of(OneHotCategorical(probs=torch.tensor([0.25, 0.75])), data, "action").exp()
        tensor([0.7500, 0.2500])
    """
    if isinstance(policy, CompositeDistribution):
        with set_composite_lp_aggregate(True):
            return policy.log_prob(data)
    taken = data.get(action)
    if taken.shape == (*policy.batch_shape, 1) and not policy.event_shape:
        taken = taken.squeeze(-1)  # else it is broadcast against the whole batch
    # TorchRL's one-hot distribution takes an argmax, which torch has not for bool.
    return policy.log_prob(taken.int() if taken.dtype == torch.bool else taken)


def summed_log_prob(log_prob: Tensor | TensorDictBase) -> Tensor:
    """Return stored log-probabilities as one number: those of a composite action's parts added up.

    Args:
        log_prob: nats, ``(*batch,)``, or a tensordict of such.
    """
    if isinstance(log_prob, Tensor):
        return log_prob
    return torch.stack(list(log_prob.values(True, True))).sum(0)


def value_taken(action_value: Tensor, action: Tensor) -> Tensor:
    """Return the value of the action taken from those of all actions.

    Args:
        action_value: any unit, ``(*batch, actions)``; ``-inf`` where an action may not be taken.
        action: numbers ``(*batch,)`` or ``(*batch, 1)``, or one-hot ``(*batch, actions)``.

    Returns:
        ``(*batch, 1)``.

    Raises:
        ValueError: if the action has another shape.

    Example:
        >>> values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> value_taken(values, torch.tensor([1, 0])).squeeze(-1)
        tensor([2., 3.])
        >>> value_taken(values, torch.tensor([[0, 1], [1, 0]])).squeeze(-1)
        tensor([2., 3.])
    """
    batch, actions = action_value.shape[:-1], action_value.shape[-1]
    if action.shape == (*batch, 1) or action.shape == batch:
        return action_value.gather(-1, action.reshape(*batch, 1).long())
    if action.shape == (*batch, actions):
        return torch.where(action.bool(), action_value, 0.0).sum(-1, keepdim=True)
    raise ValueError(
        f"Action values of shape {tuple(action_value.shape)} need an action of shape "
        f"{tuple(batch)}, {(*batch, 1)} or, one-hot, {(*batch, actions)}, but it has "
        f"{tuple(action.shape)}."
    )


def next_key(key: NestedKey) -> NestedKey:
    """Return the key of the same thing one step later.

    Example:
        >>> next_key("reward"), next_key(("cmpo", "log_prob"))
        (('next', 'reward'), ('next', 'cmpo', 'log_prob'))
    """
    return ("next", key) if isinstance(key, str) else ("next", *key)


def required(tensordict: TensorDictBase, key: NestedKey, remedy: str) -> Tensor:
    """Return what the data hold under a key.

    Args:
        tensordict: the data.
        key: that must be there.
        remedy: who could write it, and how; the end of the error.

    Raises:
        KeyError: if it is not there.
    """
    found = tensordict.get(key, None)
    if found is None:
        raise KeyError(f"The data hold no {key!r}. {remedy}")
    return found


def ends(data: TensorDictBase, done: NestedKey, terminated: NestedKey) -> tuple[Tensor, Tensor]:
    """Return where episodes end, and where they end in a terminal state.

    Args:
        data: with one of the two flags under ``"next"``, or both, as TorchRL's environments write
            them. Without ``done``, ``"truncated"`` counts beside ``terminated``, if it is there.
        done: key of the one.
        terminated: key of the other; where it is not there, all ends are terminal.

    Raises:
        KeyError: if neither is there.
    """
    finished, terminal = data.get(next_key(done), None), data.get(next_key(terminated), None)
    if finished is None and terminal is not None:
        truncated = data.get(("next", "truncated"), None)
        finished = terminal if truncated is None else terminal | truncated.reshape(terminal.shape)
    if finished is None:
        finished = required(data, next_key(done), COLLECTED)
    return finished, finished if terminal is None else terminal


def loss_mask(loss: LossModule, data: TensorDictBase, like: Tensor) -> Tensor | None:
    """Return which steps count, by the masks that a loss looks for in the data; None without one.

    Args:
        loss: whose ``loss_mask_key`` says which they are.
        data: of a step each.
        like: ``(*batch,)``, the shape of the mask.

    Raises:
        ValueError: if a mask has more axes.
    """
    found = None
    for key in loss._loss_mask_keys():
        mask = data.get(key, None)
        if mask is not None:
            mask = loss._expand_loss_mask(mask, like)
            found = mask if found is None else found & mask
    return found


def without_padding(
    loss: LossModule, data: TensorDictBase, keys: Iterable[NestedKey]
) -> TensorDictBase:
    """Return some keys of the data, where floats of the steps that do not count are 0.

    Padding may be NaN, and a gradient of 0 times NaN is NaN: so no network is to read it.

    Args:
        loss: whose ``loss_mask_key`` says which they are.
        data: of a step each; left as they are.
        keys: what to return, of what is there.
    """
    found = data.select(*keys, strict=False)
    masks = [data.get(key, None) for key in loss._loss_mask_keys()]
    for mask in (x.squeeze(-1) if x.shape[-1:] == (1,) else x for x in masks if x is not None):

        def cleaned(x: Tensor, mask: Tensor = mask) -> Tensor:
            if not x.is_floating_point() or x.shape[: mask.ndim] != mask.shape:
                return x
            return torch.where(expand_right(mask, x.shape), x, 0.0)

        found = found.apply(cleaned)
    return found


def reduced(loss: LossModule, data: TensorDictBase, each: Tensor) -> Tensor:
    """Return the losses of the steps as one, or as ``reduction`` says; weighed by priorities.

    Args:
        loss: whose ``reduction``, masks and ``priority_weight`` hold.
        data: with masks and weights, if there are any; weights ``(*batch,)`` or, of sequences,
            with fewer axes or one more.
        each: ``(*batch,)``.
    """
    weights = loss._maybe_get_priority_weight(data)
    if weights is None:
        return loss._reduce_loss(each, data)
    weights = loss._expand_loss_mask(weights, each)
    if loss.reduction != "mean":
        return loss._reduce_loss(each, data, weights=weights)
    mask = loss_mask(loss, data, each)
    if mask is not None:
        each, weights = (torch.where(mask, x, 0.0) for x in (each, weights))
    total = weights.sum()
    # TorchRL's is 0 / 0 where all is masked.
    return (each * weights).sum() / torch.where(total == 0, 1.0, total)


def per_step(x: Tensor, like: Tensor) -> Tensor:
    """Return one number a step in the shape of another, which may have axes of one more or less.

    Args:
        x: ``(*batch,)``, or as many numbers as ``like`` has.
        like: ``(*batch, *features)``, TorchRL's rewards for example.
    """
    if x.numel() == like.numel():
        return x.reshape(like.shape)
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim)).expand_as(like)
