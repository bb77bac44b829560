"""The dynamics loss: its targets by hand, its minimum, its errors, and the contract of all."""

from __future__ import annotations

import pytest
import torch
from loss_contract import LossContract
from made_up import (
    OfOneModel,
    Table,
    Toy,
    end,
    line,
    parts_with_gradient,
    sequences,
    small_model,
    steps_ahead,
)
from tensordict import TensorDict
from torch.testing import assert_close

from muon_rl.modules import SignedHyperbolicTwoHot
from muon_rl.objectives import DynamicsLoss
from muon_rl.unroll import unroll

UNROLL = [("unroll", key) for key in ("value", "reward", "mask")]


class DynamicsContract(OfOneModel, LossContract):
    loss = DynamicsLoss
    policy: tuple = ("logits",)
    reaches = {  # noqa: RUF012
        "loss_dynamics_reward": {"encoder", "transition", "reward"},
        "loss_dynamics_returns": {"encoder", "transition", "value"},
    }
    writes = {  # noqa: RUF012
        "unroll", *UNROLL, *(("unroll", key) for key in ("logits", "loc", "scale")),
    }  # fmt: skip
    renames = {  # noqa: RUF012
        "value_target": "wanted", "action": "taken", "unroll_value": ("ahead", "value"),
    }  # fmt: skip
    coefficients = {  # noqa: RUF012
        "returns_pred_coef": "loss_dynamics_returns", "reward_pred_coef": "loss_dynamics_reward",
    }  # fmt: skip

    def data(self, *batch):
        return super().data(*batch).exclude("cmpo", ("next", "cmpo"))

    def test_the_data_stay_as_they_are(self):
        """But for the unroll, whose policies are to be trained with their gradient."""
        data = self.data(3, 4)
        before = data.clone()
        self.run(self.make(policy_horizon=2), data)
        policy = [("unroll", key) for key in self.policy]
        added = set(data.keys(True, True)) - set(before.keys(True, True))
        assert added == {*UNROLL, *policy}
        assert (data.select(*before.keys(True, True)) == before).all()
        for key in added:
            assert data[key].requires_grad == (key != ("unroll", "mask"))
        features = 2 if self.kind == "box" else 3
        assert all(data[key].shape == (3, 4, 2, features) for key in policy)
        assert [data[key].shape for key in UNROLL] == [(3, 4, 5, 1), (3, 4, 5, 1), (3, 4, 5)]

    @pytest.mark.parametrize("steps", [1, 3, 9])
    @pytest.mark.parametrize("seen", [True, False])
    def test_ends_of_episodes(self, steps, seen):
        """Against a loop over states and steps, one at a time; K = 9 is longer than T = 7."""
        loss = self.make(unroll_steps=steps, reward_pred_coef=2.0, returns_pred_coef=3.0)
        data = end(self.data(2, 7), terminated=((0, 2), (1, 0)), truncated=((0, 4), (1, 3)))
        if not seen:
            data = data.exclude(("next", "observation"))
        model, code = loss.world_model, loss.world_model.code
        rewards, values = [], []
        for out, step, following in steps_ahead(model, data, steps):
            target = None
            if step["next", "terminated"]:
                target = torch.zeros(())
            elif following is not None:
                target = following["value_target"].squeeze()
            elif seen:
                with loss.target_world_model_params.to_module(model):
                    hidden = model.encode(step["next"].select("observation"))["hidden_state"]
                    target = model.predict(hidden)["value_pred"].squeeze()
            for name, found, wanted in (
                ("reward", rewards, step["next", "reward"].squeeze()),
                ("value", values, target),
            ):
                if wanted is None:
                    continue
                if code is None:
                    found.append((out[f"{name}_pred"].squeeze() - wanted) ** 2)
                else:
                    found.append(code.loss(out[f"{name}_logits"], wanted))
        out = self.run(loss, data)
        if not values:
            values = [torch.zeros(())]
        reward, value = torch.stack(rewards).mean(), torch.stack(values).mean()
        assert_close(out["dynamics_reward_loss"], reward.detach())
        assert_close(out["dynamics_returns_loss"], value.detach())
        assert_close(out["loss_dynamics_reward"], 2 * reward)
        assert_close(out["loss_dynamics_returns"], 3 * value)


class TestTwoHot(DynamicsContract):
    pass


