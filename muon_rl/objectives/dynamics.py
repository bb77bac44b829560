"""The world model's rewards and values along the actions taken, as a loss."""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from muon_rl.objectives.unrolling import UnrollLoss


class DynamicsLoss(UnrollLoss):
    r"""Train a world model to say the rewards and values of K steps that it does not see.

    .. math::
        L = \frac{c_r}{|M_r|} \sum_{t, k \in M_r} \ell(\hat r_k(s_t), r_{t+k})
        + \frac{c_v}{|M_v|} \sum_{t, k \in M_v} \ell(\hat v_k(s_t), y_{t+k}), \qquad
        k = 1, \dots, K

    from every state :math:`s_t` of sequences ``(*batch, T)``, along the actions taken. The reward
    :math:`r_{t+k}` is ``("next", "reward")`` at t + k - 1, and :math:`y` the ``value_target`` of
    :math:`s_{t+k}`; 0 if that is terminal; the target network's value of the true next observation
    where the sequence breaks off, or no target if it is not in the data. :math:`M` are the steps
    that have a target; no padding enters the mean. Gradients reach the encoder.

    Reads the representation's inputs, ``action``, ``("next", "reward")``, ``("next", "done")``,
    ``("next", "terminated")``, ``value_target`` and, where it is there, ``("next",
    "observation")``. Writes into the data ``("unroll", "logits")`` ``(*batch, T, K', A)`` of the
    first K' = ``policy_horizon`` steps, nats, or ``("unroll", "loc")`` and ``("unroll",
    "scale")`` ``(*batch, T, K', a)``; ``("unroll", "value")`` and ``("unroll", "reward")``
    ``(*batch, T, K, 1)``; and ``("unroll", "mask")`` ``(*batch, T, K)``, whether the step lies
    within the episode. All but the mask **keep their gradient**: for
    :class:`~muon_rl.objectives.MuesliModelLoss` to train the policy with it. So sum the losses
    before ``backward``, and take ``"unroll"`` out before the data are kept.

    Returns ``loss_dynamics_reward`` and ``loss_dynamics_returns``, and without their coefficients,
    detached, ``dynamics_reward_loss`` and ``dynamics_returns_loss``: nats with bins, else reward
    units squared. With reduction ``"none"`` a state's loss is the sum over its steps, over the mean
    number of steps of the states.

    Args:
        world_model: :class:`~muon_rl.modules.WorldModel`, or
            :class:`~muon_rl.modules.MuesliPolicy`, or another with ``specs`` and TensorDictModules
            ``representation``, ``dynamics`` and ``prediction`` of the same keys.
        unroll_steps: K, >= 1; may exceed T.
        policy_horizon: K', in [1, K]; ``None``: K.
        returns_pred_coef: :math:`c_v`, dimensionless; may be assigned while training.
        reward_pred_coef: :math:`c_r`, dimensionless; may be assigned while training.
        dynamics_grad_scale: factor of the gradient from step k + 1 into the hidden state of step
            k >= 1, dimensionless.
        scalar_loss: ``"two_hot"``, the cross-entropy over the model's bins, or ``"mse"``; ``None``:
            two-hot where the model has bins.
        use_target_network: ``False`` bootstraps from the current network.
        reduction: none, mean or sum.

    Raises:
        TypeError: if ``world_model`` is no world model.
        KeyError: if the data lack a key.
        ValueError: if the model lacks what is read of it, an option is out of its range,
            or the data have no dim of time.

    Example:
        >>> import torch
        >>> from torchrl.data import Categorical, Unbounded
        >>> from muon_rl.modules import WorldModel
        >>> from muon_rl.specs import Specs
        >>> loss = DynamicsLoss(WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16))
        >>> done = torch.zeros(2, 8, 1, dtype=torch.bool)
        >>> after = {"observation": torch.randn(2, 8, 4), "reward": torch.randn(2, 8, 1)}
        >>> td = TensorDict({
        ...     "observation": torch.randn(2, 8, 4),
        ...     "action": torch.randint(3, (2, 8)),
        ...     "value_target": torch.randn(2, 8, 1),
        ...     "next": {**after, "done": done, "terminated": done},
        ... }, [2, 8])
        >>> out = loss(td)
        >>> (out["loss_dynamics_reward"] + out["loss_dynamics_returns"]).backward()
        >>> td["unroll", "logits"].shape
        torch.Size([2, 8, 5, 3])

    Source: Hessel et al. 2021, arXiv:2104.06159, section 4.3; Schrittwieser et al. 2020,
    arXiv:1911.08265, appendix G (the gradient's scale).
    """

    @dataclass
    class _AcceptedKeys(UnrollLoss._AcceptedKeys):
        unroll_value: NestedKey = ("unroll", "value")
        unroll_reward: NestedKey = ("unroll", "reward")

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    _schedulable_buffers = frozenset({"returns_pred_coef", "reward_pred_coef"})
    out_keys = [  # noqa: RUF012
        "loss_dynamics_reward", "loss_dynamics_returns", "dynamics_reward_loss",
        "dynamics_returns_loss",
    ]  # fmt: skip

    returns_pred_coef: Tensor
    reward_pred_coef: Tensor

    def __init__(
        self,
        world_model: nn.Module,
        *,
        unroll_steps: int = 5,
        policy_horizon: int | None = None,
        returns_pred_coef: float = 0.25,
        reward_pred_coef: float = 1.0,
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
            use_target_network=use_target_network,
            reduction=reduction,
        )
        for name, given in (
            ("returns_pred_coef", returns_pred_coef), ("reward_pred_coef", reward_pred_coef),
        ):  # fmt: skip
            self.register_coeff_buffer(name, given, device=self._default_device)

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the loss reads; of what is under ``"next"`` only the reward and a flag must be."""
        return [*self._data_keys, self.tensor_keys.value_target]

    @property
    def written_keys(self) -> list[NestedKey]:
        """What the loss writes into the data."""
        keys = self.tensor_keys
        policy = [keys.unroll_logits] if self.discrete else [keys.unroll_loc, keys.unroll_scale]
        return [*policy, keys.unroll_value, keys.unroll_reward, keys.unroll_mask]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses and their metrics, and write the unroll into the data."""
        slices = self._slices(tensordict)
        along = self._unroll(slices)
        reward, value = self._scalar_losses(tensordict, slices, along)
        policy = ["logits"] if self.discrete else ["loc", "scale"]
        sources = [along.get(key)[..., : self.policy_horizon, :] for key in policy]
        sources += [along.get("value_pred"), along.get("reward_pred")]
        sources.append(slices.masks(self.unroll_steps).reward)
        for key, source in zip(self.written_keys, sources, strict=True):
            tensordict.set(key, source)
        out = {
            "loss_dynamics_reward": self._reduced(tensordict, self.reward_pred_coef * reward),
            "loss_dynamics_returns": self._reduced(tensordict, self.returns_pred_coef * value),
            "dynamics_reward_loss": self._average(tensordict, reward),
            "dynamics_returns_loss": self._average(tensordict, value),
        }
        return TensorDict(out, [])
