"""Newton-Schulz against the singular value decomposition and its own scalar map."""

import importlib
import re
from functools import cache

import pytest
import torch
from driving import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from muon_rl.optim import orthogonalize
from muon_rl.optim.orthogonalize import computes_bf16

SHAPES = [(32, 32), (64, 24), (24, 64), (1, 40), (40, 1), (2, 32, 32), (3, 48, 20), (2, 3, 20, 48)]
QUINTIC = (3.4445, -4.7750, 2.0315)
CUBIC = (1.5, -0.5, 0.0)
# A cubic for each of five steps, from NVIDIA Emerging-Optimizers (its set "cubic5").
CUBIC5 = [
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
]


def polar(x):
    """Return the exact polar factor U V^T, of one matrix or of each in a stack."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


@cache
def gaussian_256_and_its_polar_factor():
    x = gaussian(256, 256)
    return x, polar(x)


def scalar_map(s, triples):
    """Apply ``a s + b s^3 + c s^5`` once for each triple, in double precision."""
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return s


def mapped(s, steps, coefficients):
    """Feed each value as the one nonzero entry of a diagonal 2x3 matrix, unscaled (norm < eps)."""
    matrices = torch.zeros(len(s), 2, 3)
    matrices[:, 0, 0] = s
    result = orthogonalize(matrices, steps, coefficients, eps=1.0, dtype=torch.float32)
    off_diagonal = result.clone()
    off_diagonal[:, 0, 0] = 0
    assert not off_diagonal.any()
    return result[:, 0, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("coefficients", "triples"),
    [
        ("quintic", [QUINTIC] * 5),
        ("cubic", [CUBIC] * 5),
        ((2.0, -1.5, 0.5), [(2.0, -1.5, 0.5)] * 5),
        ([QUINTIC, CUBIC], [QUINTIC] + [CUBIC] * 4),
        ([CUBIC] * 3 + [QUINTIC] * 3, [CUBIC] * 3 + [QUINTIC] * 2),
    ],
    ids=["quintic", "cubic", "triple", "last-repeated", "longer-than-steps"],
)
def test_singular_vectors_stay_and_singular_values_follow_the_polynomial(
    shape, coefficients, triples
):
    x = gaussian(*shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()

    expected = u @ torch.diag_embed(scalar_map(s, triples)) @ vh

    result = orthogonalize(x, 5, coefficients, dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("coefficients", "steps", "smallest", "low", "high"),
    [
        ("quintic", 5, 1e-2, 0.682, 1.134),
        ("polar_express", 5, 3e-3, 0.870, 1.124),
        ("polar_express", 8, 1e-3, 1.000, 1.000),
        ("cubic", 15, 1e-2, 1.000, 1.000),
        ("cubic", 5, 1e-2, 0.076, 1.000),
        (CUBIC5, 5, 1e-2, 0.774, 1.300),
    ],
)
def test_singular_values_land_in_the_published_range_and_reach_both_ends(
    coefficients, steps, smallest, low, high
):
    values = torch.logspace(0, 1, 20001, base=smallest).clamp(max=1.0)
    result = mapped(values, steps, coefficients)
    assert float(result.min()) == pytest.approx(low, abs=6e-4)
    assert float(result.max()) == pytest.approx(high, abs=6e-4)


def test_quintic_has_slope_485_at_zero_and_never_exceeds_1_202():
    assert float(mapped(torch.tensor([1e-6]), 5, "quintic")) / 1e-6 == pytest.approx(484.9, abs=0.1)
    peak = mapped(torch.logspace(-6, 0, 20001), 5, "quintic").max()
    assert float(peak) == pytest.approx(1.202, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("coefficients", "steps", "distance"),
    [
        ("quintic", 5, 0.205),
        ("polar_express", 5, 0.101),
        ("polar_express", 8, 0.011),
        ("cubic", 15, 0.093),
    ],
)
@pytest.mark.parametrize("stacked", [False, True], ids=["single", "stacked"])
def test_distance_of_a_gaussian_to_its_polar_factor(coefficients, steps, distance, dtype, stacked):
    x, exact = gaussian_256_and_its_polar_factor()
    if stacked:
        x, exact = torch.stack([x, -x]), torch.stack([exact, -exact])
    error = orthogonalize(x, steps, coefficients, dtype=dtype) - exact
    assert float(error.norm() / exact.norm()) == pytest.approx(distance, abs=2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_enough_steps_reach_the_polar_factor(shape):
    x = gaussian(*shape, dtype=torch.float64)
    result = orthogonalize(x, 40, "cubic", dtype=torch.float64)
    torch.testing.assert_close(result, polar(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sign_and_powers_of_two_pass_through_exactly(shape, dtype):
    x = gaussian(*shape)
    result = orthogonalize(x, dtype=dtype)
    assert torch.equal(orthogonalize(-x, dtype=dtype), -result)
    assert torch.equal(orthogonalize(4 * x, dtype=dtype), result)
    assert torch.equal(orthogonalize(x / 4, dtype=dtype), result)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_the_transpose_passes_through(shape, dtype, atol):
    x = gaussian(*shape, dtype=dtype)
    result = orthogonalize(x.mT.contiguous(), dtype=dtype)
    torch.testing.assert_close(result, orthogonalize(x, dtype=dtype).mT, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 3), (1, 256)], ids=str)
def test_the_transpose_of_an_oblong_matrix_passes_through_native_bfloat16_exactly(shape):
    x = gaussian(*shape)
    transposed = orthogonalize(x.mT.contiguous(), dtype=torch.bfloat16)
    # Emulated, the products of a transpose are rounded differently.
    atol = 0.0 if computes_bf16("cpu") else 0.02
    expected = orthogonalize(x, dtype=torch.bfloat16).mT
    torch.testing.assert_close(transposed, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96), (256, 256)], ids=str)
def test_a_stack_equals_its_matrices_one_by_one_in_every_bit(shape):
    x = gaussian(2, 3, *shape)
    one_by_one = [[orthogonalize(m, dtype=torch.bfloat16) for m in row] for row in x]
    expected = torch.stack([torch.stack(row) for row in one_by_one])
    assert torch.equal(orthogonalize(x, dtype=torch.bfloat16), expected)


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96), (1, 40), (3, 3)], ids=str)
def test_a_float32_stack_equals_its_matrices_one_by_one_to_rounding(shape):
    x = gaussian(5, *shape)
    expected = torch.stack([orthogonalize(m, dtype=torch.float32) for m in x])
    result = orthogonalize(x, dtype=torch.float32)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 32, 48), (1, 1, 48, 32)], ids=str)
def test_leading_dims_of_one_change_no_bit(shape):
    x = gaussian(*shape)
    result = orthogonalize(x, dtype=torch.bfloat16)
    assert result.shape == shape
    assert torch.equal(
        result.reshape(shape[-2:]), orthogonalize(x.reshape(shape[-2:]), dtype=torch.bfloat16)
    )


def test_matrices_of_different_scale_do_not_share_a_norm():
    x = gaussian(3, 24, 24)
    scales = torch.tensor([2.0**-20, 1.0, 2.0**20]).reshape(3, 1, 1)
    assert torch.equal(
        orthogonalize(scales * x, dtype=torch.bfloat16), orthogonalize(x, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)], ids=str)
def test_a_nonfinite_entry_spoils_its_own_matrix_only(shape, bad):
    x = gaussian(3, *shape)
    clean = orthogonalize(x)
    x[1, 0, 0] = bad
    result = orthogonalize(x)
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [9e14, 1e16, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64), (2, 24, 64)], ids=str)
def test_huge_entries_give_the_direction_of_ordinary_ones(shape, scale, dtype):
    x = gaussian(*shape)
    result = orthogonalize(scale * x, 8, "polar_express", dtype=dtype)
    exact = polar(x)
    assert float((result - exact).norm() / exact.norm()) < 0.03


def test_one_huge_matrix_leaves_its_neighbours_as_they_are():
    x = gaussian(3, 24, 24)
    clean = orthogonalize(x, dtype=torch.float32)
    x[1] *= 1e20
    result = orthogonalize(x, dtype=torch.float32)
    assert torch.equal(result[[0, 2]], clean[[0, 2]])
    torch.testing.assert_close(result[1], clean[1], rtol=0, atol=1e-3)


def test_a_zero_matrix_stays_zero_beside_others():
    x = gaussian(3, 16, 24)
    x[1] = 0
    result = orthogonalize(x)
    assert not result[1].any()
    assert result[0].any()
    assert result[2].any()


def test_below_eps_the_norm_is_not_scaled_up():
    x = 1e-6 * gaussian(8, 8) / 8
    slope = QUINTIC[0] ** 5
    result = orthogonalize(x, eps=1.0, dtype=torch.float32)
    torch.testing.assert_close(result, slope * x, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 5, 0)], ids=str)
def test_an_empty_stack_comes_back_as_it_is(shape):
    assert orthogonalize(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_result_has_the_input_dtype_and_the_input_is_unchanged(dtype):
    x = gaussian(3, 16, 24).to(dtype)
    before = x.clone()
    result = orthogonalize(x)
    assert result.dtype == dtype
    assert torch.equal(x, before)
    assert not torch.equal(result, x)


@pytest.mark.parametrize(
    ("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], ids=["native", "not"]
)
def test_without_a_dtype_the_device_decides(monkeypatch, native, dtype):
    module = importlib.import_module("muon_rl.optim.orthogonalize")
    monkeypatch.setattr(module, "computes_bf16", lambda device_type: native)
    x = gaussian(100, 72)
    assert torch.equal(orthogonalize(x), orthogonalize(x, dtype=dtype))
    other = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[dtype]
    assert not torch.equal(orthogonalize(x), orthogonalize(x, dtype=other))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((63, 63), torch.float32),
        ((2, 3, 63, 80), torch.float32),
        ((64, 97), torch.float32),
        ((300, 64), torch.float32),
        ((64, 64), torch.bfloat16),
        ((64, 96), torch.bfloat16),
        ((65, 300), torch.bfloat16),
        ((300, 65), torch.bfloat16),
        ((2, 65, 80), torch.bfloat16),
    ],
    ids=str,
)
def test_on_a_cpu_with_bfloat16_a_side_below_64_or_skinny_at_64_takes_float32(
    monkeypatch, shape, dtype
):
    module = importlib.import_module("muon_rl.optim.orthogonalize")
    monkeypatch.setattr(module, "computes_bf16", lambda device_type: True)
    x = gaussian(*shape)
    other = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[dtype]
    assert torch.equal(orthogonalize(x), orthogonalize(x, dtype=dtype))
    assert not torch.equal(orthogonalize(x), orthogonalize(x, dtype=other))


def test_a_device_of_unknown_kind_is_not_trusted_with_bfloat16():
    assert computes_bf16("meta") is False


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_a_vector_is_refused_with_its_shape(shape):
    message = re.escape(f"needs matrices (*batch, m, n), but got shape {shape}")
    with pytest.raises(ValueError, match=message):
        orthogonalize(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_other_than_real_floating_point_is_refused_with_its_dtype(dtype):
    with pytest.raises(TypeError, match=f"real floating-point matrices, but got {dtype}"):
        orthogonalize(torch.zeros(3, 3, dtype=dtype))


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_steps_must_be_a_positive_integer(steps):
    with pytest.raises(ValueError, match=rf"integer of at least 1, but is {steps}"):
        orthogonalize(torch.ones(3, 3), steps)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ("septic", r"Unknown coefficients 'septic': use one of \['cubic', 'polar_express', 'quin"),
        ((1.0, 2.0), r"must hold 3 numbers, but got \(1.0, 2.0\)"),
        ([(1.5, -0.5, 0.0), (1.0,)], "must hold 3 numbers"),
        ([], r"must be a name, \(a, b, c\) or a list of them, not \[\]"),
        (None, "must be a name"),
        (("a", "b", "c"), "must hold 3 numbers|must be a name"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused_with_what_is_allowed(coefficients, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(torch.ones(3, 3), 5, coefficients)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    batch=st.lists(st.integers(1, 3), max_size=2),
    exponent=st.integers(-5, 10),
    seed=st.integers(0, 2**31 - 1),
)
def test_well_conditioned_matrices_come_out_in_the_range_of_the_quintic(
    rows, columns, batch, exponent, seed
):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)

    def orthonormal(n):
        normal = torch.randn(*batch, n, rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal).Q

    values = 0.1 + 0.9 * torch.rand(*batch, rank, generator=generator, dtype=torch.float64)
    x = orthonormal(rows) @ torch.diag_embed(values) @ orthonormal(columns).mT
    result = orthogonalize(10.0**exponent * x, dtype=torch.float32)
    assert result.shape == x.shape
    singular_values = torch.linalg.svdvals(result)
    # Condition 10 and at most 24 values keep s / |s|_F above 0.01, where the range is known.
    assert float(singular_values.min()) > 0.681
    assert float(singular_values.max()) < 1.135
