"""Orthogonalization of matrices and batches of matrices: in which dtype, form and chunks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from muon_rl.optim.coefficients import Triple, resolve_coefficients
from muon_rl.optim.newton_schulz import iterate, iterate_gram

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


def _normalize(x: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Divide each matrix of a stack by its Frobenius norm."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1))
    # Whether the norm overflowed is free to ask on a CPU alone; elsewhere it would be a sync.
    may_ask = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (may_ask and all(map(math.isfinite, norm.tolist()))):
        x = scaled_down(x, x.dtype)
        norm = torch.linalg.vector_norm(x, dim=(-2, -1))
    return torch.div(x, norm.clamp_(min=eps).view(-1, 1, 1), out=out)


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


def _prefers_gram(rows: int, columns: int, dtype: torch.dtype, triples: tuple[Triple, ...]) -> bool:
    """Tell whether the iteration on Gram matrices is right and cheaper for matrices of a shape."""
    if dtype != torch.float32 or not _is_skinny(*sorted((rows, columns))):
        return False
    # The rounding of a Gram matrix grows by the square of the slope at 0 in each step.
    rounding = 2.0**-23
    for a, _, _ in triples:
        rounding *= a * a
    return rounding < 0.2


def room(
    rows: int, columns: int, dtype: torch.dtype, triples: tuple[Triple, ...]
) -> tuple[int, int, str]:
    """Return the shape that a matrix may be padded to, and how; matrices of equals share a stack.

    Only small skinny matrices are padded, to less than twice their smaller side: a product of them
    costs less than its call.

    Args:
        rows: of a matrix.
        columns: of a matrix.
        dtype: of the arithmetic.
        triples: one ``(a, b, c)`` a step.
    """
    if min(rows, columns) > _SMALL or not _prefers_gram(rows, columns, dtype, triples):
        return rows, columns, "unpadded"
    padded = 1 << (min(rows, columns) - 1).bit_length()
    return (rows, padded, "tall") if rows > columns else (padded, columns, "wide")


def _polar_(x: Tensor, triples: tuple[Triple, ...], eps: float) -> None:
    """Orthogonalize a stack ``(N, rows, columns)`` in its memory."""
    rows, columns = x.shape[-2:]
    if _prefers_gram(rows, columns, x.dtype, triples):
        iterate_gram([_normalize(x, eps)], [x], triples)
        return
    # A compiler pays for each write into a part of a stack with a copy of all of it.
    end = torch.empty_like(x) if torch.compiler.is_compiling() else x
    # The iteration goes to and fro: it begins where it has to for its end to be there.
    other = torch.empty_like(x)
    first, second = (other, end) if len(triples) % 2 else (end, other)
    _normalize(x, eps, out=first)
    if len(x) == 1:
        # One matrix goes 2-D: quicker, and the kernels of torch.optim.Muon.
        first, second = first[0], second[0]
    iterate(first, second, triples)
    if end is not x:
        x.copy_(end)


def _polar_in_chunks_(x: Tensor, triples: tuple[Triple, ...], eps: float) -> None:
    """Orthogonalize a stack, on a CPU as much of it at a time as its cache holds."""
    small, large = sorted(x.shape[-2:])
    chunk = _WORKING_SET // (2 * small * (small + large) * x.dtype.itemsize)
    if x.device.type != "cpu" or chunk >= len(x):
        _polar_(x, triples, eps)
        return
    for part in x.split(max(1, chunk)):
        _polar_(part, triples, eps)


def orthogonalize_(stacks: Sequence[Tensor], triples: tuple[Triple, ...], eps: float) -> None:
    """Orthogonalize stacks in their own dtype and memory: what an optimizer calls.

    Args:
        stacks: matrices, each of shape ``(N, rows, columns)``, of one dtype on one device; they
            are overwritten.
        triples: one ``(a, b, c)`` a step.
        eps: a Frobenius norm below this is not scaled up further.
    """
    skinny: dict[int, list[Tensor]] = defaultdict(list)
    for x in stacks:
        if x.numel() == 0:
            continue
        rows, columns = x.shape[-2:]
        rows, columns, form = room(rows, columns, x.dtype, triples)
        if form != "unpadded":
            skinny[min(rows, columns)].append(x)
        else:
            _polar_in_chunks_(x, triples, eps)
    for alike in skinny.values():
        iterate_gram([_normalize(x, eps) for x in alike], alike, triples)


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
    polar = stack.to(dtype, copy=True)
    orthogonalize_([polar], triples, eps)
    return polar.reshape(x.shape).to(x.dtype)
