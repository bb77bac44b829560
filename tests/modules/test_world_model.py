"""World models: keys and shapes, unrolls, gradients, roles, functional calls."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, OneHot, Unbounded
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import LossModule, SoftUpdate

from muon_rl.modules import WorldModel
from muon_rl.optim import parameter_roles
from muon_rl.specs import Specs

VECTOR, GRID = Unbounded(4), Binary(shape=(6, 7, 2))
INDEX, ONE_HOT = Categorical(3), OneHot(3)
BOX = Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]))
WIDTHS = {"latent": 8, "hidden": [12], "dynamics_hidden": [12], "head_hidden": [10]}


def model_of(observation=VECTOR, action=INDEX, **options) -> WorldModel:
    if len(observation.shape) == 3:
        options = {"encoder": "conv", "channels": [3, 5], "channels_last": True, **options}
    torch.manual_seed(0)
    return WorldModel(Specs(observation, action), **{**WIDTHS, **options})


def data_of(model: WorldModel, batch=(4,), steps: int | None = None) -> TensorDict:
    between = () if steps is None else (steps,)
    return TensorDict(
        {
            "observation": model.specs.observation.rand(batch),
            "action": model.specs.action.rand((*batch, *between)),
            "is_init": torch.zeros(*batch, 1, dtype=torch.bool),
        },
        batch,
    )


def perturbed(model: WorldModel, size: float = 0.3) -> WorldModel:
    """Heads begin small: make differences show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


# ----------------------------------------------------------------------------------- keys, shapes


@pytest.mark.parametrize("batch", [(), (4,), (4, 3)], ids=str)
@pytest.mark.parametrize("bins", [None, 11])
@pytest.mark.parametrize("lstm", [False, True], ids=["", "lstm"])
@pytest.mark.parametrize("action", [INDEX, ONE_HOT, BOX], ids=["index", "one-hot", "box"])
@pytest.mark.parametrize("observation", [VECTOR, GRID], ids=["vector", "grid"])
def test_it_writes_the_keys_of_the_contract(observation, action, lstm, bins, batch):
    model = model_of(observation, action, lstm=lstm, bins=bins)
    with set_recurrent_mode(lstm and len(batch) == 2):  # (batch, time) are trajectories
        out = model(data_of(model, batch))
    policy = {"loc": 2, "scale": 2} if action is BOX else {"logits": 3}
    heads = {"value_logits": 11, "reward_logits": 11} if bins else {}
    expected = {"hidden_state": 8, "value_pred": 1, "reward_pred": 1, **policy, **heads}
    assert {key: out[key].shape for key in expected} == {
        key: (*batch, width) for key, width in expected.items()
    }
    states = {("next", f"recurrent_state_{name}") for name in "hc"} if lstm else set()
    assert set(model.out_keys) == {*expected, *states}
    written = set(out.keys(True, True)) - {"observation", "action", "is_init"}
    assert written == set(model.out_keys)


def test_without_an_action_no_reward_is_written():
    model = model_of()
    out = model(data_of(model).exclude("action"))
    assert "reward_pred" not in out and "value_pred" in out
    assert "action" not in model.in_keys


@pytest.mark.parametrize("batch", [(), (4,), (4, 3)], ids=str)
@pytest.mark.parametrize("bins", [None, 11])
@pytest.mark.parametrize("action", [INDEX, ONE_HOT, BOX], ids=["index", "one-hot", "box"])
def test_an_unroll_is_a_repeated_step_along_a_last_axis(action, bins, batch):
    model = perturbed(model_of(action=action, bins=bins))
    data = data_of(model, batch, steps=5)
    state = model.encode(data)["hidden_state"]
    along = model.unroll(state, data["action"], grad_scale=0.5)
    assert along.shape == (*batch, 5)
    assert set(along.keys()) == set(model.out_keys)
    for k in range(5):
        step = model.step(state, data["action"].select(len(batch), k))
        state = step["hidden_state"]
        for key, value in {**step, **model.predict(state)}.items():
            torch.testing.assert_close(along[key].select(len(batch), k), value)


