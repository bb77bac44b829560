"""What the data say of the actions taken: their log-probabilities, and which steps count."""

from __future__ import annotations

import pytest
import torch
from made_up import sequences, small_model
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution
from torch.distributions import Categorical, Normal
from torch.testing import assert_close
from torchrl.data import OneHot
from torchrl.modules import MaskedOneHotCategorical, OneHotCategorical

from muon_rl.objectives import DynamicsLoss
from muon_rl.objectives.acting import ends, log_prob_of, loss_mask, without_padding


@pytest.mark.parametrize("masked", [False, True])
def test_one_hot_actions_may_be_of_any_type(masked):
    logits = torch.randn(5, 3)
    policy = OneHotCategorical(logits=logits)
    if masked:
        policy = MaskedOneHotCategorical(logits=logits, mask=torch.ones(5, 3, dtype=torch.bool))
    action = OneHot(3).rand((5,))
    assert action.dtype == torch.bool
    expected = logits.log_softmax(-1)[action]
    for kind in (torch.bool, torch.int64, torch.float32):
        data = TensorDict(action=action.to(kind), batch_size=[5])
        assert_close(log_prob_of(policy, data, "action"), expected)


def test_an_action_may_have_an_axis_of_one_more():
    """Else a batch of n actions has n * n log-probabilities."""
    for batch in ((5,), (3, 3)):
        policy = Categorical(logits=torch.randn(*batch, 4))
        action = torch.randint(4, batch)
        expected = policy.log_prob(action)
        data = TensorDict(action=action.unsqueeze(-1), batch_size=batch)
        assert_close(log_prob_of(policy, data, "action"), expected)


def test_of_a_composite_action_the_parts_add_up():
    logits, loc = torch.randn(5, 3), torch.randn(5)
    params = {"move": {"logits": logits}, "force": {"loc": loc, "scale": torch.ones(5)}}
    policy = CompositeDistribution(
        TensorDict(params, [5]), distribution_map={"move": Categorical, "force": Normal}
    )
    data = TensorDict(move=torch.arange(5) % 3, force=torch.randn(5), batch_size=[5])
    expected = Categorical(logits=logits).log_prob(data["move"])
    expected = expected + Normal(loc, 1.0).log_prob(data["force"])
    assert_close(log_prob_of(policy, data, "not read"), expected)


def test_ends_are_known_from_any_of_torchrls_flags():
    loss, data = DynamicsLoss(small_model()), sequences(2, 6)
    data["next", "truncated"] = torch.zeros(2, 6, 1, dtype=torch.bool)
    data["next", "done"][:, 1] = data["next", "terminated"][:, 1] = True
    data["next", "done"][:, 3] = data["next", "truncated"][:, 3] = True
    for lost in (("next", "done"), ("next", "truncated")):
        less = data.clone().exclude(lost)
        done, terminated = ends(less, "done", "terminated")
        assert torch.equal(done, data["next", "done"])
        assert torch.equal(terminated, data["next", "terminated"])
        assert_close(loss(less), loss(data.clone()))
    less = less.exclude(("next", "terminated"))
    assert torch.equal(torch.stack(ends(less, "done", "terminated")), done.expand(2, *done.shape))
    with pytest.raises(KeyError, match=r"no \('next', 'done'\)\. A TorchRL collector"):
        ends(less.exclude(("next", "done")), "done", "terminated")


def test_a_step_counts_if_all_masks_say_so():
    loss, data = DynamicsLoss(small_model()), sequences(1, 4)
    like = torch.zeros(1, 4)
    assert loss_mask(loss, data, like) is None
    data["collector", "mask"] = torch.tensor([[True, True, False, False]]).unsqueeze(-1)
    assert loss_mask(loss, data, like).tolist() == [[True, True, False, False]]
    data["shifted_valid"] = torch.tensor([[True, False, True, False]])
    assert loss_mask(loss, data, like).tolist() == [[True, False, False, False]]
    loss.loss_mask_key = "shifted_valid"
    assert loss_mask(loss, data, like).tolist() == [[True, False, True, False]]
    loss.loss_mask_key = None
    assert loss_mask(loss, data, like) is None


def test_a_sequence_may_have_one_priority():
    loss, data = DynamicsLoss(small_model(), reduction="none"), sequences(3, 4)
    each = loss(data.clone())["loss_dynamics_reward"]
    data.batch_size = data["next"].batch_size = [3]
    data["priority_weight"] = weight = torch.rand(3)
    loss.reduction = "mean"
    found = loss(data)["loss_dynamics_reward"]
    assert_close(found, (weight.unsqueeze(-1) * each).sum() / (4 * weight.sum()))


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1), (2, 3, 1), (2, 3)])
def test_padding_is_zero_whatever_the_axes(shape):
    loss, batch = DynamicsLoss(small_model()), shape[:2]
    mask = torch.rand(shape) > 0.5
    mask[0], mask[1, 0] = True, False
    data = TensorDict(
        x=torch.full((*batch, 5), torch.nan),
        n=torch.ones(batch).long(),
        one=torch.ones(batch),
        batch_size=batch,
    )
    data["collector", "mask"] = mask
    flat = mask.reshape(batch)
    found = without_padding(loss, data, ["x", "n", "one", "none"])
    assert set(found.keys()) == {"x", "n", "one"}
    assert torch.equal(found["x"].isnan().all(-1), flat)
    assert torch.equal((found["x"] == 0).all(-1), ~flat)
    assert torch.equal(found["one"], flat.float())
    assert found["n"].all()
    assert data["x"].isnan().all()
