"""Measures of features: closed forms, each matrix of a batch by itself, numbers out of range."""

from __future__ import annotations

import math

import pytest
import torch

from muon_rl import diagnostics
from muon_rl.diagnostics import dormant_share, effective_rank, measures, stable_rank, topk_mass

MEASURES = [effective_rank, stable_rank, topk_mass, dormant_share]
SHAPES = [(12, 12), (40, 12), (12, 40)]  # square, tall, wide


def orthogonal(n: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, columns, dtype=torch.float64))[0]


def with_spectrum(values: list[float], shape: tuple[int, int]) -> torch.Tensor:
    """Return a matrix with these singular values and random singular vectors."""
    k = len(values)
    left, right = orthogonal(shape[0], k), orthogonal(shape[1], k)
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.mT


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_identity_has_full_rank(n, dtype):
    eye = torch.eye(n, dtype=dtype)
    wanted = torch.promote_types(dtype, torch.float32)
    for measure, expected in (
        (effective_rank, n), (stable_rank, n), (topk_mass, min(1, 10 / n)), (dormant_share, 0),
    ):  # fmt: skip
        found = measure(eye)
        assert found.dtype == wanted
        assert found.shape == ()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=wanted))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 9), (9, 1)])
def test_rank_one_is_one(shape):
    features = torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    for measure in (effective_rank, stable_rank, topk_mass):
        torch.testing.assert_close(measure(features), torch.tensor(1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_known_spectrum_gives_its_closed_forms(shape):
    """Shares 1/2, 1/4, 1/8, 1/8: entropy 1.75 ln 2."""
    features = with_spectrum([4.0, 2.0, 1.0, 1.0], shape)
    assert effective_rank(features).item() == pytest.approx(2**1.75, rel=1e-12)
    assert stable_rank(features).item() == pytest.approx(22 / 16, rel=1e-12)
    shares = [topk_mass(features, k).item() for k in (1, 2, 3, 4, 99)]
    assert shares == pytest.approx([0.5, 0.75, 0.875, 1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("measure", [effective_rank, stable_rank, topk_mass])
def test_a_rotation_of_samples_or_units_changes_no_rank(measure):
    features = torch.randn(30, 20, dtype=torch.float64)
    turned = orthogonal(30, 30) @ features @ orthogonal(20, 20)
    torch.testing.assert_close(measure(turned), measure(features), rtol=1e-12, atol=0)
    torch.testing.assert_close(measure(features.mT), measure(features), rtol=1e-12, atol=0)


def test_units_are_dormant_up_to_the_threshold_and_not_above():
    """The layer's mean is 1, so a unit's mean activation is its score; signs cancel nowhere."""
    activity = torch.tensor([0.0, 0.025, 0.026, 3.949], dtype=torch.float64)
    features = torch.stack([activity, -activity])
    assert dormant_share(features).item() == 0.5
    assert dormant_share(features, 0.0).item() == 0.25
    assert dormant_share(features, 0.0249).item() == 0.25
    assert dormant_share(features, 0.03).item() == 0.75


def test_dormancy_is_of_units_not_of_samples():
    features = torch.ones(2, 4)
    features[:, 0] = 0
    assert dormant_share(features).item() == 0.25
    assert dormant_share(features.mT).item() == 0.0


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_gives_what_its_matrices_give(measure, shape):
    batch = torch.randn(3, 2, *shape) * torch.rand(3, 2, 1, shape[1]).pow(4)
    found = measure(batch)
    assert found.shape == (3, 2)
    assert len(found.unique()) > 1
    for row in range(3):
        for column in range(2):
            alone = measure(batch[row, column])
            torch.testing.assert_close(found[row, column], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scale", [1e30, 1e-30, 2.0**-120, -3.0])
def test_scale_changes_nothing(measure, scale):
    features = torch.randn(2, 20, 12)
    features[..., 0] = 0
    torch.testing.assert_close(measure(scale * features), measure(features), rtol=1e-5, atol=0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("value", ["max", "tiny", "smallest_subnormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_edges_of_the_number_range_are_numbers_as_others(measure, value, dtype):
    numbers = {"smallest_subnormal": math.ulp(0.0) if dtype == torch.float64 else 2.0**-149}
    edge = numbers.get(value) or getattr(torch.finfo(dtype), value)
    features = torch.full((5, 4), edge, dtype=dtype)
    assert (features > 0).all()
    assert measure(features).item() == pytest.approx(0 if measure is dormant_share else 1)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_zero_features_give_zero(measure, shape):
    assert measure(torch.zeros(shape)).item() == 0
    other = torch.randn(shape)
    batch = torch.stack([torch.zeros(shape), other])
    torch.testing.assert_close(measure(batch), torch.stack([torch.tensor(0.0), measure(other)]))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan_for_its_own_matrix_alone(measure, bad):
    features = torch.randn(4, 9, 6)
    features[1, 3, 2] = features[3, 0, 0] = bad
    found = measure(features)
    assert found.isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(found[[0, 2]], measure(features[[0, 2]]))
    assert measure(features[1]).isnan()


def test_the_features_are_left_alone_and_need_no_gradient():
    features = torch.randn(2, 8, 6, requires_grad=True)
    before = features.detach().clone()
    assert not any(value.requires_grad for value in measures(features).values())
    assert torch.equal(features, before)


def test_all_at_once_are_the_same_as_one_by_one():
    features = torch.randn(2, 20, 12)
    found = measures(features, k=3, threshold=0.9)
    assert torch.equal(found["topk_mass"], topk_mass(features, 3))
    assert torch.equal(found["dormant_share"], dormant_share(features, 0.9))
    assert torch.equal(found["effective_rank"], effective_rank(features))
    assert torch.equal(found["stable_rank"], stable_rank(features))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 5, 3), (5,), ()])
def test_no_samples_or_units_are_refused(measure, shape):
    with pytest.raises(ValueError, match=r"need the shape \(\*batch, samples, width\)"):
        measure(torch.zeros(shape))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_floating_point_is_refused(measure, dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        measure(torch.ones(3, 2, dtype=dtype))


@pytest.mark.parametrize("k", [0, -1])
def test_a_share_of_none_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be at least 1, but is {k}"):
        topk_mass(torch.ones(3, 2), k)


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_a_threshold_below_zero_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        dormant_share(torch.ones(3, 2), threshold)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives():
    features = torch.randn(3, 64, 32)
    features[1, 0, 0] = math.nan
    for name, expected in diagnostics.measures(features).items():
        found = diagnostics.measures(features.cuda())[name]
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True)
