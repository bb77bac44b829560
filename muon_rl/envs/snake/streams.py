"""Random numbers of many games, each from a stream of its own: SplitMix64 on tensors."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """Return the int64 of the same 64 bits."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def new_streams(seed: int, number: int, device: torch.device | None = None) -> Tensor:
    """Return the states of so many streams.

    Equal seeds give equal streams, on every device; stream ``i`` is the same for every ``number``.

    Args:
        seed: any integer, of which the lower 64 bits count.
        number: of streams.
        device: of the states.

    Returns:
        States, int64, shape ``(number,)``.
    """
    first = torch.full((1,), _signed(index(seed)), dtype=torch.int64, device=device)
    # Outputs of one generator are the others' states: else each would be its neighbour, a draw on.
    return _mixed(first + torch.arange(1, number + 1, device=device) * _STEP)


def advance(streams: Tensor) -> Tensor:
    """Return the streams' next states.

    Args:
        streams: states, int64.

    Returns:
        States of the same shape.
    """
    return streams + _STEP


def uniform_below(streams: Tensor, bound: Tensor | int) -> Tensor:
    """Return the integers that states stand for, uniform over ``0 … bound - 1``.

    ``(top 31 bits of SplitMix64's output) * bound / 2^31``: no remainder, so that no value is
    likelier than another by more than ``bound / 2^31``.

    Args:
        streams: states after :func:`advance`, int64, shape ``(*batch,)``.
        bound: number of values, 1 to 2^31, broadcastable.

    Returns:
        int64, shape ``(*batch,)``.

    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators".
    """
    # SplitMix64 ends with z ^ (z >> 31), which leaves the upper 31 bits as they are.
    return (((_multiplied(streams) >> 33) & (2**31 - 1)) * bound) >> 31


def _multiplied(z: Tensor) -> Tensor:
    """Return SplitMix64's output before its last shift."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    return (z ^ _shifted(z, 27)) * _SECOND


def _mixed(z: Tensor) -> Tensor:
    """Return SplitMix64's output for a state."""
    z = _multiplied(z)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right as unsigned numbers are shifted; torch's own shift keeps the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
