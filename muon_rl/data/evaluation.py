"""Evaluation episodes: played by the policy from a fixed set of seeds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from muon_rl.envs import EnvFactory

_LONGEST = 10**9  # steps; episodes end by themselves


class EvaluationEpisodes:
    """Plays episodes with a policy: one at each step of an iteration, or one batch of them.

    Training's random numbers stay untouched, and equal policies get equal returns.

    Args:
        env: makes the environment, kept from one evaluation to the next; a vectorised one plays
            its whole batch of games at each step.
        policy: reads and writes the environment's keys.
        episodes: number of episodes, rounded up to whole batches.
        seed: of the first episode; the others follow it.
        sampled: whether actions are drawn from the policy; else each is its mode.
    """

    def __init__(
        self,
        env: EnvFactory,
        policy: TensorDictModuleBase,
        *,
        episodes: int,
        seed: int,
        sampled: bool = False,
    ) -> None:
        self.factory = env
        self.policy = policy
        self.episodes = episodes
        self.seed = seed
        self.exploration = ExplorationType.RANDOM if sampled else ExplorationType.DETERMINISTIC

    @cached_property
    def _env(self) -> EnvBase:
        with torch.random.fork_rng():  # an environment may draw its first seed
            return self.factory.make_for_evaluation(self.episodes)

    def __len__(self) -> int:
        return -(-self.episodes // self._env.batch_size.numel())

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yield the steps of each episode, a tensordict of shape ``(*games, steps)``."""
        return map(self._play, range(self.seed, self.seed + len(self)))

    def _play(self, seed: int) -> TensorDictBase:
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            set_exploration_type(self.exploration),
        ):
            torch.manual_seed(seed)
            self._env.set_seed(seed)
            return self._env.rollout(
                _LONGEST,
                self.policy,
                auto_cast_to_device=True,
                break_when_any_done=not self._env.batch_size,
                break_when_all_done=bool(self._env.batch_size),
            )


def length(episode: TensorDictBase) -> int:
    """Return the number of steps of an episode, the first that is done included.

    Args:
        episode: of shape ``(steps,)``; what follows its end is not counted.
    """
    return int(episode["next", "done"].squeeze(-1).int().argmax(-1)) + 1


def ends(episodes: TensorDictBase) -> TensorDictBase:
    """Return the last step of each episode: the first that is done.

    Args:
        episodes: of shape ``(*games, steps)``; a game that ended before others may go on.

    Returns:
        The ``next`` part of those steps, of shape ``(*games,)``.
    """
    following = episodes["next"]
    last = following["done"].squeeze(-1).int().argmax(-1, keepdim=True)
    return following.gather(-1, last).squeeze(-1)
