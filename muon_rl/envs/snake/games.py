"""Many games of Snake on tensors, which step at once, without a loop over games or cells.

A board is a linked list: the token of a body cell is the direction in which the snake left that
cell. So the tail finds its way along the body by itself, a collision is one look at the cell that
the head enters, and a step costs the same for every length of snake and size of board.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from muon_rl.envs.snake.rules import EMPTY, FOOD, HEAD, RIGHT, Rules, Tables
from muon_rl.envs.snake.streams import advance, new_streams, uniform_below


@dataclass
class Games:
    """The state of so many games, which :func:`step_` and :func:`restart_` change in place.

    Args:
        board: tokens, uint8, ``(games, cells)``.
        offset: index of each game's first cell in the flattened boards, int64, ``(games,)``.
        pose: ``4 * the head's cell + direction of the last move``, int64, ``(games,)``.
        tail: the tail's cell, int64, ``(games,)``.
        score: apples eaten in this game, int64, ``(games,)``.
        steps: steps of this game, int64, ``(games,)``.
        streams: states of the random numbers, int64, ``(games,)``.
        returned: rewards of this game, summed, float32, ``(games,)``; ``None`` where nobody asks
            for it.
        entered: the step in which the head entered each cell, float32, ``(games, cells)``, of use
            where the body is; ``None`` where nobody asks for it.
    """

    board: Tensor
    offset: Tensor
    pose: Tensor
    tail: Tensor
    score: Tensor
    steps: Tensor
    streams: Tensor
    returned: Tensor | None = None
    entered: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """Return copies of all tensors, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor.clone() for name, tensor in named.items() if tensor is not None}

    def take_back_(self, before: dict[str, Tensor], where: Tensor) -> None:
        """Set some games to an earlier state, in place.

        Args:
            before: of :meth:`state`.
            where: which of them, bool, ``(games,)``.
        """
        for name, old in before.items():
            now = getattr(self, name)
            now.copy_(torch.where(where.view(-1, *[1] * (old.ndim - 1)), old, now))

    def to(self, device: torch.device) -> Games:
        """Return the same games on a device."""
        return Games(**{name: tensor.to(device) for name, tensor in self.state().items()})


class Outcome(NamedTuple):
    """What a step brought, each of shape ``(games,)``.

    Args:
        reward: float32.
        terminated: died, or filled the board; bool.
        truncated: reached the horizon and did neither; bool.
    """

    reward: Tensor
    terminated: Tensor
    truncated: Tensor


