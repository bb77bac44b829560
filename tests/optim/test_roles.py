"""What each parameter is, on plain modules and on real TorchRL losses."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchrl.modules
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams, TensorDictSequential
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torchrl.data import Bounded
from torchrl.modules import (
    MLP,
    ConvNet,
    DdpgMlpQNet,
    DuelingCnnDQNet,
    GRUModule,
    LSTMModule,
    MultiAgentMLP,
    NoisyLinear,
    ProbabilisticActor,
    QMixer,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.modules.models.models import DuelingMlpDQNet
from torchrl.objectives import A2CLoss, ClipPPOLoss, DQNLoss, LossModule, SACLoss

from muon_rl.optim import ParameterRole, build_optimizer, parameter_roles
from muon_rl.optim.roles import network_roles

STACKED_CRITIC = {
    "module.0.weight": ("first", (2, 16, 7)),
    "module.0.bias": ("bias", (2, 16)),
    "module.1.weight": ("norm", (2, 16)),
    "module.1.bias": ("norm", (2, 16)),
    "module.3.weight": ("hidden", (2, 16, 16)),
    "module.3.bias": ("bias", (2, 16)),
    "module.4.weight": ("norm", (2, 16)),
    "module.4.bias": ("norm", (2, 16)),
    "module.6.weight": ("last", (2, 1, 16)),
    "module.6.bias": ("bias", (2, 1)),
}
ACTOR = {
    "module.0.module.0.0.weight": "first",
    "module.0.module.0.0.bias": "bias",
    "module.0.module.0.2.weight": "hidden",
    "module.0.module.0.2.bias": "bias",
    "module.0.module.0.4.weight": "last",
    "module.0.module.0.4.bias": "bias",
}
VALUE = {
    "module.0.weight": "first",
    "module.0.bias": "bias",
    "module.2.weight": "hidden",
    "module.2.bias": "bias",
    "module.4.weight": "last",
    "module.4.bias": "bias",
}


def names_of(module):
    return {name: role.role for name, role in parameter_roles(module).items()}


LAYER_ROLES = ("first", "hidden", "last")


def layers_of(roles):
    """Return the roles of layers' weights alone, by the layer's name."""
    return {
        name.removesuffix(".weight"): role.role
        for name, role in roles.items()
        if role.role in LAYER_ROLES
    }


def under(prefix, roles):
    """Return the roles below a prefix, without it."""
    return {
        name.removeprefix(prefix): role for name, role in roles.items() if name.startswith(prefix)
    }


# ------------------------------------------------------------------------------- TorchRL losses


def test_stacked_critics_of_sac_have_one_batch_dim_and_roles_of_their_layers(sac):
    roles = under("qvalue_network_params.", parameter_roles(sac))
    shapes = {
        name: tuple(p.shape)
        for name, p in under("qvalue_network_params.", dict(sac.named_parameters())).items()
    }
    # The trap: stacked biases and norms have two dims, as matrices do.
    assert shapes == {name: shape for name, (_, shape) in STACKED_CRITIC.items()}
    assert roles == {
        name: ParameterRole(role, batch_dims=1) for name, (role, _) in STACKED_CRITIC.items()
    }


def test_the_actor_of_sac_is_not_stacked_and_its_fused_head_is_one_last_matrix(sac):
    roles = under("actor_network_params.", parameter_roles(sac))
    assert roles == {name: ParameterRole(role) for name, role in ACTOR.items()}


def test_the_temperature_of_sac_is_a_network_of_its_own_without_a_layer(sac):
    assert network_roles(sac)["alpha"] == {"log_alpha": ParameterRole("other")}


def test_roles_come_in_the_order_of_named_parameters_one_for_each(sac, ppo):
    for loss in (sac, ppo, nn.Transformer(8, 2, 1, 1, 16, batch_first=True)):
        assert list(parameter_roles(loss)) == [name for name, _ in loss.named_parameters()]


def test_a_fixed_temperature_is_no_parameter(make_sac):
    assert set(network_roles(make_sac(fixed_alpha=True))) == {"actor", "critic"}


def test_a_stacked_critic_of_more_than_ten_layers_keeps_their_order(make_sac):
    roles = under("qvalue_network_params.module.", parameter_roles(make_sac(depth=12)))
    weights = [name for name, role in roles.items() if role.role in ("first", "hidden", "last")]
    assert weights == [f"{3 * layer}.weight" for layer in range(13)]
    assert [roles[name].role for name in weights] == ["first"] + ["hidden"] * 11 + ["last"]


def test_ppo_has_an_actor_and_a_critic_that_is_not_stacked(ppo):
    networks = network_roles(ppo)
    assert under("actor_network_params.", networks["actor"]) == {
        name: ParameterRole(role) for name, role in ACTOR.items()
    }
    assert under("critic_network_params.", networks["critic"]) == {
        name: ParameterRole(role) for name, role in VALUE.items()
    }
    assert set(networks) == {"actor", "critic"}


def test_dqn_has_a_critic():
    loss = DQNLoss(MLP(4, 2, num_cells=[8, 8]), action_space="one-hot")
    roles = network_roles(loss)
    assert set(roles) == {"critic"}
    assert [role.role for role in roles["critic"].values()] == [
        "first", "bias", "hidden", "bias", "last", "bias",
    ]  # fmt: skip


def test_state_value_and_action_values_of_iql_each_have_a_first_and_a_last_layer(iql):
    roles = parameter_roles(iql)
    assert under("value_network_params.", roles) == {
        name: ParameterRole(role) for name, role in VALUE.items()
    }
    assert under("qvalue_network_params.", roles) == {
        name: ParameterRole(role, batch_dims=1) for name, (role, _) in STACKED_CRITIC.items()
    }


def test_a_loss_inside_another_module_has_the_same_roles(sac):
    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = sac
            self.encoder = nn.Linear(4, 4)

    roles = parameter_roles(Agent())
    assert under("loss.", roles) == parameter_roles(sac)
    assert roles["encoder.weight"].role == "last"


def test_networks_are_named_by_attribute_without_the_ending():
    module = nn.ModuleDict(
        {
            name: nn.Linear(3, 3)
            for name in ("actor_network", "qvalue_network", "world_model_network", "encoder")
        }
    )
    assert list(network_roles(module)) == ["actor", "critic", "world_model", "encoder"]


# ------------------------------------------------------------------- paths in TorchRL's networks


class TwoHeads(nn.Module):
    """A Gaussian's mean and scale from two layers, registered before the trunk they stand on."""

    def __init__(self, inputs=5, actions=2, width=16):
        super().__init__()
        self.log_std = nn.Linear(width, actions)
        self.mean = nn.Linear(width, actions)
        self.trunk = MLP(inputs, width, num_cells=[width], activate_last_layer=True)

    def forward(self, observation):
        h = self.trunk(observation)
        return self.mean(h), self.log_std(h).clamp(-5, 2).exp()


