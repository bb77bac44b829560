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

from muon_rl.envs.snake.rules import BODY, EMPTY, FOOD, HEAD, RIGHT, Rules, Tables
from muon_rl.envs.snake.streams import advance, new_streams, uniform_below


@dataclass
class Games:
    """The state of so many games, which :func:`step_` and :func:`restart_` change in place.

    Args:
        board: tokens, uint8, ``(games, cells)``.
        offset: index of each game's first cell in the flattened boards, int64, ``(games,)``.
        head: the head's cell, int64, ``(games,)``.
        tail: the tail's cell, int64, ``(games,)``.
        direction: of the last move, int64, ``(games,)``.
        score: apples eaten in this game, int64, ``(games,)``.
        steps: steps of this game, int64, ``(games,)``.
        returned: rewards of this game, summed, float32, ``(games,)``.
        streams: states of the random numbers, int64, ``(games,)``.
        entered: the step in which the head entered each cell, float32, ``(games, cells)``, of use
            where the body is; ``None`` where nobody asks for it.
    """

    board: Tensor
    offset: Tensor
    head: Tensor
    tail: Tensor
    direction: Tensor
    score: Tensor
    steps: Tensor
    returned: Tensor
    streams: Tensor
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


def new_games(rules: Rules, tables: Tables, number: int, *, seed: int, ages: bool = False) -> Games:
    """Return so many games at their beginning.

    Args:
        rules: of the games.
        tables: of :func:`make_tables`, whose device is the games'.
        number: of games.
        seed: of all their random numbers.
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
    head, tail, direction, score, steps = torch.zeros(5, number, dtype=torch.int64, device=device)
    games = Games(
        board=tables.board.repeat(number, 1),
        offset=torch.arange(number, device=device) * rules.cells,
        head=head.clone(),
        tail=tail.clone(),
        direction=direction.clone(),
        score=score.clone(),
        steps=steps.clone(),
        returned=torch.zeros(number, dtype=torch.float32, device=device),
        streams=new_streams(seed, number, device),
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
    board, cells = games.board.view(-1), rules.cells
    # A reversal keeps the direction: of opposite ones, one bit differs.
    games.direction = action ^ (action ^ 2 == games.direction) * 2
    token = games.direction + BODY
    board.scatter_(0, games.offset + games.head, token.to(torch.uint8))

    head = tables.moves.index_select(0, token * cells + games.head)
    head_index, tail_index = games.offset + head, games.offset + games.tail
    met = board.index_select(0, head_index)
    eaten = met == FOOD
    # The table leads from a wall's cell to that cell. A tail that moves on is no obstacle.
    died = ((met > FOOD) & (head != games.tail)) | (head == games.head)

    left = board.index_select(0, tail_index)
    stays = left * eaten
    board.scatter_(0, tail_index, stays)
    # No token leads to where it is.
    games.tail = tables.moves.index_select(0, (left - stays).long() * cells + games.tail)
    board.scatter_(0, head_index, torch.full_like(met, HEAD))
    games.head = head
    games.score += eaten
    games.steps += 1
    if games.entered is not None:
        games.entered.view(-1).scatter_(0, head_index, games.steps.float())

    won = games.score == cells - rules.initial_length
    _place_food_(games, eaten > won, rules, dense=dense)
    terminated = died | won
    truncated = (games.steps >= rules.max_steps) > terminated
    reward = torch.full_like(eaten, rules.step_reward, dtype=torch.float32)
    reward.masked_fill_(eaten, rules.food_reward).masked_fill_(died, rules.death_reward)
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
    begin = {
        "head": rules.start, "tail": rules.start - rules.initial_length + 1, "direction": RIGHT,
        "score": 0, "steps": 0, "returned": 0,
    }  # fmt: skip
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
    games.board.index_copy_(0, rows, tables.board.expand(len(rows), -1))
    if games.entered is not None:
        games.entered.index_copy_(0, rows, tables.entered.expand(len(rows), -1))
    streams = advance(games.streams.index_select(0, rows))
    games.streams.index_copy_(0, rows, streams)
    food = games.offset.index_select(0, rows)
    food = food + tables.free.index_select(0, uniform_below(streams, free))
    games.board.view(-1).index_fill_(0, food, FOOD)


def _place_food_(games: Games, hungry: Tensor, rules: Rules, *, dense: bool) -> None:
    """Put food on a free cell, each as likely as the others, of the boards that lack it."""
    free = rules.cells - rules.initial_length - games.score
    if dense:
        advanced = advance(games.streams)
        cell = _free_cell(games.board, uniform_below(advanced, free))
        # A full board has no such cell, and is not hungry.
        cell = cell.clamp(max=rules.cells - 1).unsqueeze(1)
        old = games.board.gather(1, cell)
        games.board.scatter_(1, cell, old.masked_fill(hungry.unsqueeze(1), FOOD))
        games.streams = torch.where(hungry, advanced, games.streams)
        return
    rows = hungry.nonzero().squeeze(1)
    streams = advance(games.streams.index_select(0, rows))
    games.streams.index_copy_(0, rows, streams)
    rank = uniform_below(streams, free.index_select(0, rows))
    cell = _free_cell(games.board.index_select(0, rows), rank)
    games.board.view(-1).index_fill_(0, games.offset.index_select(0, rows) + cell, FOOD)


def _free_cell(board: Tensor, rank: Tensor) -> Tensor:
    """Return the empty cell of each board that has so many empty ones before it."""
    passed = (board == EMPTY).cumsum(1, dtype=torch.int32) <= rank.unsqueeze(1)
    return passed.sum(1)
