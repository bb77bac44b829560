"""What every way of feeding an agent shares: collector, frame count, evaluation, exact resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase

from muon_rl.data import random_state
from muon_rl.data.evaluation import EvaluationEpisodes
from muon_rl.data.stream import Stream
from muon_rl.envs import EnvFactory, load_states, make_several, states_of


class AgentData(L.LightningDataModule, ABC):
    """Collects with the agent's own policy and serves the batches that train it.

    One epoch is the whole run: a sized stream of batches, each used for one update. The stream is
    a function of two counters, ``frames`` and ``updates``, so a resumed run goes on where it was.

    Subclasses implement :meth:`make_collector` on a recipe's page, and :attr:`total_updates`,
    :attr:`is_up_to_date` and :meth:`batches` for a kind of data (replay, rollouts, sequences).
    What they hold beyond that goes in :meth:`contents` and :meth:`load_contents`, and what of it
    does not fit them is refused in :meth:`check_contents`.

    Args:
        env: makes the training and the evaluation environment.
        total_frames: control steps of the simulator after which training ends, >= 1.
        eval_every: frames between two evaluations, >= 1; another one ends the run.
        eval_episodes: episodes of an evaluation, >= 1.
        eval_seed: seed of an evaluation's first episode, >= 0, the same in every evaluation and
            run; the others' follow it.
        eval_sampled: whether evaluation draws its actions from the policy; the metrics of the
            policy's modes are then ``eval/greedy_*``, beside them.
        save_buffer: whether checkpoints hold the collected data, without which a resumed run
            starts with an empty buffer.
        num_envs: training environments that step together, >= 1.
        env_processes: whether each of them has a process of its own; a resumed run then begins
            new episodes.

    Raises:
        ValueError: if a number is out of its bounds, or several environments are asked for of which
            each is several games already.
    """

    def __init__(
        self,
        env: EnvFactory,
        *,
        total_frames: int,
        eval_every: int = 10_000,
        eval_episodes: int = 10,
        eval_seed: int = 0,
        eval_sampled: bool = False,
        save_buffer: bool = True,
        num_envs: int = 1,
        env_processes: bool = False,
    ) -> None:
        super().__init__()
        require_positive(
            total_frames=total_frames,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            num_envs=num_envs,
        )
        if not 0 <= eval_seed <= 2**32 - eval_episodes:
            raise ValueError(
                f"data.eval_seed must be from 0 to 2**32 - data.eval_episodes, but is {eval_seed}."
            )
        if num_envs > 1 and env.steps_together:
            raise ValueError(
                f"data.num_envs is {num_envs}, but one environment of {type(env).__name__} is "
                "several games that step together: set env.num_envs to their number, and leave "
                "data.num_envs at 1."
            )
        self.env = env
        self.total_frames = total_frames
        self.eval_every = eval_every
        self.eval_episodes = eval_episodes
        self.eval_seed = eval_seed
        self.eval_sampled = eval_sampled
        self.save_buffer = save_buffer
        self.num_envs = num_envs
        self.env_processes = env_processes
        self.frames = 0
        self.updates = 0
        self.evaluated_frames = 0
        self._episode_metrics: dict[str, float] = {}
        self.collector: BaseCollector | None = None
        self._rollouts: Iterator[TensorDictBase] = iter(())
        self._random_state: dict[str, Any] | None = None
        self.continues_episodes = False  # whether a checkpoint brought back the running ones

    # -- what a recipe and a kind of data bring ------------------------------------------------

    @abstractmethod
    def make_collector(self, env: EnvBase, policy: TensorDictModuleBase) -> BaseCollector:
        """Return the collector of training data, without a bound on its frames.

        Args:
            env: a training environment, seeded, or several as one of batch size ``(num_envs,)``.
            policy: the agent's own; it shares its parameters with the loss.
        """

    @property
    @abstractmethod
    def total_updates(self) -> int:
        """Number of updates of the whole run."""

    @property
    def updates_per_rate(self) -> int:
        """Updates in a row that share one learning rate where rates are annealed, >= 1.

        With rollouts, all updates of one: epochs times minibatches.
        """
        return 1

    @property
    @abstractmethod
    def is_up_to_date(self) -> bool:
        """Whether all updates that the frames so far allow have been made."""

    @abstractmethod
    def batches(self) -> Iterator[TensorDictBase]:
        """Collect as the counters demand and yield the batches that are left.

        Each yield is one update; implementations add 1 to ``updates`` before it.
        """

    def contents(self) -> dict[str, Any]:
        """Return what a kind of data holds, as tensors and numbers."""
        return {}

    def check_contents(self, contents: dict[str, Any]) -> None:
        """Raise ``ValueError`` if :meth:`load_contents` cannot take these.

        Args:
            contents: of a checkpoint, read before a run goes on from it.
        """

    def load_contents(self, contents: dict[str, Any]) -> None:
        """Take back what :meth:`contents` returned.

        Args:
            contents: of the same kind of data, with the same fields.
        """

    # -- training ------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Make the collector, before Lightning restores its state."""
        if stage != "fit":
            return
        # From the global seed, so that equal seeds see equal episodes, and each rank its own.
        seed = int(torch.randint(2**31 - 1, ())) + self.trainer.global_rank
        env = make_several(self.env, self.num_envs, seed=seed, processes=self.env_processes)
        self.collector = self.make_collector(env, self.trainer.lightning_module.policy)
        self._rollouts = iter(self.collector)

    def collect(self) -> TensorDictBase:
        """Return the next batch of training data and count its frames.

        Raises:
            SIGTERMException: if the run was asked to stop.
        """
        if self.trainer.received_sigterm:
            raise SIGTERMException
        rollout = next(self._rollouts)
        self.frames += rollout.numel() * self.env.action_repeat
        done = rollout["next", "done"]
        if done.any():
            ended = rollout["next"][done.squeeze(-1)]
            length = ended["step_count"].float().mean() * self.env.action_repeat
            self._episode_metrics = {
                "train/episode_return": ended["episode_return"].mean().item(),
                "train/episode_length": length.item(),
            }
            score = ended.get("score", None)
            if score is not None:
                self._episode_metrics["train/episode_score"] = score.float().mean().item()
        return rollout

    def take_episode_metrics(self) -> dict[str, float]:
        """Return return and length (frames) of the last ended training episode, once."""
        metrics, self._episode_metrics = self._episode_metrics, {}
        return metrics

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation stands due at the frames so far."""
        if self.updates >= self.total_updates:
            return True
        passed = self.frames // self.eval_every > self.evaluated_frames // self.eval_every
        return passed and self.is_up_to_date

    def train_dataloader(self) -> Stream:
        """Return the stream of the batches that are left."""
        return Stream(self)

    def val_dataloader(self) -> list[EvaluationEpisodes]:
        """Return the episodes of one evaluation, played anew at each iteration.

        With ``eval_sampled`` these are two sets of the same seeds, the greedy policy's the second.
        """
        policy = self.trainer.lightning_module.policy
        return [
            EvaluationEpisodes(
                self.env,
                policy,
                episodes=self.eval_episodes,
                seed=self.eval_seed,
                sampled=sampled,
            )
            for sampled in ([True, False] if self.eval_sampled else [False])
        ]

    def teardown(self, stage: str) -> None:
        """Close the collector and its environment."""
        if self.collector is not None:
            self.collector.shutdown()
            self.collector = None

    # -- resume --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return counters, contents, the running episode and the random states."""
        state: dict[str, Any] = {
            "frames": self.frames,
            "updates": self.updates,
            "evaluated_frames": self.evaluated_frames,
            "episode_metrics": self._episode_metrics,
        }
        if self.collector is not None:
            collector = self.collector.state_dict()
            # The agent's own state holds the policy.
            collector.pop("policy_state_dict", None)
            # The collector leaves out the running episode (torchrl 0.14): its environment's state,
            # and the carrier, on which the next step is taken.
            carrier = self.collector._carrier.to_dict(retain_none=False)
            state |= {
                "collector": dict(collector),
                "carrier": carrier,
                "env": states_of(self.env, self.collector.env),
                "random": random_state.get(),
            }
        if self.save_buffer:
            state["contents"] = self.contents()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Args:
            state_dict: of the same data module with the same environment.
        """
        self.frames, self.updates = state_dict["frames"], state_dict["updates"]
        self.evaluated_frames = state_dict["evaluated_frames"]
        self._episode_metrics = state_dict.get("episode_metrics", {})
        if self.collector is None:  # validation only
            return
        carrier = TensorDict.from_dict(state_dict["carrier"], auto_batch_size=False)
        ours = self.collector._carrier
        # Another number of environments begins new episodes, as one that cannot tell its state or,
        # in a process of its own, take it.
        self.continues_episodes = (
            state_dict["env"] is not None
            and states_of(self.env, self.collector.env) is not None
            and carrier["done"].shape == ours["done"].shape
        )
        collector = dict(state_dict["collector"])
        if not self.continues_episodes:
            collector.pop("env_state_dict", None)
        self.collector.load_state_dict(collector, strict=False)
        if self.continues_episodes:
            load_states(self.env, self.collector.env, state_dict["env"])
            ours.update(carrier)
        if "contents" in state_dict:
            self.check_contents(state_dict["contents"])
            self.load_contents(state_dict["contents"])
        # Set when the stream starts: what lies between may still draw random numbers.
        self._random_state = state_dict["random"]

    def restore_random_state(self) -> None:
        """Set the random states that a checkpoint brought, once."""
        if self._random_state is not None:
            random_state.set(self._random_state)
            self._random_state = None


def require_positive(**numbers: float) -> None:
    """Raise ``ValueError`` for the first number below 1, naming it."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"data.{name} must be at least 1, but is {number}.")
