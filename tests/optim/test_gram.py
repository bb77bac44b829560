"""The iteration on the Gram matrix against the plain one, worked out in float64."""

import pytest
import torch
from driving import gaussian
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from muon_rl.optim import Muon, orthogonalize
from muon_rl.optim.coefficients import COEFFICIENTS

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
# Each has 2 * (larger side) > 3 * (smaller side), tall ones and stacks among them.
OBLONG = [(24, 64), (64, 24), (64, 256), (3, 256, 64), (2, 2, 40, 61), (1, 40)]


def iterate(x, coefficients, steps):
    """Return the plain iteration in float64, without a fused product or a transpose."""
    triples = list(COEFFICIENTS[coefficients])[:steps]
    triples += [triples[-1]] * (steps - len(triples))
    x = x.double()
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt()
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def with_singular_values(rows, columns, values, seed=0):
    """Build a matrix of the given singular values, between random orthonormal bases."""
    left, right = (gaussian(n, len(values), seed=seed).double() for n in (rows, columns))
    return (torch.linalg.qr(left).Q * values @ torch.linalg.qr(right).Q.mT).float()


def ill_conditioned(rows, columns):
    values = torch.logspace(0, -6, min(rows, columns), dtype=torch.float64)
    return with_singular_values(rows, columns, values)


def rank_deficient(rows, columns):
    rank = max(1, min(rows, columns) // 2)
    return gaussian(rows, rank) @ gaussian(rank, columns, seed=1)


def rank_one(rows, columns):
    return gaussian(rows, 1) @ gaussian(1, columns, seed=1)


def with_zero_rows(rows, columns):
    x = gaussian(rows, columns)
    x[: rows // 3] = 0
    x[:, columns - columns // 4 :] = 0
    return x


class LongProducts(TorchDispatchMode):
    """Counts the matrix products that the larger side of the matrices takes part in."""

    def __init__(self, shape):
        super().__init__()
        self.side, self.count = max(shape[-2:]), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in PRODUCTS:
            shapes = [x.shape[-2:] for x in args[-2:]]
            self.count += any(self.side in shape for shape in shapes)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [
        ((40, 61), torch.float32, "gram"),
        ((61, 40), torch.float32, "gram"),
        ((2, 61, 40), torch.float32, "gram"),
        ((40, 60), torch.float32, "plain"),
        ((60, 40), torch.float32, "plain"),
        ((64, 256), torch.bfloat16, "plain"),
        ((256, 64), torch.bfloat16, "plain"),
        ((2, 64, 256), torch.bfloat16, "plain"),
    ],
    ids=str,
)
def test_the_gram_form_is_taken_in_float32_where_it_is_cheaper(shape, dtype, form):
    with LongProducts(shape) as products:
        orthogonalize(gaussian(*shape), dtype=dtype)
    # At its beginning and at its end, or twice in each of five steps.
    assert products.count == {"gram": 2, "plain": 10}[form]


@pytest.mark.parametrize(
    ("coefficients", "steps", "form"),
    [
        ("quintic", 5, "gram"),
        ("quintic", 6, "plain"),
        ("polar_express", 5, "gram"),
        ("polar_express", 6, "plain"),
        ("cubic", 15, "gram"),
        ("cubic", 20, "plain"),
    ],
)
@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (70, 200)], ids=str)
def test_the_gram_form_is_taken_for_few_steps_as_its_rounding_grows(
    shape, coefficients, steps, form
):
    with LongProducts(shape) as products:
        orthogonalize(gaussian(*shape), steps, coefficients, dtype=torch.float32)
    assert products.count == {"gram": 2, "plain": 2 * steps}[form]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("coefficients", "steps"), [("cubic", 1), ("cubic", 3), ("quintic", 5)])
def test_the_gram_form_is_never_taken_in_another_arithmetic(coefficients, steps, dtype):
    with LongProducts((40, 200)) as products:
        orthogonalize(gaussian(40, 200), steps, coefficients, dtype=dtype)
    assert products.count == 2 * steps


@pytest.mark.parametrize(
    ("coefficients", "steps", "atol"),
    [
        ("quintic", 5, 3e-6),
        ("cubic", 5, 4e-7),
        ("cubic", 15, 1e-6),
        ("polar_express", 5, 2e-5),
        ("polar_express", 8, 8e-6),
    ],
)
@pytest.mark.parametrize("shape", OBLONG, ids=str)
def test_of_gaussians_it_equals_the_plain_form_to_rounding(shape, coefficients, steps, atol):
    x = gaussian(*shape)
    result = orthogonalize(x, steps, coefficients, dtype=torch.float32)
    expected = iterate(x, coefficients, steps)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=atol)