TWO_HEADS = {"log_std": "last", "mean": "last", "trunk.0": "first", "trunk.2": "hidden"}


def gaussian(network, **options):
    return ProbabilisticActor(
        TensorDictModule(network, out_keys=["loc", "scale"], **options),
        in_keys=["loc", "scale"],
        spec=Bounded(-torch.ones(2), torch.ones(2)),
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def test_two_parallel_heads_of_a_sac_actor_are_both_last():
    critics = [ValueOperator(MLP(7, 1), in_keys=["observation", "action"]) for _ in range(2)]
    loss = SACLoss(gaussian(TwoHeads(), in_keys=["observation"]), critics)
    roles = under("actor_network_params.module.0.module.", parameter_roles(loss))
    assert layers_of(roles) == TWO_HEADS


def test_stacked_critics_that_take_the_action_in_the_second_layer_have_one_first():
    critics = [DdpgMlpQNet({"in_features": 5}, {"in_features": 402}) for _ in range(3)]
    critics = [ValueOperator(critic, in_keys=["observation", "action"]) for critic in critics]
    loss = SACLoss(gaussian(TwoHeads(), in_keys=["observation"]), critics, num_qvalue_nets=3)
    roles = under("qvalue_network_params.module.", parameter_roles(loss))
    assert layers_of(roles) == {"mlp1.0": "first", "mlp2.0": "hidden", "mlp2.2": "last"}
    assert {role.batch_dims for role in roles.values()} == {1}


@pytest.mark.parametrize(
    ("kind", "observation"),
    [(DuelingMlpDQNet, (1, 4)), (DuelingCnnDQNet, (1, 3, 84, 84))],
    ids=["mlp", "cnn"],
)
def test_advantage_and_value_of_a_dueling_network_both_end_in_a_last_layer(kind, observation):
    net = kind(2)
    net(torch.zeros(observation))
    loss = DQNLoss(
        QValueActor(net, in_keys=["observation"], action_space="one-hot"), action_space="one-hot"
    )
    assert layers_of(under("value_network_params.module.0.module.", parameter_roles(loss))) == {
        "features.0": "first",
        "features.2": "hidden",
        "features.4": "hidden",
        "advantage.0": "hidden",
        "advantage.2": "last",
        "value.0": "hidden",
        "value.2": "last",
    }


@pytest.mark.parametrize("python_based", [False, True])
@pytest.mark.parametrize("wrapper", [GRUModule, LSTMModule])
def test_a_recurrent_module_between_encoder_and_head_is_hidden(wrapper, python_based):
    state = ["h"] if wrapper is GRUModule else ["h", "c"]
    memory = wrapper(
        input_size=6,
        hidden_size=8,
        in_keys=["embedding", *state],
        out_keys=["features", *[("next", key) for key in state]],
        python_based=python_based,
    )
    encoder = TensorDictModule(MLP(4, 6, num_cells=[6]), ["observation"], ["embedding"])
    head = TensorDictModule(nn.Linear(8, 2), ["features"], ["action_value"])
    loss = DQNLoss(TensorDictSequential(encoder, memory, head), action_space="one-hot")
    roles = network_roles(loss)["critic"]
    assert [role.role for role in roles.values() if role.role in LAYER_ROLES] == [
        "first", "hidden", "hidden", "hidden", "last",
    ]  # fmt: skip


@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
def test_networks_of_several_agents_are_stacked_unless_they_are_shared(share):
    net = MultiAgentMLP(3, 2, 4, centralized=False, share_params=share, depth=2)
    loss = DQNLoss(
        QValueActor(net, in_keys=["observation"], action_space="one-hot"), action_space="one-hot"
    )
    expected = {"0": "first", "2": "hidden", "4": "last"}
    for prefix, module in (
        ("params.", net),
        ("value_network_params.module.0.module.params.", loss),
    ):
        roles = under(prefix, parameter_roles(module))
        assert layers_of(roles) == expected
        assert {role.batch_dims for role in roles.values()} == {0 if share else 1}
    assert list(network_roles(loss)) == ["critic"]


def test_the_layers_of_a_mixer_make_its_weights_and_take_no_agent_s_value():
    mixer = QMixer(state_shape=(6,), mixing_embed_dim=8, n_agents=4, device="cpu")
    mixing = TensorDictModule(mixer, in_keys=["value", "state"], out_keys=["total"])
    agents = TensorDictModule(nn.Linear(3, 1), in_keys=["observation"], out_keys=["value"])
    assert layers_of(parameter_roles(TensorDictSequential(agents, mixing))) == {
        "module.0.module": "last",
        "module.1.module.hyper_w_1": "last",
        "module.1.module.hyper_w_final": "last",
        "module.1.module.hyper_b_1": "last",
        "module.1.module.V.0": "first",
        "module.1.module.V.2": "last",
    }


def test_spectral_norm_in_a_ppo_actor_keeps_its_layers():
    net = nn.Sequential(MLP(5, 4, num_cells=[16]), NormalParamExtractor())
    for layer in (net[0][0], net[0][2]):
        parametrizations.spectral_norm(layer)
    value = ValueOperator(MLP(5, 1, num_cells=[16]), in_keys=["observation"])
    loss = ClipPPOLoss(gaussian(net, in_keys=["observation"]), value)
    assert layers_of(network_roles(loss)["actor"]) == {
        f"actor_network_params.module.0.module.0.{layer}.parametrizations.weight.original": role
        for layer, role in ((0, "first"), (2, "last"))
    }


# ---------------------------------------------------------------------------------- shared trunks

TRUNK = {"0": "first", "2": "hidden"}
HEAD = {"0": "hidden", "2": "last"}


@pytest.mark.parametrize("estimator", [False, True], ids=["", "with-estimator"])
@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate-losses"])
@pytest.mark.parametrize("kind", [ClipPPOLoss, A2CLoss])
def test_a_trunk_of_actor_and_critic_is_a_network_of_its_own(operator, kind, separate, estimator):
    loss = kind(
        operator.get_policy_operator(), operator.get_value_operator(), separate_losses=separate
    )
    if estimator:  # holds the critic once more
        loss.make_value_estimator()
    networks = network_roles(loss)
    assert set(networks) == {"trunk", "actor", "critic"}
    for network, prefix, expected in (
        ("trunk", "actor_network_params.module.0.module.", TRUNK),
        ("actor", "actor_network_params.module.1.module.0.", HEAD),
        ("critic", "critic_network_params.module.1.module.", HEAD),
    ):
        assert all(name.startswith(prefix) for name in networks[network])
        assert layers_of(under(prefix, networks[network])) == expected
    names = {name for roles in networks.values() for name in roles}
    assert names == {name for name, _ in loss.named_parameters()}


def critic_on(trunk):
    head = ValueOperator(MLP(18, 1, num_cells=[16]), in_keys=["hidden", "action"])
    return TensorDictSequential(trunk, head)


@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate-losses"])
def test_a_trunk_that_stacked_critics_share_with_the_actor_is_not_stacked(operator, separate):
    trunk = operator.module[0]
    loss = SACLoss(
        operator.get_policy_operator(),
        [critic_on(trunk), critic_on(trunk)],
        action_spec=Bounded(-torch.ones(2), torch.ones(2)),
        separate_losses=separate,
    )
    networks = network_roles(loss)
    assert set(networks) == {"trunk", "actor", "critic", "alpha"}
    for network, expected, batch_dims in (
        ("trunk", TRUNK, 0),
        ("actor", HEAD, 0),
        ("critic", HEAD, 1),
    ):
        assert list(layers_of(networks[network]).values()) == list(expected.values())
        assert {role.batch_dims for role in networks[network].values()} == {batch_dims}


def test_a_critic_that_is_drawn_anew_shares_no_trunk(operator):
    loss = SACLoss(
        operator.get_policy_operator(),
        critic_on(operator.module[0]),
        action_spec=Bounded(-torch.ones(2), torch.ones(2)),
    )
    networks = network_roles(loss)
    assert set(networks) == {"actor", "critic", "alpha"}
    for network in ("actor", "critic"):
        assert list(layers_of(networks[network]).values()) == ["first", "hidden", "hidden", "last"]


class OwnLoss(LossModule):
    """A loss whose Q-network stands on the actor's trunk, with a target copy of each."""

    @dataclass
    class _AcceptedKeys:
        pass

    default_keys = _AcceptedKeys
    actor_network: Any
    actor_network_params: Any
    target_actor_network_params: Any
    q_network: Any
    q_network_params: Any
    target_q_network_params: Any

    def __init__(self, actor, q):
        super().__init__()
        self.convert_to_functional(actor, "actor_network", create_target_params=True)
        self.convert_to_functional(
            q, "q_network", create_target_params=True, compare_against=list(actor.parameters())
        )

    def forward(self, tensordict):
        raise RuntimeError("a loss's own forward is no path")


def test_a_trunk_that_one_network_holds_as_plain_tensors_is_found(operator):
    loss = OwnLoss(operator.get_policy_operator(), operator.get_value_operator())
    networks = network_roles(loss)
    assert {name: list(layers_of(roles).values()) for name, roles in networks.items()} == {
        "trunk": ["first", "hidden"],
        "actor": ["hidden", "last"],
        "q": ["hidden", "last"],
    }


def test_parameters_and_modules_of_a_loss_itself_are_networks_by_their_names(operator):
    loss = OwnLoss(operator.get_policy_operator(), operator.get_value_operator())
    loss.world_model = nn.Linear(3, 3)
    loss.temperature = nn.Parameter(torch.zeros(()))
    loss.scales = "where the scales come from"
    loss.scales_params = TensorDictParams(TensorDict({"mean": torch.zeros(2, 2)}))
    networks = network_roles(nn.ModuleDict({"loss": loss}))
    assert set(networks) == {"trunk", "actor", "q", "world_model", "temperature", "scales"}
    assert layers_of(networks["world_model"]) == {"loss.world_model": "last"}
    assert networks["temperature"] == {"loss.temperature": ParameterRole("other")}
    assert networks["scales"] == {"loss.scales_params.mean": ParameterRole("other")}


def test_the_trunk_of_a_loss_is_optimized_by_a_config_of_its_own(operator):
    loss = ClipPPOLoss(operator.get_policy_operator(), operator.get_value_operator())
    muon = {"case": "muon"}
    optimizer = build_optimizer(loss, trunk=muon, actor=muon, critic={"case": "adam"})
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in loss.parameters())
    (group,) = [group for group in optimizer.param_groups if group["name"] == "trunk/muon"]
    assert [tuple(p.shape) for p in group["params"]] == [(16, 5), (16, 16)]
    with pytest.raises(ValueError, match=r"trainable network\(s\) trunk"):
        build_optimizer(loss, actor=muon, critic=muon)


