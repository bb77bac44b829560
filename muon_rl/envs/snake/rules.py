"""The rules of Snake, the tokens of a board, and tables of both to look up."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY, FOOD, HEAD = 0, 1, 6
BODY = 2  # the token of a cell left upwards; 3 to the right, 4 downwards, 5 to the left
UP, RIGHT, DOWN, LEFT = range(4)
OFFSETS = ((-1, 0), (0, 1), (1, 0), (0, -1))  # rows and columns of the four directions


@dataclass(frozen=True)
class Rules:
    """Size of the board, beginning and horizon of a game, and its rewards.

    A snake of ``initial_length`` begins in row ``height // 2``, its head in column
    ``width // 2``, heading right. A wall or the body kills; the cell that the tail leaves in the
    same step is free. A reversal keeps the direction. Filling the board wins.

    Args:
        height: rows, >= 2.
        width: columns, >= 2.
        initial_length: cells of the new snake, 1 to ``width // 2 + 1``.
        max_steps: steps after which a game is truncated, >= 1.
        food_reward: for a step that eats.
        death_reward: for a step that dies.
        step_reward: for any other step.

    Raises:
        ValueError: if a number is out of its bounds, or no integer where it counts.
    """

    height: int = 10
    width: int = 10
    initial_length: int = 3
    max_steps: int = 500
    food_reward: float = 10.0
    death_reward: float = -10.0
    step_reward: float = -0.01

    def __post_init__(self) -> None:
        require_integers(
            height=self.height,
            width=self.width,
            initial_length=self.initial_length,
            max_steps=self.max_steps,
        )
        for name in ("height", "width"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, but is {getattr(self, name)}.")
        if not 1 <= self.initial_length <= self.width // 2 + 1:
            raise ValueError(
                f"initial_length must be 1 to width // 2 + 1 = {self.width // 2 + 1}, "
                f"but is {self.initial_length}."
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, but is {self.max_steps}.")

    @property
    def cells(self) -> int:
        """Number of cells of the board."""
        return self.height * self.width

    @property
    def start(self) -> int:
        """The cell in which the head begins, ``row * width + column``."""
        return self.height // 2 * self.width + self.width // 2


def require_integers(**numbers: object) -> None:
    """Raise ``ValueError`` for the first of these that is no integer, naming it."""
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise ValueError(f"{name} must be an integer, but is {number!r}.")


class Tables(NamedTuple):
    """What depends on the rules alone, as tensors to look up.

    Args:
        turns: the pose after an action, int64, at ``4 * pose + action``, where a pose is ``4 * the
            head's cell + direction``. A reversal keeps the direction; a wall keeps the cell.
        left_by: the token of the cell that a snake has left which is in this pose now, uint8.
        moves: the cell that lies in the direction of a body token, int64, at
            ``token * cells + cell``; a cell at the wall leads to itself, and so do other tokens.
        board: a new game's tokens without food, uint8, ``(cells,)``.
        free: the cells of that board that are free, int64.
        entered: the step in which the snake entered each cell of that board, float32,
            ``(cells,)``: the head in step 0, what lies behind it before.
        food_reward: float32, ``()``, and so are the others.
        death_reward: for a step that dies.
        step_reward: for any other step.
    """

    turns: Tensor
    left_by: Tensor
    moves: Tensor
    board: Tensor
    free: Tensor
    entered: Tensor
    food_reward: Tensor
    death_reward: Tensor
    step_reward: Tensor


def make_tables(rules: Rules, device: torch.device | None = None) -> Tables:
    """Return the tables of some rules.

    Args:
        rules: of the games.
        device: of the tables.

    Example:
        >>> tables = make_tables(Rules(height=2, width=4, initial_length=2))
        >>> tables.board.view(2, 4)
        tensor([[0, 0, 0, 0],
                [0, 3, 6, 0]], dtype=torch.uint8)
        >>> tables.moves.view(8, 2, 4)[BODY + RIGHT]
        tensor([[1, 2, 3, 3],
                [5, 6, 7, 7]])
    """
    cell = torch.arange(rules.cells)
    moves = cell.repeat(8, 1)
    row, column = cell // rules.width, cell % rules.width
    for direction, (down, right) in enumerate(OFFSETS):
        to_row, to_column = row + down, column + right
        inside = (to_row >= 0) & (to_row < rules.height)
        inside &= (to_column >= 0) & (to_column < rules.width)
        moves[BODY + direction] = torch.where(inside, to_row * rules.width + to_column, cell)
    # Of opposite directions, one bit differs.
    action, before = torch.arange(4), torch.arange(4).view(4, 1)
    turned = torch.where(action == before ^ 2, before, action)
    to_cell = moves[BODY : BODY + 4].T[:, turned]  # (cells, directions, actions)
    board = torch.zeros(rules.cells, dtype=torch.uint8)
    entered = torch.zeros(rules.cells, dtype=torch.float32)
    snake = torch.arange(rules.initial_length)
    board[rules.start - snake] = BODY + RIGHT
    board[rules.start] = HEAD
    entered[rules.start - snake] = -snake.float()
    tables = Tables(
        turns=(4 * to_cell + turned).flatten(),
        left_by=(BODY + action).to(torch.uint8).repeat(rules.cells),
        moves=moves.flatten(),
        board=board,
        free=(board == EMPTY).nonzero().squeeze(1),
        entered=entered,
        food_reward=torch.tensor(float(rules.food_reward)),
        death_reward=torch.tensor(float(rules.death_reward)),
        step_reward=torch.tensor(float(rules.step_reward)),
    )
    return Tables(*(table.to(device) for table in tables))
