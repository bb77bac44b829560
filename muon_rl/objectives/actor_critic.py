"""What losses of an actor and a critic share: keys, networks, and where advantages come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictParams,
    composite_lp_aggregate,
)
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import dispatch_value_estimator

from muon_rl.objectives.acting import loss_mask, per_step
from muon_rl.objectives.retrace import PADDING, RetraceEstimator

ESTIMATORS = ("GAE", "TD0", "TD1", "TDLambda")


class ActorCriticLoss(LossModule):
    """Base of losses that weigh actions by an advantage, estimated where the data hold none.

    A subclass makes ``actor_network`` and ``critic_network`` (or ``None``) functional, the critic
    with target parameters, and then calls :meth:`make_value_estimator`.
    """

    @dataclass
    class _AcceptedKeys:
        """Those of TorchRL's PPO; ``value`` is ``value_pred`` where only that is written."""

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "state_value"
        value_logits: NestedKey = "value_logits"
        sample_log_prob: NestedKey | None = None
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

        def __post_init__(self) -> None:
            if self.sample_log_prob is None:
                aggregates = composite_lp_aggregate(nowarn=True)
                self.sample_log_prob = "sample_log_prob" if aggregates else "action_log_prob"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator: Any = RetraceEstimator

    actor_network: ProbabilisticTensorDictSequential
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    critic_network: TensorDictModuleBase | None
    critic_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams

    _live_actor = False

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> ActorCriticLoss:
        """Set what makes advantage and value target where the data hold none.

        Args:
            value_type: ``None`` or ``RetraceEstimator``; another class or an instance, which then
                has its own network; or one of ``ValueEstimators``: GAE, TD0, TD1, TDLambda.
            **hyperparams: of the estimator.
        """
        if value_type is None or value_type is RetraceEstimator:
            hyperparams = {"gamma": 0.99, "device": self._default_device, **hyperparams}
            self._live_actor = "actor_network" not in hyperparams
            if self.critic_network is None:
                hyperparams.setdefault("value_network", None)
            super().make_value_estimator(RetraceEstimator.for_loss(self, **hyperparams))
            self._forward_value_estimator_keys()
            return self
        self._live_actor = False
        kind, options = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if kind is not None:
            supported = [getattr(ValueEstimators, name) for name in ESTIMATORS]
            dispatch_value_estimator(self, kind, supported=supported, **options)
            self._forward_value_estimator_keys()
        return self

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        super()._forward_value_estimator_keys(**kwargs)
        if isinstance(self._value_estimator, RetraceEstimator):
            keys = self.tensor_keys
            self._value_estimator.set_keys(action=keys.action, sample_log_prob=keys.sample_log_prob)

    def _make_vmap(self) -> None:
        """Do nothing: the estimator alone runs networks under vmap, and has a way of its own."""

    def _policy(self, data: TensorDictBase) -> tuple[Distribution, TensorDictBase]:
        """Return the policy, and what the actor read and wrote on the way to it."""
        seen = data.select(*self.actor_network.in_keys, strict=False)
        # A network that samples on the way is to do so, though TorchRL's losses forbid it.
        with (
            set_exploration_type(ExplorationType.RANDOM),
            self.actor_network_params.to_module(self.actor_network, preserve_module_state=False),
        ):
            return self.actor_network.get_dist(seen), seen

    def _mask(self, data: TensorDictBase, like: Tensor) -> Tensor | None:
        """Return which steps count, and tell it to Retrace: no trace runs into those that do not.

        Args:
            data: a copy, where the mask is written.
            like: ``(*batch,)``.
        """
        found = loss_mask(self, data, like)
        if found is not None:
            data.set(PADDING, found.unsqueeze(-1))
        return found

    def _advantage(self, data: TensorDictBase) -> tuple[Tensor, Tensor | None]:
        """Return the advantage, and the value target where there is one."""
        keys = self.tensor_keys
        advantage, target = data.get(keys.advantage, None), data.get(keys.value_target, None)
        if advantage is not None and (target is not None or self.critic_network is None):
            return advantage, target
        if advantage is None and target is not None:
            value = data.get(keys.value, None)
            if value is None and self.critic_network is not None:
                value = self._critic(data, self.target_critic_network_params).get(keys.value)
            if value is not None:
                return target - per_step(value, target), target
        options = {}
        if self.critic_network is not None:
            prior = self.target_critic_network_params
            options = {"params": prior, "target_params": prior}
            # Of an older critic; TorchRL stumbles where the next state has none.
            data.exclude(keys.value, ("next", keys.value), inplace=True)
        if self._live_actor:
            # It stands for this loss's own, which a deepcopy of the loss would part.
            actor = self.value_estimator.actor_network
            self.actor_network_params.to_module(actor, preserve_module_state=False)
        self.value_estimator(data, **options)
        return data.get(keys.advantage), data.get(keys.value_target)

    def _critic(self, data: TensorDictBase, params: TensorDictParams) -> TensorDictBase:
        critic: Any = self.critic_network
        with params.to_module(critic, preserve_module_state=False):
            return critic(data.select(*critic.in_keys, strict=False))
