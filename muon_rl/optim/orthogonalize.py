"""Newton-Schulz orthogonalization of matrices and batches of matrices: pure functions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from muon_rl.optim.coefficients import Triple, resolve_coefficients

# On CPU, below this smaller side, fp32 is as quick as bf16 (measured), and finer; and at it, where
# the Gram form is cheaper.
_SMALL = 64
# Bytes of matrix, Gram matrix, polynomial and result that a CPU works on at a time (measured).
_WORKING_SET = 5 * 2**19


@torch.compiler.assume_constant_result
def computes_bf16(device_type: str) -> bool:
    """Tell whether a kind of device multiplies bfloat16 matrices natively.

    Args:
        device_type: ``torch.device.type``, such as ``"cpu"`` or ``"cuda"``.
    """
    return _computes_bf16(device_type)


@cache
def _computes_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        # Emulated below compute capability 8.0, and then slower than fp32.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        try:
            # The first follows ONEDNN_MAX_CPU_ISA, the second reads the processor's flags.
            return bool(
                torch.ops.mkldnn._is_mkldnn_bf16_supported()
                and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
            )
        except (AttributeError, RuntimeError):
            return False
    return False


def arithmetic(device_type: str, rows: int, columns: int) -> torch.dtype:
    """Return the dtype that the iteration on matrices of a shape runs in unless one is given.

    Args:
        device_type: ``torch.device.type``.
        rows: of a matrix.
        columns: of a matrix.
    """
    small, large = sorted((rows, columns))
    if device_type == "cpu" and (small < _SMALL or (small == _SMALL and _is_skinny(small, large))):
        return torch.float32
    return torch.bfloat16 if computes_bf16(device_type) else torch.float32


def _is_skinny(small: int, large: int) -> bool:
    """Tell whether the iteration on the Gram matrix takes fewer operations."""
    return 2 * large > 3 * small


def _iterate(x: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """Run the iteration ``X <- a X + (b X X^T + c (X X^T)^2) X`` on ``(m, n)`` or ``(N, m, n)``.

    The Gram matrix is of the smaller side: a tall ``x`` is multiplied from the right. ``x`` is
    overwritten.
    """
    product, fused = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
    is_tall = x.shape[-2] > x.shape[-1]
    is_square = x.shape[-2] == x.shape[-1]
    side = min(x.shape[-2:])
    result = torch.empty_like(x)
    polynomial = x.new_empty(*x.shape[:-2], side, side)
    space = None if is_square else torch.empty_like(polynomial)
    for a, b, c in triples:
        # A square result may lie where its Gram matrix was: less memory, more of it in the cache.
        gram = polynomial if c == 0.0 else result if space is None else space
        product(*((x.mT, x) if is_tall else (x, x.mT)), out=gram)
        alpha = b
        if c != 0.0:
            # Not where c = 0: on CPU, bf16 baddbmm with alpha=0 ignores beta.
            fused(gram, gram, gram, beta=b, alpha=c, out=polynomial)
            alpha = 1.0
        step = (x, polynomial) if is_tall else (polynomial, x)
        fused(x, *step, beta=a, alpha=alpha, out=result)
        x, result = result, x
    return x


def _iterate_gram(stacks: Sequence[Tensor], triples: tuple[Triple, ...]) -> list[Tensor]:
    """Run the same iteration on Gram matrices, and multiply each ``x`` by the product of its steps.

    With ``G = X X^T``, a step multiplies ``X`` by ``S = a I + b G + c G^2`` and turns ``G`` into
    ``S G S``: products of ``(m, m)`` alone, cheaper for ``m`` well below ``n``. In fp32 it equals
    the plain form to rounding, up to some steps; in bf16 it overflows. A tall ``x`` is multiplied
    from the right. Stacks of different shapes are one batch of Gram matrices, padded with zeros,
    which stay zero.
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
    results = []
    for x, is_tall, part in zip(stacks, tall, product.split_with_sizes(counts), strict=True):
        side = min(x.shape[-2:])
        part = part[:, :side, :side]
        # Transposed, since from the right the first step comes first.
        results.append(torch.bmm(x, part.mT) if is_tall else torch.bmm(part, x))
    return results


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Divide each matrix of a stack by its Frobenius norm; it may overwrite ``x``."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    # Whether the norm overflowed is free to ask on a CPU alone; elsewhere it would be a sync.
    may_ask = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (may_ask and math.isfinite(norm.sum().item())):
        x = scaled_down(x, x.dtype)
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x.div_(norm.clamp_(min=eps))