def test_a_trunk_in_two_networks_of_a_holder_is_a_network_of_its_own():
    trunk = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8))
    holder = nn.ModuleDict(
        {
            "actor": nn.Sequential(trunk, nn.Linear(8, 8), nn.Linear(8, 2)),
            "critic": nn.Sequential(trunk, nn.Linear(8, 1)),
        }
    )
    assert {name: layers_of(roles) for name, roles in network_roles(holder).items()} == {
        "trunk": {"actor.0.0": "first", "actor.0.1": "hidden"},
        "actor": {"actor.1": "hidden", "actor.2": "last"},
        "critic": {"critic.1": "last"},
    }


def test_a_trunk_of_tied_weights_is_found_in_modules_of_two():
    holder = nn.ModuleDict(
        {name: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)) for name in ("actor", "critic")}
    )
    holder["critic"][0].weight = holder["actor"][0].weight
    networks = network_roles(holder)
    assert layers_of(networks["trunk"]) == {"actor.0": "first"}
    assert layers_of(networks["critic"]) == {"critic.1": "last"}


def test_weights_tied_between_first_and_last_layer_are_hidden():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    assert layers_of(parameter_roles(net)) == {"0": "hidden", "1": "hidden"}


def test_a_shared_network_that_the_holder_names_keeps_its_name():
    encoder, head = nn.Linear(3, 8), nn.Linear(8, 2)
    holder = nn.ModuleDict({"encoder": encoder, "actor": nn.Sequential(encoder, head)})
    assert {name: layers_of(roles) for name, roles in network_roles(holder).items()} == {
        "encoder": {"encoder": "first"},
        "actor": {"actor.1": "last"},
    }


