"""What a network must know of its environment."""

from __future__ import annotations

from typing import NamedTuple

from torchrl.data import TensorSpec


class Specs(NamedTuple):
    """The specs that give networks their sizes.

    Args:
        observation: spec of the key ``observation``, without batch dims.
        action: spec of the key ``action``, without batch dims.
        action_mask: spec of the key ``action_mask``, without batch dims; ``None`` where the
            environment does not write it.
    """

    observation: TensorSpec
    action: TensorSpec
    action_mask: TensorSpec | None = None
