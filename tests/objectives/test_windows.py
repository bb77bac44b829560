"""Unrolled targets and masks against a walk along each episode, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muon_rl.objectives.windows import unroll_masks, unroll_targets, unroll_windows


def flags(steps: int, *at: int) -> torch.Tensor:
    return torch.zeros(steps, dtype=torch.bool).index_fill(0, torch.tensor(at).long(), True)


def walk(t, steps, terminated, truncated, valid, next_observed):
    """Yield what each step from t has: (reward, value, policy) and where its state is found."""
    last = len(terminated) - 1
    alive = valid[t]
    for u in range(t, t + steps):
        alive = alive and u <= last and valid[u]
        if not alive:
            yield (False, False, False), None
            continue
        breaks = terminated[u] or truncated[u] or u == last or not valid[u + 1]
        if terminated[u]:
            yield (True, True, False), "terminal"
        elif breaks:
            yield (True, next_observed[u], next_observed[u]), ("bootstrap", u)
        else:
            yield (True, True, True), ("root", u + 1)
        alive = not breaks


def compare(terminated, truncated, valid, next_observed, steps):
    length = len(terminated)
    root, bootstrap = torch.arange(1.0, length + 1), torch.arange(1.0, length + 1) * 100
    masks = unroll_masks(terminated, truncated, steps, valid=valid, next_observed=next_observed)
    targets = unroll_targets(root, bootstrap, terminated, truncated, steps, valid=valid)
    assert targets.shape == masks.reward.shape == (length, steps)
    source = {"root": root, "bootstrap": bootstrap}
    lists = [x.tolist() for x in (terminated, truncated, valid, next_observed)]
    for t in range(length):
        for k, (wanted, place) in enumerate(walk(t, steps, *lists)):
            assert tuple(mask[t, k].item() for mask in masks) == wanted
            if place == "terminal":
                assert targets[t, k] == 0
            elif place is not None:
                assert targets[t, k] == source[place[0]][place[1]]


def test_a_termination_leaves_twelve_rewards_twelve_values_and_nine_policies():
    masks = unroll_masks(flags(6, 2), flags(6), 3)
    assert [mask.sum().item() for mask in masks] == [12, 12, 9]
    value = torch.full((6,), 5.0)
    targets = unroll_targets(value, value + 1, flags(6, 2), flags(6), 3)
    assert targets[masks.value].eq(0).sum() == 3
    assert targets[2, 0] == 0


def test_a_truncation_bootstraps_and_keeps_the_policy_if_the_observation_is_there():
    masks = unroll_masks(flags(6), flags(6, 2), 3)
    assert [mask.sum().item() for mask in masks] == [12, 12, 12]
    value = torch.arange(6.0)
    targets = unroll_targets(value, value + 10, flags(6), flags(6, 2), 3)
    assert targets[0].tolist() == [1, 2, 12]
    without = unroll_masks(flags(6), flags(6, 2), 3, next_observed=False)
    # Left out: s_3 at three steps, the sequence's own end at three.
    assert [mask.sum().item() for mask in without] == [12, 6, 6]
    partly = unroll_masks(flags(6), flags(6, 2), 3, next_observed=flags(6, 5))
    assert [mask.sum().item() for mask in partly] == [12, 9, 9]


def test_a_step_that_terminated_and_was_truncated_terminated():
    """SliceSampler marks each slice's last step as truncated, terminal or not."""
    both = unroll_masks(flags(4, 1), flags(4, 1, 3), 2)
    assert [mask.sum().item() for mask in both] == [6, 6, 4]
    ones = torch.ones(4)
    assert unroll_targets(ones, ones, flags(4, 1), flags(4, 1, 3), 2)[1, 0] == 0


def test_padding_and_what_lies_beyond_it_is_left_out():
    """The real sequence is three long; a padded step repeats the last and must not follow it."""
    valid = ~flags(5, 3, 4)
    masks = unroll_masks(flags(5), flags(5), 3, valid=valid)
    assert masks.reward.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0] * 3, [0] * 3]
    assert torch.equal(masks.policy, masks.reward)
    value = torch.tensor([1.0, 2.0, 3.0, math.nan, math.nan])
    targets = unroll_targets(value, value + 10, flags(5), flags(5), 3, valid=valid)
    assert targets[0].tolist() == [2, 3, 13]
    assert targets[masks.value].isfinite().all()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**20), st.booleans())
def test_masks_and_targets_are_those_of_a_walk(length, steps, seed, padded):
    generator = torch.Generator().manual_seed(seed)
    terminated, truncated, observed, holes = torch.rand(4, length, generator=generator)
    valid = holes > 0.2 if padded else torch.ones(length, dtype=torch.bool)
    compare(terminated < 0.2, truncated < 0.2, valid, observed < 0.7, steps)


