"""Real TorchRL losses on small networks, for the tests of roles and of build_optimizer."""

import pytest
import torch
from tensordict.nn import TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ActorValueOperator, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, IQLLoss, SACLoss

OBSERVATIONS, ACTIONS, WIDTH = 5, 2, 16


def make_actor():
    """Build a tanh-normal actor with one fused mean and scale head."""
    network = nn.Sequential(
        MLP(OBSERVATIONS, 2 * ACTIONS, num_cells=[WIDTH, WIDTH]), NormalParamExtractor()
    )
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-torch.ones(ACTIONS), torch.ones(ACTIONS)),
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def make_critic(depth=2):
    """Build an action value with LayerNorm behind each hidden layer."""
    network = MLP(
        OBSERVATIONS + ACTIONS,
        1,
        num_cells=[WIDTH] * depth,
        norm_class=nn.LayerNorm,
        norm_kwargs=[{"normalized_shape": WIDTH}] * depth,
    )
    return ValueOperator(network, in_keys=["observation", "action"])


def make_operator():
    """Build an actor and a state value on one trunk, each with a hidden layer of its own."""
    trunk = MLP(OBSERVATIONS, WIDTH, num_cells=[WIDTH], activate_last_layer=True)
    policy = nn.Sequential(MLP(WIDTH, 2 * ACTIONS, num_cells=[WIDTH]), NormalParamExtractor())
    return ActorValueOperator(
        TensorDictModule(trunk, in_keys=["observation"], out_keys=["hidden"]),
        ProbabilisticActor(
            TensorDictModule(policy, in_keys=["hidden"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=Bounded(-torch.ones(ACTIONS), torch.ones(ACTIONS)),
            distribution_class=TanhNormal,
            return_log_prob=True,
        ),
        ValueOperator(MLP(WIDTH, 1, num_cells=[WIDTH]), in_keys=["hidden"]),
    )


def make_value():
    """Build a state value."""
    return ValueOperator(MLP(OBSERVATIONS, 1, num_cells=[WIDTH, WIDTH]), in_keys=["observation"])


@pytest.fixture
def make_sac():
    """Return a builder of a SACLoss with two stacked critics; keywords go to the loss."""

    def make(depth=2, **options):
        torch.manual_seed(0)
        return SACLoss(make_actor(), [make_critic(depth), make_critic(depth)], **options)

    return make


@pytest.fixture
def sac(make_sac):
    """Return a SACLoss with two stacked critics."""
    return make_sac()


@pytest.fixture
def ppo():
    """Return a ClipPPOLoss with an actor and a state value."""
    torch.manual_seed(0)
    return ClipPPOLoss(make_actor(), make_value())


@pytest.fixture
def iql():
    """Return an IQLLoss, whose critic is two networks: stacked action values and a state value."""
    torch.manual_seed(0)
    return IQLLoss(make_actor(), [make_critic(), make_critic()], make_value())


@pytest.fixture
def operator():
    """Return an actor and a state value on one trunk."""
    torch.manual_seed(0)
    return make_operator()
