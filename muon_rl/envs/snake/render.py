"""Pictures of a board of Snake: text, RGB, and a GIF of a game."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from torch import Tensor

_SIGNS = "-*^>v<@"
# Of the tokens, in their order: a quiet board, red food, a green body, a head apart from it.
_COLORS = [(24, 26, 32), (222, 72, 66), *[(72, 168, 92)] * 4, (196, 232, 120)]
_SEAM = 2  # pixels of the board between two cells


def to_text(board: Tensor) -> str:
    """Return a board as text: ``-`` empty, ``*`` food, ``^>v<`` body, ``@`` head.

    Args:
        board: tokens, ``(height, width)``.

    Example:
        >>> print(to_text(torch.tensor([[0, 3, 6], [1, 0, 0]])))
        ->@
        *--
    """
    return "\n".join("".join(_SIGNS[token] for token in row) for row in board.tolist())


def to_rgb(board: Tensor, *, cell: int = 24) -> Tensor:
    """Return boards as pictures.

    Args:
        board: tokens, ``(*batch, height, width)``.
        cell: pixels of a cell's side, >= 1.

    Returns:
        uint8, ``(*batch, height * cell, width * cell, 3)``.

    Raises:
        ValueError: if ``cell`` is below 1.

    Example:
        >>> to_rgb(torch.zeros(5, 10, 10, dtype=torch.uint8), cell=8).shape
        torch.Size([5, 80, 80, 3])
    """
    if cell < 1:
        raise ValueError(f"cell must be at least 1, but is {cell}.")
    colors = torch.tensor(_COLORS, dtype=torch.uint8, device=board.device)
    picture = colors[board.long()]
    picture = picture.repeat_interleave(cell, -3).repeat_interleave(cell, -2)
    if cell > _SEAM:
        rows = torch.arange(picture.shape[-3], device=board.device) % cell < _SEAM
        columns = torch.arange(picture.shape[-2], device=board.device) % cell < _SEAM
        seam = rows.unsqueeze(1) | columns
        picture = torch.where(seam.unsqueeze(-1), colors[0], picture)
    return picture


def to_gif(boards: Tensor, *, cell: int = 24, milliseconds: int = 80) -> bytes:
    """Return the boards of one game as an animated GIF that plays again and again.

    Args:
        boards: tokens, one board a frame, ``(frames, height, width)``.
        cell: pixels of a cell's side, >= 1.
        milliseconds: that a frame is shown, >= 20; the last stays for a second.

    Returns:
        The file's bytes.

    Raises:
        ValueError: if there is no frame, or a number is below its bound.

    Example:
        >>> to_gif(torch.zeros(3, 10, 10, dtype=torch.uint8))[:6]
        b'GIF89a'
    """
    from PIL import Image

    if len(boards) == 0:
        raise ValueError("A GIF needs at least one board.")
    if milliseconds < 20:  # below it, programs show a frame for as long as they like
        raise ValueError(f"milliseconds must be at least 20, but is {milliseconds}.")
    first, *others = (Image.fromarray(frame.numpy()) for frame in to_rgb(boards.cpu(), cell=cell))
    file = io.BytesIO()
    first.save(
        file,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=[milliseconds] * len(others) + [1000],
        loop=0,
    )
    return file.getvalue()


MODES: dict[str, Callable[[Tensor], str | Tensor]] = {"text": to_text, "rgb": to_rgb}
