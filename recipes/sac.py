"""Soft actor-critic: environment -> collector -> buffer -> loss -> optimizer, on one page.

Source: Haarnoja et al. 2018, arXiv:1812.05905; the loss is TorchRL's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tensordict.nn import TensorDictModuleBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.collectors import BaseCollector, Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.objectives import SACLoss, SoftUpdate

from muon_rl.agent import Agent
from muon_rl.data import ReplayData
from muon_rl.envs import EnvFactory
from muon_rl.modules import QCritic, TanhNormalActor
from muon_rl.optim import OptimizerConfig
from muon_rl.specs import Specs


class SACData(ReplayData):
    """One environment or several, a uniform replay buffer, returns of one step or several."""

    def make_collector(self, env: EnvBase, policy: TensorDictModuleBase) -> BaseCollector:
        """Return a collector that acts at random first and with the policy after that."""
        return Collector(
            env,
            policy,
            frames_per_batch=self.steps_per_collection,
            total_frames=-1,
            init_random_frames=self.init_random_steps,
            track_traj_ids=False,
            auto_register_policy_transforms=False,  # the policy is not recurrent
        )

    def make_buffer(self) -> ReplayBuffer:
        """Return the buffer of single transitions, sampled uniformly."""
        return TensorDictReplayBuffer(
            storage=LazyTensorStorage(self.buffer_size), batch_size=self.batch_size
        )


@dataclass
class AlphaOptimizer(OptimizerConfig):
    """How the entropy coefficient is optimized: a number, so by Adam unless set."""

    case: Literal["muon", "adamw", "adam"] = "adam"


@dataclass
class SACOptimizers:
    """The optimizer of each of SAC's networks.

    Args:
        actor: of the policy.
        critic: of all Q-networks.
        alpha: of the entropy coefficient.
    """

    actor: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    alpha: AlphaOptimizer = field(default_factory=AlphaOptimizer)


class SAC(Agent):
    """Soft actor-critic with a learned or a fixed entropy coefficient and stacked critics.

    Args:
        env: gives the networks their sizes.
        actor: makes the policy from the environment's specs.
        critic: makes one Q-network from the environment's specs.
        optimizer: of actor, critic and alpha.
        num_critics: Q-networks, at least 2; their minimum is the target.
        alpha_init: entropy coefficient at the start, > 0, in units of return per nat.
        fixed_alpha: whether it stays what it is, instead of being learned.
        target_entropy: that a learned coefficient holds the policy to, in nats; "auto" is minus
            the number of actions.
        gamma: discount per agent step, in [0, 1].
        tau: share of the online critics that moves into the targets at each update, in (0, 1].
        max_grad_norm: bound on the norm of all gradients together, or {critic: 10} for those of
            single networks; null for none.
        anneal_lr: whether all learning rates fall along a line, to 0 after the last update; or a
            scheduler of torch by its class_path, which counts updates.
    """

    def __init__(
        self,
        env: EnvFactory,
        actor: Callable[[Specs], TanhNormalActor] = TanhNormalActor,
        critic: Callable[[Specs], QCritic] = QCritic,
        optimizer: SACOptimizers = SACOptimizers(),  # noqa: B008
        num_critics: int = 2,
        alpha_init: float = 1.0,
        fixed_alpha: bool = False,
        target_entropy: float | Literal["auto"] = "auto",
        gamma: float = 0.99,
        tau: float = 0.005,
        max_grad_norm: float | dict[str, float] | None = None,
        anneal_lr: bool | Callable[[Optimizer], LRScheduler] = False,
    ) -> None:
        if num_critics < 2:
            # TorchRL's loss leaves the parameters of a single one out (torchrl 0.14).
            raise ValueError(f"model.num_critics must be at least 2, but is {num_critics}.")
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"model.gamma must be in [0, 1], but is {gamma}.")
        if not 0.0 < tau <= 1.0:
            raise ValueError(f"model.tau must be in (0, 1], but is {tau}.")
        if not 0.0 < alpha_init < math.inf:
            raise ValueError(f"model.alpha_init must be above 0, but is {alpha_init}.")
        policy = actor(env.specs)
        # A list, because from a single critic TorchRL would draw new weights for the others.
        critics = [critic(env.specs) for _ in range(num_critics)]
        loss = SACLoss(
            policy,
            critics,
            num_qvalue_nets=num_critics,
            alpha_init=alpha_init,
            fixed_alpha=fixed_alpha,
            target_entropy=target_entropy,
        )
        loss.make_value_estimator(gamma=gamma)
        _ = loss.target_entropy  # makes the lazy buffer, which a checkpoint must find
        optimizers = dict(vars(optimizer))
        if fixed_alpha:
            del optimizers["alpha"]  # nothing of it is trained
        super().__init__(
            loss=loss,
            policy=policy,
            optimizer=optimizers,
            targets=[SoftUpdate(loss, tau=tau)],
            max_grad_norm=max_grad_norm,
            anneal_lr=anneal_lr,
        )
