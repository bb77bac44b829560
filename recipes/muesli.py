"""Muesli: environment -> collector -> buffer -> losses -> optimizer, on one page.

Source: Hessel et al. 2021, arXiv:2104.06159; PPO's loss is TorchRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.collectors import BaseCollector, Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler
from torchrl.envs import EnvBase
from torchrl.objectives import ClipPPOLoss, DQNLoss, LossModule, SoftUpdate, ValueEstimators

from muon_rl.agent import Agent
from muon_rl.data import SequenceData
from muon_rl.data.sequences import STRETCH
from muon_rl.envs import EnvFactory
from muon_rl.modules import MuesliPolicy, QHead, WorldModel
from muon_rl.objectives import (
    CMPOLoss,
    DynamicsLoss,
    LossSequence,
    MuesliModelLoss,
    MuesliPolicyLoss,
    OneStepLookahead,
)
from muon_rl.objectives.presets import PRESETS
from muon_rl.optim import OptimizerConfig
from muon_rl.optim.roles import network_roles
from muon_rl.specs import Specs


class MuesliData(SequenceData):
    """Sequences of the newest collection, mixed with windows of a replay buffer."""

    def make_collector(self, env: EnvBase, policy: TensorDictModuleBase) -> BaseCollector:
        """Return a collector whose steps hold the log-probability of the action that was taken."""
        return Collector(
            env,
            policy,
            frames_per_batch=self.steps_per_collection,
            total_frames=-1,
            track_traj_ids=False,
            auto_register_policy_transforms=False,  # the policy is not recurrent
        )

    def make_buffer(self) -> ReplayBuffer:
        """Return the buffer of steps, a row a game, of which windows are drawn uniformly."""
        return ReplayBuffer(
            storage=LazyTensorStorage(self.buffer_size, ndim=2),
            sampler=SliceSampler(
                slice_len=self.sequence_length,
                traj_key=STRETCH,
                strict_length=True,
                cache_values=True,
            ),
            batch_size=self.replayed * self.sequence_length,
            dim_extend=1,
        )


class QHeadLoss(DQNLoss):
    """TorchRL's DQN loss, its term under the name that is trained."""

    out_keys = ["loss_q_head"]  # noqa: RUF012

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, delay_value=True, **options)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the loss's term."""
        return TensorDict({"loss_q_head": super().forward(tensordict)["loss"]}, [])


class MuesliLosses(LossSequence):
    """The losses in their order, behind one estimate of returns that all of them read."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the terms and metrics of all losses for sequences ``(batch, time)``."""
        data, policy = tensordict.copy(), self.losses["policy"]
        prior = policy.target_critic_network_params
        # Muesli's advantage is over the target network's value, PPO's over the critic's.
        muesli = isinstance(policy, MuesliPolicyLoss)
        now = prior if muesli else policy.critic_network_params
        policy.value_estimator(data, params=now, target_params=prior)
        return super().forward(data)


@dataclass
class QHeadOptimizer(OptimizerConfig):
    """How a Q-head is optimized where there is one."""

    case: Literal["muon", "adamw", "adam"] = "adamw"


@dataclass
class MuesliOptimizers:
    """The optimizer of each network.

    Args:
        actor: of the world model, which acts as well.
        critic: of the Q-head, where ``action_values`` is q_head.
    """

    actor: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: QHeadOptimizer = field(default_factory=QHeadOptimizer)


