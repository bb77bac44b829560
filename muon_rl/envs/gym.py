"""Gymnasium environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from torchrl.envs import EnvBase, GymWrapper

from muon_rl.envs.base import EnvFactory


class Gym(EnvFactory):
    """A Gymnasium environment, its observation flattened to one float32 vector or as it is.

    A resumed run begins a new episode: Gymnasium has no call for an environment's state.

    Args:
        id: as registered, such as ``Pendulum-v1``.
        action_repeat: frames that each action is held for; rewards are summed over them.
        flatten: whether the observation becomes one vector; else it must be one array, which
            keeps its shape and dtype: a grid of cells for a convolution.
        options: further arguments of ``gymnasium.make``.

    Raises:
        ValueError: if no such environment is registered; when one is made, if what it depends on
            is not installed.

    Example:
        >>> Gym("Pendulum-v1").make(seed=0).rollout(3)["observation"].shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        id: str,
        action_repeat: int = 1,
        flatten: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(action_repeat)
        try:
            gymnasium.spec(id)
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"Gymnasium cannot make {id!r}: {error}") from error
        self.id = id
        self.flatten = flatten
        self.options = dict(options or {})

    @property
    def task(self) -> str:
        """The environment's id."""
        return self.id

    def build(self) -> EnvBase:
        """Make the environment without counters."""
        try:
            env = gymnasium.make(self.id, **self.options)
        except gymnasium.error.DependencyNotInstalled as error:
            raise ValueError(f"{self.id} needs what is not installed: {error}") from error
        space = env.observation_space
        if not self.flatten:
            if not isinstance(space, gymnasium.spaces.Box):
                raise ValueError(
                    f"env.flatten=false needs an observation of one array, but {self.id}'s is "
                    f"{space}: leave it at true."
                )
            return self._wrapped(env)
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            env = gymnasium.wrappers.FlattenObservation(env)
        if env.observation_space.dtype != np.float32:
            env = gymnasium.wrappers.DtypeObservation(env, np.float32)
        return self._wrapped(env)

    def _wrapped(self, env: gymnasium.Env) -> EnvBase:
        return GymWrapper(env, frame_skip=self.action_repeat, categorical_action_encoding=True)
