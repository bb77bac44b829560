"""Sequences: some of what was just collected, the others from a replay buffer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer

from muon_rl.data.base import AgentData, require_positive
from muon_rl.envs import EnvFactory

STRETCH = "stretch"  # one number for all steps: in each game, time is unbroken for the sampler


class SequenceData(AgentData):
    r"""Collects with the present policy, and serves sequences: fresh ones mixed with replayed ones.

    A batch has shape ``(batch_size, sequence_length)``. Its replayed sequences are windows of all
    that the buffer holds, drawn uniformly; its fresh ones are of the newest collection, each once
    before any is served again, in an order drawn anew each time. A window may run over the end of
    an episode, which the flags in it show: losses over time stop there.

    Args:
        env: makes the training and the evaluation environment.
        total_frames: control steps of the simulator after which training ends, rounded up to whole
            collections.
        sequence_length: agent steps of a sequence.
        batch_size: sequences of a batch.
        replay_fraction: share of a batch that is replayed, in [0, 1], rounded to whole sequences;
            at 0 there is no buffer, and between 0 and 1 at least one of each kind.
        buffer_size: agent steps that the buffer holds; then the oldest are overwritten.
        steps_per_collection: agent steps collected at a time, those of all environments together;
            rounded up to whole sequences of each.
        updates_per_step: updates for each agent step, a fraction too; those that a collection
            allows follow it.
        eval_every: frames between two evaluations; another one ends the run.
        eval_episodes: episodes of an evaluation.
        eval_seed: seed of an evaluation's first episode.
        eval_sampled: whether evaluation draws its actions from the policy; the metrics of the
            policy's modes are then ``eval/greedy_*``, beside them.
        save_buffer: whether checkpoints hold the buffer and the newest collection.
        num_envs: training environments that step together.
        env_processes: whether each of them has a process of its own; a resumed run then begins
            new episodes.

    Raises:
        ValueError: if a number is out of its range, the buffer holds less than a collection, or a
            batch is too small for a mixture.

    Source: the mixture is that of Hessel et al. 2021, arXiv:2104.06159, section 5.
    """

    def __init__(
        self,
        env: EnvFactory,
        *,
        total_frames: int,
        sequence_length: int = 20,
        batch_size: int = 16,
        replay_fraction: float = 0.75,
        buffer_size: int = 100_000,
        steps_per_collection: int = 160,
        updates_per_step: float = 0.05,
        eval_every: int = 10_000,
        eval_episodes: int = 10,
        eval_seed: int = 0,
        eval_sampled: bool = False,
        save_buffer: bool = True,
        num_envs: int = 1,
        env_processes: bool = False,
    ) -> None:
        super().__init__(
            env,
            total_frames=total_frames,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            eval_seed=eval_seed,
            eval_sampled=eval_sampled,
            save_buffer=save_buffer,
            num_envs=num_envs,
            env_processes=env_processes,
        )
        require_positive(
            sequence_length=sequence_length,
            batch_size=batch_size,
            buffer_size=buffer_size,
            steps_per_collection=steps_per_collection,
        )
        if not 0.0 <= replay_fraction <= 1.0:
            raise ValueError(f"data.replay_fraction must be in [0, 1], but is {replay_fraction}.")
        if not 0.0 < updates_per_step < math.inf:
            raise ValueError(f"data.updates_per_step must be above 0, but is {updates_per_step}.")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.replay_fraction = replay_fraction
        self.replayed = round(batch_size * replay_fraction)
        if 0.0 < replay_fraction < 1.0 and self.replayed in (0, batch_size):
            raise ValueError(
                f"data.replay_fraction={replay_fraction} of data.batch_size={batch_size} is "
                f"rounded to {self.replayed} sequences, which is no mixture: raise "
                f"data.batch_size, or set data.replay_fraction to {round(replay_fraction)}."
            )
        self.buffer_size = buffer_size
        self.updates_per_step = updates_per_step
        once = sequence_length * num_envs * env.num_envs
        self.steps_per_collection = -(-steps_per_collection // once) * once
        if self.replayed and buffer_size < self.steps_per_collection:
            raise ValueError(
                f"data.buffer_size is {buffer_size}, but one collection has "
                f"{self.steps_per_collection} steps: raise it, or collect less."
            )
        if self.total_updates < 1:
            raise ValueError(
                f"data.total_frames={total_frames} and data.updates_per_step={updates_per_step} "
                "leave no update: raise one of them."
            )
        self.buffer: Any = None  # made in setup
        self._fresh: Any = None  # sequences of the newest collection
        self._order = torch.empty(0, dtype=torch.int64)

    @abstractmethod
    def make_buffer(self) -> ReplayBuffer:
        """Return an empty replay buffer of steps ``(games, time)`` that samples whole sequences.

        A sample has ``replayed * sequence_length`` steps, one sequence after the other, each within
        one game; their :data:`STRETCH` is that of all.
        """

    @property
    def total_updates(self) -> int:
        """Number of updates of the whole run."""
        frames_per_collection = self.steps_per_collection * self.env.action_repeat
        collections = -(-self.total_frames // frames_per_collection)
        return self._updates_after(collections * self.steps_per_collection)

    @property
    def is_up_to_date(self) -> bool:
        """Whether all updates that the frames so far allow have been made."""
        return self.updates >= self._updates_after(self.frames // self.env.action_repeat)

    def setup(self, stage: str) -> None:
        """Make the collector and the buffer."""
        super().setup(stage)
        if stage == "fit" and self.replayed:
            self.buffer = self.make_buffer()

    def batches(self) -> Iterator[TensorDictBase]:
        """Yield batches, collecting whenever the frames so far allow no further update."""
        while self.updates < self.total_updates:
            # A run resumed without its buffer has to collect first.
            while self.is_up_to_date or self._fresh is None:
                self._store(self.collect())
            self.updates += 1
            yield self._batch()

    def contents(self) -> dict[str, Any]:
        """Return the buffer, the newest collection and what of it is left to be served."""
        contents: dict[str, Any] = {"sizes": self._sizes}
        if self._fresh is None:
            return contents
        contents |= {"fresh": self._fresh.to_dict(retain_none=False), "order": self._order.clone()}
        if self.replayed:
            contents["steps"] = self.buffer[:].clone().to_dict(retain_none=False)
            contents["writer"] = dict(self.buffer.writer.state_dict())
        return contents

    def check_contents(self, contents: dict[str, Any]) -> None:
        """Raise if sequences, games or buffer were of another size, or there was no buffer."""
        sizes = contents.get("sizes", {})
        for name, now in self._sizes.items():
            before = sizes.get(name, now)
            if before != now:
                raise ValueError(
                    f"{name} is {before} in the checkpoint and {now} in this config: set it as it "
                    "was, or begin a fresh run."
                )
        if "fresh" in contents and ("steps" in contents) != bool(self.replayed):
            raise ValueError(
                f"data.replay_fraction is {self.replay_fraction}, but the checkpoint holds "
                f"{'no' if self.replayed else 'a'} replay buffer: set it as it was, or begin a "
                "fresh run."
            )

    def load_contents(self, contents: dict[str, Any]) -> None:
        """Take back the buffer, the newest collection and what of it is left to be served."""
        if "fresh" not in contents:
            return
        self._fresh = TensorDict.from_dict(contents["fresh"], batch_dims=2)
        self._order = contents["order"]
        if self.replayed:
            steps = TensorDict.from_dict(contents["steps"], batch_dims=2)
            newest = torch.tensor([(contents["writer"]["_cursor"] - 1) % steps.shape[1]])
            if not self.continues_episodes:
                # New episodes follow: the old ones were cut off there.
                steps["next", "done"] = steps["next", "done"].index_fill(1, newest, True)
            self.buffer.extend(steps)
            self.buffer.writer.load_state_dict(contents["writer"])
            storage = self.buffer.storage
            if len(storage) == storage.max_size:
                # It takes the row that it was given last for the newest, after which time breaks.
                storage.set(newest, storage.get(newest))

    @property
    def _sizes(self) -> dict[str, int]:
        sizes = {
            "data.sequence_length": self.sequence_length,
            "data.steps_per_collection": self.steps_per_collection,
            "data.num_envs": self.num_envs,
            "the number of games in one environment": self.env.num_envs,
        }
        return sizes | ({"data.buffer_size": self.buffer_size} if self.replayed else {})

    def _updates_after(self, steps: int) -> int:
        """Return the updates that so many agent steps allow."""
        return int(steps * self.updates_per_step)

    def _store(self, rollout: TensorDictBase) -> None:
        """Keep a collection ``(time,)`` or ``(games, time)``; its sequences are the fresh ones."""
        rollout = rollout.select(*self.trainer.lightning_module.loss.in_keys, strict=False)
        rollout = rollout.reshape(-1, rollout.shape[-1])
        if self.replayed:
            stretch = torch.zeros(rollout.shape, dtype=torch.int64, device=rollout.device)
            self.buffer.extend(rollout.copy().set(STRETCH, stretch))
        self._fresh = rollout.reshape(-1, self.sequence_length)
        self._order = self._order[:0]

    def _batch(self) -> TensorDictBase:
        """Return fresh sequences, then replayed ones."""
        parts = []
        if self.replayed < self.batch_size:
            parts.append(self._fresh[self._next(self.batch_size - self.replayed)])
        if self.replayed:
            replayed = self.buffer.sample().reshape(-1, self.sequence_length)
            parts.append(replayed.select(*self._fresh.keys(True, True)))
        return torch.cat(parts)

    def _next(self, number: int) -> torch.Tensor:
        """Return the places of the fresh sequences whose turn it is."""
        while len(self._order) < number:
            self._order = torch.cat([self._order, torch.randperm(len(self._fresh))])
        taken, self._order = self._order.split([number, len(self._order) - number])
        return taken
