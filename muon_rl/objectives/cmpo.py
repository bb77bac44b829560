"""CMPO: a policy moves towards its prior, reweighted by clipped advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictParams,
    dispatch,
)
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import LossModule

from muon_rl.choices import REDUCTIONS, check_choice
from muon_rl.objectives.acting import loss_mask, next_key, reduced, without_padding
from muon_rl.objectives.action_values import ActionValues, values_of_all, values_of_samples
from muon_rl.objectives.divergences import DIVERGENCES
from muon_rl.objectives.lookahead import PRIOR_ACTION_VALUE, PRIOR_STATE_VALUE
from muon_rl.objectives.normalizer import AdvantageNormalizer
from muon_rl.objectives.priors import PriorMixture, all_log_probs, is_discrete


class CMPOLoss(LossModule):
    r"""Clipped MPO: pull the policy towards the prior that advantages have reweighted.

    .. math::
        \pi_\mathrm{cmpo}(a|s) \propto \pi_\mathrm{prior}(a|s)
        \exp(\mathrm{clip}((q(s, a) - v(s)) / \sigma, -c, c)), \qquad
        L = \lambda \, \mathrm{KL}(\pi_\mathrm{cmpo}, \pi)

    Prior and values are those of the target networks, which one ``SoftUpdate`` of the loss moves;
    only the actor gets a gradient. Discrete actions, categorical or one-hot, masked or not, are all
    valued; of continuous ones N are sampled from the prior, and
    :math:`L = -\frac{\lambda}{N} \sum_k \frac{w_k}{\tilde z_k} \log \pi(a_k|s)`, a cross-entropy.

    Reads the inputs of both networks, and ``value_target`` where it is there: :math:`\sigma^2` is
    then the running second moment of ``value_target`` :math:`- v`, else that of the advantage under
    the prior. Writes into the data, without gradients, ``("cmpo", "log_prob")`` ``(*batch, A)`` in
    nats, or ``("cmpo", "action")`` ``(*batch, N, a)`` and :math:`w_k / \tilde z_k` as ``("cmpo",
    "weight")`` ``(*batch, N)``: a tensordict cannot hold N before its batch. The same under
    ``"next"``, where all inputs are there too.

    Returns ``loss_cmpo`` and, detached: ``cmpo_loss``; ``cmpo_kl_loss``, the divergence before
    ``kl_coef``; ``cmpo_kl``, :math:`\mathrm{KL}(\pi_\mathrm{cmpo}, \pi)`, and ``cmpo_tv``, total
    variation from prior to :math:`\pi_\mathrm{cmpo}`, of samples both estimates; ``cmpo_adv_mean``
    and ``cmpo_adv_std`` of the advantage under the prior, in units of return;
    ``cmpo_adv_variance_ema``, :math:`\sigma^2`.

    Args:
        actor_network: with ``get_dist``.
        q_network: writes ``action_value`` ``(*batch, A)``, whose mean under the prior is
            :math:`v`; or, for continuous actions, ``state_action_value`` ``(*batch, 1)`` of
            ``action``, with the mean of the N as :math:`v`; or a
            :class:`~muon_rl.objectives.OneStepLookahead`. It is trained elsewhere: by SACLoss and
            TD3Loss only in copies, of which ``docs/muesli.md`` copies one back.
        kl_coef: :math:`\lambda`, dimensionless; may be assigned while training.
        advantage_clip_min: :math:`-c`, dimensionless.
        advantage_clip_max: :math:`c`, dimensionless.
        min_advantage_variance: floor of :math:`\sigma^2`, units of return squared, > 0.
        advantage_decay: of the running second moment, dimensionless, in [0, 1).
        normalizer: ``"second_moment"`` or ``"variance"``, see
            :class:`~muon_rl.objectives.AdvantageNormalizer`.
        use_target_network: ``False`` makes the current networks prior and values.
        divergence: ``"kl"`` or ``"cross_entropy"``, which has the same gradient; discrete only.
        num_samples: N, continuous only.
        z_init: guess of one sample's weight, dimensionless, > 0, continuous only.
        prior_mixture: shares of prior, behaviour and uniform policy, adding up to 1, such as
            :data:`~muon_rl.objectives.priors.PRIOR_MIXTURE`; discrete only. Needs the behaviour's
            ``logits`` in the data; where ``"next"`` lacks them, its share is the prior's.
        next_targets: whether to write under ``"next"``, for a model loss at the end of an unroll.
        reduction: none, mean or sum.

    Raises:
        ValueError: if an option is out of its range, or there is one value a state, not an action.
        KeyError: if ``q_network`` writes no value, or the data hold no behaviour's logits.

    Example:
        >>> from tensordict.nn import TensorDictModule
        >>> from torch import nn
        >>> from torch.distributions import Categorical
        >>> from torchrl.modules import ProbabilisticActor
        >>> from torchrl.objectives import SoftUpdate
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(nn.Linear(4, 3), ["observation"], ["logits"]),
        ...     in_keys=["logits"],
        ...     distribution_class=Categorical,
        ... )
        >>> q_network = TensorDictModule(nn.Linear(4, 3), ["observation"], ["action_value"])
        >>> loss = CMPOLoss(actor, q_network)
        >>> targets = SoftUpdate(loss, tau=0.1)
        >>> td = TensorDict(observation=torch.randn(7, 4), batch_size=[7])
        >>> loss(td)["loss_cmpo"].backward()
        >>> targets.step()
        >>> td["cmpo", "log_prob"].shape
        torch.Size([7, 3])

    Source: Hessel et al. 2021, arXiv:2104.06159, eqs. 7 and 10 to 12.
    """

    @dataclass
    class _AcceptedKeys:
        """``prior_action_value`` and ``prior_state_value`` go before ``action_value``."""

        action: NestedKey = "action"
        action_value: NestedKey = "action_value"
        state_action_value: NestedKey = "state_action_value"
        prior_action_value: NestedKey = PRIOR_ACTION_VALUE
        prior_state_value: NestedKey = PRIOR_STATE_VALUE
        value_target: NestedKey = "value_target"
        behaviour_logits: NestedKey = "logits"
        cmpo_log_prob: NestedKey = ("cmpo", "log_prob")
        cmpo_action: NestedKey = ("cmpo", "action")
        cmpo_weight: NestedKey = ("cmpo", "weight")
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    _schedulable_buffers = frozenset({"kl_coef"})
    out_keys = [  # noqa: RUF012
        "loss_cmpo", "cmpo_loss", "cmpo_kl_loss", "cmpo_kl", "cmpo_tv", "cmpo_adv_mean",
        "cmpo_adv_std", "cmpo_adv_variance_ema",
    ]  # fmt: skip

    actor_network: ProbabilisticTensorDictSequential
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    q_network: TensorDictModuleBase
    q_network_params: TensorDictParams
    target_q_network_params: TensorDictParams
    kl_coef: Tensor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        q_network: TensorDictModuleBase,
        *,
        kl_coef: float = 1.0,
        advantage_clip_min: float = -1.0,
        advantage_clip_max: float = 1.0,
        min_advantage_variance: float = 1e-8,
        advantage_decay: float = 0.99,
        normalizer: str = "second_moment",
        use_target_network: bool = True,
        divergence: str = "kl",
        num_samples: int = 16,
        z_init: float = 1.0,
        prior_mixture: Sequence[float] | None = None,
        next_targets: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_choice("divergence", divergence, DIVERGENCES)
        check_choice("reduction", reduction, REDUCTIONS)
        if not advantage_clip_min < advantage_clip_max:
            raise ValueError(
                "advantage_clip_min must be below advantage_clip_max, but they are "
                f"{advantage_clip_min} and {advantage_clip_max}."
            )
        if num_samples < 1 or not z_init > 0:
            raise ValueError(f"Needs num_samples >= 1 and z_init > 0, not {num_samples}, {z_init}.")
        self.convert_to_functional(
            actor_network, "actor_network", create_target_params=use_target_network
        )
        # No compare_against: it takes the gradient from what both share, and SoftUpdate then leaves
        # the targets of all that be. Shared parameters are listed under the actor alone anyway.
        self.convert_to_functional(q_network, "q_network", create_target_params=use_target_network)
        self.register_coeff_buffer("kl_coef", kl_coef, device=self._default_device)
        scale = AdvantageNormalizer(
            advantage_decay, min_advantage_variance=min_advantage_variance, normalizer=normalizer
        )
        self.normalizer = scale.to(self._default_device)
        self.advantage_clip_min, self.advantage_clip_max = advantage_clip_min, advantage_clip_max
        self.use_target_network, self.divergence = use_target_network, divergence
        self.num_samples, self.z_init = num_samples, z_init
        self.prior_mixture = None if prior_mixture is None else PriorMixture(prior_mixture)
        self.next_targets, self.reduction = next_targets, reduction

    @property
    def in_keys(self) -> list[NestedKey]:
        """The inputs of both networks; where the prior is mixed, the behaviour's logits."""
        mixture, logits = self.prior_mixture, self.tensor_keys.behaviour_logits
        behaviour = [logits] if mixture is not None and mixture.shares[1] > 0 else []
        return list(dict.fromkeys([*self._network_keys, *behaviour]))

    @property
    def _network_keys(self) -> list[NestedKey]:
        """What the networks read, less the action, which comes from the prior."""
        keys = dict.fromkeys([*self.actor_network.in_keys, *self.q_network.in_keys])
        return [key for key in keys if key != self.tensor_keys.action]

    @property
    def written_keys(self) -> list[NestedKey]:
        """What the loss may write into the data, with ``next_targets`` under ``"next"`` too."""
        keys = self.tensor_keys
        written = [keys.cmpo_log_prob, keys.cmpo_action, keys.cmpo_weight]
        return [*written, *(map(next_key, written) if self.next_targets else ())]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the loss and its metrics, and write the target policy into the data."""
        inputs = [*self.actor_network.in_keys, *self.q_network.in_keys, *self.in_keys]
        data = without_padding(self, tensordict, [*inputs, *map(next_key, inputs)])
        policy = self._policy(data, self.actor_network_params)
        discrete = is_discrete(policy)
        with torch.no_grad():
            seen = self._look(data, discrete)
            mean, moment = seen.mean(seen.advantage), seen.mean(seen.advantage.square())
            clip = (self.advantage_clip_min, self.advantage_clip_max)
            options: dict[str, Any] = {"scale": self._scale(tensordict, seen), "clip": clip}
            target = self._write(tensordict, seen, options)
            ahead = (data.get(next_key(key), None) for key in self._network_keys)
            if self.next_targets and all(x is not None for x in ahead):
                following = self._look(data.get("next"), discrete, at_next=True)
                self._write(tensordict.get("next"), following, options)
        if seen.action is None:
            log_prob = all_log_probs(policy)
            divergence = DIVERGENCES[self.divergence](target, log_prob)
        else:
            log_prob = policy.log_prob(seen.action)
            divergence = -(target * log_prob).mean(0)
        kl, tv = seen.distances(log_prob.detach(), **options)
        loss = self.kl_coef * divergence

        def average(x: Tensor) -> Tensor:
            return self._reduce_loss(x.detach(), tensordict, reduction="mean")

        variance = average(moment) - average(mean).square()
        out = {
            "loss_cmpo": reduced(self, tensordict, loss),
            "cmpo_loss": average(loss),
            "cmpo_kl_loss": average(divergence),
            "cmpo_kl": average(kl),
            "cmpo_tv": average(tv),
            "cmpo_adv_mean": average(mean),
            "cmpo_adv_std": variance.clamp_min(0.0).sqrt(),
            "cmpo_adv_variance_ema": self.normalizer.second_moment,
        }
        return TensorDict(out, [])

    def _make_vmap(self) -> None:
        """Do nothing: no network runs under vmap."""

    def _policy(self, tensordict: TensorDictBase, params: TensorDictParams) -> Distribution:
        data = tensordict.select(*self.actor_network.in_keys, strict=False)
        # A network that samples on the way is to do so, though TorchRL's losses forbid it.
        with (
            set_exploration_type(ExplorationType.RANDOM),
            params.to_module(self.actor_network, preserve_module_state=False),
        ):
            return self.actor_network.get_dist(data)

    def _look(
        self, tensordict: TensorDictBase, discrete: bool, *, at_next: bool = False
    ) -> ActionValues:
        """Return what the target networks say."""
        policy = self._policy(tensordict, self.target_actor_network_params)
        log_prob = None
        if discrete:
            log_prob = all_log_probs(policy)
            if self.prior_mixture is not None:
                key = self.tensor_keys.behaviour_logits
                behaviour = self.prior_mixture.behaviour(tensordict, key, required=not at_next)
                log_prob = self.prior_mixture(log_prob, behaviour)
        elif self.prior_mixture is not None:
            raise ValueError(
                "prior_mixture needs discrete actions, but the actor's distribution is "
                f"{type(policy).__name__}. Leave it at None."
            )
        network, keys = self.q_network, self.tensor_keys
        with self.target_q_network_params.to_module(network, preserve_module_state=False):
            if log_prob is not None:
                return values_of_all(log_prob, tensordict, network, keys)
            return values_of_samples(policy, self.num_samples, tensordict, network, keys)

    def _scale(self, tensordict: TensorDictBase, seen: ActionValues) -> Tensor:
        """Return what to divide advantages by, after an update of the running second moment."""
        mask = loss_mask(self, tensordict, seen.value)
        value_target = tensordict.get(self.tensor_keys.value_target, None)
        spread = seen.spread(value_target)
        return self.normalizer(spread, None if mask is None else mask.unsqueeze(-1))

    def _write(
        self, tensordict: TensorDictBase, seen: ActionValues, options: dict[str, Any]
    ) -> Tensor:
        """Write the target policy into the data and return it."""
        keys = self.tensor_keys
        target = seen.reweighted(z_init=self.z_init, **options)
        if seen.action is None:
            tensordict.set(keys.cmpo_log_prob, target)
        else:
            tensordict.set(keys.cmpo_action, seen.action.movedim(0, -2))
            tensordict.set(keys.cmpo_weight, target.movedim(0, -1))
        return target
