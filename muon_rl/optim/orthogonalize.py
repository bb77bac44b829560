"""Newton-Schulz orthogonalization of matrices and batches of matrices: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Triple = tuple[float, float, float]

# Polar Express (Amsel et al. 2025, arXiv:2505.16932, algorithm 1), minimax polynomials for
# singular values from 1e-3. All but the last are damped by 1.01, against rounding in bf16.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_DAMPED_POLAR_EXPRESS = (
    *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS[:-1]),
    _POLAR_EXPRESS[-1],
)

COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "cubic": ((1.5, -0.5, 0.0),),
    "polar_express": _DAMPED_POLAR_EXPRESS,
}

# From here on a sum of squares may overflow fp32 and bf16: such a matrix is scaled down first.
_LARGE = 1e15


def resolve_coefficients(
    coefficients: str | Sequence[float] | Sequence[Sequence[float]], steps: int
) -> tuple[Triple, ...]:
    """Return one ``(a, b, c)`` a step, the last one given repeated up to ``steps``.

    Args:
        coefficients: ``"quintic"``, ``"cubic"``, ``"polar_express"``, one triple or a list of them.
        steps: number of iterations, >= 1.

    Raises:
        ValueError: for an unknown name, a tuple that is not of three numbers, or ``steps < 1``.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"ns_steps must be an integer of at least 1, but is {steps!r}.")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"Unknown coefficients {coefficients!r}: use one of {sorted(COEFFICIENTS)}, "
                "a triple (a, b, c) or a list of triples."
            )
        triples: Sequence = COEFFICIENTS[coefficients]
    else:
        try:
            given: list[Any] = list(coefficients)
            triples = [given] if not isinstance(given[0], Sequence) else given
            triples = [tuple(float(number) for number in triple) for triple in triples]
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"coefficients must be a name, (a, b, c) or a list of them, not {coefficients!r}."
            ) from error
        if any(len(triple) != 3 for triple in triples):
            raise ValueError(f"Each of coefficients must hold 3 numbers, but got {coefficients!r}.")
    padded = [*triples[:steps], *[triples[-1]] * (steps - len(triples))]
    return tuple((a, b, c) for a, b, c in padded)


@cache
def computes_bf16(device_type: str) -> bool:
    """Tell whether a kind of device multiplies bfloat16 matrices natively.

    Args:
        device_type: ``torch.device.type``, such as ``"cpu"`` or ``"cuda"``.
    """
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


def _iterate(x: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """Run the iteration ``X <- a X + (b X X^T + c (X X^T)^2) X`` on ``(m, n)`` or ``(N, m, n)``."""
    fused = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in triples:
        gram = x @ x.mT
        if c == 0.0:
            # Not the general form with c = 0: on CPU, bf16 baddbmm with alpha=0 ignores beta.
            x = fused(x, gram, x, beta=a, alpha=b)
        else:
            x = fused(x, fused(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


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
        dtype: of the arithmetic; ``None`` takes bfloat16 where the device computes it natively
            and float32 elsewhere.

    Returns:
        The orthogonalized matrices, same shape and dtype as ``x``. A zero matrix stays zero, a
        matrix with a NaN becomes NaN and leaves its neighbours alone.

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
    if x.numel() == 0:
        return x.clone()
    if dtype is None:
        dtype = torch.bfloat16 if computes_bf16(x.device.type) else torch.float32

    # One matrix stays 2-D: the same kernels as torch.optim.Muon, hence the same bits.
    matrices = x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 and x.shape[:-2].numel() > 1 else x
    matrices = matrices.reshape(x.shape[-2:]) if x.shape[:-2].numel() == 1 else matrices
    wide = x.shape[-2] <= x.shape[-1]
    work = matrices if wide else matrices.mT
    peak = work.abs().amax(dim=(-2, -1), keepdim=True)
    work = (work / torch.where(peak > _LARGE, peak, 1.0)).to(dtype)
    norm = torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True)
    work = _iterate(work / norm.clamp(min=eps), triples)
    return (work if wide else work.mT).reshape(x.shape).to(x.dtype)
