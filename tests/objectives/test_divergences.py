"""Divergences between policies, some of whose actions are never taken."""

from __future__ import annotations

import math

import pytest
import torch

from muon_rl.objectives.divergences import cross_entropy, kl_divergence, total_variation


def test_divergences_with_actions_that_are_never_taken():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    q = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]])
    leaves = [x.clone().requires_grad_() for x in (p.log(), q.log())]
    by_hand = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]
    assert kl_divergence(*leaves).tolist() == pytest.approx(by_hand)
    assert total_variation(*leaves).tolist() == [0.25, 0.5]
    entropy = [math.log(2), 0.0]
    wanted = [kl + h for kl, h in zip(by_hand, entropy, strict=True)]
    assert cross_entropy(*leaves).tolist() == pytest.approx(wanted)
    for measure in (kl_divergence, cross_entropy, total_variation):
        for gradient in torch.autograd.grad(measure(*leaves).sum(), leaves):
            assert gradient.isfinite().all()
    assert kl_divergence(leaves[1], leaves[0])[1] == math.inf
    faint = torch.tensor([0.0, -200.0])  # e^-200 is 0 in float32
    assert kl_divergence(faint, torch.tensor([0.0, -math.inf])).item() == 0
    assert kl_divergence(torch.tensor([math.nan, 0.0]), faint).isnan()
    for measure in (kl_divergence, cross_entropy, total_variation):
        with pytest.raises(ValueError, match="same shape"):
            measure(p, q[:1])