def test_the_first_reward_of_an_unroll_is_the_one_that_forward_writes():
    model = perturbed(model_of())
    data = data_of(model, steps=3)
    out = model(data.clone().set("action", data["action"][:, 0]))
    along = model.unroll(out["hidden_state"], data["action"])
    torch.testing.assert_close(along["reward_pred"][:, 0], out["reward_pred"])
    assert out["reward_pred"].std() > 1e-3


def test_an_action_changes_its_own_step_and_later_ones_only():
    model = perturbed(model_of())
    data = data_of(model, steps=5)
    state, other = model.encode(data)["hidden_state"], data["action"].clone()
    other[:, 2] = (other[:, 2] + 1) % 3
    before, after = (model.unroll(state, actions) for actions in (data["action"], other))
    for key in ("reward_pred", "value_pred", "logits"):
        changed = (before[key] != after[key]).any(-1)
        assert changed.tolist() == [[False, False, True, True, True]] * 4, key


@pytest.mark.parametrize("spec", [INDEX, ONE_HOT], ids=["index", "one-hot"])
def test_every_action_of_a_discrete_spec_leads_elsewhere_and_both_codes_agree(spec):
    model = perturbed(model_of(action=spec))
    actions = spec.enumerate()
    state = torch.rand(8).expand(3, 8)
    out = model.step(state, actions)["hidden_state"]
    assert torch.pdist(out).min() > 1e-3
    twin = model_of(action=ONE_HOT if spec is INDEX else INDEX)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.step(state, twin.specs.action.enumerate())["hidden_state"], out)


@pytest.mark.parametrize("bins", [None, 61])
def test_the_first_predictions_are_near_zero_and_the_first_policy_near_uniform(bins):
    model = WorldModel(Specs(VECTOR, INDEX), bins=bins)
    out = model(data_of(model, (256,)))
    assert max(out["value_pred"].abs().max(), out["reward_pred"].abs().max()) < 0.1
    assert (out["logits"].softmax(-1) - 1 / 3).abs().max() < 0.01


def test_nothing_in_it_is_random():
    model = model_of(lstm=True)
    data = data_of(model)
    first, second = model(data.clone()), model(data.clone())
    assert all(torch.equal(first[key], second[key]) for key in model.out_keys)


# -------------------------------------------------------------------------------------- gradients