class TestSquaredError(DynamicsContract):
    kind = "one-hot"
    model = {"bins": None}  # noqa: RUF012


class TestContinuous(DynamicsContract):
    kind = "box"
    policy = ("loc", "scale")


def zeros(target: float = 0.0, **options) -> DynamicsLoss:
    """Return a loss whose model says 0, and its target network the observation times a factor."""
    loss = DynamicsLoss(Table(1, 2), **options)
    loss.target_world_model_params["prediction", "module", "value"].fill_(target)
    return loss


def counted(*, terminated: tuple = (), truncated: tuple = ()) -> TensorDict:
    """Return six steps: rewards 1 to 6, the state t of value 10 t and observation 10 t."""
    steps = torch.arange(6.0).unsqueeze(-1)
    now = {"observation": 10 * steps, "value_target": 10 * steps}
    after = {"observation": 10 * (steps + 1), "reward": steps + 1}
    return line(now, after, terminated=terminated, truncated=truncated)


def test_the_reward_of_step_k_is_that_of_transition_t_plus_k_minus_1():
    """Pairs of K = 2 from 1, 2, 3, 4: four of one step, 4, 9, 16 of the second."""
    out = zeros(unroll_steps=2)(counted()[:4])
    assert_close(out["dynamics_reward_loss"], torch.tensor((30 + 29) / 7))


@pytest.mark.parametrize(
    ("ends", "seen", "value"),
    [
        ({"terminated": (2,)}, True, 18300 / 12),  # s_3 is worth 0, s_6 its own 60
        ({"truncated": (2,)}, True, 21000 / 12),  # s_3 is worth its own 30, three times
        ({"truncated": (2,)}, False, 7500 / 6),  # of s_3 and s_6 nothing is known
        ({"terminated": (2,)}, False, 7500 / 9),  # of s_3 it is: 0, three times
    ],
)
def test_masks_and_values_at_an_end(ends, seen, value):
    """T = 6, an end after step 2, K = 3: twelve rewards."""
    data = counted(**ends)
    if not seen:
        data = data.exclude(("next", "observation"))
    out = zeros(1.0, unroll_steps=3)(data)
    assert_close(out["dynamics_reward_loss"], torch.tensor(210 / 12))
    assert_close(out["dynamics_returns_loss"], torch.tensor(value))
    assert data["unroll", "mask"].sum() == 12


def test_one_step():
    out = zeros(1.0, unroll_steps=4)(counted()[2:3])
    assert_close(out["dynamics_reward_loss"], torch.tensor(9.0))
    assert_close(out["dynamics_returns_loss"], torch.tensor(900.0))


def test_without_a_target_network_the_current_one_bootstraps():
    loss = DynamicsLoss(Table(1, 2), unroll_steps=1, use_target_network=False)
    loss.world_model_params["prediction", "module", "value"].data.fill_(2.0)
    out = loss(counted()[5:])
    # The state predicted is 0, so is its value; the next observation is 60.
    assert_close(out["dynamics_returns_loss"], torch.tensor(120.0**2))
    out["loss_dynamics_returns"].backward()
    assert loss.world_model_params["prediction", "module", "value"].grad.item() == 0.0


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_gradient_scale_acts_between_steps(steps):
    """Oracle: dL/dw = w^(K-1) h_0 (2 - 2^(1-K)), dL/dh_0 = w^K 0.5^(K-1) of h_K."""
    model, w = Table(1, 1), 1.5
    model.dynamics.module.following.data.fill_(w)
    start = torch.tensor([3.0], requires_grad=True)
    along = unroll(model, start, torch.zeros(steps, dtype=torch.int64), grad_scale=0.5)
    along["hidden_state"][-1].sum().backward()
    expected = torch.tensor(w ** (steps - 1) * 3.0 * (2 - 2 ** (1 - steps)))
    assert_close(model.dynamics.module.following.grad.squeeze(), expected)
    assert_close(start.grad, torch.tensor([w**steps * 0.5 ** (steps - 1)]))