def new_games(
    rules: Rules,
    tables: Tables,
    number: int,
    *,
    seed: int,
    returns: bool = False,
    ages: bool = False,
) -> Games:
    """Return so many games at their beginning.

    Args:
        rules: of the games.
        tables: of :func:`make_tables`, whose device is the games'.
        number: of games.
        seed: of all their random numbers.
        returns: whether to sum each game's rewards.
        ages: whether to note when the head entered each cell.

    Example:
        >>> from muon_rl.envs.snake.rules import make_tables
        >>> rules = Rules(height=3, width=4)
        >>> games = new_games(rules, make_tables(rules), 1, seed=1)
        >>> games.board.view(3, 4)
        tensor([[0, 0, 0, 1],
                [3, 3, 6, 0],
                [0, 0, 0, 0]], dtype=torch.uint8)
    """
    device = tables.board.device

    def zeros(dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(number, dtype=dtype, device=device)

    games = Games(
        board=tables.board.repeat(number, 1),
        offset=torch.arange(number, device=device) * rules.cells,
        pose=zeros(),
        tail=zeros(),
        score=zeros(),
        steps=zeros(),
        streams=new_streams(seed, number, device),
        returned=zeros(torch.float32) if returns else None,
        entered=tables.entered.repeat(number, 1) if ages else None,
    )
    restart_(games, torch.ones(number, dtype=torch.bool, device=device), rules, tables)
    return games


def step_(
    games: Games, action: Tensor, rules: Rules, tables: Tables, *, dense: bool = False
) -> Outcome:
    """Move every snake by one cell; the games change in place.

    What a game shows after its end is unspecified, and so is a step of a game that has ended.

    Args:
        games: to play.
        action: direction of each, int64, ``(games,)``: 0 up, 1 right, 2 down, 3 left.
        rules: of the games.
        tables: of :func:`make_tables`.
        dense: whether food is placed without a shape that depends on data: more work, and no
            wait for the device; a graph of it can be compiled and captured.

    Returns:
        Reward and ends.

    Example:
        >>> from muon_rl.envs.snake.rules import UP, make_tables
        >>> rules = Rules(height=3, width=4)
        >>> tables = make_tables(rules)
        >>> games = new_games(rules, tables, 1, seed=1)
        >>> for direction in (RIGHT, UP):
        ...     outcome = step_(games, torch.tensor([direction]), rules, tables)
        >>> outcome.reward, games.score
        (tensor([10.]), tensor([1]))
        >>> games.board.view(3, 4)
        tensor([[0, 0, 0, 6],
                [0, 3, 3, 2],
                [0, 0, 0, 1]], dtype=torch.uint8)
    """
    board, offset = games.board.view(-1), games.offset
    behind = offset + (games.pose >> 2)
    games.pose = tables.turns.index_select(0, torch.add(action, games.pose, alpha=4))
    head, tail = offset + (games.pose >> 2), offset + games.tail
    # A wall leads to the cell before it: the snake meets the body that it leaves there.
    board.scatter_(0, behind, tables.left_by.index_select(0, games.pose))
    met = board.index_select(0, head)
    eaten = met == FOOD
    # A tail that moves on is no obstacle; a snake of one cell is its own tail, also at a wall.
    died = (met > FOOD) & (head != tail)
    if rules.initial_length == 1:
        died |= head == behind

    left = board.index_select(0, tail)
    stays = left * eaten.view(torch.uint8)
    board.scatter_(0, tail, stays)
    # No token leads to where it is.
    step = (left - stays).long()
    games.tail = tables.moves.index_select(0, torch.add(games.tail, step, alpha=rules.cells))
    board.scatter_(0, head, torch.full_like(met, HEAD))
    games.score += eaten
    games.steps += 1
    if games.entered is not None:
        games.entered.view(-1).scatter_(0, head, games.steps.float())

    won = games.score == rules.cells - rules.initial_length
    _place_food_(games, eaten & ~won, rules, dense=dense)
    terminated = died | won
    truncated = (games.steps >= rules.max_steps) & ~terminated
    reward = torch.where(eaten, tables.food_reward, tables.step_reward)
    reward = torch.where(died, tables.death_reward, reward)
    if games.returned is not None:
        games.returned += reward
    return Outcome(reward, terminated, truncated)


def restart_(
    games: Games, where: Tensor, rules: Rules, tables: Tables, *, dense: bool = False
) -> None:
    """Begin some games anew, in place; the others stay as they are, their random numbers too.

    Args:
        games: to change.
        where: which of them, bool, ``(games,)``.
        rules: of the games.
        tables: of :func:`make_tables`.
        dense: as in :func:`step_`.
    """
    tail = rules.start - rules.initial_length + 1
    begin = {"pose": 4 * rules.start + RIGHT, "tail": tail, "score": 0, "steps": 0}
    if games.returned is not None:
        begin["returned"] = 0
    free = len(tables.free)
    if dense:
        for name, value in begin.items():
            getattr(games, name).masked_fill_(where, value)
        advanced = advance(games.streams)
        food = tables.free.index_select(0, uniform_below(advanced, free))
        new = tables.board.expand_as(games.board).scatter(1, food.unsqueeze(1), FOOD)
        games.board = torch.where(where.unsqueeze(1), new, games.board)
        games.streams = torch.where(where, advanced, games.streams)
        if games.entered is not None:
            games.entered = torch.where(where.unsqueeze(1), tables.entered, games.entered)
        return
    rows = where.nonzero().squeeze(1)
    for name, value in begin.items():
        getattr(games, name).index_fill_(0, rows, value)
    # Bytes are copied faster as wider numbers, where these fit into a row.
    wide = torch.int32 if rules.cells % 4 == 0 else torch.uint8
    new = tables.board.view(wide).expand(len(rows), -1)
    games.board.view(wide).index_copy_(0, rows, new)
    if games.entered is not None:
        games.entered.index_copy_(0, rows, tables.entered.expand(len(rows), -1))
    streams = advance(games.streams.index_select(0, rows))
    games.streams.index_copy_(0, rows, streams)
    food = games.offset.index_select(0, rows)
    food = food + tables.free.index_select(0, uniform_below(streams, free))
    games.board.view(-1).index_fill_(0, food, FOOD)


def _place_food_(games: Games, hungry: Tensor, rules: Rules, *, dense: bool) -> None:
    """Put food on a free cell, each as likely as the others, of the boards that lack it."""
    most = rules.cells - rules.initial_length
    if dense:
        advanced = advance(games.streams)
        cell = _free_cell(games.board, uniform_below(advanced, most - games.score))
        # A full board has no such cell, and is not hungry.
        cell = cell.clamp(max=rules.cells - 1).unsqueeze(1)
        old = games.board.gather(1, cell)
        games.board.scatter_(1, cell, old.masked_fill(hungry.unsqueeze(1), FOOD))
        games.streams = torch.where(hungry, advanced, games.streams)
        return
    rows = hungry.nonzero().squeeze(1)
    streams = advance(games.streams.index_select(0, rows))
    games.streams.index_copy_(0, rows, streams)
    rank = uniform_below(streams, most - games.score.index_select(0, rows))
    cell = _free_cell(games.board.index_select(0, rows), rank)
    games.board.view(-1).index_fill_(0, games.offset.index_select(0, rows) + cell, FOOD)


def _free_cell(board: Tensor, rank: Tensor) -> Tensor:
    """Return the empty cell of each board that has so many empty ones before it."""
    empty = (board == EMPTY).cumsum(1)
    return torch.searchsorted(empty, rank.unsqueeze(1), right=True).squeeze(1)