class Linear(nn.Module):
    """h' = w h, whose gradients through an unroll have a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, hidden_state, action):
        return self.w * hidden_state, hidden_state


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [0.5, 1.0, 0.0])
def test_the_gradient_along_the_unroll_is_scaled_from_the_second_step_on(steps, scale):
    model = model_of(latent=1, bins=None).double()
    model.dynamics = TensorDictModule(
        Linear(), ["hidden_state", "action"], [("next", "hidden_state"), "reward_pred"]
    )
    w = model.dynamics.module.w
    start = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    along = model.unroll(start, torch.zeros(steps, dtype=torch.int64), grad_scale=scale)
    last = along["hidden_state"][-1]
    torch.testing.assert_close(last, w**steps * start)
    of_w, of_start = torch.autograd.grad(last.sum(), [w, start])
    shares = sum(scale**k for k in range(steps))  # at 0.5 it is 2 - 2^(1 - K)
    torch.testing.assert_close(of_w, w.detach() ** (steps - 1) * start.detach()[0] * shares)
    torch.testing.assert_close(of_start, (w.detach() ** steps * scale ** (steps - 1))[None])


@pytest.mark.parametrize("key", ["reward_pred", "value_pred", "logits"])
@pytest.mark.parametrize("observation", [VECTOR, GRID], ids=["vector", "grid"])
def test_the_gradient_of_each_prediction_reaches_every_layer_of_the_encoder(observation, key):
    model = perturbed(model_of(observation, lstm=True, activation="tanh"), 0.1)
    data = data_of(model, (4, 6), steps=3)
    with set_recurrent_mode(True):
        state = model.encode(data)["hidden_state"]
    along = model.unroll(state, data["action"])
    along[key].square().sum().backward()
    for name, parameter in model.representation.named_parameters():
        assert parameter.grad.abs().max() > 0, name


# -------------------------------------------------------------------------- in losses, optimizers


@pytest.mark.parametrize("action", [INDEX, BOX], ids=["index", "box"])
def test_its_layers_have_the_roles_of_one_network(action):
    roles = parameter_roles(model_of(GRID, action, lstm=True, latent_norm="layernorm"))
    weights = {n.removesuffix(".weight"): r for n, r in roles.items() if r.role != "bias"}
    expected = {
        "representation.module.0.module.1.layers.0": "first",
        "representation.module.0.module.1.layers.2": "hidden",
        "representation.module.0.module.2.0": "hidden",
        "representation.module.0.module.2.2": "hidden",
        "representation.module.1.lstm.weight_ih_l0": "hidden",
        "representation.module.1.lstm.weight_hh_l0": "hidden",
        "representation.module.2.module": "norm",
        "representation.module.2.module.bias": "norm",
        "dynamics.module.network.0": "hidden",
        "dynamics.module.network.2": "hidden",
        "dynamics.module.norm": "norm",
        "dynamics.module.norm.bias": "norm",
        "dynamics.module.reward.network.0": "hidden",
        "dynamics.module.reward.network.2": "last",
        "prediction.module.value.network.0": "hidden",
        "prediction.module.value.network.2": "last",
        "prediction.module.policy.0": "hidden",
        "prediction.module.policy.2": "last",
    }
    assert {name: role.role for name, role in weights.items()} == expected
    assert {name for name, role in weights.items() if role.splits != 1} == {
        "representation.module.1.lstm.weight_ih_l0",
        "representation.module.1.lstm.weight_hh_l0",
    }
    assert {role.splits for name, role in weights.items() if "lstm" in name} == {4}


class Loss(LossModule):
    world_model: WorldModel
    world_model_params: TensorDictParams
    target_world_model_params: TensorDictParams

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.convert_to_functional(model, "world_model", create_target_params=True)

    def values(self, data: TensorDict, *, target: bool) -> torch.Tensor:
        params = self.target_world_model_params if target else self.world_model_params
        with params.to_module(self.world_model):
            state = self.world_model.encode(data.clone())["hidden_state"]
            return self.world_model.unroll(state, data["action"])["value_pred"]


@pytest.mark.filterwarnings("ignore:Found an eps value:UserWarning")
@pytest.mark.parametrize("observation", [VECTOR, GRID], ids=["vector", "grid"])
def test_an_unroll_uses_the_parameters_that_a_loss_puts_in(observation):
    loss = Loss(perturbed(model_of(observation)))
    targets = SoftUpdate(loss, tau=1.0)
    data = data_of(loss.world_model, steps=3)
    old = loss.values(data, target=False)
    perturbed(loss)
    torch.testing.assert_close(loss.values(data, target=True), old)
    new = loss.values(data, target=False)
    assert (new - old).abs().max() > 1e-2
    targets.step()
    torch.testing.assert_close(loss.values(data, target=True), new)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_unroll_compiles_in_one_piece():
    model = perturbed(model_of())
    data = data_of(model, steps=3)
    state = model.encode(data)["hidden_state"].detach()
    compiled = torch.compile(model.unroll, backend="eager", fullgraph=True)
    along = compiled(state, data["action"], grad_scale=0.5)
    expected = model.unroll(state, data["action"])
    for key in model.out_keys:
        torch.testing.assert_close(along[key], expected[key])


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(4,), (4, 0), (3, 5), (4, 5, 1)], ids=str)
def test_an_unroll_refuses_actions_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"needs actions of shape \(\*\(4,\), K >= 1, \*\(\)\)"):
        model_of().unroll(torch.rand(4, 8), torch.zeros(shape, dtype=torch.int64))


def test_a_step_refuses_a_sequence_of_actions():
    with pytest.raises(ValueError, match=r"needs actions of shape \(\*\(4,\), \*\(\)\), but"):
        model_of().step(torch.rand(4, 8), torch.zeros(4, 5, dtype=torch.int64))
