"""Gymnasium environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from torchrl.envs import EnvBase, GymWrapper

from muon_rl.envs.base import EnvFactory


class Gym(EnvFactory):
    """A Gymnasium environment, its observation flattened to one float32 vector.

    A resumed run begins a new episode: Gymnasium has no call for an environment's state.

    Args:
        id: as registered, such as ``Pendulum-v1``.
        action_repeat: frames that each action is held for; rewards are summed over them.
        options: further arguments of ``gymnasium.make``.

    Raises:
        ValueError: if no such environment is registered.

    Example:
        >>> Gym("Pendulum-v1").make(seed=0).rollout(3)["observation"].shape
        torch.Size([3, 3])
    """

    def __init__(
        self, id: str, action_repeat: int = 1, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(action_repeat)
        try:
            gymnasium.spec(id)
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"Gymnasium cannot make {id!r}: {error}") from error
        self.id = id
        self.options = dict(options or {})

    @property
    def task(self) -> str:
        """The environment's id."""
        return self.id

    def build(self) -> EnvBase:
        """Make the environment without counters."""
        env = gymnasium.make(self.id, **self.options)
        space = env.observation_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            env = gymnasium.wrappers.FlattenObservation(env)
        if env.observation_space.dtype != np.float32:
            env = gymnasium.wrappers.DtypeObservation(env, np.float32)
        return GymWrapper(env, frame_skip=self.action_repeat, categorical_action_encoding=True)
