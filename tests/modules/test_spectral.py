"""Linear layers of spectral norm 1: torch's arithmetic, alone and in the stacks of a loss."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchrl.objectives import SACLoss

from muon_rl.modules import SpectralLinear, spectral_normalize
from muon_rl.modules.spectral import _follow

SHAPES = pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)], ids=str)


def largest(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(weight.detach(), 2)


def vectors_of(params: TensorDict) -> dict[str, torch.Tensor]:
    leaves = params.flatten_keys(".").items()
    return {name: value.clone() for name, value in leaves if name.endswith((".u", ".v"))}


# -- one layer ---------------------------------------------------------------------------------


@SHAPES
def test_one_iteration_is_torchs_spectral_norm_step_by_step(shape):
    out_features, in_features = shape
    mine = SpectralLinear(in_features, out_features, iterations=1)
    its = nn.Linear(in_features, out_features)
    its.load_state_dict({"weight": mine.weight, "bias": mine.bias})
    spectral_norm(its)
    power = its.parametrizations.weight[0]
    power._u.copy_(mine.u)
    power._v.copy_(mine.v)
    raw = its.parametrizations.weight.original
    optimizers = [torch.optim.Adam(layer.parameters(), 0.05) for layer in (mine, its)]
    for _ in range(20):
        x, target = torch.randn(16, in_features), torch.randn(16, out_features)
        for layer, optimizer in zip((mine, its), optimizers, strict=True):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
        torch.testing.assert_close(mine.weight.grad, raw.grad)
        torch.testing.assert_close(mine.bias.grad, its.bias.grad)
        raw.grad.copy_(mine.weight.grad)  # lest Adam blows rounding up
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(mine(x), its(x))
        torch.testing.assert_close(mine.u, power._u)
        torch.testing.assert_close(mine.v, power._v)
    torch.testing.assert_close(mine.eval()(x), its.eval()(x))
    torch.testing.assert_close(mine.normalized_weight(), its.weight)


@SHAPES
@pytest.mark.parametrize("iterations", [1, 2, 8])
def test_the_largest_singular_value_is_1_and_directions_are_kept(shape, iterations):
    layer = SpectralLinear(*reversed(shape), iterations=iterations)
    for _ in range(300 // iterations):
        layer(torch.zeros(layer.in_features))
    weight = layer.normalized_weight()
    torch.testing.assert_close(largest(weight), torch.tensor(1.0))
    torch.testing.assert_close(weight * largest(layer.weight), layer.weight)


@SHAPES
def test_many_iterations_find_the_largest_value_sooner(shape):
    """Never lower than before, near after as many products as leave power iteration far off."""
    weights = torch.randn(200, *shape)
    u, v = (nn.functional.normalize(torch.randn(200, size), dim=-1) for size in shape)

    def ratio(u, v):
        return torch.einsum("bo,boi,bi->b", u, weights, v) / largest(weights)

    u, v = _follow(weights, u, v, 1)
    errors, before = {}, ratio(u, v)
    for iterations in range(1, 9):
        now = ratio(*_follow(weights, u, v, iterations))
        assert (now >= before - 1e-6).all() and (now <= 1 + 1e-6).all()
        errors[iterations] = (1 - now).mean()
    power = u, v
    for _ in range(8):
        power = _follow(weights, *power, 1)
    assert errors[8] < (1 - ratio(*power)).mean() / 2


@pytest.mark.parametrize("iterations", [2, 3, 8])
def test_iterations_before_the_last_are_a_chebyshev_polynomial(iterations):
    """Of W^T W on [0, |W v|^2]: by its cosine, where the matrix is diagonal."""
    weight = torch.linspace(0.1, 2, 6, dtype=torch.float64).diag()
    v = nn.functional.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    squares = weight.diag().square()
    x = 2 * squares / (weight @ v).square().sum() - 1
    angles = torch.arccos(x.to(torch.complex128))
    polynomial = torch.cos((iterations - 1) * angles).real
    expected = nn.functional.normalize(squares * polynomial * v, dim=0)
    torch.testing.assert_close(_follow(weight, v, v, iterations)[1], expected)


def test_more_iterations_than_needed_neither_overflow_nor_spoil():
    """A start that hardly touches a far larger direction makes a polynomial grow fastest."""
    weight = torch.diag(torch.tensor([1e6, 1.0, 0.5]))
    start = nn.functional.normalize(torch.tensor([1e-12, 1.0, 1.0]), dim=0)
    u, v = _follow(weight, start, start, 100)
    torch.testing.assert_close(v, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(u, v)


def test_evaluation_mode_leaves_the_vectors():
    layer, x = SpectralLinear(5, 8), torch.randn(3, 5)
    nn.init.normal_(layer.weight)
    before = layer.u.clone(), layer.v.clone()
    out = layer.eval()(x)
    assert torch.equal(layer.u, before[0]) and torch.equal(layer.v, before[1])
    expected = x @ (layer.weight / (layer.u @ layer.weight @ layer.v)).T + layer.bias
    torch.testing.assert_close(out, expected)
    layer.train()(x)
    assert not torch.equal(layer.u, before[0]) and not torch.equal(layer.v, before[1])


@pytest.mark.parametrize("training", [True, False])
def test_a_backward_takes_the_vectors_of_its_own_forward(training):
    layer, x = SpectralLinear(5, 8, iterations=1), torch.randn(3, 5)
    nn.init.normal_(layer.weight)
    twin = deepcopy(layer).train(training)
    layer.train(training)(x).square().sum().backward()
    out = twin(x)
    twin.train()(x)
    read = twin.normalized_weight()
    twin(x)
    out.square().sum().backward()
    assert torch.equal(twin.weight.grad, layer.weight.grad)
    read.sum().backward()


def test_weights_of_zeros_give_zero_and_are_left_again():
    layer, x = SpectralLinear(5, 8), torch.randn(3, 5)
    nn.init.zeros_(layer.weight)
    out = layer(x)
    out.square().sum().backward()
    assert torch.equal(out, layer.bias.expand(3, 8))
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()
    nn.init.normal_(layer.weight)
    for _ in range(50):
        layer(x)
    torch.testing.assert_close(largest(layer.normalized_weight()), torch.tensor(1.0))


def test_reset_finds_vectors_for_a_new_weight_in_place():
    layer = SpectralLinear(5, 8)
    u, v = layer.u, layer.v
    nn.init.normal_(layer.weight)
    assert largest(layer.normalized_weight()) > 1.01
    layer.reset_vectors()
    torch.testing.assert_close(largest(layer.normalized_weight()), torch.tensor(1.0))
    layer.reset_parameters()
    torch.testing.assert_close(largest(layer.normalized_weight()), torch.tensor(1.0))
    assert layer.u is u and layer.v is v


def test_copies_and_states_carry_the_vectors():
    layer, x = SpectralLinear(5, 8), torch.randn(3, 5)
    layer(x).sum().backward()
    copy, other = deepcopy(layer), SpectralLinear(5, 8)
    assert list(layer.state_dict()) == ["weight", "bias", "u", "v"]
    other.load_state_dict(layer.state_dict())
    expected = layer(x)
    assert torch.equal(copy(x), expected) and torch.equal(other(x), expected)
    assert copy.u.data_ptr() != layer.u.data_ptr()
    assert torch.equal(copy.u, layer.u)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_kept(dtype):
    layer = SpectralLinear(5, 8, dtype=dtype)
    out = layer(torch.randn(3, 5, dtype=dtype))
    assert out.dtype == layer.u.dtype == layer.v.dtype == dtype
    torch.testing.assert_close(
        largest(layer.normalized_weight().double()), torch.tensor(1.0).double(), rtol=0, atol=0.02
    )


def test_no_iteration_is_refused():
    with pytest.raises(ValueError, match=r"iterations of at least 1, not 0"):
        SpectralLinear(5, 8, iterations=0)


# -- in a stack --------------------------------------------------------------------------------


def test_each_of_a_stack_under_vmap_does_as_it_does_alone():
    layers = [SpectralLinear(5, 8) for _ in range(3)]
    stack = TensorDict.from_modules(*deepcopy(layers), as_module=True)
    empty, x = deepcopy(layers[0]), torch.randn(7, 5)

    def call(params):
        with params.to_module(empty, preserve_module_state=False):
            return empty(x)

    for _ in range(3):
        out = torch.vmap(call)(stack)
        torch.testing.assert_close(out, torch.stack([layer(x) for layer in layers]))
        for name in ("u", "v"):
            alone = torch.stack([getattr(layer, name) for layer in layers])
            torch.testing.assert_close(stack[name], alone)
        weights = spectral_normalize(stack["weight"], stack["u"], stack["v"])
        alone = torch.stack([layer.normalized_weight() for layer in layers])
        torch.testing.assert_close(weights, alone)
        with torch.no_grad():
            for index, layer in enumerate(layers):
                layer.weight.add_(torch.randn(8, 5))
                stack["weight"][index].copy_(layer.weight)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("case", "tolerance"), [("adam", 0.01), ("muon", 0.03)])
def test_training_keeps_every_spectral_norm_near_1(sac, case, tolerance, residual):
    """As each forward has it: the last one, which an update has not yet followed."""
    agent = sac(case, hidden=[64, 64], residual=residual, spectral_norm=True, critics=2)
    before = vectors_of(agent.critics)
    agent.update(50)
    agent.loss(agent.batch())
    layers = [
        nest[name[:-1]]
        for nest in (
            agent.critics,
            agent.loss.actor_network_params,
            agent.loss.target_qvalue_network_params,
        )
        for name in nest.keys(True, True)
        if name[-1] == "u"
    ]
    assert len(layers) == 3 * (5 if residual else 2)
    for layer in layers:
        values = largest(spectral_normalize(layer["weight"], layer["u"], layer["v"]))
        torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=tolerance)
    for name, vectors in vectors_of(agent.critics).items():
        assert not torch.equal(vectors, before[name])
        assert (vectors[0] - vectors[1]).norm() > 0.1


def test_targets_follow_their_own_weights(sac):
    agent = sac(hidden=[16, 16], spectral_norm=True)
    targets = agent.loss.target_qvalue_network_params
    assert all(
        torch.equal(vectors, vectors_of(agent.critics)[name])
        for name, vectors in vectors_of(targets).items()
    )
    agent.update(5)
    for name, vectors in vectors_of(targets).items():
        assert not torch.equal(vectors, vectors_of(agent.critics)[name])
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))


def test_a_checkpoint_holds_the_vectors_of_each_critic(sac):
    agent, other = (sac(hidden=[16, 16], spectral_norm=True) for _ in range(2))
    agent.update(3)
    other.loss(other.batch())
    state = agent.loss.state_dict()
    for network in ("qvalue_network_params", "target_qvalue_network_params"):
        assert state[f"{network}.module.2.u"].shape == (3, 16)
    other.loss.load_state_dict(state)
    batch, results = agent.batch(), []
    for one in (agent, other):
        torch.manual_seed(1)
        results.append(one.loss(batch.clone()))
    assert torch.equal(results[0]["loss_qvalue"], results[1]["loss_qvalue"])
    assert torch.equal(results[0]["loss_actor"], results[1]["loss_actor"])
    assert all(
        torch.equal(value, other.loss.state_dict()[name])
        for name, value in agent.loss.state_dict().items()
    )


def test_the_mode_is_that_of_the_networks_which_the_loss_does_not_register(sac):
    agent = sac(hidden=[16, 16], spectral_norm=True)

    def moved() -> set[str]:
        before = {name: value.clone() for name, value in agent.loss.state_dict().items()}
        agent.loss(agent.batch())
        after = agent.loss.state_dict().items()
        return {name.split("_")[0] for name, value in after if not torch.equal(value, before[name])}

    agent.loss.eval()
    assert moved() == {"actor", "qvalue", "target"}
    agent.actor.eval()  # as Lightning does: the policy is a child of the agent
    assert moved() == {"qvalue", "target"}
    agent.loss.qvalue_network.eval()
    assert moved() == set()


def test_the_policy_acts_with_the_vectors_of_the_loss(sac):
    agent = sac(hidden=[16, 16], spectral_norm=True)
    agent.update(3)
    layer = agent.actor.module[0].module[0][2]
    params = agent.loss.actor_network_params["module", "0", "module", "0", "2"]
    assert torch.equal(layer.u, params["u"]) and torch.equal(layer.v, params["v"])


def test_a_loss_resets_its_stack(sac):
    loss: SACLoss = sac(hidden=[16, 16], spectral_norm=True).loss
    before = vectors_of(loss.qvalue_network_params)
    loss.reset_parameters_recursive()
    layer = loss.qvalue_network_params["module", "2"]
    assert not torch.equal(layer["u"], before["module.2.u"])
    values = largest(spectral_normalize(layer["weight"], layer["u"], layer["v"]))
    torch.testing.assert_close(values, torch.ones(3), rtol=0, atol=1e-3)