@pytest.mark.parametrize("policy_first", [False, True])
def test_another_name_of_the_actor_makes_no_trunk(sac, policy_first):
    policy = sac.__dict__["actor_network"]
    parts = {"loss": sac, "policy": policy}
    holder = nn.ModuleDict(dict(reversed(parts.items())) if policy_first else parts)
    networks = network_roles(holder)
    actor = "policy" if policy_first else "actor"
    assert set(networks) == {actor, "critic", "alpha"}
    assert list(layers_of(networks[actor]).values()) == ["first", "hidden", "last"]


def test_another_name_of_a_part_of_the_actor_makes_no_trunk(sac):
    holder = nn.ModuleDict({"loss": sac})
    holder["layer"] = sac.__dict__["actor_network"].module[0].module[0][0]
    assert list(network_roles(holder)) == ["alpha", "actor", "critic"]


# ---------------------------------------------------------------------------- holders of networks


class Holder(nn.Module):
    """An actor and a critic on one network, registered last."""

    def __init__(self):
        super().__init__()
        self.actor = nn.Linear(8, 2)
        self.critic = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8))

    def get_action_and_value(self, x):
        h = self.network(x)
        return self.actor(h), self.critic(h)


class HolderWithForward(Holder):
    """Its forward leads through the children."""

    def forward(self, x):
        return self.get_action_and_value(x)


