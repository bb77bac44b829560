"""Muesli's policy gradient and its value regression, off-policy."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    dispatch,
)
from tensordict.utils import NestedKey
from torch import Tensor

from muon_rl.choices import REDUCTIONS, check_choice
from muon_rl.objectives.acting import (
    log_prob_of,
    per_step,
    reduced,
    required,
    summed_log_prob,
    without_padding,
)
from muon_rl.objectives.actor_critic import ActorCriticLoss
from muon_rl.objectives.judging import (
    entropy_of,
    explained_variance,
    masked_variance,
    own_critic,
    value_key,
)
from muon_rl.objectives.normalizer import AdvantageNormalizer
from muon_rl.objectives.retrace import COLLECT
from muon_rl.two_hot import LIMIT, two_hot_loss

SCALAR_LOSSES = (None, "two_hot", "mse")


class MuesliPolicyLoss(ActorCriticLoss):
    r"""Importance-weighted policy gradient towards Retrace's advantages, and the critic's loss.

    .. math::
        L_\pi = -\frac{\pi(a|s)}{\pi_b(a|s)} \, \frac{G - v_\mathrm{prior}(s)}{\sigma}, \qquad
        L_v = c_v \, \ell(v(s), G)

    The gradient is that of the ratio: advantage and :math:`\sigma`, root of their running second
    moment, are detached. :math:`v_\mathrm{prior}` is the target critic, which one ``SoftUpdate`` of
    the loss moves; :math:`\ell` is a two-hot cross-entropy where the critic writes
    ``value_logits``, else the squared error. CMPO's regulariser,
    :class:`~muon_rl.objectives.CMPOLoss`, goes with it.

    Reads the actor's inputs, ``action``, the behaviour's log-probability (``action_log_prob``, or
    ``sample_log_prob`` where tensordict aggregates), and :math:`G` and the advantage, in this
    order: ``advantage`` and ``value_target`` as they are; ``value_target`` less ``state_value``,
    or less the target critic; from ``value_estimator``, by default a
    :class:`~muon_rl.objectives.RetraceEstimator` (:math:`\gamma` 0.99, :math:`\lambda` 0.95) over
    steps ``(*batch, T)`` with the current actor and the target critic, whose other options come by
    ``make_value_estimator(gamma=0.997, target="state_value")``. Writes nothing into the data.

    Returns ``loss_policy``, ``loss_value`` and, detached: ``entropy`` in nats, of one sample where
    actions are continuous; ``ratio_mean`` and ``ratio_max`` of :math:`\pi / \pi_b`;
    ``advantage_std`` in units of return, before :math:`\sigma`; ``advantage_variance_ema``,
    :math:`\sigma^2`; ``explained_variance``, the share of G's variance that the critic explains,
    at most 1, and 0 where G has none.

    Args:
        actor_network: with ``get_dist``.
        critic_network: writes ``state_value`` or, as world models do, ``value_pred``,
            ``(*batch, 1)``, in units of return. ``None``: the actor's own, if it writes one of the
            two on the way; else there is no ``loss_value`` and the data hold the advantage.
        value_pred_coef: :math:`c_v`, dimensionless; may be assigned while training.
        scalar_loss: :math:`\ell`, ``"two_hot"`` or ``"mse"``; ``None`` for the first where the
            critic writes ``value_logits``.
        two_hot_limit: the critic's last bin, in transformed units, > 0; ``None`` for that of its
            ``code``, as a world model has one, else 30.
        max_importance_ratio: what :math:`\pi / \pi_b` is cut down to, dimensionless, > 0; the
            gradient of :math:`\log \pi` stays, with this weight. ``None``: as it is.
        min_advantage_variance: floor of :math:`\sigma^2`, units of return squared, > 0.
        advantage_decay: of the running second moment, dimensionless, in [0, 1).
        normalizer: ``"second_moment"`` or ``"variance"``, see
            :class:`~muon_rl.objectives.AdvantageNormalizer`.
        use_target_network: ``False`` makes the current critic :math:`v_\mathrm{prior}`.
        reduction: none, mean or sum.

    Raises:
        ValueError: if an option is out of its range, or the critic writes no value.
        KeyError: if the data lack the behaviour's log-probability.

    Example:
        >>> from tensordict.nn import TensorDictModule
        >>> from torch import nn
        >>> from torch.distributions import Categorical
        >>> from torchrl.modules import ProbabilisticActor, ValueOperator
        >>> from torchrl.objectives import SoftUpdate
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(nn.Linear(4, 3), ["observation"], ["logits"]),
        ...     in_keys=["logits"],
        ...     distribution_class=Categorical,
        ...     return_log_prob=True,
        ... )
        >>> loss = MuesliPolicyLoss(actor, ValueOperator(nn.Linear(4, 1)))
        >>> targets = SoftUpdate(loss, tau=0.1)
        >>> td = actor(TensorDict(observation=torch.randn(7, 4), batch_size=[7]))
        >>> done = torch.zeros(7, 1, dtype=torch.bool)
        >>> following = {"observation": torch.randn(7, 4), "reward": torch.ones(7, 1)}
        >>> td["next"] = TensorDict({**following, "done": done, "terminated": done}, [7])
        >>> out = loss(td)
        >>> (out["loss_policy"] + out["loss_value"]).backward()
        >>> targets.step()

    Source: Hessel et al. 2021, arXiv:2104.06159, eq. 9 and section 4.5; Munos et al. 2016,
    arXiv:1606.02647.
    """

    _schedulable_buffers = frozenset({"value_pred_coef"})

    value_pred_coef: Tensor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase | None = None,
        *,
        value_pred_coef: float = 0.25,
        scalar_loss: str | None = None,
        two_hot_limit: float | None = None,
        max_importance_ratio: float | None = None,
        min_advantage_variance: float = 1e-8,
        advantage_decay: float = 0.99,
        normalizer: str = "second_moment",
        use_target_network: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_choice("scalar_loss", scalar_loss, SCALAR_LOSSES)
        check_choice("reduction", reduction, REDUCTIONS)
        bounds = {"max_importance_ratio": max_importance_ratio, "two_hot_limit": two_hot_limit}
        for name, bound in bounds.items():
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} must be above 0, but is {bound}.")
        critic = own_critic(actor_network) if critic_network is None else critic_network
        self._own_critic = critic_network is None  # then one pass gives the policy and the value
        self.convert_to_functional(actor_network, "actor_network")
        # No compare_against, as in CMPOLoss: what both share is listed under the actor alone.
        if critic is None:
            self.critic_network = None
        else:
            self._tensor_keys.value = value_key(critic)
            if scalar_loss == "two_hot" and self._tensor_keys.value_logits not in critic.out_keys:
                raise ValueError(
                    "scalar_loss='two_hot' needs a critic that writes 'value_logits', but it "
                    f"writes {', '.join(map(repr, critic.out_keys))}. Give it bins, or take 'mse'."
                )
            if two_hot_limit is None:
                two_hot_limit = getattr(getattr(critic, "code", None), "limit", LIMIT)
            self.convert_to_functional(
                critic, "critic_network", create_target_params=use_target_network
            )
        self.register_coeff_buffer("value_pred_coef", value_pred_coef, device=self._default_device)
        scale = AdvantageNormalizer(
            advantage_decay, min_advantage_variance=min_advantage_variance, normalizer=normalizer
        )
        self.normalizer = scale.to(self._default_device)
        self.scalar_loss, self.two_hot_limit = scalar_loss, two_hot_limit
        self.max_importance_ratio = max_importance_ratio
        self.use_target_network, self.reduction = use_target_network, reduction
        self.out_keys = [
            "loss_policy", "entropy", "ratio_mean", "ratio_max", "advantage_std",
            "advantage_variance_ema",
        ]  # fmt: skip
        if critic is not None:
            self.out_keys = [*self.out_keys, "loss_value", "explained_variance"]
        # Now, as its buffers are part of the state.
        self.make_value_estimator()

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the estimate of the advantage reads too, unless the data hold it."""
        keys = self.tensor_keys
        found = [*self.actor_network.in_keys, keys.action, keys.sample_log_prob]
        if self.critic_network is None:
            found.append(keys.advantage)
        else:
            inputs = list(self.critic_network.in_keys)
            ahead = [*inputs, keys.reward, keys.done, keys.terminated]
            found += [*inputs, *(("next", key) for key in ahead)]
        return list(dict.fromkeys(found))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses and their metrics."""
        keys = self.tensor_keys
        data = without_padding(self, tensordict.clone(recurse=False), tensordict.keys())
        policy, seen = self._policy(data)
        log_prob = log_prob_of(policy, data, keys.action)
        behaviour = summed_log_prob(required(data, keys.sample_log_prob, COLLECT)).detach()
        log_ratio = log_prob - per_step(behaviour, log_prob)
        mask = self._mask(data, log_prob)
        with torch.no_grad():
            advantage, target = self._advantage(data)
            advantage = per_step(advantage, log_prob)
            scaled = advantage / self.normalizer(advantage, mask)
            ratio = log_ratio.exp()
        log_weight = log_ratio
        if self.max_importance_ratio is not None:
            excess = (log_ratio.detach() - math.log(self.max_importance_ratio)).clamp(min=0.0)
            log_weight = log_ratio - excess

        def average(x: Tensor) -> Tensor:
            return self._reduce_loss(x.detach(), data, reduction="mean")

        here = torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask
        out = {
            "loss_policy": reduced(self, data, -log_weight.exp() * scaled),
            "entropy": average(entropy_of(policy)),
            "ratio_mean": average(ratio),
            "ratio_max": torch.where(here, ratio, 0.0).max(),
            "advantage_std": masked_variance(advantage, here).sqrt(),
            "advantage_variance_ema": self.normalizer.second_moment,
        }
        if self.critic_network is not None and target is not None:
            target = per_step(target, log_prob).detach()
            if not (self._own_critic and keys.value in seen):
                seen = self._critic(data, self.critic_network_params)
            value, loss = self._value(seen, target)
            out["loss_value"] = reduced(self, data, self.value_pred_coef * loss)
            out["explained_variance"] = explained_variance(value, target, here)
        return TensorDict(out, [])

    def _value(self, seen: TensorDictBase, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the critic's value and its loss, ``(*batch,)``, of what it wrote."""
        value = per_step(seen.get(self.tensor_keys.value), target)
        logits = seen.get(self.tensor_keys.value_logits, None)
        if self.scalar_loss == "mse" or logits is None:
            return value, (value - target).square()
        return value, two_hot_loss(logits, target, limit=self.two_hot_limit or LIMIT)
