"""PPO on vectors, as a recipe would wire it."""

from __future__ import annotations

from types import SimpleNamespace

from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.modules import TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from muon_rl.agent import Agent
from muon_rl.data import RolloutData
from muon_rl.envs import EnvFactory
from muon_rl.modules import mlp
from muon_rl.specs import Specs

GAMMA, LMBDA = 0.9, 0.8


class VectorPPOData(RolloutData):
    def make_collector(self, env, policy):
        return Collector(
            env,
            policy,
            frames_per_batch=self.steps_per_rollout,
            total_frames=-1,
            track_traj_ids=False,
            auto_register_policy_transforms=False,
        )


def networks(
    specs: Specs, key: str = "observation", features: int | None = None
) -> tuple[ValueOperator, list]:
    """Return a critic, and the modules of an actor, that read so many features from a key."""
    features = features or specs.observation.shape[-1]
    critic = ValueOperator(mlp(features, 1, [16]), in_keys=[key])
    if specs.action.dtype.is_floating_point:
        size = specs.action.shape[-1]
        extract = NormalParamExtractor("biased_softplus_1.0", 0.1)
        network = nn.Sequential(mlp(features, 2 * size, [16]), extract)
        return critic, [
            TensorDictModule(network, in_keys=[key], out_keys=["loc", "scale"]),
            ProbabilisticTensorDictModule(
                in_keys=["loc", "scale"],
                out_keys=["action"],
                distribution_class=TanhNormal,
                return_log_prob=True,
            ),
        ]
    return critic, [
        TensorDictModule(
            mlp(features, specs.action.space.n, [16]), in_keys=[key], out_keys=["logits"]
        ),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=Categorical,
            return_log_prob=True,
        ),
    ]


class TrunkOnce(ClipPPOLoss):
    """PPO's loss on heads, behind one pass through the trunk of the policy that holds them."""

    def __init__(self, policy: ProbabilisticTensorDictSequential) -> None:
        critic, *actor = policy.module[1:]
        super().__init__(ProbabilisticTensorDictSequential(*actor), critic)
        self.trunk_network = policy

    @property
    def in_keys(self):
        trunk = self.trunk_network[0]
        heads = [key for key in super().in_keys if key not in trunk.out_keys]
        return [*trunk.in_keys, *heads]

    def forward(self, tensordict):
        return super().forward(self.trunk_network[0](tensordict.copy()))


class VectorPPO(Agent):
    """The policy writes the value as it acts; networks of their own, or heads on a trunk."""

    def __init__(
        self, env: EnvFactory, *, shared=False, gamma=GAMMA, lmbda=LMBDA, case="muon", **options
    ):
        optimizer = {"actor": {"case": case}, "critic": {"case": case, "lr": 1e-3}}
        if shared:
            embed = TensorDictModule(
                mlp(env.specs.observation.shape[-1], 8, [16]), ["observation"], ["embed"]
            )
            critic, actor = networks(env.specs, "embed", 8)
            policy = ProbabilisticTensorDictSequential(embed, critic, *actor)
            loss, optimizer["trunk"] = TrunkOnce(policy), {"case": case}
        else:
            critic, actor = networks(env.specs)
            policy = ProbabilisticTensorDictSequential(critic, *actor)
            loss = ClipPPOLoss(ProbabilisticTensorDictSequential(*actor), critic)
        loss.make_value_estimator(ValueEstimators.GAE, gamma=gamma, lmbda=lmbda)
        super().__init__(loss=loss, policy=policy, optimizer=optimizer, **options)


def make(env: EnvFactory, agent: VectorPPO | None = None, **options) -> VectorPPOData:
    """Return PPO's data on an environment as Lightning's trainer would set it up."""
    data = VectorPPOData(env, **{"total_frames": 200, "steps_per_rollout": 40, **options})
    data.trainer = SimpleNamespace(
        lightning_module=agent or VectorPPO(env),
        received_sigterm=False,
        global_rank=0,
        state=SimpleNamespace(fn="fit"),
    )
    data.setup("fit")
    return data
