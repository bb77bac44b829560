"""What an agent sees of a game of Snake, from the state of the games; always in new tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from muon_rl.envs.snake.games import Games
from muon_rl.envs.snake.rules import BODY, EMPTY, FOOD, HEAD, Rules


def tokens(games: Games, rules: Rules) -> Tensor:
    """Return one token a cell: 0 empty, 1 food, 2 to 5 body, 6 head.

    A body cell's token is 2 + the direction in which the snake left it. So the order of the body
    can be read from one board; a snake of one cell alone hides its direction.

    Args:
        games: to look at.
        rules: of the games.

    Returns:
        uint8, ``(games, height, width)``.
    """
    return games.board.view(-1, rules.height, rules.width).clone()


def planes(games: Games, rules: Rules) -> Tensor:
    """Return the planes head, body, food and empty.

    A body cell holds ``steps until the tail leaves it / length of the snake``, where eating costs
    no step: ``1 / length`` at the tail, ``1 - 1 / length`` behind the head. The head is in its
    own plane alone.

    Args:
        games: to look at, made with ``ages=True``.
        rules: of the games.

    Returns:
        float32, ``(games, 4, height, width)``.

    Raises:
        ValueError: if the games do not know when their heads entered the cells.
    """
    if games.entered is None:
        raise ValueError("planes need games made with ages=True.")
    board = games.board
    seen = torch.empty(len(board), 4, rules.cells, dtype=torch.float32, device=board.device)
    torch.eq(board, HEAD, out=seen[:, 0])
    length = (games.score + rules.initial_length).unsqueeze(1)
    left = games.entered + (length - games.steps.unsqueeze(1)).float()
    left /= length.float()
    left *= (board >= BODY) & (board < HEAD)
    seen[:, 1] = left
    torch.eq(board, FOOD, out=seen[:, 2])
    torch.eq(board, EMPTY, out=seen[:, 3])
    return seen.view(-1, 4, rules.height, rules.width)


def rgb3(games: Games, rules: Rules) -> Tensor:
    """Return body (the head included), food and empty in the last dim, as older programs have it.

    It tells neither the head nor the direction: a policy cannot play well from one of these.

    Args:
        games: to look at.
        rules: of the games.

    Returns:
        float32, ``(games, height, width, 3)``.
    """
    board = games.board.view(-1, rules.height, rules.width)
    seen = torch.empty(*board.shape, 3, dtype=torch.float32, device=board.device)
    torch.ge(board, BODY, out=seen[..., 0])
    torch.eq(board, FOOD, out=seen[..., 1])
    torch.eq(board, EMPTY, out=seen[..., 2])
    return seen


def action_mask(games: Games) -> Tensor:
    """Return which moves the game carries out: all but the reversal, which keeps the direction.

    Args:
        games: to look at.

    Returns:
        bool, ``(games, 4)``.
    """
    direction = torch.arange(4, device=games.pose.device)
    return direction != ((games.pose & 3) ^ 2).unsqueeze(1)


OBSERVATIONS: dict[str, Callable[[Games, Rules], Tensor]] = {
    "tokens": tokens,
    "planes": planes,
    "rgb3": rgb3,
}
