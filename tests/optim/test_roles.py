"""What each parameter is, on plain modules and on real TorchRL losses."""

import pytest
import torch
import torchrl.modules
from torch import nn
from torchrl.modules import MLP, ConvNet, GRUModule, LSTMModule, NoisyLinear
from torchrl.objectives import DQNLoss

from muon_rl.optim import ParameterRole, parameter_roles
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
