"""Perceptrons, plain and residual: what they compute, how they begin, and that they train."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from itertools import product

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn import functional as F
from torchrl.data import Bounded, Unbounded
from torchrl.modules import MLP

from muon_rl.modules import L2Norm, QCritic, SpectralLinear, TanhNormalActor, mlp
from muon_rl.modules.mlp import ResidualBlock
from muon_rl.optim import parameter_roles
from muon_rl.specs import Specs

SPECS = Specs(Unbounded(5), Bounded(-torch.ones(2), torch.ones(2)))
ACTIVATIONS = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "selu": F.selu, "gelu": F.gelu,
    "silu": F.silu, "mish": F.mish, "tanh": torch.tanh,
}  # fmt: skip
NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "layernorm": lambda x: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    ),
    "l2": lambda x: x / x.norm(dim=-1, keepdim=True),
}


def state_of(make: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return make().state_dict()


def affine(network: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    layer = network.get_submodule(name)
    return x @ layer.weight.T + layer.bias


# -- what it computes --------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [[], [16], [16, 8], (256, 256)])
@pytest.mark.parametrize(
    ("make", "sizes", "prefix"),
    [
        (lambda hidden: mlp(5, 2, hidden), (5, 2), ""),
        (lambda hidden: TanhNormalActor(SPECS, hidden), (5, 4), "module.0.module.0."),
        (lambda hidden: QCritic(SPECS, hidden), (7, 1), "module."),
    ],
)
def test_by_default_it_is_torchrls_and_begins_as_it_did(make, sizes, prefix, hidden):
    """Names, values and random numbers: seeds' results and older checkpoints hang on them."""
    expected = state_of(lambda: MLP(*sizes, num_cells=list(hidden), activation_class=nn.ReLU))
    state = state_of(lambda: make(hidden))
    assert list(state) == [prefix + name for name in expected]
    assert all(torch.equal(state[prefix + name], value) for name, value in expected.items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plain_layers_are_linear_norm_activation(activation, norm):
    network = mlp(5, 2, [16, 8], activation=activation, activation_norm=norm)
    x = observed = torch.randn(9, 5)
    linears = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    for name in linears[:-1]:
        x = ACTIVATIONS[activation](NORMS[norm](affine(network, name, x)))
    torch.testing.assert_close(network(observed), affine(network, linears[-1], x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_blocks_are_added_and_a_norm_precedes_the_head(activation, norm):
    network = mlp(5, 2, [8, 8, 8], residual=True, activation=activation, activation_norm=norm)
    observed = torch.randn(9, 5)
    x = affine(network, "0", observed)
    for block in ("1", "2", "3"):
        inner = ACTIVATIONS[activation](affine(network, f"{block}.first", NORMS[norm](x)))
        x = x + affine(network, f"{block}.second", inner)
    expected = affine(network, str(len(network) - 1), NORMS[norm](x))
    torch.testing.assert_close(network(observed), expected)


@pytest.mark.parametrize("part", ["second.", ""])
@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_block_of_zeros_is_the_identity(norm, spectral_norm, part):
    network = mlp(5, 2, [8], residual=True, activation_norm=norm, spectral_norm=spectral_norm)
    block = network[1]
    assert isinstance(block, ResidualBlock)
    x = torch.randn(9, 8)
    assert not torch.equal(block(x), x)
    for name, parameter in block.named_parameters():
        if name.startswith(part):
            nn.init.zeros_(parameter)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("residual", [False, True])
def test_several_inputs_are_concatenated(residual):
    network, x = mlp(5, 2, [8, 8], residual=residual), torch.randn(9, 5)
    assert torch.equal(network(x[:, :2], x[:, 2:]), network(x))


@pytest.mark.parametrize("residual", [False, True])
def test_spectral_norm_is_of_every_layer_but_the_head(residual):
    network = mlp(5, 2, [8, 8], residual=residual, spectral_norm=True)
    *below, head = (part for part in network.modules() if isinstance(part, nn.Linear))
    assert head is network[-1] and type(head) is nn.Linear and head.out_features == 2
    assert len(below) == (5 if residual else 2)
    assert all(type(part) is SpectralLinear for part in below)


def test_l2_norm_gives_unit_length():
    x = torch.randn(100, 256) * torch.logspace(-2, 6, 100)[:, None]
    torch.testing.assert_close(L2Norm(256)(x).norm(dim=-1), torch.ones(100), rtol=0, atol=1e-5)
    torch.testing.assert_close(F.cosine_similarity(L2Norm(256)(x), x), torch.ones(100))


def test_l2_norm_has_a_gradient_everywhere():
    zero = torch.zeros(3, 4, requires_grad=True)
    out = L2Norm(4)(zero)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(3, 4))
    torch.testing.assert_close(zero.grad, torch.full((3, 4), 1e4))  # 1 / sqrt(1e-8)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(L2Norm(4), x)


# -- how it begins -----------------------------------------------------------------------------


def singular_values(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(weight.detach())


GAINS = {"relu": math.sqrt(2), "silu": math.sqrt(2), "tanh": 5 / 3, "selu": 3 / 4}


@pytest.mark.parametrize(("activation", "gain"), GAINS.items())
@pytest.mark.parametrize("residual", [False, True])
def test_orthogonal_weights_have_one_singular_value(residual, activation, gain):
    network = mlp(5, 2, [8, 8], residual=residual, activation=activation, init="orthogonal")
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear):
            activated = name.endswith("first") if residual else part is not network[-1]
            values = singular_values(part.weight)
            torch.testing.assert_close(values, torch.full_like(values, gain if activated else 1.0))
            assert not part.bias.any()


def test_orthogonal_layers_of_spectral_norm_have_vectors_for_their_weight():
    network = mlp(5, 2, [8, 16], init="orthogonal", spectral_norm=True).eval()
    for part in network[0], network[2]:
        values = singular_values(part.normalized_weight())
        torch.testing.assert_close(values, torch.ones_like(values))


def test_orthogonal_critics_stay_so_in_a_stack_and_differ(sac):
    critics = sac(hidden=[16, 8], init="orthogonal").critics
    for layer, gain in (("0", math.sqrt(2)), ("2", math.sqrt(2)), ("4", 1.0)):
        weights = critics["module", layer, "weight"]
        values = singular_values(weights)
        torch.testing.assert_close(values, torch.full_like(values, gain))
        assert not torch.equal(weights[0], weights[1])


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, TanhNormalActor, QCritic])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, r"activation must be one of relu, .*tanh, but is 'swish'"),
        ({"activation_norm": "batch"}, r"must be one of none, layernorm, l2, but is 'batch'"),
        ({"init": "zeros"}, r"init must be one of default, orthogonal, but is 'zeros'"),
        ({"hidden": [8, 0]}, r"positive integers, but is \[8, 0\]"),
        ({"hidden": [8, 8.0]}, r"positive integers, but is \[8, 8\.0\]"),
        ({"hidden": [8, 16], "residual": True}, r"all equal, .* but is \[8, 16\]"),
        ({"hidden": [], "residual": True}, r"at least one .* but is \[\]"),
    ],
)
def test_an_option_that_means_nothing_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(*((5, 2) if make is mlp else (SPECS,)), **options)