def test_the_children_of_a_holder_with_a_forward_are_parts_of_one_path():
    networks = network_roles(HolderWithForward())
    assert {name: layers_of(roles) for name, roles in networks.items()} == {
        "actor": {"actor": "last"},
        "critic": {"critic.0": "hidden", "critic.2": "last"},
        "network": {"network.0": "first", "network.2": "hidden"},
    }


def test_the_children_of_a_holder_without_a_forward_are_paths_by_themselves():
    networks = network_roles(Holder())
    assert {name: layers_of(roles) for name, roles in networks.items()} == {
        "actor": {"actor": "last"},
        "critic": {"critic.0": "first", "critic.2": "last"},
        "network": {"network.0": "first", "network.2": "last"},
    }


def test_a_holder_of_a_loss_is_not_run():
    class Agent(HolderWithForward):
        def __init__(self, loss):
            super().__init__()
            self.loss = loss

    critics = [ValueOperator(MLP(7, 1), in_keys=["observation", "action"]) for _ in range(2)]
    loss = SACLoss(gaussian(TwoHeads(), in_keys=["observation"]), critics)
    networks = network_roles(Agent(loss))
    assert set(networks) == {"alpha", "actor", "critic", "network"}
    assert layers_of(networks["network"]) == {"network.0": "first", "network.2": "last"}


# -------------------------------------------------------------------------------- plain modules


def test_a_plain_network_has_a_first_hidden_layers_and_a_last():
    net = nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1)
    )
    assert names_of(net) == {
        "0.weight": "first",
        "0.bias": "bias",
        "2.weight": "hidden",
        "2.bias": "bias",
        "4.weight": "hidden",
        "4.bias": "bias",
        "5.weight": "last",
        "5.bias": "bias",
    }


@pytest.mark.parametrize(
    "module",
    [nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)), nn.Conv2d(3, 4, 2)],
    ids=["linear", "norm-linear", "conv"],
)
def test_a_network_of_one_layer_has_only_a_last(module):
    roles = list(names_of(module).values())
    assert roles.count("last") == 1
    assert not {"first", "hidden"} & set(roles)


