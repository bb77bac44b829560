"""The polynomials of Newton-Schulz iterations, by name or by their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
            if not isinstance(coefficients, Sequence):
                raise TypeError("neither a list nor a tuple")
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
