"""The running second moment: oracle, masks, what is not finite, checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from muon_rl.objectives import AdvantageNormalizer


def test_the_average_is_debiased():
    normalizer = AdvantageNormalizer()
    found = []
    for moment in (4.0, 4.0, 16.0):
        scale = normalizer(torch.full((3, 2), math.sqrt(moment)))
        found.append(normalizer.second_moment.item())
        assert scale.item() == pytest.approx(math.sqrt(found[-1]))
    assert found == pytest.approx([4, 4, 8.040268], abs=2e-6)


def test_a_constant_is_its_own_scale_however_long():
    """Centred, it would be 0."""
    normalizer = AdvantageNormalizer(0.9)
    for _ in range(200):
        assert normalizer(torch.full((7,), -5.0)).item() == pytest.approx(5, rel=1e-5)


def test_variance_does_what_the_known_implementation_does():
    normalizer = AdvantageNormalizer(normalizer="variance")
    assert normalizer.scale().item() == 1.0
    average = 1.0
    for seed in range(5):
        batch = np.random.default_rng(seed).normal(3, 2, size=(4, 6))
        average = 0.99 * average + 0.01 * max(batch.var(ddof=1), 1e-8)
        found = normalizer(torch.as_tensor(batch))
        assert found.item() == pytest.approx(average + 1e-8, rel=1e-6)


@pytest.mark.parametrize("normalizer", ["second_moment", "variance"])
def test_masked_values_are_not_read(normalizer):
    one, other = (AdvantageNormalizer(0.5, normalizer=normalizer) for _ in range(2))
    values, mask = torch.randn(3, 4), torch.rand(3, 4) > 0.4
    for bad in (math.nan, math.inf, 1e30):
        found = one(torch.where(mask, values, bad), mask)
        assert_close(found, other(values[mask]))


@pytest.mark.parametrize("normalizer", ["second_moment", "variance"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "masked", "empty"])
def test_a_batch_that_tells_nothing_changes_nothing(normalizer, bad):
    module = AdvantageNormalizer(normalizer=normalizer)
    batch, mask = torch.randn(5, 2), None
    if bad == "masked":
        mask = torch.zeros(5, 2, dtype=torch.bool)
    elif bad == "empty":
        batch = torch.zeros(0, 2)
    else:
        batch[3, 1] = bad
    module(batch, mask)
    assert module.scale().item() == pytest.approx(1.0, abs=1e-7)
    module(torch.randn(9))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(batch, mask)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_one_value_has_a_moment_but_no_variance():
    assert AdvantageNormalizer()(torch.tensor(3.0)).item() == 3
    assert AdvantageNormalizer(normalizer="variance")(torch.tensor(3.0)).item() == 1


def test_the_floor_keeps_the_scale_from_zero():
    assert AdvantageNormalizer()(torch.zeros(4)).item() == pytest.approx(1e-4)
    floor = AdvantageNormalizer(min_advantage_variance=0.25)
    assert floor(torch.full((4,), 0.1)).item() == 0.5
    assert floor.second_moment.item() == pytest.approx(0.01)


def test_evaluation_reads_and_does_not_learn():
    normalizer = AdvantageNormalizer()
    normalizer(torch.full((4,), 2.0))
    assert normalizer.eval()(torch.full((4,), 100.0)).item() == 2


def test_the_state_is_in_the_checkpoint_and_goes_on_as_it_was():
    one, other = AdvantageNormalizer(0.9), AdvantageNormalizer(0.9)
    for _ in range(3):
        one(torch.randn(8))
    other.load_state_dict(one.state_dict(), strict=True)
    batch = torch.randn(8)
    assert torch.equal(one(batch), other(batch))
    assert not list(one.parameters())


def test_no_gradient_and_no_precision_of_the_batch_comes_in():
    advantage = torch.randn(6, requires_grad=True)
    assert not AdvantageNormalizer()(advantage).requires_grad
    scale = AdvantageNormalizer()(torch.full((300,), 3.0, dtype=torch.bfloat16))
    assert scale.dtype == torch.float32
    assert scale.item() == 3


def test_it_compiles_in_one_graph():
    one, other = AdvantageNormalizer(), AdvantageNormalizer()
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    for _ in range(3):
        batch, mask = torch.randn(4, 5), torch.rand(4, 5) > 0.5
        assert_close(compiled(batch, mask), other(batch, mask))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), but is 1.0"),
        ({"decay": math.nan}, "decay"),
        ({"min_advantage_variance": 0.0}, "min_advantage_variance must be above 0"),
        ({"normalizer": "std"}, "'second_moment' or 'variance', but is 'std'"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdvantageNormalizer(**options)