def test_torchrl_mlp_with_norms():
    net = MLP(
        3, 1, num_cells=[8, 8], norm_class=nn.LayerNorm, norm_kwargs=[{"normalized_shape": 8}] * 2
    )
    assert list(names_of(net).values()) == [
        "first", "bias", "norm", "norm", "hidden", "bias", "norm", "norm", "last", "bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((4, 4)),
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm((3, 4)),
        nn.InstanceNorm2d(4, affine=True),
        nn.SyncBatchNorm(4),
        torchrl.modules.BatchRenorm1d(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_weight_and_bias_of_a_norm_are_norms_whatever_their_shape(norm):
    assert set(names_of(norm).values()) == {"norm"}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_of_embeddings_is_no_layer(kind):
    net = nn.Sequential(kind(10, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert list(names_of(net).values()) == ["embedding", "first", "bias", "last", "bias"]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.Conv1d, (4, 3, 2)),
        (nn.Conv2d, (4, 3, 2, 2)),
        (nn.Conv3d, (4, 3, 2, 2, 2)),
        (nn.ConvTranspose2d, (3, 4, 2, 2)),
    ],
)
def test_a_convolution_is_a_layer_without_batch_dims(kind, shape):
    net = nn.Sequential(kind(3, 4, 2), nn.Flatten(), nn.Linear(36, 2))
    assert net[0].weight.shape == shape
    roles = parameter_roles(net)
    assert roles["0.weight"] == ParameterRole("first", batch_dims=0, splits=1)
    assert roles["0.bias"].role == "bias"
    assert roles["2.weight"].role == "last"


def test_torchrl_convnet_has_kernels_as_layers():
    net = ConvNet(in_features=3, num_cells=[4, 4, 4], kernel_sizes=[2, 2, 2])
    assert list(names_of(net).values()) == ["first", "bias", "hidden", "bias", "last", "bias"]


def test_attention_is_three_matrices_in_and_one_out():
    layers = [nn.Linear(8, 8), nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.Linear(8, 2)]
    roles = parameter_roles(nn.Sequential(*layers))
    assert roles["1.in_proj_weight"] == ParameterRole("hidden", splits=3)
    assert roles["1.out_proj.weight"] == ParameterRole("hidden", splits=1)
    for name in ("in_proj_bias", "out_proj.bias", "bias_k", "bias_v"):
        assert roles[f"1.{name}"].role == "bias"


def test_attention_with_separate_widths_has_three_weights_of_one_matrix():
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    roles = parameter_roles(nn.Sequential(nn.Linear(8, 8), attention, nn.Linear(8, 2)))
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        assert roles[f"1.{name}"] == ParameterRole("hidden", splits=1)


def test_a_transformer_layer_between_two_linear_ones_is_hidden():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    roles = parameter_roles(nn.Sequential(nn.Linear(3, 8), block, nn.Linear(8, 2)))
    hidden = {name: role.splits for name, role in roles.items() if role.role == "hidden"}
    assert hidden == {
        "1.self_attn.in_proj_weight": 3,
        "1.self_attn.out_proj.weight": 1,
        "1.linear1.weight": 1,
        "1.linear2.weight": 1,
    }
    assert {n for n, r in roles.items() if r.role == "norm"} == {
        "1.norm1.weight", "1.norm1.bias", "1.norm2.weight", "1.norm2.bias",
    }  # fmt: skip


def assert_gates(cell, gates):
    roles = under("1.", parameter_roles(nn.Sequential(nn.Linear(3, 6), cell, nn.Linear(8, 2))))
    for name, p in cell.named_parameters():
        if name.startswith("weight"):
            assert p.shape[0] == 8 * gates
            assert roles[name] == ParameterRole("hidden", splits=gates)
        else:
            assert roles[name] == ParameterRole("bias")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [(nn.GRU, 3), (nn.LSTM, 4), (nn.RNN, 1)])
def test_a_recurrent_weight_is_one_matrix_a_gate(kind, gates, bidirectional, layers):
    assert_gates(kind(6, 8, layers, bidirectional=bidirectional), gates)


@pytest.mark.parametrize(("kind", "gates"), [(nn.GRUCell, 3), (nn.LSTMCell, 4), (nn.RNNCell, 1)])
def test_a_weight_of_a_recurrent_cell_is_one_matrix_a_gate(kind, gates):
    assert_gates(kind(6, 8), gates)