def has_less_range(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Tell whether numbers of another dtype may be too large for this one.

    Args:
        dtype: of the arithmetic.
        other: of what is to be computed on.
    """
    return 2 * torch.finfo(dtype).max < torch.finfo(other).max


def scaled_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide matrices whose norm may overflow by their largest entry.

    Args:
        x: matrices, ``(*batch, m, n)``.
        dtype: that the norm is to be computed in.
    """
    large = torch.finfo(dtype).max ** 0.39  # 1e15 in fp32 and bf16
    peak = x.abs().amax(dim=(-2, -1), keepdim=True)
    return x / torch.where(peak > large, peak, 1.0)


def _prefers_gram(x: Tensor, triples: tuple[Triple, ...]) -> bool:
    """Tell whether the iteration on Gram matrices is right and cheaper for a stack."""
    if x.dtype != torch.float32 or not _is_skinny(*sorted(x.shape[-2:])):
        return False
    # The rounding of a Gram matrix grows by the square of the slope at 0 in each step.
    rounding = 2.0**-23
    for a, _, _ in triples:
        rounding *= a * a
    return rounding < 0.2


def _polar(x: Tensor, triples: tuple[Triple, ...], eps: float) -> Tensor:
    """Orthogonalize a stack ``(N, rows, columns)``; it may overwrite ``x``."""
    x = _normalized(x, eps)
    if _prefers_gram(x, triples):
        return _iterate_gram([x], triples)[0]
    # One matrix goes 2-D: quicker, and the kernels, hence the bits, of torch.optim.Muon.
    return _iterate(x[0], triples)[None] if len(x) == 1 else _iterate(x, triples)


def _polar_in_chunks(x: Tensor, triples: tuple[Triple, ...], eps: float) -> Tensor:
    """Orthogonalize a stack, on a CPU as much of it at a time as its cache holds."""
    small, large = sorted(x.shape[-2:])
    chunk = _WORKING_SET // (2 * small * (small + large) * x.dtype.itemsize)
    if x.device.type != "cpu" or chunk >= len(x):
        return _polar(x, triples, eps)
    for part in x.split(max(1, chunk)):
        part.copy_(_polar(part, triples, eps))
    return x


def orthogonalize_(
    stacks: Sequence[Tensor], triples: tuple[Triple, ...], eps: float
) -> list[Tensor]:
    """Orthogonalize stacks in their own dtype and memory: what an optimizer calls.

    Args:
        stacks: matrices, each of shape ``(N, rows, columns)``, of one dtype on one device; they
            are overwritten.
        triples: one ``(a, b, c)`` a step.
        eps: a Frobenius norm below this is not scaled up further.

    Returns:
        For each stack the orthogonalized matrices, in its memory or in new memory.
    """
    polar = list(stacks)
    skinny: dict[int, list[int]] = defaultdict(list)
    for index, x in enumerate(stacks):
        side = min(x.shape[-2:])
        if x.numel() == 0:
            continue
        if _prefers_gram(x, triples) and side <= _SMALL:
            # Padded to less than twice their side: a product of them costs less than its call.
            skinny[(side - 1).bit_length()].append(index)
        else:
            polar[index] = _polar_in_chunks(x, triples, eps)
    for indices in skinny.values():
        normalized = [_normalized(stacks[index], eps) for index in indices]
        for index, x in zip(indices, _iterate_gram(normalized, triples), strict=True):
            polar[index] = x
    return polar


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "quintic",
    *,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Approximate the orthogonal polar factor of each matrix by Newton-Schulz iteration.

    For :math:`X = U S V^T` it returns about :math:`U V^T`: from :math:`X_0 = X / \|X\|_F`, each
    step is :math:`X \leftarrow a X + b (X X^T) X + c (X X^T)^2 X`, which keeps the singular
    vectors and drives the singular values towards 1 (with ``"quintic"`` into [0.68, 1.14]).

    Args:
        x: matrices, shape ``(*batch, m, n)``, floating point; each is treated by itself.
        steps: number of iterations, >= 1.
        coefficients: ``"quintic"`` (steep at 0, stops near 1), ``"cubic"`` (3/2, -1/2: exact in
            the limit, slow), ``"polar_express"``, one triple, or a list used in order, its last
            repeated.
        eps: a Frobenius norm below this is not scaled up further, in the units of ``x``.
        dtype: of the arithmetic; ``None`` takes bfloat16 where the device computes it natively,
            and float32 elsewhere and, on CPU, for matrices with a side below 64 (or skinny ones of
            64).

    Returns:
        The orthogonalized matrices, same shape and dtype as ``x``. A zero matrix stays zero, a
        matrix with a NaN becomes NaN and leaves its neighbours alone. No gradient flows through.

    Raises:
        ValueError: if ``x`` has fewer than 2 dimensions, or the coefficients do not fit.
        TypeError: if ``x`` is not a real floating-point tensor.

    Example:
        >>> import torch
        >>> stack = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
        >>> singular_values = torch.linalg.svdvals(orthogonalize(stack))
        >>> bool((singular_values > 0.6).all() and (singular_values < 1.3).all())
        True

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks";
    Amsel et al. 2025, arXiv:2505.16932 (Polar Express).
    """
    if x.ndim < 2:
        raise ValueError(
            f"orthogonalize needs matrices (*batch, m, n), but got shape {tuple(x.shape)}."
        )
    if not x.is_floating_point():
        raise TypeError(f"orthogonalize needs real floating-point matrices, but got {x.dtype}.")
    triples = resolve_coefficients(coefficients, steps)
    if dtype is None:
        dtype = arithmetic(x.device.type, *x.shape[-2:])
    stack = x.reshape(-1, *x.shape[-2:]) if x.numel() else x
    if has_less_range(dtype, x.dtype) and x.numel():
        stack = scaled_down(stack, dtype)
    (polar,) = orthogonalize_([stack.to(dtype, copy=True)], triples, eps)
    return polar.reshape(x.shape).to(x.dtype)
