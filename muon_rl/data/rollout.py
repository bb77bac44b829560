"""On-policy data: a rollout, its advantages, then epochs of minibatches of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives.value import GAE

from muon_rl.data.base import AgentData, require_positive
from muon_rl.envs import EnvFactory


class RolloutData(AgentData):
    r"""Collects a rollout with the present policy, and serves each transition once an epoch.

    Advantages and value targets are TorchRL's ``GAE``, with the discount, the decay and the
    ``average_gae`` of the loss's own value estimator:

    .. math::

        \delta_t = r_t + \gamma\,(1 - \mathrm{terminated}_t)\, V(s'_t) - V(s_t), \qquad
        A_t = \delta_t + \gamma\lambda\,(1 - \mathrm{done}_t)\, A_{t+1}

    :math:`V(s_t)` is the value that the policy wrote while it acted, and so is :math:`V(s'_t) =
    V(s_{t+1})` within an episode. Only where the rollout does not show the next state, at a
    truncation and at its end, the policy is run once more.

    Args:
        env: makes the training and the evaluation environment.
        total_frames: control steps of the simulator after which training ends, rounded up to whole
            rollouts.
        steps_per_rollout: agent steps of a rollout, those of all environments together; rounded up
            to a multiple of ``num_envs``, or of the games that step together in one.
        epochs: passes through each rollout, in a new order each.
        minibatches: parts of an epoch, one update each; their sizes differ by at most 1.
        eval_every: frames between two evaluations; another one ends the run.
        eval_episodes: episodes of an evaluation.
        eval_seed: seed of an evaluation's first episode.
        eval_sampled: whether evaluation draws its actions from the policy; the metrics of the
            policy's modes are then ``eval/greedy_*``, beside them.
        num_envs: training environments that step together.
        env_processes: whether each of them has a process of its own; a resumed run then begins
            new episodes.

    Raises:
        ValueError: if a number is below 1, or a minibatch has no transition.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; Schulman et al. 2017, arXiv:1707.06347,
    algorithm 1; Pardo et al. 2018, arXiv:1712.00378 (truncations).
    """

    def __init__(
        self,
        env: EnvFactory,
        *,
        total_frames: int,
        steps_per_rollout: int = 2048,
        epochs: int = 4,
        minibatches: int = 4,
        eval_every: int = 10_000,
        eval_episodes: int = 10,
        eval_seed: int = 0,
        eval_sampled: bool = False,
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
            save_buffer=True,  # within a rollout a run cannot go on without it
            num_envs=num_envs,
            env_processes=env_processes,
        )
        require_positive(
            steps_per_rollout=steps_per_rollout, epochs=epochs, minibatches=minibatches
        )
        together = num_envs * env.num_envs
        self.steps_per_rollout = -(-steps_per_rollout // together) * together
        self.epochs = epochs
        self.minibatches = minibatches
        if minibatches > self.steps_per_rollout:
            raise ValueError(
                f"data.minibatches is {minibatches}, but data.steps_per_rollout gives only "
                f"{self.steps_per_rollout} transitions: lower it, or collect more."
            )
        self._rollout: TensorDictBase | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def total_updates(self) -> int:
        """Number of updates of the whole run."""
        frames_per_rollout = self.steps_per_rollout * self.env.action_repeat
        return -(-self.total_frames // frames_per_rollout) * self.updates_per_rate

    @property
    def updates_per_rate(self) -> int:
        """Updates of one rollout, which share one learning rate where rates are annealed."""
        return self.epochs * self.minibatches

    @property
    def is_up_to_date(self) -> bool:
        """Whether all updates of the rollouts so far have been made."""
        return self.updates % self.updates_per_rate == 0

    def batches(self) -> Iterator[TensorDictBase]:
        """Yield minibatches, collecting a rollout whenever one is used up.

        Raises:
            ValueError: if the loss's value estimator is not GAE, the policy writes no value, or the
                environment's own batch makes rollouts of another size.
        """
        while self.updates < self.total_updates:
            if self.is_up_to_date:
                self._rollout = self._prepared(self.collect())
            part = self.updates % self.minibatches
            if part == 0:
                self._order = torch.randperm(self.steps_per_rollout)
            rows = self._order.tensor_split(self.minibatches)[part]
            self.updates += 1
            yield self._rollout[rows]  # type: ignore[index]

    def contents(self) -> dict[str, Any]:
        """Return the rollout in use and the order of its epoch, if updates of it are left."""
        contents: dict[str, Any] = {"sizes": self._sizes}
        if not self.is_up_to_date and self._rollout is not None:
            contents["rollout"] = self._rollout.to_dict(retain_none=False)
            contents["order"] = self._order
        return contents

    def check_contents(self, contents: dict[str, Any]) -> None:
        """Raise if rollouts were of another size, or had another number of updates."""
        for name, before in contents.get("sizes", {}).items():
            now = self._sizes[name]
            if before != now:
                raise ValueError(
                    f"data.{name} is {before} in the checkpoint and {now} in this "
                    "config: set it as it was, or begin a fresh run."
                )

    def load_contents(self, contents: dict[str, Any]) -> None:
        """Take back the rollout in use and the order of its epoch."""
        if "rollout" in contents:
            self._rollout = TensorDict.from_dict(contents["rollout"], batch_dims=1)
            self._order = contents["order"]

    @property
    def _sizes(self) -> dict[str, int]:
        return {
            "steps_per_rollout": self.steps_per_rollout,
            "epochs": self.epochs,
            "minibatches": self.minibatches,
        }

    def _prepared(self, rollout: TensorDictBase) -> TensorDictBase:
        """Return the transitions in one dim, with advantage and value target, for the loss."""
        if rollout.numel() != self.steps_per_rollout:
            raise ValueError(
                f"A rollout has {rollout.numel()} steps, but data.steps_per_rollout is "
                f"{self.steps_per_rollout}: set it to a multiple of the environments, which are "
                f"{rollout.shape[:-1].numel()}."
            )
        loss = self.trainer.lightning_module.loss
        estimator = loss.value_estimator
        if not isinstance(estimator, GAE):
            raise ValueError(
                f"{type(self).__name__} needs a loss whose value estimator is GAE, but "
                f"{type(loss).__name__}'s is {type(estimator).__name__}: call "
                "make_value_estimator(ValueEstimators.GAE, gamma=..., lmbda=...)."
            )
        keys = estimator.tensor_keys
        if keys.value not in rollout:
            raise ValueError(
                f"{type(self).__name__} needs a policy that writes {keys.value!r} while it acts, "
                f"but it writes {sorted(map(str, self.trainer.lightning_module.policy.out_keys))}."
            )
        rollout = rollout.copy()
        rollout["next", keys.value] = self._next_values(rollout, keys.value)
        advantages = GAE(
            gamma=estimator.gamma,
            lmbda=estimator.lmbda,
            value_network=None,
            average_gae=estimator.average_gae,
            vectorized=estimator.vectorized,
        )
        advantages.set_keys(**vars(keys))
        advantages(rollout, time_dim=rollout.ndim - 1)
        now = [key for key in loss.in_keys if key[0] != "next"]
        kept = rollout.select(*now, keys.value, keys.advantage, keys.value_target, strict=False)
        return kept.reshape(-1)

    def _next_values(self, rollout: TensorDictBase, key: Any) -> Tensor:
        """Return the value of each next state, any number where the episode terminated."""
        values, after = rollout[key], rollout["next"]
        unseen = after["done"].clone()
        unseen[..., -1, :] = True
        unseen = (unseen & ~after["terminated"]).squeeze(-1)
        following = values.roll(-1, dims=values.ndim - 2)
        if unseen.any():
            policy = self.trainer.lightning_module.policy
            states = after[unseen].select(*policy.in_keys)
            # Not sampled: what an action would draw is left to the actions that are taken.
            with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
                following[unseen] = policy(states)[key].to(following.device)
        return following
