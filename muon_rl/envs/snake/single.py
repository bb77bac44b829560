"""One game of Snake as a Gymnasium environment, registered as ``muon_rl/Snake-v0``."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from tensordict import TensorDict, TensorDictBase

from muon_rl.envs.snake.env import SnakeEnv
from muon_rl.envs.snake.render import to_rgb, to_text


class SnakeGame(gymnasium.Env):
    """A game of :class:`~muon_rl.envs.SnakeEnv` by itself, with arrays in place of tensors.

    A seed gives the games that ``SnakeEnv(1, seed=seed)`` plays. Every ``info`` holds ``score``
    and ``length``, and ``action_mask`` (int8, as ``Discrete.sample`` takes it) if asked for.

    Args:
        height: rows, >= 2.
        width: columns, >= 2.
        render_mode: ``ansi`` (text), ``rgb_array`` or ``None``.
        options: further arguments of :class:`~muon_rl.envs.SnakeEnv`.

    Raises:
        ValueError: if ``SnakeEnv`` refuses an argument, or the render mode is unknown.

    Example:
        >>> game = gymnasium.make("muon_rl/Snake-v0", height=6, width=6)
        >>> observation, info = game.reset(seed=0)
        >>> observation.shape, info
        ((6, 6), {'score': 0, 'length': 3})
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 12}  # noqa: RUF012

    def __init__(
        self,
        height: int = 10,
        width: int = 10,
        *,
        render_mode: Literal["ansi", "rgb_array"] | None = None,
        **options: Any,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            modes = ", ".join(self.metadata["render_modes"])
            raise ValueError(f"render_mode must be one of {modes} or None, not {render_mode!r}.")
        self._env = SnakeEnv(1, height, width, **options)
        self.render_mode = render_mode
        self.action_space = Discrete(4)
        bounds = self._env.observation_spec_unbatched["observation"].space
        low, high = bounds.low.numpy(), bounds.high.numpy()
        self.observation_space = Box(low, high, dtype=low.dtype.type)
        self._now: TensorDictBase = TensorDict()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a game.

        Args:
            seed: of its random numbers and of those that follow; ``None`` goes on with them.
            options: none are known.

        Returns:
            Observation and info.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._env.set_seed(seed)
        self._now = self._env.reset()
        return self._observation(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the snake by one cell.

        Args:
            action: 0 up, 1 right, 2 down, 3 left.

        Returns:
            Observation, reward, terminated, truncated and info.

        Raises:
            ValueError: if the action is not one of the four.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"action must be 0, 1, 2 or 3, but is {action!r}.")
        self._now["action"] = torch.tensor([int(action)])
        self._now = self._env.step(self._now)["next"]
        reward, terminated, truncated = (
            self._now[key].item() for key in ("reward", "terminated", "truncated")
        )
        return self._observation(), reward, terminated, truncated, self._info()

    def render(self) -> str | np.ndarray | None:
        """Return the board as text or as an RGB array, as ``render_mode`` says."""
        if self.render_mode is None:
            return None
        board = self._env.boards()[0]
        return to_text(board) if self.render_mode == "ansi" else to_rgb(board).numpy()

    def _observation(self) -> np.ndarray:
        return self._now["observation"][0].numpy()

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {key: self._now[key].item() for key in ("score", "length")}
        if "action_mask" in self._now:
            info["action_mask"] = self._now["action_mask"][0].numpy().astype(np.int8)
        return info
