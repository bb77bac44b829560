"""Snake for recipes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from muon_rl.envs.base import EnvFactory
from muon_rl.envs.snake.env import SnakeEnv
from muon_rl.envs.snake.render import to_gif


class Snake(EnvFactory):
    """Games of Snake that step together, as one environment of batch size ``(num_envs,)``.

    Its counters are the environment's own, which cost less than transforms; beside those of every
    factory it has ``score`` and ``length``.

    Args:
        height: rows, >= 2.
        width: columns, >= 2.
        num_envs: games that step together, >= 1; TorchRL's overhead per step asks for 1000.
        initial_length: cells of a new snake, 1 to ``width // 2 + 1``.
        max_steps: steps after which a game is truncated, >= 1.
        food_reward: for a step that eats.
        death_reward: for a step that dies.
        step_reward: for any other step.
        observation: ``tokens``, ``planes`` or ``rgb3``: see :class:`~muon_rl.envs.SnakeEnv`.
        action_mask: whether to write ``action_mask``, all moves but the reversal.
        device: of all tensors.

    Raises:
        ValueError: if a number is out of its bounds or the observation is not one of the three.

    Example:
        >>> factory = Snake(6, 6, num_envs=4)
        >>> rollout = factory.make(seed=0).rollout(5, break_when_any_done=False)
        >>> rollout["observation"].shape, factory.specs.observation.shape
        (torch.Size([4, 5, 6, 6]), torch.Size([6, 6]))
    """

    steps_together = True

    def __init__(
        self,
        height: int = 10,
        width: int = 10,
        *,
        num_envs: int = 1,
        initial_length: int = 3,
        max_steps: int = 500,
        food_reward: float = 10.0,
        death_reward: float = -10.0,
        step_reward: float = -0.01,
        observation: Literal["tokens", "planes", "rgb3"] = "tokens",
        action_mask: bool = False,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.num_envs = num_envs
        self._options: dict[str, Any] = {
            "height": height,
            "width": width,
            "initial_length": initial_length,
            "max_steps": max_steps,
            "food_reward": food_reward,
            "death_reward": death_reward,
            "step_reward": step_reward,
            "observation": observation,
            "action_mask": action_mask,
            "device": device,
        }
        self._task = f"snake-{height}x{width}"
        self.build()  # refuses here what it would refuse later

    @property
    def task(self) -> str:
        """The task's name: ``snake-10x10``."""
        return self._task

    def build(self) -> SnakeEnv:
        """Make the environment; it counts by itself."""
        return SnakeEnv(self.num_envs, **self._options, episode_return=True)

    def count(self, env: EnvBase) -> EnvBase:
        """Return the environment as it is: it counts by itself."""
        return env

    def make_for_evaluation(self, episodes: int) -> SnakeEnv:
        """Make as many games as there are episodes.

        Args:
            episodes: of an evaluation, >= 1.
        """
        return SnakeEnv(episodes, **self._options, episode_return=True)

    def film(self, episode: TensorDictBase) -> bytes | None:
        """Return a game as an animated GIF; of observations other than tokens there is none.

        Args:
            episode: of shape ``(steps,)``.
        """
        if self._options["observation"] != "tokens":
            return None
        boards = episode["observation"]
        # A board after a death is free to be anything.
        after = episode["next"][-1:]
        seen = boards if after["terminated"].item() else torch.cat([boards, after["observation"]])
        return to_gif(seen)

    def env_state(self, env: EnvBase) -> dict[str, Any]:
        """Return the state of the games, random numbers included."""
        return env.get_extra_state()

    def load_env_state(self, env: EnvBase, state: dict[str, Any]) -> None:
        """Set the games and their random numbers."""
        env.set_extra_state(state)
