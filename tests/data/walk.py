"""A world of short episodes that end both ways: terminated at a wall, truncated after a while."""

from __future__ import annotations

import gymnasium
import numpy as np


class Walk(gymnasium.Env):
    """A point on a line, pushed by the action, whose number tells its step apart."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal()
        self.count = self.np_random.normal()
        return self._observation(), {}

    def step(self, action):
        self.place += float(action[0])
        self.count += 1.0
        return self._observation(), self.place + 3.0, abs(self.place) > 1.5, False, {}

    def _observation(self):
        return np.array([self.place, self.count], np.float32)


def register() -> str:
    """Make the world known to Gymnasium, and return its id."""
    if "Walk-v0" not in gymnasium.registry:
        gymnasium.register("Walk-v0", entry_point=Walk, max_episode_steps=9)
    return "Walk-v0"
