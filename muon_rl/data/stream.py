"""A run's batches, as Lightning takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tensordict import TensorDictBase

if TYPE_CHECKING:
    from muon_rl.data.base import AgentData


class Stream:
    """The batches of a run that are left, with a length: Lightning then fetches none ahead.

    A run that was stopped in its last evaluation has none left; it gets one that is ``None``, which
    trains nothing and is followed by that evaluation.

    Args:
        data: whose batches they are.
    """

    def __init__(self, data: AgentData) -> None:
        self.data = data
        self._length = max(1, data.total_updates - data.updates)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[TensorDictBase | None]:
        self.data.restore_random_state()
        return self.data.batches() if self.data.updates < self.data.total_updates else iter([None])
