"""A policy that is a world model: it acts, and writes all that Muesli's losses read."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Categorical, Composite, OneHot
from torchrl.modules import (
    MaskedCategorical,
    MaskedOneHotCategorical,
    OneHotCategorical,
    SafeProbabilisticModule,
    SafeProbabilisticTensorDictSequential,
    TanhNormal,
)

from muon_rl.modules.world_model import WorldModel


class _ActionThenReward(SafeProbabilisticModule):
    """Samples the action, then writes the reward that the world model predicts for it."""

    def __init__(self, world_model: WorldModel, **options: Any) -> None:
        super().__init__(**options)
        # Not as a submodule: it is one of the policy already, and stands before this.
        self.__dict__["_world_model"] = world_model

    def forward(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        _requires_sample: bool = True,
    ) -> TensorDictBase:
        out = super().forward(tensordict, tensordict_out, _requires_sample=_requires_sample)
        step = self._world_model.step(tensordict["hidden_state"], out["action"])
        return out.update(step.exclude("hidden_state"))


class MuesliPolicy(SafeProbabilisticTensorDictSequential):
    r"""Actor whose network is a world model, so that one forward writes all that Muesli reads.

    Reads what ``world_model.representation`` reads, and ``action_mask`` if told so. Writes
    ``hidden_state`` ``(*batch, H)``, ``value_pred`` ``(*batch, 1)`` in units of return, ``logits``
    ``(*batch, A)`` or ``loc`` and ``scale`` ``(*batch, a)``, then ``action``, its log-probability
    ``action_log_prob`` ``(*batch)`` in nats, and ``reward_pred`` ``(*batch, 1)`` for that action;
    with bins ``value_logits`` and ``reward_logits`` too.

    The distribution is categorical, one-hot categorical or tanh-Gaussian in the bounds, by the spec
    of the action. It is torchrl's actor in all else: ``get_dist``, ``log_prob``,
    ``ExplorationType``, and parameters that are the world model's own.

    Args:
        world_model: whose representation and prediction make the distribution.
        action_mask: whether to read ``action_mask`` ``(*batch, A)``, False where an action is not
            allowed. ``logits`` stay unmasked; imagined states have no mask.
        return_log_prob: whether to write ``action_log_prob``, the behaviour's for off-policy data.

    Attributes:
        world_model: as given.

    Raises:
        ValueError: if continuous actions are to be masked.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Categorical, Unbounded
        >>> from muon_rl.specs import Specs
        >>> policy = MuesliPolicy(WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16))
        >>> out = policy(TensorDict(observation=torch.zeros(7, 4), batch_size=[7]))
        >>> out["action"].shape, out["reward_pred"].shape
        (torch.Size([7]), torch.Size([7, 1]))

    Source: Hessel et al. 2021, arXiv:2104.06159, section 4.
    """

    def __init__(
        self, world_model: WorldModel, *, action_mask: bool = False, return_log_prob: bool = True
    ) -> None:
        spec = world_model.specs.action
        keys = {"logits": "logits", "mask": "action_mask"} if action_mask else ["logits"]
        options: dict[str, Any] = {"in_keys": keys}
        if isinstance(spec, Categorical):
            plain, masked = torch.distributions.Categorical, MaskedCategorical
            options["distribution_class"] = masked if action_mask else plain
        elif isinstance(spec, OneHot):
            masked = MaskedOneHotCategorical
            options["distribution_class"] = masked if action_mask else OneHotCategorical
        elif action_mask:
            raise ValueError(
                f"action_mask=True needs a discrete action, but it is a {type(spec).__name__}: "
                "a continuous one is limited by the bounds of its spec."
            )
        else:
            options = {
                "in_keys": ["loc", "scale"],
                "distribution_class": TanhNormal,
                "distribution_kwargs": {"low": spec.space.low, "high": spec.space.high},
            }
        super().__init__(
            world_model,
            _ActionThenReward(
                world_model,
                out_keys=["action"],
                spec=Composite(action=spec),
                return_log_prob=return_log_prob,
                **options,
            ),
        )

    @property
    def world_model(self) -> WorldModel:
        """The world model, whose parameters are the policy's."""
        return self.module[0]
