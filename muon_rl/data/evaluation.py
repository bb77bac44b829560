"""Evaluation episodes: played by the deterministic policy from a fixed set of seeds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from muon_rl.envs import EnvFactory

_LONGEST = 10**9  # steps; episodes end by themselves


class EvaluationEpisodes:
    """Plays episodes with a policy, one at each step of an iteration.

    Training's random numbers stay untouched, and equal policies get equal returns.

    Args:
        env: makes the environment, kept from one evaluation to the next.
        policy: reads and writes the environment's keys.
        episodes: number of episodes.
        seed: of the first episode; the others follow it.
    """

    def __init__(
        self, env: EnvFactory, policy: TensorDictModuleBase, *, episodes: int, seed: int
    ) -> None:
        self.factory = env
        self.policy = policy
        self.episodes = episodes
        self.seed = seed
        self._env: EnvBase | None = None

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yield each episode's steps, a tensordict of shape ``(steps,)``."""
        return map(self._play, range(self.seed, self.seed + self.episodes))

    def _play(self, seed: int) -> TensorDictBase:
        if self._env is None:
            self._env = self.factory.make()
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            set_exploration_type(ExplorationType.DETERMINISTIC),
        ):
            torch.manual_seed(seed)
            self._env.set_seed(seed)
            return self._env.rollout(_LONGEST, self.policy, auto_cast_to_device=True)
