"""MinAtar: five Atari games on a board of 10 x 10 cells."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import gymnasium

from muon_rl.envs.gym import Gym

Game = Literal["asterix", "breakout", "freeway", "seaquest", "space_invaders"]


class MinAtar(Gym):
    """A game of MinAtar, through its registration with Gymnasium (v1: the actions that it has).

    The observation is a grid of cells ``(10, 10, channels)``, bool, channels last. One action in
    ten is the last one again, and games grow harder as they go on, as they were published.

    Args:
        game: asterix, breakout, freeway, seaquest or space_invaders.
        max_steps: steps after which a game is truncated, >= 1; MinAtar knows no limit.
        options: of MinAtar's environment, such as ``sticky_action_prob`` and
            ``difficulty_ramping``.

    Raises:
        ValueError: if MinAtar is not installed, or ``max_steps`` is below 1.

    Example:
        >>> MinAtar("breakout").specs.observation.shape
        torch.Size([10, 10, 4])

    Source: Young and Tian 2019, arXiv:1903.03176.
    """

    def __init__(
        self,
        game: Game = "breakout",
        max_steps: int = 10_000,
        options: dict[str, Any] | None = None,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"env.max_steps must be at least 1, but is {max_steps}.")
        name = f"MinAtar/{game.title().replace('_', '')}-v1"
        if name not in gymnasium.registry:
            try:
                # Gymnasium 1 no longer asks installed packages for their environments.
                importlib.import_module("minatar.gym").register_envs()
            except ImportError as error:
                raise ValueError(
                    "MinAtar is not installed: pip install 'muon-rl[minatar]'."
                ) from error
        self.game = game
        limit = {"max_episode_steps": max_steps}
        super().__init__(name, flatten=False, options={**limit, **(options or {})})

    @property
    def task(self) -> str:
        """The game, as in ``minatar-breakout``."""
        return f"minatar-{self.game}"
