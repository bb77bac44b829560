"""Two-hot scalars: round trip, gradient, range."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from muon_rl.two_hot import two_hot_bins, two_hot_loss, two_hot_value


def test_scalars_come_back_from_their_two_bins():
    values = torch.cat([torch.linspace(-904, 904, 4001), torch.linspace(-2, 2, 401)])
    bins = two_hot_bins(torch.empty(61))
    assert_close(bins, torch.arange(-30.0, 31.0), rtol=0, atol=0)
    transformed = values.sign() * ((values.abs() + 1).sqrt() - 1) + 1e-3 * values
    low = transformed.floor()
    probability = torch.zeros(len(values), 61)
    rows = torch.arange(len(values))
    probability[rows, (low + 30).long()] = 1 - (transformed - low)
    probability[rows, (low + 31).long().clamp(max=60)] += transformed - low
    found = two_hot_value(probability.log())
    assert_close(found, values, rtol=2e-5, atol=2e-5)
    # The same two bins in the loss, at any logits: its gradient is softmax less two-hot.
    logits = torch.randn(len(values), 61, requires_grad=True)
    two_hot_loss(logits, values).sum().backward()
    assert_close(logits.softmax(-1) - logits.grad, probability, rtol=0, atol=2e-5)


def test_two_hot_reaches_904_and_clamps_beyond():
    last = torch.full((61,), -math.inf).index_fill(0, torch.tensor(60), 0.0)
    assert two_hot_value(last).item() == pytest.approx(904.7, abs=0.05)
    logits = torch.randn(4, 61)
    beyond = torch.tensor([[1e9], [math.inf], [-1e9], [905.0]])
    limit = torch.tensor([904.74, 904.74, -904.74, 904.74])
    assert_close(two_hot_loss(logits, beyond), two_hot_loss(logits, limit), rtol=1e-4, atol=1e-4)
    half = two_hot_loss(logits.bfloat16(), limit.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,), (4, 1)])
def test_a_single_bin_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2 bins"):
        two_hot_bins(torch.zeros(shape))
    with pytest.raises(ValueError, match="limit must be above 0"):
        two_hot_bins(torch.zeros(3), limit=0.0)