def test_the_loss_scales_its_gradient():
    """By hand: w = 2, h_0 = 1, and the model's reward of step k is h_(k-1): 1, 2, 4."""
    loss = DynamicsLoss(Table(1, 1), unroll_steps=3, dynamics_grad_scale=0.25)
    params = loss.world_model_params["dynamics", "module"]
    params["following"].data.fill_(2.0)
    params["reward"].data.fill_(1.0)
    data = counted()[:3]
    data["observation"] = torch.ones(3, 1)
    reward = loss(data)["loss_dynamics_reward"]
    reward.backward()
    # Prediction and target: (1,1) (2,2) (4,3) from the first state, (1,2) (2,3), (1,3).
    assert_close(reward, torch.tensor((1 + 1 + 1 + 4) / 6))
    # dh_1/dw = 1 and dh_2/dw = h_1 + w / 4, both once more scaled on their way to the reward.
    assert_close(params["following"].grad.squeeze(), torch.tensor(2 * (2.5 - 1.0) / 4 / 6))


@pytest.mark.parametrize("bins", [None, 61])
@pytest.mark.parametrize("limit", [3, 1000])
def test_the_exact_model_of_a_toy_is_the_minimum(bins, limit):
    torch.manual_seed(0)
    toy = Toy()
    code = None if bins is None else SignedHyperbolicTwoHot(bins)
    model = toy.exact(bins=code)
    loss = DynamicsLoss(model, unroll_steps=4, dynamics_grad_scale=1.0)
    out = loss(toy.data(16, 8, limit))
    sum(out[term] for term in DynamicsContract.reaches).backward()
    if bins is None:
        assert out["dynamics_reward_loss"] < 1e-10
        assert out["dynamics_returns_loss"] < 1e-10
    for p in loss.parameters():
        if p.grad is not None:
            assert p.grad.abs().max() < 1e-4
    with torch.no_grad():
        model.prediction.module.value.add_(0.1 * torch.randn(4, bins or 1))
    worse = loss(toy.data(16, 8, limit))
    assert worse["dynamics_returns_loss"] > out["dynamics_returns_loss"]


def test_training_from_random_init_learns_the_toy():
    torch.manual_seed(0)
    before, after = Toy().learned(DynamicsLoss, 2e-3)
    for key in ("dynamics_reward_loss", "dynamics_returns_loss"):
        assert after[key] < 0.03 * before[key]


def test_sequences_may_be_joined_where_they_are_truncated():
    """As SliceSampler gives them: flat, with the end of each marked as truncated."""
    torch.manual_seed(0)
    loss = DynamicsLoss(small_model())
    data = end(sequences(3, 4), truncated=((..., 3, 0),))
    assert_close(loss(data.clone()), loss(data.clone().flatten()))


@pytest.mark.parametrize("steps", [1, 4])
def test_numbers_a_step_need_no_axis_of_one(steps):
    loss, data = DynamicsLoss(small_model()), sequences(3, steps)
    flat = data.clone()
    for key in (("next", "reward"), ("next", "done"), ("next", "terminated"), "value_target"):
        flat[key] = flat[key].squeeze(-1)
    assert_close(loss(flat), loss(data))
    assert_close(flat["unroll"], data["unroll"])


def test_an_lstm_runs_along_the_sequence():
    model = small_model(lstm=True)
    loss, data = DynamicsLoss(model), sequences(2, 4)
    data["is_init"] = torch.zeros(2, 4, 1, dtype=torch.bool)
    for key in ("recurrent_state_h", "recurrent_state_c"):
        data[key] = torch.zeros(2, 4, 1, 8)
    out = loss(data)
    sum(out[term] for term in DynamicsContract.reaches).backward()
    assert "encoder" in parts_with_gradient(loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unroll_steps": 0}, "unroll_steps must be at least 1, but is 0"),
        ({"policy_horizon": 6}, "policy_horizon must be from 1 to unroll_steps=5, but is 6"),
        ({"scalar_loss": "l1"}, "scalar_loss must be one of two_hot, mse, but is 'l1'"),
        ({"scalar_loss": "two_hot"}, "needs a world model with bins"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicsLoss(Table(1, 1), **options)


def test_what_is_missing_is_named():
    loss, data = DynamicsLoss(small_model()), sequences(2, 3)
    for key in ("value_target", "action", ("next", "reward")):
        with pytest.raises(KeyError, match=r"The data hold no .*set_keys"):
            loss(data.exclude(key))
    with pytest.raises(KeyError, match=r"RetraceEstimator, or TorchRL's GAE"):
        loss(data.exclude("value_target"))
    with pytest.raises(ValueError, match=r"needs sequences \(\*batch, T\)"):
        loss(data[0, 0])
