r"""Retrace as a value estimator of TorchRL, for any loss that takes one."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    dispatch,
    set_skip_existing,
)
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule
from torchrl.objectives.value import ValueEstimatorBase

from muon_rl.choices import check_choice
from muon_rl.objectives.acting import (
    ends,
    log_prob_taken,
    per_step,
    required,
    summed_log_prob,
    value_taken,
)
from muon_rl.objectives.functional import retrace_returns

GIVE = "Give RetraceEstimator {}=..., make it by for_loss(loss), or name the key by set_keys()."
COLLECT = "Collect with a policy of return_log_prob=True, or name the key by set_keys()."
TARGETS = ("action_value", "state_value")
PADDING = ("collector", "mask")  # where SliceSampler(pad_output=True) marks it by False


class RetraceEstimator(ValueEstimatorBase):
    r"""Estimate returns off-policy: multi-step as far as the policy would have acted alike.

    .. math::
        G_t = r_{t+1} + \gamma \bigl( V_{t+1} + c_{t+1} (G_{t+1} - Q_{t+1}) \bigr), \qquad
        c_t = \lambda \min\left(1, \frac{\pi(a_t|s_t)}{\mu(a_t|s_t)}\right)

    It writes ``advantage`` :math:`G_t - V(s_t)` and ``value_target``. :math:`V_{t+1}` is of the
    true next observation. A terminal state is worth 0; at a truncation, at the end of the sequence
    and before padding the trace is cut, and :math:`V_{t+1}` alone goes on. On-policy, with no
    Q-network, :math:`G` is TD(:math:`\lambda`) and the advantage GAE.

    With the policy's own :math:`Q` and :math:`V`, :math:`G` has its :math:`Q(s_t, a_t)` as mean,
    whoever acted. Without action values, :math:`V` stands for :math:`Q` in the recursion, which is
    V-trace: off-policy its mean belongs to the policy :math:`\propto \min(\pi, \mu)`. (``VTrace``
    of torchrl 0.14 never reads the action: for :math:`\pi(a_t|s_t)` it takes the probability of one
    that it chooses anew.)

    Nothing that it writes has a gradient. Two ways to hand it to a loss; TorchRL gives a class
    neither the loss's networks nor its keys, so the first names them::

        loss.make_value_estimator(
            RetraceEstimator, gamma=0.99, value_network=critic, actor_network=actor
        )
        loss.make_value_estimator(RetraceEstimator.for_loss(loss, gamma=0.99))

    Args:
        gamma: discount, dimensionless, in [0, 1].
        lmbda: :math:`\lambda`, dimensionless, in [0, 1].
        value_network: writes ``value``, ``(*batch, T, 1)``. ``None``: the data hold it, and under
            ``"next"`` too.
        actor_network: the policy :math:`\pi`, with ``get_dist``. ``None``: the data hold
            ``policy_log_prob``.
        q_network: writes ``state_action_value``: of the action taken, ``(*batch, T, 1)``, or of
            all, ``(*batch, T, actions)``. ``None``: the data hold it if its key was set by
            ``set_keys``, else :math:`V` stands for it.
        target: what ``value_target`` is. ``"action_value"``: :math:`G_t`, Muesli's target.
            ``"state_value"``: :math:`V_t + \min(1, \pi / \mu) (G_t - Q_t)`, which corrects the
            first action too, so that a state's value is not that of the behaviour's action.
        skip_existing, time_dim, device, deactivate_vmap: as in TorchRL's other estimators.

    Raises:
        ValueError: if ``gamma``, ``lmbda`` or ``target`` is out of its range, or the data hold
            ``steps_to_next_obs``: Retrace needs the single steps that MultiStep has summed up.
        KeyError: if the behaviour's or the policy's log-probability, or a value, is missing.

    Example:
        >>> from tensordict import TensorDict
        >>> column, never = torch.tensor([[2.0], [4.0], [6.0]]), torch.zeros(3, 1).bool()
        >>> following = {"state_value": column + 2, "reward": torch.ones(3, 1), "done": never}
        >>> td = TensorDict({"state_value": column, "next": following}, [3])
        >>> td["action_log_prob"] = torch.zeros(3)
        >>> td["policy_log_prob"] = torch.tensor([1.0, 1.0, 0.5]).log()
        >>> estimator = RetraceEstimator(gamma=0.5, lmbda=1.0)
        >>> estimator(td)["value_target"].squeeze(-1).tolist()
        [2.875, 3.75, 5.0]

    Source: Munos et al. 2016, arXiv:1606.02647, eq. 3 and section 3; the state's target Espeholt et
    al. 2018, arXiv:1802.01561, eq. 1.
    """

    @dataclass
    class _AcceptedKeys(ValueEstimatorBase._AcceptedKeys):
        """TorchRL's, and the three last; ``set_keys`` looks in this class alone, so all stand here.

        ``sample_log_prob`` is the behaviour's, by default where TorchRL's policies write it;
        ``policy_log_prob`` is of the same action under the policy. Both in nats.
        """

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        sample_log_prob: NestedKey | None = None
        action: NestedKey = "action"
        policy_log_prob: NestedKey = "policy_log_prob"
        state_action_value: NestedKey | None = None

    default_keys = _AcceptedKeys

    @classmethod
    def for_loss(cls, loss_module: LossModule, **hyperparams: Any) -> RetraceEstimator:
        """Return an estimator of a loss's own critic, actor and keys.

        The critic is called with the parameters that the loss passes, the actor with the live ones.
        ``hyperparams`` are arguments of the class; they go before what the loss has.
        """
        if "actor_network" not in hyperparams and hasattr(loss_module, "actor_network"):
            actor = loss_module.actor_network
            if getattr(loss_module, "functional", False):
                # The loss keeps a template without parameters: bind the live ones to a copy.
                actor = deepcopy(actor)
                loss_module.actor_network_params.to_module(actor, preserve_module_state=False)
            hyperparams["actor_network"] = actor
        estimator = super().for_loss(loss_module, **hyperparams)
        # Not all of one name mean the same: SAC's state_action_value is what its critics write.
        shared = {*vars(ValueEstimatorBase._AcceptedKeys()), "action"}
        theirs = vars(loss_module.tensor_keys)
        estimator.set_keys(**{name: key for name, key in theirs.items() if key and name in shared})
        return estimator

    def __init__(
        self,
        *,
        gamma: float | Tensor,
        lmbda: float | Tensor = 0.95,
        value_network: TensorDictModuleBase | None = None,
        actor_network: ProbabilisticTensorDictSequential | None = None,
        q_network: TensorDictModuleBase | None = None,
        target: str = "action_value",
        skip_existing: bool | None = None,
        time_dim: int | None = None,
        device: torch.device | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__(
            value_network=value_network,
            skip_existing=skip_existing,
            device=device,
            deactivate_vmap=deactivate_vmap,
        )
        for name, number in (("gamma", gamma), ("lmbda", lmbda)):
            if not 0.0 <= float(number) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], but is {number}.")
            self.register_buffer(name, torch.as_tensor(number, device=self._device))
        check_choice("target", target, TARGETS)
        self.target = target
        self.time_dim = time_dim
        # As the value network: theirs are no parameters of this module, nor of a loss that has it.
        self.__dict__["actor_network"] = actor_network
        self.__dict__["q_network"] = q_network

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        found = [*super().in_keys, *(("next", key) for key in (keys.reward, keys.done))]
        found += [("next", keys.terminated), keys.sample_log_prob, keys.action]
        if self.value_network is None:
            found += [keys.value, ("next", keys.value)]
        found += self.actor_network.in_keys if self.actor_network else [keys.policy_log_prob]
        if self.q_network is not None:
            found += self.q_network.in_keys
        elif keys.state_action_value is not None:
            found.append(keys.state_action_value)
        return list(dict.fromkeys(found))

    @dispatch
    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        r"""Write the advantage and the value target, ``(*batch, T, 1)``, and what they are made of.

        ``params`` are the value network's for :math:`V(s_t)`, ``target_params`` for
        :math:`V_{t+1}`; ``time_dim`` goes before that of the class.
        """
        keys = self.tensor_keys
        if self.value_network is None:
            value = required(tensordict, keys.value, GIVE.format("value_network"))
            next_value = required(tensordict, ("next", keys.value), GIVE.format("value_network"))
        else:
            skip = self.skip_existing
            with nullcontext() if skip is None else set_skip_existing(skip):
                value, next_value, _ = self._call_value_nets(
                    data=tensordict,
                    params=params,
                    next_params=params if target_params is None else target_params,
                    single_call=False,
                    value_key=keys.value,
                    detach_next=True,
                    vmap_randomness=self.vmap_randomness,
                )
        returns, q_value, ratio = self._retrace(tensordict, next_value, time_dim)
        value = value.reshape(returns.shape)
        target = returns
        if self.target == "state_value":
            target = value + ratio * (returns - (value if q_value is None else q_value))
        tensordict.set(keys.advantage, returns - value)
        tensordict.set(keys.value_target, target)
        return tensordict

    @torch.no_grad()
    def value_estimate(
        self,
        tensordict: TensorDictBase,
        target_params: TensorDictBase | None = None,
        next_value: Tensor | None = None,
        time_dim: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return :math:`G_t`, ``(*batch, T, 1)``: the target of losses that learn action values.

        ``next_value`` is :math:`V_{t+1}`, in place of the network's with ``target_params``.
        """
        if next_value is None and self.value_network is None:
            key = ("next", self.tensor_keys.value)
            next_value = required(tensordict, key, GIVE.format("value_network"))
        elif next_value is None:
            next_value = self._next_value(tensordict, target_params, kwargs)
        return self._retrace(tensordict, next_value, time_dim)[0]

    def _retrace(
        self, tensordict: TensorDictBase, next_value: Tensor, time_dim: int | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the returns, the action values where there are any, and min(1, pi / mu)."""
        keys = self.tensor_keys
        if tensordict.get(keys.steps_to_next_obs, None) is not None:
            raise ValueError(
                f"Retrace needs single steps, but the data hold {keys.steps_to_next_obs!r}, as "
                "MultiStep writes it. Take MultiStep away: Retrace looks further ahead by itself."
            )
        reward = tensordict.get(("next", keys.reward))
        done, terminated = ends(tensordict, keys.done, keys.terminated)
        time = self._get_time_dim(time_dim, tensordict)
        q_value = self._action_value(tensordict, reward)
        behaviour = summed_log_prob(required(tensordict, keys.sample_log_prob, COLLECT))
        if self.actor_network is None:
            policy = required(tensordict, keys.policy_log_prob, GIVE.format("actor_network"))
        else:
            policy = log_prob_taken(self.actor_network, tensordict, keys.action)
        ratio = (per_step(policy, reward) - per_step(behaviour, reward)).clamp(max=0.0).exp()
        discount = self.gamma.to(reward.device) * ~terminated
        goes_on = ~(done | terminated).narrow(time, 0, reward.shape[time] - 1)
        trace = self.lmbda.to(reward.device) * _later(ratio, time) * goes_on
        padding = tensordict.get(PADDING, None)
        if padding is not None:
            trace = torch.where(_later(per_step(padding, reward), time), trace, 0.0)
        next_value = per_step(next_value, reward)
        before_last = next_value.narrow(time, 0, reward.shape[time] - 1)
        later_q = before_last if q_value is None else _later(q_value, time)
        inputs = (reward, discount, next_value, later_q, trace)
        # Rewards may be whole numbers: what they are added to is not.
        dtype = torch.promote_types(reward.dtype, next_value.dtype)
        dtype = dtype if dtype.is_floating_point else self.gamma.dtype
        returns = retrace_returns(*(x.to(dtype).movedim(time, -1) for x in inputs))
        return returns.movedim(-1, time), q_value, ratio

    def _action_value(self, tensordict: TensorDictBase, reward: Tensor) -> Tensor | None:
        """Return the values of the actions taken, if anything says them."""
        key = self.tensor_keys.state_action_value
        if self.q_network is not None:
            data = tensordict.select(*self.q_network.in_keys, strict=False)
            q_value = self.q_network(data).get(key or "state_action_value")
        elif key is not None:
            q_value = required(tensordict, key, GIVE.format("q_network"))
        else:
            return None
        if q_value.numel() != reward.numel():
            q_value = value_taken(q_value, tensordict.get(self.tensor_keys.action))
        return q_value.reshape(reward.shape)


def _later(x: Tensor, dim: int) -> Tensor:
    """Return all but the first entry in time."""
    return x.narrow(dim, 1, x.shape[dim] - 1)