# The first step's rounding in the Gram matrix (6e-8) is multiplied by the squared slope of the
# steps that follow: 2e4 for five steps of the quintic, 2e5 for Polar Express.
@pytest.mark.parametrize(
    ("make", "coefficients", "steps", "atol"),
    [
        (ill_conditioned, "quintic", 5, 6e-4),
        (ill_conditioned, "cubic", 5, 4e-7),
        (ill_conditioned, "cubic", 15, 1e-3),
        (ill_conditioned, "polar_express", 5, 4e-3),
        (rank_deficient, "quintic", 5, 3e-5),
        (rank_deficient, "cubic", 5, 4e-7),
        (rank_deficient, "cubic", 15, 5e-5),
        (rank_deficient, "polar_express", 5, 1e-4),
        (rank_one, "quintic", 5, 3e-5),
        (rank_one, "polar_express", 5, 1e-4),
        (with_zero_rows, "quintic", 5, 4e-6),
        (with_zero_rows, "cubic", 5, 4e-7),
        (with_zero_rows, "polar_express", 5, 4e-5),
        (with_zero_rows, "polar_express", 8, 2e-5),
    ],
)
@pytest.mark.parametrize("shape", [(24, 64), (64, 256), (2, 64, 128)], ids=str)
def test_of_singular_matrices_it_equals_the_plain_form_far_below_the_iterations_own_error(
    shape, make, coefficients, steps, atol
):
    x = make(*shape[-2:]).expand(shape)
    result = orthogonalize(x, steps, coefficients, dtype=torch.float32)
    expected = iterate(x, coefficients, steps)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("make", "coefficients", "atol"),
    [
        (rank_deficient, "quintic", 3e-5),
        (rank_deficient, "polar_express", 1e-4),
        (rank_one, "quintic", 3e-5),
        (rank_one, "polar_express", 1e-4),
    ],
)
def test_of_a_singular_tall_matrix_it_is_as_exact_as_of_its_transpose(make, coefficients, atol):
    x = make(64, 24)
    result = orthogonalize(x, 5, coefficients, dtype=torch.float32)
    expected = iterate(x, coefficients, 5)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("make", [ill_conditioned, rank_deficient, rank_one])
@pytest.mark.parametrize(
    ("coefficients", "steps"),
    [("quintic", 6), ("quintic", 10), ("polar_express", 6), ("polar_express", 12)],
)
def test_many_steps_of_a_singular_matrix_stay_near_the_plain_form(make, coefficients, steps):
    x = make(64, 256)
    result = orthogonalize(x, steps, coefficients, dtype=torch.float32)
    expected = iterate(x, coefficients, steps)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (2, 64, 256)], ids=str)
@pytest.mark.parametrize("steps", [6, 8])
def test_in_bfloat16_where_it_would_overflow_singular_matrices_stay_bounded(steps, shape):
    """In bfloat16 the Gram form of this matrix ends at 2e8 after six steps, in NaN after eight."""
    x = rank_deficient(*shape[-2:]).expand(shape)
    result = orthogonalize(x, steps, dtype=torch.bfloat16)
    assert float(torch.linalg.matrix_norm(result, 2).max()) < 1.25


def test_matrices_of_different_shapes_in_one_step_move_as_each_alone():
    """Their Gram matrices are one batch, padded with zeros."""
    shapes = [(24, 64), (64, 24), (3, 5, 40), (40, 61), (1, 40), (40, 1), (64, 256), (2, 30, 30)]
    together, alone = (
        [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(shapes)] for _ in range(2)
    )
    batch_dims = [len(shape) - 2 for shape in shapes]
    optimizers = [
        Muon([{"params": [p], "batch_dims": b}], lr=1.0, dtype=torch.float32)
        for p, b in zip(alone, batch_dims, strict=True)
    ]
    group = {"params": together, "batch_dims": batch_dims}
    optimizers.append(Muon([group], lr=1.0, dtype=torch.float32))
    for step in range(3):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = gaussian(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_a_nan_stays_in_its_own_matrix_among_matrices_of_other_shapes():
    shapes = [(24, 64), (3, 5, 40), (40, 16)]
    runs = []
    for spoiled in (False, True):
        params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(shapes)]
        group = {"params": params, "batch_dims": [0, 1, 0]}
        optimizer = Muon([group], dtype=torch.float32)
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=9 + i)
        if spoiled:
            params[1].grad[1, 0, 0] = float("nan")
        optimizer.step()
        runs.append([p.detach() for p in params])
    clean, spoiled = runs
    assert torch.equal(clean[0], spoiled[0])
    assert torch.equal(clean[1][[0, 2]], spoiled[1][[0, 2]])
    assert torch.equal(clean[2], spoiled[2])
    assert bool(spoiled[1][1].isnan().all())
