"""What every environment factory brings: specs, counters, seeds and the state for a resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

from tensordict import TensorDictBase
from torchrl.envs import EnvBase, RewardSum, StepCounter, TransformedEnv

from muon_rl.specs import Specs


class EnvFactory(ABC):
    """Makes one kind of environment, as often as it is asked for.

    An environment made here has the keys ``observation``, ``action``, ``reward``, ``terminated``,
    ``truncated``, ``done``, ``step_count`` (agent steps of the episode so far) and
    ``episode_return`` (sum of its rewards).

    Subclasses implement :meth:`build` and, for a resume that continues mid-episode,
    :meth:`env_state` and :meth:`load_env_state`.

    Args:
        action_repeat: frames (control steps of the simulator) that each action is held for, >= 1.

    Raises:
        ValueError: if ``action_repeat`` is below 1.
    """

    steps_together = False  # whether one environment is several games, with a batch dim of its own
    num_envs = 1  # how many they are

    def __init__(self, action_repeat: int = 1) -> None:
        if action_repeat < 1:
            raise ValueError(f"action_repeat must be at least 1, but is {action_repeat}.")
        self.action_repeat = action_repeat

    @property
    @abstractmethod
    def task(self) -> str:
        """The task's name, for tables and tags: ``cheetah-run``."""

    @abstractmethod
    def build(self) -> EnvBase:
        """Make the environment without counters: flat float32 ``observation``, action repeat."""

    def make(self, seed: int | None = None) -> EnvBase:
        """Make an environment.

        Args:
            seed: of its first episode and, through it, of all that follow; ``None`` leaves the
                environment's own.
        """
        env = self.count(self.build())
        if seed is not None:
            env.set_seed(seed)
        return env

    def count(self, env: EnvBase) -> EnvBase:
        """Return an environment with counters of an episode's steps and rewards.

        Args:
            env: of :meth:`build`, or several of them as one.
        """
        if not isinstance(env, TransformedEnv):
            env = TransformedEnv(env)
        env.append_transform(StepCounter())
        env.append_transform(RewardSum(["reward"], ["episode_return"]))
        return env

    def make_for_evaluation(self, episodes: int) -> EnvBase:
        """Make an environment that plays evaluation episodes.

        Args:
            episodes: of an evaluation, >= 1; one whose games step together may play all at once.
        """
        return self.make()

    def film(self, episode: TensorDictBase) -> bytes | None:
        """Return an episode as an animated GIF, or ``None`` where there is nothing to see.

        Args:
            episode: of shape ``(steps,)``, as evaluation plays it, up to its end.
        """
        return None

    @cached_property
    def specs(self) -> Specs:
        """The specs that networks need, without batch dims, read once from an environment."""
        env = self.make()
        specs = Specs(
            env.observation_spec_unbatched["observation"].clone(),
            env.action_spec_unbatched.clone(),
            env.observation_spec_unbatched.get("action_mask", None),
        )
        env.close()
        return specs

    def env_state(self, env: EnvBase) -> dict[str, Any] | None:
        """Return the state of a running environment as tensors and numbers.

        Args:
            env: an environment that this factory made.

        Returns:
            What :meth:`load_env_state` takes, or ``None`` where the simulator cannot tell: a
            resumed run then begins a new episode.
        """
        return None

    def load_env_state(self, env: EnvBase, state: dict[str, Any]) -> None:
        """Set a running environment to a state that :meth:`env_state` returned.

        Args:
            env: an environment that this factory made.
            state: what :meth:`env_state` returned.
        """
        raise TypeError(f"{type(self).__name__} cannot set the state of its environment.")
