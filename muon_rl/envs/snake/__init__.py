"""Snake: rules on tensors, a TorchRL environment of many games, one game for Gymnasium."""

import gymnasium

from muon_rl.envs.snake.env import SnakeEnv
from muon_rl.envs.snake.factory import Snake
from muon_rl.envs.snake.render import to_gif, to_rgb, to_text

__all__ = ["Snake", "SnakeEnv", "to_gif", "to_rgb", "to_text"]

if "muon_rl/Snake-v0" not in gymnasium.registry:
    gymnasium.register("muon_rl/Snake-v0", entry_point="muon_rl.envs.snake.single:SnakeGame")
