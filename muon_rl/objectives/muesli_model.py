"""The world model's policies along the actions taken, pulled towards CMPO's, as a loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.modules import TanhNormal

from muon_rl.choices import check_choice
from muon_rl.objectives.acting import next_key, required
from muon_rl.objectives.divergences import DIVERGENCES
from muon_rl.objectives.unrolling import Slices, UnrollLoss

TARGETS = ("cmpo", "current")
GAUSSIAN = ("loc", "scale")
CMPO = (
    "CMPOLoss writes it: call it before this loss (in LossSequence, put it first), or train "
    "towards the current policy by policy_target='current'. Name another key by set_keys()."
)

UNROLL = (
    "DynamicsLoss writes it: call it before this loss (in LossSequence, put it first), or let this "
    "loss unroll for itself by own_unroll=True. Name another key by set_keys()."
)


class MuesliModelLoss(UnrollLoss):
    r"""Train a world model to say, K steps ahead, the policy that CMPO wants in that state.

    .. math::
        L = \frac{c_\pi}{|M|} \sum_{t, k \in M}
        \mathrm{KL}(\pi_\mathrm{cmpo}(s_{t+k}), \hat\pi_k(s_t)), \qquad k = 1, \dots, K'

    from every state :math:`s_t` of sequences ``(*batch, T)``, along the actions taken. Targets are
    of the real states :math:`s_{t+k}`, and have no gradient. :math:`M` are the steps within the
    episode whose state is not terminal and has a target: where the sequence breaks off, that of
    the true next observation, if it is there. Gradients reach the encoder.

    - With ``("unroll", ...)`` in the data, as :class:`~muon_rl.objectives.DynamicsLoss` leaves it,
      its policies are trained, and rewards and values are that loss's. It must be of this step, and
      of the same model: what a buffer kept has no gradient.
    - Else it unrolls for itself, and rewards and values are trained here too, with the targets of
      DynamicsLoss; then ``value_target`` is read. ``own_unroll`` settles which, whatever the data.

    Reads besides, written by :class:`~muon_rl.objectives.CMPOLoss`, ``("cmpo", "log_prob")``
    ``(*batch, T, A)`` in nats; for continuous actions ``("cmpo", "action")`` ``(*batch, T, N, a)``
    and ``("cmpo", "weight")`` ``(*batch, T, N)``, and the divergence is
    :math:`-\frac{1}{N} \sum_i w_i \log \hat\pi_k(a_i|s_t)`. The same under ``"next"``, where it is
    there. With ``policy_target="current"`` the target is the current policy of :math:`s_{t+k}`, of
    continuous actions N samples, and CMPO is not needed. Writes nothing.

    Returns ``loss_muesli_policy`` and, unrolling for itself, ``loss_muesli_value`` and
    ``loss_muesli_reward``; detached, ``muesli_policy_loss``, ``muesli_value_loss`` and
    ``muesli_reward_loss`` without their coefficients, and ``muesli_model_loss``, the sum of the
    losses. With reduction ``"none"`` a state's loss is the sum over its steps, over the mean
    number of steps of the states.

    Args:
        world_model: as of :class:`~muon_rl.objectives.DynamicsLoss`.
        policy_target: ``"cmpo"`` or ``"current"``.
        policy_pred_coef: :math:`c_\pi`, dimensionless; all three may be assigned while training.
        value_pred_coef: of the value's loss, where it unrolls for itself, dimensionless.
        reward_pred_coef: of the reward's loss, where it unrolls for itself, dimensionless.
        own_unroll: ``True`` unrolls for itself, ``False`` needs ``("unroll", ...)``, ``None`` takes
            it where it is there; ``in_keys`` and ``out_keys`` of ``None`` are those of ``True``,
            but in a :class:`~muon_rl.objectives.LossSequence`, which knows what is there.
        unroll_steps: K, >= 1; may exceed T. Not read where ``("unroll", ...)`` is.
        policy_horizon: K', in [1, K]; ``None``: K. An unroll of fewer steps in the data counts with
            those it has.
        divergence: ``"kl"`` or ``"cross_entropy"``, which has the same gradient; discrete only.
        num_samples: N with ``policy_target="current"``, continuous only.
        next_targets: whether to read CMPO's policies under ``"next"``; ``False`` leaves the state
            after a sequence breaks off without a target, and CMPOLoss need not value it.
        dynamics_grad_scale: as of DynamicsLoss.
        scalar_loss: as of DynamicsLoss.
        use_target_network: as of DynamicsLoss.
        reduction: none, mean or sum.

    Raises:
        TypeError: if ``world_model`` is no world model.
        KeyError: if the data lack a key.
        ValueError: if the model lacks what is read of it, an option is out of its range,
            or shapes do not fit.

    Example:
        >>> from torchrl.data import Categorical, Unbounded
        >>> from muon_rl.modules import WorldModel
        >>> from muon_rl.specs import Specs
        >>> model = WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16)
        >>> loss = MuesliModelLoss(model, policy_target="current")
        >>> done = torch.zeros(2, 8, 1, dtype=torch.bool)
        >>> after = {"observation": torch.randn(2, 8, 4), "reward": torch.randn(2, 8, 1)}
        >>> td = TensorDict({
        ...     "observation": torch.randn(2, 8, 4),
        ...     "action": torch.randint(3, (2, 8)),
        ...     "value_target": torch.randn(2, 8, 1),
        ...     "next": {**after, "done": done, "terminated": done},
        ... }, [2, 8])
        >>> out = loss(td)
        >>> sum(out[key] for key in out.keys() if key.startswith("loss_")).backward()
        >>> sorted(key for key in out.keys() if key.startswith("loss_"))
        ['loss_muesli_policy', 'loss_muesli_reward', 'loss_muesli_value']

    Source: Hessel et al. 2021, arXiv:2104.06159, eq. 13; its sampled form, eqs. 11 and 12.
    """

    @dataclass
    class _AcceptedKeys(UnrollLoss._AcceptedKeys):
        cmpo_log_prob: NestedKey = ("cmpo", "log_prob")
        cmpo_action: NestedKey = ("cmpo", "action")
        cmpo_weight: NestedKey = ("cmpo", "weight")

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    _schedulable_buffers = frozenset({"policy_pred_coef", "value_pred_coef", "reward_pred_coef"})
    out_keys = [  # noqa: RUF012
        "loss_muesli_policy", "loss_muesli_value", "loss_muesli_reward", "muesli_model_loss",
        "muesli_policy_loss", "muesli_value_loss", "muesli_reward_loss",
    ]  # fmt: skip

    policy_pred_coef: Tensor
    value_pred_coef: Tensor
    reward_pred_coef: Tensor

    def __init__(
        self,
        world_model: nn.Module,
        *,
        policy_target: str = "cmpo",
        policy_pred_coef: float = 1.0,
        value_pred_coef: float = 0.25,
        reward_pred_coef: float = 1.0,
        own_unroll: bool | None = None,
        unroll_steps: int = 5,
        policy_horizon: int | None = None,
        divergence: str = "kl",
        num_samples: int = 16,
        next_targets: bool = True,
        dynamics_grad_scale: float = 0.5,
        scalar_loss: str | None = None,
        use_target_network: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            world_model,
            unroll_steps=unroll_steps,
            policy_horizon=policy_horizon,
            dynamics_grad_scale=dynamics_grad_scale,
            scalar_loss=scalar_loss,
            # Only values are bootstrapped.
            use_target_network=use_target_network and own_unroll is not False,
            reduction=reduction,
        )
        check_choice("policy_target", policy_target, TARGETS)
        check_choice("divergence", divergence, DIVERGENCES)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, but is {num_samples}.")
        self.policy_target, self.divergence = policy_target, divergence
        self.num_samples, self.own_unroll = num_samples, own_unroll
        self.next_targets = next_targets
        if own_unroll is False:
            self.out_keys = self._returned(unrolls=False)
        for name, given in (
            ("policy_pred_coef", policy_pred_coef), ("value_pred_coef", value_pred_coef),
            ("reward_pred_coef", reward_pred_coef),
        ):  # fmt: skip
            self.register_coeff_buffer(name, given, device=self._default_device)

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the loss reads; of what is under ``"next"`` only the reward and a flag must be."""
        return self._read(unrolls=self.own_unroll is not False)

    def keys_after(self, written: Collection[NestedKey]) -> tuple[list[NestedKey], list[NestedKey]]:
        """Return ``in_keys`` and ``out_keys`` where the data hold what other losses wrote.

        Args:
            written: their keys; with ``own_unroll=None`` they settle who unrolls.
        """
        there = all(unravel_key(key) in written for key in self._unroll_keys)
        unrolls = not there if self.own_unroll is None else self.own_unroll
        return self._read(unrolls=unrolls), self._returned(unrolls=unrolls)

    def _read(self, *, unrolls: bool) -> list[NestedKey]:
        names, current = self.tensor_keys, self.policy_target == "current"
        keys = self._data_keys if unrolls or current else self._flag_keys
        if unrolls:
            keys = [*keys, names.value_target]
        else:
            keys = [key for key in keys if key != names.action]
            keys += [*self._unroll_keys, names.unroll_mask]
        if current:
            return keys
        ahead = map(next_key, self._target_keys) if self.next_targets else ()
        return [*keys, *self._target_keys, *ahead]

    def _returned(self, *, unrolls: bool) -> list[NestedKey]:
        return [key for key in self.out_keys if unrolls or "policy" in key or "model" in key]

    @property
    def _target_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        return [keys.cmpo_log_prob] if self.discrete else [keys.cmpo_action, keys.cmpo_weight]

    @property
    def _unroll_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        return [keys.unroll_logits] if self.discrete else [keys.unroll_loc, keys.unroll_scale]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses and their metrics."""
        slices = self._slices(tensordict)
        predicted, within = self._unroll_there(tensordict), None
        terms: dict[str, tuple[Tensor, Tensor]] = {}
        if predicted is None:
            along = self._unroll(slices)
            predicted = [along.get(key) for key in (["logits"] if self.discrete else GAUSSIAN)]
            reward, value = self._scalar_losses(tensordict, slices, along)
            terms = {
                "value": (self.value_pred_coef, value), "reward": (self.reward_pred_coef, reward),
            }  # fmt: skip
        else:
            within = tensordict.get(self.tensor_keys.unroll_mask, None)
        policy = self._policy_loss(tensordict, slices, predicted, within)
        terms = {"policy": (self.policy_pred_coef, policy), **terms}
        out, total = {}, torch.zeros_like(slices.reward)
        for name, (coefficient, each) in terms.items():
            out[f"loss_muesli_{name}"] = self._reduced(tensordict, coefficient * each)
            out[f"muesli_{name}_loss"] = self._average(tensordict, each)
            total = total + coefficient * each.detach()
        out["muesli_model_loss"] = self._average(tensordict, total)
        return TensorDict(out, [])

    def _unroll_there(self, tensordict: TensorDictBase) -> list[Tensor] | None:
        """Return the policies that DynamicsLoss has predicted, if they are to be taken."""
        if self.own_unroll:
            return None
        found = [tensordict.get(key, None) for key in self._unroll_keys]
        if self.own_unroll is None and any(x is None for x in found):
            return None
        return [required(tensordict, key, UNROLL) for key in self._unroll_keys]

    def _policy_loss(
        self,
        tensordict: TensorDictBase,
        slices: Slices,
        predicted: Sequence[Tensor],
        within: Tensor | None,
    ) -> Tensor:
        """Return the divergence of each state, ``(*batch, T)``."""
        steps = min(self.policy_horizon, predicted[0].shape[slices.reward.ndim])
        predicted = [x[..., :steps, :] for x in predicted]
        roots, nexts = self._targets(tensordict, slices)
        slices = slices._replace(next_observed=nexts is not None)
        targets = [
            slices.ahead(root, None if nexts is None else nexts[index], steps)
            for index, root in enumerate(roots)
        ]
        mask = slices.masks(steps).policy
        if within is not None:
            mask = mask & within[..., :steps]
        if self.discrete:
            target = torch.where(mask.unsqueeze(-1), targets[0], 0.0)
            loss = DIVERGENCES[self.divergence](target, predicted[0].log_softmax(-1))
        else:
            policy = self._gaussian(*(x.unsqueeze(-2) for x in predicted))
            # Any action within the bounds, where there is none: outside, log_prob has no gradient.
            inside = mask[..., None, None]
            action = torch.where(inside, targets[0], policy.low + (policy.high - policy.low) / 2)
            weight = torch.where(mask.unsqueeze(-1), targets[1], 0.0)
            loss = -(weight * policy.log_prob(action)).mean(-1)
        return self._each(loss, mask, slices)

    def _targets(
        self, tensordict: TensorDictBase, slices: Slices
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return what is wanted in each state, and in the true next ones if that is known."""
        if self.policy_target == "current":
            now = self._current(slices, following=False)
            return now, self._current(slices, following=True) if slices.next_observed else None
        now = [required(tensordict, key, CMPO).detach() for key in self._target_keys]
        if not self.next_targets:
            return now, None
        nexts = [tensordict.get(next_key(key), None) for key in self._target_keys]
        found = [x.detach() for x in nexts if x is not None]
        return now, found if len(found) == len(nexts) else None

    def _current(self, slices: Slices, *, following: bool) -> list[Tensor]:
        policy = self._predicted(slices, self.world_model_params, following=following)
        if self.discrete:
            return [policy.get("logits").log_softmax(-1)]
        actions = self._gaussian(policy.get("loc"), policy.get("scale")).sample((self.num_samples,))
        return [actions.movedim(0, -2), torch.ones_like(actions[..., 0]).movedim(0, -1)]

    def _gaussian(self, loc: Tensor, scale: Tensor) -> TanhNormal:
        space = self.world_model.specs.action.space
        return TanhNormal(loc, scale, low=space.low.to(loc), high=space.high.to(loc))
