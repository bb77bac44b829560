"""The Newton-Schulz iteration on matrices, in its plain form and on Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from muon_rl.optim.coefficients import Triple

# Rows of a symmetric product that a CPU multiplies at a time, and the side from which that is
# quicker than all of them at once (measured).
_STRIP = 256
_LARGE = 448


def iterate(x: Tensor, result: Tensor, triples: tuple[Triple, ...]) -> None:
    """Run the iteration ``X <- a X + (b X X^T + c (X X^T)^2) X`` on ``(m, n)`` or ``(N, m, n)``.

    The Gram matrix is of the smaller side: a tall ``x`` is multiplied from the right. The steps go
    to and fro between ``x`` and ``result``, so after an odd number of them it lies in ``result``.

    Args:
        x: matrices of norm 1, which are overwritten.
        result: memory for as many.
        triples: one ``(a, b, c)`` a step.
    """
    product, fused = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
    is_tall = x.shape[-2] > x.shape[-1]
    is_square = x.shape[-2] == x.shape[-1]
    side = min(x.shape[-2:])
    by_strips = _takes_strips(x, side)
    polynomial = x.new_empty(*x.shape[:-2], side, side)
    space = None if is_square else torch.empty_like(polynomial)
    for a, b, c in triples:
        # A square result may lie where its Gram matrix was: less memory, more of it in the cache.
        gram = polynomial if c == 0.0 else result if space is None else space
        left, right = (x.mT, x) if is_tall else (x, x.mT)
        if by_strips:
            _gram_by_strips(left, right, out=gram)
        else:
            product(left, right, out=gram)
        alpha = b
        if c != 0.0:
            # Not where c = 0: on CPU, bf16 baddbmm with alpha=0 ignores beta.
            if by_strips:
                _polynomial_by_strips(gram, b, c, out=polynomial)
            else:
                fused(gram, gram, gram, beta=b, alpha=c, out=polynomial)
            alpha = 1.0
        step = (x, polynomial) if is_tall else (polynomial, x)
        fused(x, *step, beta=a, alpha=alpha, out=result)
        x, result = result, x


def _takes_strips(x: Tensor, side: int) -> bool:
    """Tell whether symmetric products are quicker by strips: of large single matrices on a CPU."""
    # Strips of a stack would be copied first, as oneDNN takes stacks only whole, and the compiler
    # writes products into contiguous memory only.
    is_single = x.ndim == 2 and x.device.type == "cpu"
    return is_single and side >= _LARGE and not torch.compiler.is_compiling()


def _gram_by_strips(x: Tensor, x_transposed: Tensor, out: Tensor) -> None:
    """Write ``X X^T``."""

    def multiply(rows: slice, columns: slice) -> None:
        torch.mm(x[rows], x_transposed[:, columns], out=out[rows, columns])

    _fill_by_strips(out, multiply)


def _polynomial_by_strips(gram: Tensor, b: float, c: float, out: Tensor) -> None:
    """Write ``b G + c G^2`` for a symmetric ``G``."""

    def multiply(rows: slice, columns: slice) -> None:
        part = gram[rows, columns]
        torch.addmm(part, gram[rows], gram[:, columns], beta=b, alpha=c, out=out[rows, columns])

    _fill_by_strips(out, multiply)


def _fill_by_strips(out: Tensor, multiply: Callable[[slice, slice], None]) -> None:
    """Fill a symmetric matrix: strips of rows up to the diagonal, and the rest by mirroring them.

    Of ``k`` strips this takes ``(k + 1) / 2k`` of the products, and has the bits of the whole.
    """
    for start in range(0, len(out), _STRIP):
        rows, columns = slice(start, start + _STRIP), slice(start + _STRIP)
        multiply(rows, columns)
        out[:start, rows] = out[rows, :start].mT


def iterate_gram(
    stacks: Sequence[Tensor], results: Sequence[Tensor], triples: tuple[Triple, ...]
) -> None:
    """Run the same iteration on Gram matrices, and multiply each ``x`` by the product of its steps.

    With ``G = X X^T``, a step multiplies ``X`` by ``S = a I + b G + c G^2`` and turns ``G`` into
    ``S G S``: products of ``(m, m)`` alone, cheaper for ``m`` well below ``n``. In fp32 it equals
    the plain form to rounding, up to some steps; in bf16 it overflows. A tall ``x`` is multiplied
    from the right. Stacks of different shapes are one batch of Gram matrices, padded with zeros,
    which stay zero.

    Args:
        stacks: matrices of norm 1, each ``(N, m, n)``.
        results: memory for each stack's result, which may be its own.
        triples: one ``(a, b, c)`` a step.
    """
    counts = [len(x) for x in stacks]
    tall = [x.shape[-2] > x.shape[-1] for x in stacks]
    grams = [
        torch.bmm(x.mT, x) if is_tall else torch.bmm(x, x.mT)
        for x, is_tall in zip(stacks, tall, strict=True)
    ]
    gram = grams[0]
    if len(stacks) > 1:
        side = max(g.shape[-1] for g in grams)
        gram = gram.new_zeros(sum(counts), side, side)
        for part, g in zip(gram.split_with_sizes(counts), grams, strict=True):
            part[:, : g.shape[-1], : g.shape[-1]] = g
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = identity
    for number, (a, b, c) in enumerate(triples, start=1):
        # The step is S = a I + rest.
        rest = b * gram if c == 0.0 else torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if number == 1:
            product = torch.add(rest, identity, alpha=a)
        else:
            product = torch.baddbmm(product, rest, product, beta=a)
        if number < len(triples):
            half = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(half, half, rest, beta=a)
    parts = product.split_with_sizes(counts) if len(stacks) > 1 else (product,)
    for x, result, is_tall, part in zip(stacks, results, tall, parts, strict=True):
        side = min(x.shape[-2:])
        if side < part.shape[-1]:
            part = part[:, :side, :side]
        # Transposed, since from the right the first step comes first.
        torch.bmm(*((x, part.mT) if is_tall else (part, x)), out=result)