@pytest.mark.parametrize(
    ("kind", "gates"),
    [
        (torchrl.modules.GRU, 3),
        (torchrl.modules.GRUCell, 3),
        (torchrl.modules.LSTM, 4),
        (torchrl.modules.LSTMCell, 4),
    ],
)
def test_a_recurrent_weight_of_torchrl_is_one_matrix_a_gate(kind, gates):
    assert_gates(kind(6, 8), gates)


@pytest.mark.parametrize("wrapper", [GRUModule, LSTMModule])
def test_torchrl_recurrent_modules_show_the_gates_of_what_they_wrap(wrapper):
    state = ["h"] if wrapper is GRUModule else ["h", "c"]
    module = wrapper(
        input_size=6,
        hidden_size=8,
        in_keys=["x", *state],
        out_keys=["y", *[("next", key) for key in state]],
    )
    splits = {r.splits for n, r in parameter_roles(module).items() if "weight" in n}
    assert splits == {3 if wrapper is GRUModule else 4}


def test_the_projection_of_an_lstm_is_one_matrix():
    cell = nn.LSTM(6, 8, proj_size=4)
    roles = under("1.", parameter_roles(nn.Sequential(nn.Linear(3, 6), cell, nn.Linear(4, 2))))
    assert cell.weight_hr_l0.shape == (4, 8)
    assert {name: role.splits for name, role in roles.items() if "weight" in name} == {
        "weight_ih_l0": 4,
        "weight_hh_l0": 4,
        "weight_hr_l0": 1,
    }


def test_a_noisy_layer_gives_its_mean_as_matrix_and_its_noise_to_the_rest():
    net = nn.Sequential(nn.Linear(3, 8), NoisyLinear(8, 8), nn.Linear(8, 2))
    roles = names_of(net)
    assert roles["1.weight_mu"] == "hidden"
    assert roles["1.weight_sigma"] == "other"
    assert roles["1.bias_mu"] == "bias"


def test_a_matrix_that_no_known_layer_owns_is_other():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 4))
            self.log_std = nn.Parameter(torch.zeros(4))
            self.bias_table = nn.Parameter(torch.zeros(4, 4))
            self.layer = nn.Linear(4, 4)

    assert names_of(Policy()) == {
        "table": "other",
        "log_std": "other",
        "bias_table": "bias",
        "layer.weight": "last",
        "layer.bias": "bias",
    }


def test_a_module_without_parameters_has_no_roles():
    assert parameter_roles(nn.ReLU()) == {}


@pytest.mark.parametrize(
    ("lazy", "name"),
    [(nn.LazyLinear(4), "LazyLinear"), (nn.LazyConv2d(4, 2), "LazyConv2d")],
    ids=["linear", "conv"],
)
def test_a_lazy_layer_without_a_shape_is_refused_by_name(lazy, name):
    with pytest.raises(ValueError, match=rf"'1.weight' belongs to a lazy {name}.*pass one batch"):
        parameter_roles(nn.Sequential(nn.Linear(2, 2), lazy))


def test_a_lazy_layer_that_has_seen_data_is_a_layer():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
    net(torch.zeros(1, 3))
    assert list(names_of(net).values()) == ["first", "bias", "last", "bias"]


# --------------------------------------------------------------------------------- parametrizations


def parametrized(norm, **options):
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1))
    norm(net[1], **options)
    return net


@pytest.mark.parametrize(
    ("norm", "weight"),
    [
        (parametrizations.spectral_norm, "parametrizations.weight.original"),
        (parametrizations.orthogonal, "parametrizations.weight.original"),
        (parametrizations.weight_norm, "parametrizations.weight.original1"),
        (nn.utils.spectral_norm, "weight_orig"),
    ],
    ids=["spectral", "orthogonal", "weight", "older-spectral"],
)
def test_what_a_parametrization_keeps_of_a_weight_has_the_role_of_its_layer(norm, weight):
    net = parametrized(norm)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    roles = parameter_roles(net)
    assert roles[f"1.{weight}"] == ParameterRole("hidden")
    assert roles["0.weight"].role == "first"
    assert roles["1.bias"].role == "bias"
    assert roles["2.weight"].role == "last"
    # Reading the weight would have made a step of the power iteration.
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("norm", "scale"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original0"),
        (nn.utils.weight_norm, "weight_g"),
    ],
    ids=["weight", "older-weight"],
)
@pytest.mark.parametrize("inputs", [1, 3])
def test_the_scale_of_weight_norm_is_a_norm_also_where_it_has_the_shape_of_the_weight(
    norm, scale, inputs
):
    net = nn.Sequential(norm(nn.Linear(inputs, 4)), nn.Linear(4, 2))
    roles = parameter_roles(net)
    assert roles[f"0.{scale}"] == ParameterRole("norm")
    assert list(roles.values()).count(ParameterRole("first")) == 1


