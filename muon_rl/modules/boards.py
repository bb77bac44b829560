"""Boards as networks read them: what a spec says, cells as features, patches of cells."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrl.data import TensorSpec

KINDS = 8  # 0 empty, 1 food, 2-5 body by direction, 6 head, 7 wall
HEAD, WALL = 6, 7
HEAD_PLANE = 0  # of the four: head, body, food, empty


class BoardLayout(NamedTuple):
    """How the boards of a spec are laid out.

    Args:
        channels: planes of a board, or 0 for one ``uint8`` kind a cell.
        height: rows.
        width: columns.
        channels_last: whether planes come as ``(height, width, channels)``.
    """

    channels: int
    height: int
    width: int
    channels_last: bool = False

    @classmethod
    def of(cls, spec: TensorSpec, channels_last: bool | None = None) -> BoardLayout:
        """Return the layout of a spec without batch dims.

        Args:
            spec: ``uint8`` of shape ``(height, width)``, or floats ``(channels, height, width)``.
            channels_last: whether floats are ``(height, width, channels)`` instead; ``None`` is
                no, but refuses a last dim of 3, which is a width as well as colours.

        Raises:
            ValueError: if it is neither, or may be both.
        """
        if spec.dtype == torch.uint8 and len(spec.shape) == 2:
            return cls(0, *spec.shape)
        if spec.dtype.is_floating_point and len(spec.shape) == 3:
            first, middle, last = spec.shape
            if channels_last is None and last == 3:
                raise ValueError(
                    f"An observation of shape {tuple(spec.shape)} is {first} planes of {middle} x "
                    f"{last} cells, or {last} planes of {first} x {middle}, as Snake's rgb3: set "
                    "channels_last to false or true."
                )
            return cls(last, first, middle, True) if channels_last else cls(*spec.shape)
        raise ValueError(
            "A network of boards needs tokens, uint8 of shape (height, width), or planes, floats "
            f"(channels, height, width), as observation, but the environment's is {spec.dtype} of "
            f"shape {tuple(spec.shape)}."
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a board's tensor."""
        cells = (self.height, self.width)
        if not self.channels:
            return cells
        return (*cells, self.channels) if self.channels_last else (self.channels, *cells)

    @property
    def shows_head(self) -> bool:
        """Whether a board tells the head's cell: as a token, or as the first of four planes."""
        return self.channels in (0, 4)

    def flat(self, boards: Tensor) -> Tensor:
        """Return boards ``(*batch, *shape)`` as ``(N, height, width, channels or 1)``.

        Raises:
            ValueError: if the last dims are not those of a board.
        """
        batch = boards.shape[: boards.ndim - len(self.shape)]
        flat = boards.reshape((batch.numel(), *self.shape))
        if not self.channels:
            return flat.unsqueeze(-1)
        return flat if self.channels_last else flat.movedim(1, -1)


class Patches(nn.Module):
    """Boards cut into square patches, row by row, with the features of a patch's cells in a row.

    A cell has the embedding of its kind, or its planes as they are.

    Args:
        layout: of the boards.
        patch: edge of a patch in cells, a divisor of height and width.
        cell_width: size of the embedding of a kind; planes need none.

    Attributes:
        rows: patches in a column of them.
        columns: patches in a row of them.
        out_features: of a patch.

    Raises:
        ValueError: if the patches do not tile the board.

    Example:
        >>> patches = Patches(BoardLayout(0, 6, 8), 2, 16)
        >>> features, head = patches(torch.full((7, 6, 8), 6, dtype=torch.uint8))
        >>> features.shape, head.shape
        (torch.Size([7, 12, 64]), torch.Size([7]))
    """

    def __init__(self, layout: BoardLayout, patch: int, cell_width: int) -> None:
        super().__init__()
        if patch < 1 or layout.height % patch or layout.width % patch:
            raise ValueError(
                f"patch must divide height and width of the board, but is {patch} on "
                f"{layout.height} x {layout.width}."
            )
        self.layout, self.patch = layout, patch
        self.rows, self.columns = layout.height // patch, layout.width // patch
        self.cells = None if layout.channels else nn.Embedding(KINDS, cell_width)
        self.out_features = patch * patch * (layout.channels or cell_width)

    def forward(self, boards: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patches of boards, and the number of the one with the head.

        Args:
            boards: ``(*batch, *layout.shape)``.

        Returns:
            Floats ``(N, rows * columns, out_features)`` and int64 ``(N,)``, with N the product of
            the batch dims; where no cell shows a head, as after a death, the first patch's.
        """
        cells = self.layout.flat(boards)
        cut = cells.unflatten(1, (self.rows, self.patch)).unflatten(3, (self.columns, self.patch))
        patches = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.cells is None:
            shown = patches[..., HEAD_PLANE] > 0
            return patches.flatten(2), _first(shown)
        kinds = patches.squeeze(-1)
        return self.cells(kinds.int()).flatten(2), _first(kinds == HEAD)


def _first(shown: Tensor) -> Tensor:
    """Return which patch shows something first, of ``(N, patches, cells)``."""
    return shown.any(-1).int().argmax(-1)