def test_actor_and_critic_have_the_same_options_and_defaults():
    options = [
        {n: p.default for n, p in signature(make).parameters.items() if n != "min_scale"}
        for make in (mlp, TanhNormalActor, QCritic)
    ]
    options[0] = {"specs": options[0].pop("inputs")} | options[0]
    del options[0]["outputs"]
    assert options[0] == options[1] == options[2]


@pytest.mark.parametrize("kind", [TanhNormalActor, QCritic])
def test_a_recipe_sets_the_options(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=Callable[[Specs], kind])
    options = {
        "hidden": [16, 16], "residual": True, "activation": "silu", "activation_norm": "l2",
        "spectral_norm": True, "init": "orthogonal",
    }  # fmt: skip
    name = f"muon_rl.modules.{kind.__name__}"
    config = parser.parse_object({"network": {"class_path": name, "init_args": options}})
    network = parser.instantiate(config).network(SPECS)
    kinds = {type(part) for part in network.modules()}
    assert kinds >= {ResidualBlock, SpectralLinear, L2Norm, nn.SiLU}


# -- in an agent -------------------------------------------------------------------------------

OPTIONS = [
    {"residual": residual, "activation_norm": norm, "spectral_norm": spectral_norm}
    for residual, norm, spectral_norm in product([False, True], NORMS, [False, True])
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("init", ["default", "orthogonal"])
@pytest.mark.parametrize("case", ["muon", "adamw"])
def test_two_updates_train_every_parameter_of_every_network(sac, case, init, options):
    agent = sac(case, hidden=[16, 16], init=init, **options)
    before = {name: value.detach().clone() for name, value in agent.loss.named_parameters()}
    agent.update(2)
    trained = {name: p for name, p in agent.loss.named_parameters() if p.requires_grad}
    assert len(trained) >= 13
    for name, parameter in trained.items():
        copies = 3 if name.startswith("qvalue") else 1
        changed = (parameter != before[name]).reshape(copies, -1).any(1)
        assert changed.all(), f"{name}: {changed}"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_optimizer_finds_each_parameters_role(sac, options):
    roles = parameter_roles(sac(hidden=[16, 16], **options).loss)
    network = mlp(7, 1, [16, 16], **options)
    first, *hidden, last = (n for n, part in network.named_modules() if isinstance(part, nn.Linear))
    expected = {f"{first}.weight": "first", f"{last}.weight": "last"}
    expected |= {f"{name}.weight": "hidden" for name in hidden}
    for name, part in network.named_modules():
        if isinstance(part, nn.LayerNorm):
            expected |= {f"{name}.weight": "norm", f"{name}.bias": "norm"}
    expected = {name: expected.get(name, "bias") for name, _ in network.named_parameters()}
    for prefix, batch_dims in (("actor_network_params.module.0.module.0.", 0),
                               ("qvalue_network_params.module.", 1)):  # fmt: skip
        found = {n.removeprefix(prefix): r for n, r in roles.items() if n.startswith(prefix)}
        assert {name: role.role for name, role in found.items()} == expected
        assert {role.batch_dims for role in found.values()} == {batch_dims}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_compiles_whole(options):
    network, twin = (mlp(5, 2, [16, 16], **options) for _ in range(2))
    twin.load_state_dict(network.state_dict())
    compiled, x = torch.compile(network, fullgraph=True, backend="aot_eager"), torch.randn(9, 5)
    for _ in range(2):
        for module in (compiled, twin):
            module(x).square().sum().backward()
    for mine, its in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
    for mine, its in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, its)
