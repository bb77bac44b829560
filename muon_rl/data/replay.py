"""Off-policy data: random warm-up, a replay buffer, a fixed number of updates a step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.envs import MultiStepTransform

from muon_rl.data.base import AgentData, require_positive
from muon_rl.envs import EnvFactory


class ReplayData(AgentData):
    """Collects a little, then serves samples of everything collected so far.

    Args:
        env: makes the training and the evaluation environment.
        total_frames: control steps of the simulator after which training ends.
        init_random_frames: frames of uniformly random actions before the first update; they must
            fill at least one batch.
        batch_size: transitions of a sample.
        buffer_size: transitions that the buffer holds; then the oldest are overwritten.
        updates_per_step: updates for each agent step, a fraction or a number above 1 too.
        steps_per_collection: agent steps collected at a time, a multiple of ``num_envs`` or of the
            games that step together in one (rounded up to one); the updates they allow follow.
        n_steps: rewards that a transition sums, discounted, before it bootstraps; 1 is plain
            temporal difference. Episodes' ends cut the sum short.
        eval_every: frames between two evaluations, of which the random frames have none; another
            one ends the run.
        eval_episodes: episodes of an evaluation.
        eval_seed: seed of an evaluation's first episode.
        eval_sampled: whether evaluation draws its actions from the policy; the metrics of the
            policy's modes are then ``eval/greedy_*``, beside them.
        save_buffer: whether checkpoints hold the buffer.
        num_envs: training environments that step together.
        env_processes: whether each of them has a process of its own; a resumed run then begins
            new episodes.

    Raises:
        ValueError: if a number is out of its range, or the warm-up is smaller than a batch.
    """

    def __init__(
        self,
        env: EnvFactory,
        *,
        total_frames: int,
        init_random_frames: int = 10_000,
        batch_size: int = 256,
        buffer_size: int = 1_000_000,
        updates_per_step: float = 1.0,
        steps_per_collection: int = 1,
        n_steps: int = 1,
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
            batch_size=batch_size,
            buffer_size=buffer_size,
            steps_per_collection=steps_per_collection,
            n_steps=n_steps,
        )
        if not 0 < updates_per_step < math.inf:
            raise ValueError(f"data.updates_per_step must be above 0, but is {updates_per_step}.")
        self.init_random_frames = init_random_frames
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.updates_per_step = updates_per_step
        together = num_envs * env.num_envs
        self.steps_per_collection = -(-steps_per_collection // together) * together
        self.n_steps = n_steps
        self.buffer: Any = None  # made in setup
        self.multi_step: MultiStepTransform | None = None
        # The last n steps of each environment still wait for their rewards.
        first = self.init_random_steps - (n_steps * together if n_steps > 1 else 0)
        waiting = f", data.n_steps={n_steps}" if n_steps > 1 else ""
        if batch_size > min(first, buffer_size):
            raise ValueError(
                f"data.batch_size is {batch_size}, but data.init_random_frames="
                f"{init_random_frames} gives only {max(0, first)} transitions before the first "
                f"update (action repeat {env.action_repeat}{waiting}) and data.buffer_size is "
                f"{buffer_size}: raise those or lower the batch size."
            )
        if init_random_frames >= total_frames:
            raise ValueError(
                f"data.init_random_frames={init_random_frames} leaves nothing of "
                f"data.total_frames={total_frames} for training."
            )
        if self.total_updates < 1:
            raise ValueError(
                f"data.total_frames={total_frames} and data.updates_per_step={updates_per_step} "
                "leave no update: raise one of them."
            )

    @abstractmethod
    def make_buffer(self) -> ReplayBuffer:
        """Return an empty replay buffer that samples ``batch_size`` transitions."""

    @property
    def init_random_steps(self) -> int:
        """Agent steps of the warm-up, a whole number of collections."""
        return self._whole_collections(self.init_random_frames)

    @property
    def total_updates(self) -> int:
        """Number of updates of the whole run."""
        return self._updates_after(self._whole_collections(self.total_frames))

    @property
    def is_up_to_date(self) -> bool:
        """Whether all updates that the frames so far allow have been made."""
        return self.updates >= self._updates_after(self.frames // self.env.action_repeat)

    def setup(self, stage: str) -> None:
        """Make the collector and the buffer."""
        super().setup(stage)
        if stage == "fit":
            self.buffer = self.make_buffer()
            if self.n_steps > 1:
                gamma = float(self.trainer.lightning_module.loss.value_estimator.gamma)
                # done_keys=[], because TorchRL's default (0.14) keeps the flags of the first step:
                # a sum that an episode's end cuts short would bootstrap from that end.
                self.multi_step = MultiStepTransform(self.n_steps, gamma, done_keys=[])

    def batches(self) -> Iterator[TensorDictBase]:
        """Yield samples, collecting whenever the frames so far allow no further update."""
        loss = self.trainer.lightning_module.loss
        while self.updates < self.total_updates:
            # A run resumed without its buffer has to fill one first.
            while self.is_up_to_date or len(self.buffer) < self.batch_size:
                # Only what the loss reads: during the warm-up the policy has written nothing.
                rollout = self.collect().select(*loss.in_keys)
                if self.multi_step is not None:
                    rollout = self.multi_step.inv(rollout)
                if rollout is not None:  # the first n steps still wait for their rewards
                    self.buffer.extend(rollout.reshape(-1))
            if self.updates == 0:
                self.evaluated_frames = self.frames  # nothing is trained yet to be evaluated
            batch = self.buffer.sample()
            self.updates += 1
            yield batch

    def contents(self) -> dict[str, Any]:
        """Return the transitions and the places of writer and sampler."""
        if self.buffer is None or len(self.buffer) == 0:
            return {}
        # Not the buffer's own state_dict: that is as large as its capacity, filled or not. A
        # clone, because a view is saved with all of the storage that it looks at.
        return {
            "capacity": self.buffer_size,
            "transitions": self.buffer[:].clone().to_dict(retain_none=False),
            "writer": dict(self.buffer.writer.state_dict()),
            "sampler": dict(self.buffer.sampler.state_dict()),
            "waiting": self._waiting(),
        }

    def _waiting(self) -> dict[str, Any]:
        """Return the steps that still wait for their rewards, if a sum has several."""
        waiting = self.multi_step and self.multi_step._buffer
        return {} if waiting is None else waiting.clone().to_dict(retain_none=False)

    def check_contents(self, contents: dict[str, Any]) -> None:
        """Raise if the transitions do not fit in the buffer or sum another number of rewards."""
        if not contents:
            return
        number = len(TensorDict.from_dict(contents["transitions"], batch_dims=1))
        if number > self.buffer_size:
            raise ValueError(
                f"The checkpoint holds {number} transitions, but data.buffer_size is "
                f"{self.buffer_size}: raise it to at least as many."
            )
        if ("steps_to_next_obs" in contents["transitions"]) != (self.n_steps > 1):
            raise ValueError(
                "The checkpoint's transitions were collected with another data.n_steps than "
                f"{self.n_steps}: set it as it was, or begin a fresh run."
            )

    def load_contents(self, contents: dict[str, Any]) -> None:
        """Take back transitions, each to its old place, and the places of writer and sampler."""
        if not contents:
            return
        transitions = TensorDict.from_dict(contents["transitions"], batch_dims=1)
        if contents["capacity"] == self.buffer_size:
            self.buffer.extend(transitions)
            self.buffer.writer.load_state_dict(contents["writer"])
        else:
            # The place of the next write is another one here: the oldest go first.
            oldest = contents["writer"]["_cursor"] % len(transitions)
            order = torch.arange(len(transitions)).roll(-oldest)
            self.buffer.extend(transitions[order])
        self.buffer.sampler.load_state_dict(contents["sampler"])
        # Where new episodes begin, the old ones' last steps have no rewards to wait for.
        multi_step, waiting = self.multi_step, contents.get("waiting")
        if multi_step is not None and waiting and self.continues_episodes:
            batch_dims = waiting["next"]["done"].ndim - 1
            multi_step._buffer = TensorDict.from_dict(waiting, batch_dims=batch_dims)

    def _whole_collections(self, frames: int) -> int:
        """Return the agent steps of the fewest collections that make so many frames."""
        frames_per_collection = self.steps_per_collection * self.env.action_repeat
        return -(-frames // frames_per_collection) * self.steps_per_collection

    def _updates_after(self, steps: int) -> int:
        """Return the updates that so many agent steps allow."""
        return max(0, int((steps - self.init_random_steps) * self.updates_per_step))
