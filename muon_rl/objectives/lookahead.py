"""Action values from a world model that looks one step ahead."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import TanhNormal

from muon_rl.objectives.model_parts import is_listed, model_of

PRIOR_ACTION = ("prior", "action")
PRIOR_ACTION_VALUE = ("prior", "action_value")
PRIOR_STATE_VALUE = ("prior", "state_value")


class OneStepLookahead(TensorDictModuleBase):
    r"""Value every action by what a world model says of the step after it.

    .. math::
        \hat q(s, a) = \hat r_1(s, a) + \gamma \hat v_1(s, a), \qquad \hat v(s) = \hat v_0(s)

    A Q-network for :class:`~muon_rl.objectives.CMPOLoss`, which calls it with its target
    parameters; called by itself it uses the model's own, and keeps the gradient. It reads what the
    representation reads, and writes ``("prior", "action_value")`` and ``("prior", "state_value")``
    ``(*batch, 1)``, in units of return; never ``state_value``, which is a critic's, and nothing
    that it computes on the way.

    - Discrete: the values ``(*batch, A)`` are those of all actions.
    - Continuous: those ``(*batch, N)`` of the actions in ``("prior", "action")``
      ``(*batch, N, a)``. Where there are none, it samples them from the model's own policy and
      writes them.

    Args:
        world_model: with three TensorDictModules ``representation``, ``dynamics`` and
            ``prediction``, and the environment's ``specs``:
            :class:`~muon_rl.modules.WorldModel`, or :class:`~muon_rl.modules.MuesliPolicy`.
        gamma: :math:`\gamma`, dimensionless, in [0, 1].
        num_samples: N of the actions that it samples itself.

    Raises:
        TypeError: if ``world_model`` is no world model.
        ValueError: if the model lacks what is read of it, or ``gamma`` or ``num_samples`` is out
            of its range.

    Example:
        >>> from torchrl.data import Categorical, Unbounded
        >>> from muon_rl.modules import WorldModel
        >>> from muon_rl.specs import Specs
        >>> model = WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16)
        >>> td = TensorDict(observation=torch.zeros(7, 4), batch_size=[7])
        >>> prior = OneStepLookahead(model, gamma=0.9)(td)["prior"]
        >>> prior["action_value"].shape, prior["state_value"].shape
        (torch.Size([7, 3]), torch.Size([7, 1]))

    Source: Hessel et al. 2021, arXiv:2104.06159, eq. 14.
    """

    world_model: Any

    def __init__(
        self, world_model: nn.Module, *, gamma: float = 0.99, num_samples: int = 16
    ) -> None:
        super().__init__()
        # Without the policy: CMPOLoss has actions from its own actor.
        model = model_of("OneStepLookahead", world_model, policy=False)
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], but is {gamma}.")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, but is {num_samples}.")
        self.world_model, self.gamma, self.num_samples = model, gamma, num_samples
        self.discrete = is_listed(model)
        self.in_keys = list(model.representation.in_keys)
        self.out_keys = [PRIOR_ACTION_VALUE, PRIOR_STATE_VALUE]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values of all actions, or of N, and of the state."""
        # A copy: hidden states of these parameters are not for those who read the data next.
        seen = self.world_model.representation(tensordict.select(*self.in_keys, strict=False))
        state = seen.get("hidden_state")
        batch = state.shape[:-1]
        now = self._predicted(state)
        actions = self._actions(tensordict, now, batch)
        count = actions.shape[len(batch)]
        states = state.unsqueeze(-2).expand(*batch, count, state.shape[-1])
        step = TensorDict({"hidden_state": states, "action": actions}, (*batch, count))
        step = self.world_model.dynamics(step)
        following = self._predicted(step.get(("next", "hidden_state")))
        value = step.get("reward_pred") + self.gamma * following.get("value_pred")
        tensordict.set(PRIOR_ACTION_VALUE, value.squeeze(-1))
        tensordict.set(PRIOR_STATE_VALUE, now.get("value_pred"))
        return tensordict

    def _predicted(self, state: Tensor) -> TensorDictBase:
        """Return value and policy of a hidden state."""
        return self.world_model.prediction(TensorDict({"hidden_state": state}, state.shape[:-1]))

    def _actions(
        self, tensordict: TensorDictBase, now: TensorDictBase, batch: torch.Size
    ) -> Tensor:
        """Return all actions, or the N that are given or sampled, ``(*batch, N, *action)``."""
        spec = self.world_model.specs.action
        if self.discrete:
            actions = spec.enumerate()
            return actions.expand(*batch, *actions.shape).to(now.get("value_pred").device)
        given = tensordict.get(PRIOR_ACTION, None)
        if given is not None:
            return given
        low, high = spec.space.low, spec.space.high
        policy = TanhNormal(now.get("loc"), now.get("scale"), low=low, high=high)
        actions = policy.sample((self.num_samples,)).movedim(0, -2)
        tensordict.set(PRIOR_ACTION, actions)
        return actions
