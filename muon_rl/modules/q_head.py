"""The values of all actions, by a network beside a world model."""

from __future__ import annotations

from copy import deepcopy

from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import QValueActor

from muon_rl.modules.world_model import WorldModel


class QHead(QValueActor):
    """Values of all actions, seen by a representation like a world model's that shares nothing.

    Reads what ``world_model.representation`` reads; writes ``action_value`` ``(*batch, A)`` in
    units of return, and what TorchRL's ``QValueActor`` makes of it. For a DQN loss to train, and
    for :class:`~muon_rl.objectives.CMPOLoss` to read.

    Args:
        world_model: over discrete actions, whose representation is copied and drawn anew.

    Raises:
        ValueError: if the actions are continuous.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Unbounded
        >>> from muon_rl.specs import Specs
        >>> head = QHead(WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16))
        >>> head(TensorDict(observation=torch.zeros(7, 4), batch_size=[7]))["action_value"].shape
        torch.Size([7, 3])
    """

    def __init__(self, world_model: WorldModel) -> None:
        action = world_model.specs.action
        if not isinstance(action, Categorical):
            raise ValueError(
                "A Q-head values each of the actions, but the environment's are no Categorical: "
                f"{type(action).__name__} of shape {tuple(action.shape)}."
            )
        encoder = deepcopy(world_model.representation)
        for module in encoder.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        values = TensorDictModule(
            nn.Linear(world_model.latent, action.space.n), ["hidden_state"], ["action_value"]
        )
        super().__init__(TensorDictSequential(encoder, values), action_space="categorical")
