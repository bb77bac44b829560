"""PPO on vectors, as a recipe would wire it."""

from __future__ import annotations

from types import SimpleNamespace

from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from muon_rl.agent import Agent
from muon_rl.data import RolloutData
from muon_rl.envs import EnvFactory
from muon_rl.modules import TanhNormalActor, mlp
from muon_rl.specs import Specs

GAMMA, LMBDA = 0.9, 0.8


class PPOData(RolloutData):
    def make_collector(self, env, policy):
        return Collector(
            env,
            policy,
            frames_per_batch=self.steps_per_rollout,
            total_frames=-1,
            track_traj_ids=False,
            auto_register_policy_transforms=False,
        )


def networks(specs: Specs) -> tuple[ValueOperator, list]:
    """Return a critic, and the modules of an actor."""
    features = specs.observation.shape[-1]
    critic = ValueOperator(mlp(features, 1, [16]), in_keys=["observation"])
    if specs.action.dtype.is_floating_point:
        gaussian = TanhNormalActor(specs, hidden=[16])
        choice = ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=gaussian[-1].distribution_class,
            distribution_kwargs=gaussian[-1].distribution_kwargs,
            return_log_prob=True,
        )
        return critic, [gaussian[0], choice]
    return critic, [
        TensorDictModule(
            mlp(features, specs.action.space.n, [16]), in_keys=["observation"], out_keys=["logits"]
        ),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=Categorical,
            return_log_prob=True,
        ),
    ]


class PPO(Agent):
    """Policy and value in networks of their own; the policy writes the value as it acts."""

    def __init__(self, env: EnvFactory, *, gamma=GAMMA, lmbda=LMBDA, case="muon", **options):
        critic, actor = networks(env.specs)
        loss = ClipPPOLoss(ProbabilisticTensorDictSequential(*actor), critic)
        loss.make_value_estimator(ValueEstimators.GAE, gamma=gamma, lmbda=lmbda)
        super().__init__(
            loss=loss,
            policy=ProbabilisticTensorDictSequential(critic, *actor),
            optimizer={"actor": {"case": case}, "critic": {"case": case, "lr": 1e-3}},
            **options,
        )


def make(env: EnvFactory, agent: PPO | None = None, **options) -> PPOData:
    """Return PPO's data on an environment as Lightning's trainer would set it up."""
    data = PPOData(env, **{"total_frames": 200, "steps_per_rollout": 40, **options})
    data.trainer = SimpleNamespace(
        lightning_module=agent or PPO(env),
        received_sigterm=False,
        global_rank=0,
        state=SimpleNamespace(fn="fit"),
    )
    data.setup("fit")
    return data
