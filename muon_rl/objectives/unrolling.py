"""What the losses that unroll a world model share: its parts, the data's ends, the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives import LossModule

from muon_rl.choices import REDUCTIONS, check_choice
from muon_rl.objectives.acting import (
    COLLECTED,
    ends,
    loss_mask,
    next_key,
    per_step,
    reduced,
    required,
    without_padding,
)
from muon_rl.objectives.model_parts import is_listed, model_of
from muon_rl.objectives.windows import UnrollMasks, unroll_masks, unroll_targets, unroll_windows
from muon_rl.unroll import unroll

VALUE_TARGET = (
    "A value estimator writes it (RetraceEstimator, or TorchRL's GAE): run it over the data before "
    "this loss, or name the key by set_keys(value_target=...)."
)
SCALAR_LOSSES = ("two_hot", "mse")


class Slices(NamedTuple):
    """Sequences, and where they end: flags bool ``(*batch, T)``, ``data`` of that batch size."""

    data: TensorDictBase
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    next_observed: bool

    def masks(self, steps: int) -> UnrollMasks:
        return unroll_masks(
            self.terminated, self.truncated, steps, valid=self.valid,
            next_observed=self.next_observed,
        )  # fmt: skip

    def ahead(self, root: Tensor, bootstrap: Tensor | None, steps: int) -> Tensor:
        """Return what is known of each :math:`s_{t+k}`, ``(*batch, T, K, *features)``."""
        return unroll_targets(
            root, bootstrap, self.terminated, self.truncated, steps, valid=self.valid,
            feature_dims=root.ndim - self.reward.ndim,
        )  # fmt: skip


class UnrollLoss(LossModule):
    """Base of the losses that unroll a world model along the actions taken.

    Args:
        world_model: as the losses' own.
        unroll_steps: K, >= 1.
        policy_horizon: steps whose policy is predicted, in [1, K]; ``None``: K.
        dynamics_grad_scale: factor of the gradient on the recurrent path, dimensionless.
        scalar_loss: ``"two_hot"`` or ``"mse"``; ``None``: as the model has bins.
        use_target_network: whether bootstrapped values are a target network's.
        reduction: none, mean or sum.

    Raises:
        TypeError: if ``world_model`` is no world model.
        ValueError: if the model lacks what is read of it, or an option is out of its range.
    """

    @dataclass
    class _AcceptedKeys:
        """``reward``, ``done`` and ``terminated`` stand under ``"next"``."""

        action: NestedKey = "action"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        value_target: NestedKey = "value_target"
        unroll_logits: NestedKey = ("unroll", "logits")
        unroll_loc: NestedKey = ("unroll", "loc")
        unroll_scale: NestedKey = ("unroll", "scale")
        unroll_mask: NestedKey = ("unroll", "mask")
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: Any
    default_keys = _AcceptedKeys

    world_model: Any
    world_model_params: TensorDictParams
    target_world_model_params: TensorDictParams

    def __init__(
        self,
        world_model: nn.Module,
        *,
        unroll_steps: int,
        policy_horizon: int | None,
        dynamics_grad_scale: float,
        scalar_loss: str | None,
        use_target_network: bool,
        reduction: str,
    ) -> None:
        super().__init__()
        model = model_of(type(self).__name__, world_model, policy=True)
        code = getattr(model, "code", None)
        if scalar_loss is None:
            scalar_loss = "mse" if code is None else "two_hot"
        check_choice("scalar_loss", scalar_loss, SCALAR_LOSSES)
        check_choice("reduction", reduction, REDUCTIONS)
        if scalar_loss == "two_hot" and code is None:
            raise ValueError(
                "scalar_loss='two_hot' needs a world model with bins, whose code has the loss, but "
                "its code is None. Build it with bins=61, or take scalar_loss='mse'."
            )
        if unroll_steps < 1:
            raise ValueError(f"unroll_steps must be at least 1, but is {unroll_steps}.")
        horizon = unroll_steps if policy_horizon is None else policy_horizon
        if not 1 <= horizon <= unroll_steps:
            raise ValueError(
                f"policy_horizon must be from 1 to unroll_steps={unroll_steps}, but is {horizon}."
            )
        self.convert_to_functional(model, "world_model", create_target_params=use_target_network)
        self.discrete = is_listed(model)
        self.unroll_steps, self.policy_horizon = unroll_steps, horizon
        self.dynamics_grad_scale, self.scalar_loss = dynamics_grad_scale, scalar_loss
        self.use_target_network, self.reduction = use_target_network, reduction

    def _make_vmap(self) -> None:
        """Do nothing: no network runs under vmap."""

    @property
    def _model_keys(self) -> list[NestedKey]:
        return list(self.world_model.representation.in_keys)

    @property
    def _flag_keys(self) -> list[NestedKey]:
        """What says where sequences end, of which one of the two flags is optional."""
        keys = self.tensor_keys
        return [next_key(key) for key in (keys.reward, keys.done, keys.terminated)]

    @property
    def _data_keys(self) -> list[NestedKey]:
        """What an unroll reads of the data: optional are a flag and next observations."""
        inputs = self._model_keys
        nexts = map(next_key, inputs)
        return list(dict.fromkeys([*inputs, self.tensor_keys.action, *self._flag_keys, *nexts]))

    def _slices(self, tensordict: TensorDictBase) -> Slices:
        keys = self.tensor_keys
        reward = required(tensordict, next_key(keys.reward), COLLECTED)
        if reward.ndim < 2:
            raise ValueError(
                f"{type(self).__name__} needs sequences (*batch, T) whose last dim is time, but "
                f"{next_key(keys.reward)!r} has shape {tuple(reward.shape)}: (*batch, T, 1) is "
                "needed."
            )
        if reward.ndim > tensordict.batch_dims:  # else the last axis is time, be it of one step
            reward = reward.squeeze(-1)
        flags = ends(tensordict, keys.done, keys.terminated)
        done, terminated = (per_step(flag, reward) for flag in flags)
        mask = loss_mask(self, tensordict, reward)
        valid = torch.ones_like(done) if mask is None else mask
        nexts = [next_key(key) for key in self._model_keys]
        data = without_padding(self, tensordict, [*self._model_keys, keys.action, *nexts])
        data.batch_size = reward.shape
        seen = all(data.get(key, None) is not None for key in nexts)
        return Slices(data, reward, terminated, done & ~terminated, valid, seen)

    def _unroll(self, slices: Slices) -> TensorDict:
        """Return the predictions of the K steps from each state, ``(*batch, T, K)``."""
        key = self.tensor_keys.action
        action = required(slices.data, key, COLLECTED)
        windows = unroll_windows(
            action, self.unroll_steps, feature_dims=action.ndim - slices.reward.ndim
        )
        with self.world_model_params.to_module(self.world_model, preserve_module_state=False):
            state = self._encoded(slices.data, slices.reward.shape)
            return unroll(self.world_model, state, windows, grad_scale=self.dynamics_grad_scale)

    def _predicted(
        self, slices: Slices, params: TensorDictParams, *, following: bool
    ) -> TensorDictBase:
        """Return value and policy of the sequences' states, or of the true next ones."""
        data = slices.data.get("next") if following else slices.data
        with torch.no_grad(), params.to_module(self.world_model, preserve_module_state=False):
            state = self._encoded(data, slices.reward.shape)
            return self.world_model.prediction(
                TensorDict({"hidden_state": state}, slices.reward.shape)
            )

    def _encoded(self, data: TensorDictBase, batch: torch.Size) -> Tensor:
        inputs = data.select(*self._model_keys, strict=False)
        inputs.batch_size = batch
        return self.world_model.representation(inputs).get("hidden_state")

    def _scalar_losses(
        self, tensordict: TensorDictBase, slices: Slices, along: TensorDictBase
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of reward and value of each state, ``(*batch, T)``."""
        steps, masks = self.unroll_steps, slices.masks(self.unroll_steps)
        reward = unroll_windows(slices.reward, steps)
        key = self.tensor_keys.value_target
        root = per_step(required(tensordict, key, VALUE_TARGET), slices.reward)
        bootstrap = None
        if slices.next_observed:
            seen = self._predicted(slices, self.target_world_model_params, following=True)
            bootstrap = seen.get("value_pred").squeeze(-1).to(root.dtype)
        value = slices.ahead(root, bootstrap, steps)
        return (
            self._each(self._scalar(along, "reward", reward, masks.reward), masks.reward, slices),
            self._each(self._scalar(along, "value", value, masks.value), masks.value, slices),
        )

    def _scalar(self, along: TensorDictBase, name: str, target: Tensor, mask: Tensor) -> Tensor:
        target = torch.where(mask, target.detach(), 0.0)
        if self.scalar_loss == "two_hot":
            return self.world_model.code.loss(along.get(f"{name}_logits"), target)
        return (along.get(f"{name}_pred").squeeze(-1) - target).square()

    @staticmethod
    def _each(loss: Tensor, mask: Tensor, slices: Slices) -> Tensor:
        """Return one number a state, whose mean over the states is that over all valid steps."""
        count = mask.sum().clamp_min(1)
        return torch.where(mask, loss, 0.0).sum(-1) * slices.valid.sum() / count

    def _reduced(self, tensordict: TensorDictBase, loss: Tensor) -> Tensor:
        return reduced(self, tensordict, loss)

    def _average(self, tensordict: TensorDictBase, loss: Tensor) -> Tensor:
        return self._reduce_loss(loss.detach(), tensordict, reduction="mean")