class Muesli(Agent):
    """A policy gradient beside a better policy (CMPO), and a world model that learns both.

    What it is made of is set term by term, so that the same page gives PPO alone
    (``policy_gradient=ppo, action_values=none, model_policy=none``), all of Muesli (the defaults)
    and what lies between.

    Args:
        env: gives the networks their sizes.
        world_model: makes the network of everything from the environment's specs.
        optimizer: of the world model and, where there is one, of the Q-head.
        policy_gradient: retrace (importance-weighted, on the returns of Retrace) or ppo (TorchRL's,
            on GAE, which wants data.replay_fraction=0).
        action_values: that CMPO values actions by: of the model one step ahead, of a q_head that
            DQN trains, or none, which leaves CMPO out.
        model_policy: that the world model learns to say of later states: cmpo, the current one, or
            none, which leaves its losses out.
        dynamics: whether DynamicsLoss unrolls the model for all; else its policy's loss does.
        preset: coefficients and steps that belong together: paper, conservative or aggressive.
        kl_coef: of CMPO's divergence; null for the preset's, as with the five that follow.
        policy_pred_coef: of the model's policies.
        value_pred_coef: of the model's values.
        reward_pred_coef: of the model's rewards.
        unroll_steps: agent steps that the model is unrolled, >= 1.
        policy_horizon: first of these whose policy is predicted, 1 to ``unroll_steps``.
        advantage_clip: largest exponent of CMPO, > 0: the policy is moved by at most tanh(c/2).
        prior_mixture: shares of prior, behaviour and uniform policy that make up CMPO's prior, such
            as [0.95, 0, 0.05], which keeps a policy from settling; null is [1, 0, 0]. For discrete
            actions only.
        value_target: what the critic learns where ``policy_gradient`` is retrace: action_value, the
            return of the action taken (Muesli's), or state_value, which corrects that action too,
            so that old data of a worse policy do not lower the values.
        max_importance_ratio: what retrace's ratio of new to old probability is cut down to, > 0;
            null leaves it as it is.
        clip: how far PPO's ratio of new to old probability may be from 1, > 0.
        entropy_coef: weight of PPO's entropy bonus, in units of advantage per nat.
        value_coef: weight of the critic's loss.
        gamma: discount per agent step, in [0, 1].
        lmbda: decay of the returns' trace per agent step, in [0, 1].
        tau: share of the online network that moves into the prior at each update, in (0, 1].
        max_grad_norm: bound on the norm of all gradients together; null for none.
        anneal_lr: whether all learning rates fall along a line, to 0 after the last update; or a
            scheduler of torch by its class_path, which counts updates.
    """

    def __init__(
        self,
        env: EnvFactory,
        world_model: Callable[[Specs], WorldModel] = WorldModel,
        optimizer: MuesliOptimizers = MuesliOptimizers(),  # noqa: B008
        policy_gradient: Literal["retrace", "ppo"] = "retrace",
        action_values: Literal["model", "q_head", "none"] = "model",
        model_policy: Literal["cmpo", "current", "none"] = "cmpo",
        dynamics: bool = True,
        preset: Literal["paper", "conservative", "aggressive"] = "paper",
        kl_coef: float | None = None,
        policy_pred_coef: float | None = None,
        value_pred_coef: float | None = None,
        reward_pred_coef: float | None = None,
        unroll_steps: int | None = None,
        policy_horizon: int | None = None,
        advantage_clip: float = 1.0,
        prior_mixture: tuple[float, float, float] | None = None,
        value_target: Literal["action_value", "state_value"] = "action_value",
        max_importance_ratio: float | None = None,
        clip: float = 0.2,
        entropy_coef: float = 0.01,
        value_coef: float = 0.25,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        tau: float = 0.1,
        max_grad_norm: float | dict[str, float] | None = 1.0,
        anneal_lr: bool | Callable[[Optimizer], LRScheduler] = True,
    ) -> None:
        for name, share in (("gamma", gamma), ("lmbda", lmbda)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"model.{name} must be in [0, 1], but is {share}.")
        for name, number in (("clip", clip), ("advantage_clip", advantage_clip)):
            if not number > 0.0:
                raise ValueError(f"model.{name} must be above 0, but is {number}.")
        if not 0.0 < tau <= 1.0:
            raise ValueError(f"model.tau must be in (0, 1], but is {tau}.")
        if model_policy == "cmpo" and action_values == "none":
            raise ValueError(
                "model.model_policy=cmpo needs CMPO, but model.action_values=none leaves it out: "
                "set it to model or q_head, or model.model_policy to current or none."
            )
        options = PRESETS[preset]
        steps = {"unroll_steps": unroll_steps, "policy_horizon": policy_horizon}
        if unroll_steps is not None and policy_horizon is None:
            steps["policy_horizon"] = min(unroll_steps, options["dynamics"]["policy_horizon"])
        scalars = {"reward_pred_coef": reward_pred_coef, **steps}

        def chosen(loss: str, **given: Any) -> dict[str, Any]:
            """Return the preset's options of a loss, with those that were given in their place."""
            return options[loss] | {key: value for key, value in given.items() if value is not None}

        policy = MuesliPolicy(world_model(env.specs))
        losses: dict[str, LossModule] = {}
        targets: list[SoftUpdate] = []  # one for each loss that has target networks
        # -- the policy's gradient and the critic
        if policy_gradient == "ppo":
            model = policy.world_model
            critic = TensorDictSequential(model.representation, model.prediction)
            ppo = ClipPPOLoss(
                policy,
                critic,
                clip_epsilon=clip,
                entropy_coeff=entropy_coef,
                critic_coeff=value_coef,
                loss_critic_type="smooth_l1",
                normalize_advantage=True,
            )
            ppo.set_keys(value="value_pred")
            ppo.make_value_estimator(ValueEstimators.GAE, gamma=gamma, lmbda=lmbda)
            losses["policy"] = ppo
        else:
            retrace = MuesliPolicyLoss(
                policy, value_pred_coef=value_coef, max_importance_ratio=max_importance_ratio
            )
            retrace.make_value_estimator(gamma=gamma, lmbda=lmbda, target=value_target)
            losses["policy"] = retrace
            targets.append(SoftUpdate(retrace, tau=tau))
        # -- the better policy that it stays near
        if action_values != "none":
            q_network: Any = OneStepLookahead(policy, gamma=gamma)
            if action_values == "q_head":
                q_network = QHead(policy.world_model)
                losses["q_head"] = QHeadLoss(q_network, action_space="categorical")
                losses["q_head"].make_value_estimator(gamma=gamma)
                targets.append(SoftUpdate(losses["q_head"], tau=tau))
            losses["cmpo"] = CMPOLoss(
                policy,
                q_network,
                advantage_clip_min=-advantage_clip,
                advantage_clip_max=advantage_clip,
                prior_mixture=prior_mixture,
                next_targets=False,
                **chosen("cmpo", kl_coef=kl_coef),
            )
            targets.append(SoftUpdate(losses["cmpo"], tau=tau))
        # -- the world model
        if model_policy != "none":
            if dynamics:
                losses["dynamics"] = DynamicsLoss(
                    policy, **chosen("dynamics", returns_pred_coef=value_pred_coef, **scalars)
                )
                targets.append(SoftUpdate(losses["dynamics"], tau=tau))
            losses["model"] = MuesliModelLoss(
                policy,
                policy_target=model_policy,
                own_unroll=not dynamics,
                # CMPO would value twice the states for the one that follows a window.
                next_targets=False,
                **chosen(
                    "muesli_model",
                    policy_pred_coef=policy_pred_coef,
                    value_pred_coef=value_pred_coef,
                    **scalars,
                ),
            )
            if not dynamics:  # then it has values to bootstrap from
                targets.append(SoftUpdate(losses["model"], tau=tau))
        loss = MuesliLosses(losses)
        # PPO's critic shares with the actor what is a trunk as soon as there is a Q-head as well.
        of = {"actor": optimizer.actor, "trunk": optimizer.actor, "critic": optimizer.critic}
        super().__init__(
            loss=loss,
            policy=policy,
            optimizer={name: of[name] for name in network_roles(loss)},
            targets=targets,
            max_grad_norm=max_grad_norm,
            anneal_lr=anneal_lr,
        )
