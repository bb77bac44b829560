"""PPO on boards: environment -> collector -> GAE -> loss -> optimizer, on one page.

Source: Schulman et al. 2017, arXiv:1707.06347; the loss is TorchRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from muon_rl.agent import Agent
from muon_rl.data import RolloutData
from muon_rl.envs import EnvFactory
from muon_rl.modules import GridActorCritic, TransformerActorCritic
from muon_rl.optim import OptimizerConfig
from muon_rl.specs import Specs


class PPOData(RolloutData):
    """Rollouts of many games that step together, served for several epochs of minibatches."""

    def make_collector(self, env: EnvBase, policy: TensorDictModuleBase) -> BaseCollector:
        """Return a collector of whole rollouts, whose steps hold the values of the states."""
        return Collector(
            env,
            policy,
            frames_per_batch=self.steps_per_rollout,
            total_frames=-1,
            track_traj_ids=False,
            auto_register_policy_transforms=False,  # the policy is not recurrent
        )


class TrunkOncePPOLoss(ClipPPOLoss):
    """TorchRL's PPO loss on two heads, behind one pass through the trunk that they share.

    Args:
        policy: whose trunk, actor and critic are trained.
        options: of ClipPPOLoss.
    """

    def __init__(self, policy: GridActorCritic, **options: object) -> None:
        super().__init__(policy.actor, policy.critic, **options)
        # With the heads: the optimizer sees by them that the trunk's last layer is a hidden one.
        self.trunk_network = policy

    @property
    def in_keys(self) -> list:
        """What the trunk reads in place of what it writes."""
        trunk = self.trunk_network.trunk
        return [*trunk.in_keys, *(key for key in super().in_keys if key not in trunk.out_keys)]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the loss's terms and metrics."""
        return super().forward(self.trunk_network.trunk(tensordict.copy()))


@dataclass
class HeadOptimizer(OptimizerConfig):
    """How a head is optimized: one last layer, so by AdamW unless Muon is to take that too."""

    case: Literal["muon", "adamw", "adam"] = "adamw"


@dataclass
class PPOOptimizers:
    """The optimizer of each part of the policy.

    Args:
        trunk: of what actor and critic share.
        actor: of the policy's head.
        critic: of the value's head.
    """

    trunk: OptimizerConfig = field(default_factory=OptimizerConfig)
    actor: HeadOptimizer = field(default_factory=HeadOptimizer)
    critic: HeadOptimizer = field(default_factory=HeadOptimizer)


class PPO(Agent):
    """Proximal policy optimization with clipped ratios, actor and critic on one trunk.

    Args:
        env: gives the networks their sizes.
        policy: makes trunk, actor and critic from the environment's specs.
        optimizer: of trunk, actor and critic.
        clip: how far the ratio of new to old probability may be from 1, > 0.
        entropy_coef: weight of the entropy bonus, in units of advantage per nat.
        value_coef: weight of the value's loss.
        gamma: discount per agent step, in [0, 1].
        lmbda: decay of the advantage's estimate per agent step, in [0, 1].
        max_grad_norm: bound on the norm of all gradients together, or {trunk: 0.5} for those of
            single networks; null for none.
        anneal_lr: whether all learning rates fall along a line, rollout by rollout, to 0 after the
            last one; or a scheduler of torch by its class_path, which counts updates.
    """

    def __init__(
        self,
        env: EnvFactory,
        policy: Callable[[Specs], GridActorCritic] = TransformerActorCritic,
        optimizer: PPOOptimizers = PPOOptimizers(),  # noqa: B008
        clip: float = 0.2,
        entropy_coef: float = 0.01,
        value_coef: float = 0.5,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        max_grad_norm: float | dict[str, float] | None = 0.5,
        anneal_lr: bool | Callable[[Optimizer], LRScheduler] = True,
    ) -> None:
        if not clip > 0.0:
            raise ValueError(f"model.clip must be above 0, but is {clip}.")
        for name, share in (("gamma", gamma), ("lmbda", lmbda)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"model.{name} must be in [0, 1], but is {share}.")
        acting = policy(env.specs)
        loss = TrunkOncePPOLoss(
            acting,
            clip_epsilon=clip,
            entropy_coeff=entropy_coef,
            critic_coeff=value_coef,
            loss_critic_type="smooth_l1",
            normalize_advantage=True,
        )
        # The data module takes its advantages from this estimator, with the values of the rollout.
        loss.make_value_estimator(ValueEstimators.GAE, gamma=gamma, lmbda=lmbda)
        super().__init__(
            loss=loss,
            policy=acting,
            optimizer=dict(vars(optimizer)),
            max_grad_norm=max_grad_norm,
            anneal_lr=anneal_lr,
        )