def test_the_gates_of_a_parametrized_recurrent_weight_stay_its_splits():
    cell = parametrizations.weight_norm(nn.LSTM(6, 8), "weight_hh_l0")
    roles = parameter_roles(nn.Sequential(nn.Linear(3, 6), cell))
    assert roles["1.parametrizations.weight_hh_l0.original1"] == ParameterRole("last", splits=4)


def test_what_a_parametrization_keeps_in_another_shape_is_other():
    class Outer(nn.Module):
        def forward(self, column):
            return column @ column.T

        def right_inverse(self, weight):
            return weight[:, :2].clone()

    net = parametrized(lambda layer: register_parametrization(layer, "weight", Outer()))
    roles = parameter_roles(net)
    assert net[1].parametrizations.weight.original.shape == (8, 2)
    assert roles["1.parametrizations.weight.original"] == ParameterRole("other")


def test_stacked_weight_norms_keep_their_batch_dim():
    critics = [ValueOperator(MLP(7, 1, num_cells=[8]), ["observation", "action"]) for _ in "12"]
    for critic in critics:
        parametrizations.weight_norm(critic.module[0])
    loss = SACLoss(gaussian(TwoHeads(), in_keys=["observation"]), critics)
    roles = under("qvalue_network_params.module.0.", parameter_roles(loss))
    assert roles == {
        "bias": ParameterRole("bias", 1),
        "parametrizations.weight.original0": ParameterRole("norm", 1),
        "parametrizations.weight.original1": ParameterRole("first", 1),
    }


# ------------------------------------------------------------------------------------ other cases


def test_frozen_layers_count_for_the_path():
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    assert layers_of(parameter_roles(net)) == {"0": "first", "1": "hidden", "2": "last"}


def test_a_transformer_from_embedding_to_head():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)
            self.positions = nn.Parameter(torch.zeros(1, 7, 8))
            block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(block, 2)
            self.embed = nn.Linear(3, 8)

        def forward(self, observations):
            h = self.embed(observations) + self.positions[:, : observations.shape[1]]
            return self.head(self.encoder(h)[:, -1])

    roles = parameter_roles(Policy())
    layers = layers_of(roles)
    assert layers.pop("head") == "last"
    assert layers.pop("embed") == "first"
    assert set(layers.values()) == {"hidden"}
    assert len(layers) == 8
    assert roles["positions"] == ParameterRole("other")


@pytest.mark.parametrize("train", [True, False])
def test_the_last_layer_of_a_transformer_is_the_end_of_its_last_block(train):
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    roles = layers_of(parameter_roles(nn.TransformerEncoder(block, 2).train(train)))
    assert [name for name, role in roles.items() if role == "last"] == ["layers.1.linear2"]
    assert [name for name, role in roles.items() if role == "first"] == [
        "layers.0.self_attn.in_proj_weight"
    ]


def test_encoder_and_decoder_of_a_transformer_each_have_an_input():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    roles = layers_of(parameter_roles(model))
    assert [name for name, role in roles.items() if role != "hidden"] == [
        "encoder.layers.0.self_attn.in_proj_weight",
        "decoder.layers.0.self_attn.in_proj_weight",
        "decoder.layers.0.linear2",
    ]


def test_networks_on_the_meta_device_share_nothing():
    with torch.device("meta"):
        actor, critic = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, n)) for n in (2, 1))
    assert list(network_roles(nn.ModuleDict({"actor": actor, "critic": critic}))) == [
        "actor",
        "critic",
    ]


def test_a_view_of_a_part_of_a_weight_is_a_parameter_of_its_own():
    actor, critic = (nn.Sequential(nn.Linear(3, n), nn.Linear(n, 1)) for n in (4, 2))
    critic[0].weight = nn.Parameter(actor[0].weight.detach()[:2])
    assert critic[0].weight.data_ptr() == actor[0].weight.data_ptr()
    assert list(network_roles(nn.ModuleDict({"actor": actor, "critic": critic}))) == [
        "actor",
        "critic",
    ]


def test_a_convolutional_encoder_before_an_mlp():
    encoder = ConvNet(in_features=3, num_cells=[4, 4], kernel_sizes=[2, 2])
    net = nn.Sequential(encoder, MLP(16, 2, num_cells=[8]))
    assert list(layers_of(parameter_roles(net)).values()) == ["first", "hidden", "hidden", "last"]