@pytest.mark.parametrize("length", [1, 2])
def test_a_sequence_shorter_than_the_unroll(length):
    masks = unroll_masks(flags(length), flags(length), 5)
    assert masks.reward.sum() == length * (length + 1) / 2
    compare(flags(length), flags(length), ~flags(length), ~flags(length), 5)


def test_all_padding_leaves_nothing():
    masks = unroll_masks(flags(4), flags(4), 3, valid=flags(4))
    assert not any(mask.any() for mask in masks)


def test_windows_follow_time_not_the_batch():
    reward = torch.arange(12.0).reshape(2, 6)
    windows = unroll_windows(reward, 3)
    assert windows.shape == (2, 6, 3)
    assert windows[1, 2].tolist() == [8, 9, 10]  # ("next", "reward")[t + k - 1]
    assert windows[0, 4].tolist() == [4, 5, 5]
    actions = torch.randn(2, 5, 6, 3, 4)
    windows = unroll_windows(actions, 2, feature_dims=2)
    assert windows.shape == (2, 5, 6, 2, 3, 4)
    assert torch.equal(windows[:, :, 3, 1], actions[:, :, 4])


def test_each_sequence_of_a_batch_has_its_own_ends():
    terminated = torch.stack([flags(6, 2), flags(6), flags(6, 0, 5)]).reshape(3, 1, 6)
    truncated = torch.stack([flags(6), flags(6, 3), flags(6, 2)]).reshape(3, 1, 6)
    policy = torch.randn(3, 1, 6, 4).log_softmax(-1)
    after = torch.randn(3, 1, 6, 4).log_softmax(-1)
    masks = unroll_masks(terminated, truncated, 3)
    found = unroll_targets(policy, after, terminated, truncated, 3, feature_dims=1)
    assert found.shape == (3, 1, 6, 3, 4)
    for i in range(3):
        ends = terminated[i, 0], truncated[i, 0]
        for mask, alone in zip(masks, unroll_masks(*ends, 3), strict=True):
            assert torch.equal(mask[i, 0], alone)
        alone = unroll_targets(policy[i, 0], after[i, 0], *ends, 3, feature_dims=1)
        assert torch.equal(found[i, 0], alone)
    assert torch.equal(found[0, 0, 0, 0], policy[0, 0, 1])
    assert torch.equal(found[1, 0, 3, 0], after[1, 0, 3])
    assert found[masks.policy].logsumexp(-1).abs().max() < 1e-6


def test_targets_carry_a_gradient_and_none_through_what_is_left_out():
    root = torch.randn(5).requires_grad_()
    bootstrap = torch.full((5,), math.nan).index_fill(0, torch.tensor(4), 1.0).requires_grad_()
    unroll_targets(root, bootstrap, flags(5, 1), flags(5), 2).nansum().backward()
    assert root.grad.tolist() == [0, 1, 0, 2, 2]
    assert bootstrap.grad.tolist() == [0, 0, 0, 0, 3]  # the last window repeats its last entry
    masked = unroll_targets(root, None, flags(5), flags(5, 1), 2)
    assert masked[1, 0] == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="steps >= 1, but has 0"):
        unroll_masks(flags(3), flags(3), 0)
    with pytest.raises(ValueError, match="steps >= 1"):
        unroll_windows(torch.zeros(3), 0)
    for shape, feature_dims in (((), 0), ((3,), 1), ((2, 0), 0), ((3,), -1)):
        with pytest.raises(ValueError, match=r"need \(\*batch, T, \*features\)"):
            unroll_windows(torch.zeros(shape), 2, feature_dims=feature_dims)
    for name in ("truncated", "valid", "next_observed"):
        given = {"truncated": flags(3), name: flags(3).unsqueeze(-1)}
        with pytest.raises(ValueError, match=f"terminated and {name} need the same shape"):
            unroll_masks(flags(3), steps=2, **given)
    with pytest.raises(ValueError, match="root needs"):
        unroll_targets(torch.zeros(3, 2), None, flags(3), flags(3), 2)
    with pytest.raises(ValueError, match="bootstrap needs the shape"):
        unroll_targets(torch.zeros(3), torch.zeros(2), flags(3), flags(3), 2)


def test_windows_compile_in_one_graph():
    def everything(x, terminated, truncated, valid):
        masks = unroll_masks(terminated, truncated, 4, valid=valid)
        targets = unroll_targets(x, x + 1, terminated, truncated, 4, valid=valid)
        return *masks, targets, unroll_windows(x, 4)

    args = torch.randn(3, 7), *(torch.rand(3, 3, 7) < torch.tensor([0.2, 0.2, 0.8])[:, None, None])
    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    for found, wanted in zip(compiled(*args), everything(*args), strict=True):
        assert torch.equal(found, wanted)
