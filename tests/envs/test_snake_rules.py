"""The rules of Snake against a slow reference in plain Python, told only where food fell."""

from __future__ import annotations

import random

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from muon_rl.envs import SnakeEnv
from muon_rl.envs.snake.games import new_games, restart_, step_
from muon_rl.envs.snake.rules import BODY, FOOD, HEAD, RIGHT, Rules, make_tables
from muon_rl.envs.snake.streams import advance, new_streams, uniform_below

MOVES = [(-1, 0), (0, 1), (1, 0), (0, -1)]


class Reference:
    """One game, its snake a list of cells from head to tail."""

    def __init__(self, height, width, initial_length, max_steps):
        self.height, self.width = height, width
        self.initial_length, self.max_steps = initial_length, max_steps
        self.restart()

    def restart(self):
        row, column = self.height // 2, self.width // 2
        self.snake = [(row, column - i) for i in range(self.initial_length)]
        self.left_by = [None, *[1] * (self.initial_length - 1)]  # direction that left each cell
        self.direction, self.score, self.steps, self.food = 1, 0, 0, None

    def next_cell(self, action):
        direction = self.direction if (action + 2) % 4 == self.direction else action
        down, right = MOVES[direction]
        return direction, (self.snake[0][0] + down, self.snake[0][1] + right)

    def survives(self, action):
        _, (row, column) = self.next_cell(action)
        inside = 0 <= row < self.height and 0 <= column < self.width
        obstacles = self.snake if (row, column) == self.food else self.snake[:-1]
        return inside and ((row, column) not in obstacles)

    def step(self, action):
        """Return reward, terminated, truncated; ``food`` is ``None`` where new food is due."""
        alive = self.survives(action)
        self.direction, cell = self.next_cell(action)
        self.steps += 1
        late = self.steps >= self.max_steps
        if not alive:
            return -10.0, True, False
        ate = cell == self.food
        self.snake.insert(0, cell)
        self.left_by = [None, self.direction, *self.left_by[1:]]
        if not ate:
            self.snake.pop()
            self.left_by.pop()
            return -0.01, False, late
        self.score, self.food = self.score + 1, None
        won = len(self.snake) == self.height * self.width
        return 10.0, won, late and not won

    def told(self, board):
        """Take the food from a board of tokens, and check that it lies on a free cell."""
        cells = (board == FOOD).nonzero().tolist()
        full = len(self.snake) == self.height * self.width
        assert len(cells) == (0 if full else 1)
        if not full:
            self.food = tuple(cells[0])
            assert self.food not in self.snake

    def tokens(self):
        board = [[0] * self.width for _ in range(self.height)]
        for (row, column), direction in zip(self.snake, self.left_by, strict=True):
            board[row][column] = HEAD if direction is None else BODY + direction
        if self.food is not None:
            board[self.food[0]][self.food[1]] = FOOD
        return board

    def planes(self):
        seen = torch.zeros(4, self.height, self.width)
        seen[3] = 1
        length = len(self.snake)
        for age, (row, column) in enumerate(self.snake):
            seen[3, row, column] = 0
            seen[0 if age == 0 else 1, row, column] = 1 if age == 0 else (length - age) / length
        if self.food is not None:
            seen[2][self.food], seen[3][self.food] = 1, 0
        return seen

    def rgb3(self):
        seen = torch.zeros(self.height, self.width, 3)
        for row in range(self.height):
            for column in range(self.width):
                kind = 1 if (row, column) == self.food else 2
                seen[row, column, 0 if (row, column) in self.snake else kind] = 1
        return seen

    def distance_to_food(self, action):
        _, (row, column) = self.next_cell(action)
        return abs(row - self.food[0]) + abs(column - self.food[1])

    def choose(self, rng):
        """Return a move that mostly survives, so that snakes grow; sometimes any move."""
        safe = [action for action in range(4) if self.survives(action)]
        if not safe or rng.random() < 0.03:
            return rng.randrange(4)
        if self.food is not None and rng.random() < 0.5:
            return min(safe, key=self.distance_to_food)
        return rng.choice(safe)


@pytest.mark.parametrize(
    ("height", "width", "initial_length", "max_steps", "steps"),
    [
        (2, 2, 1, 4, 250),
        (2, 2, 2, 2, 250),
        (3, 3, 2, 40, 400),
        (2, 5, 3, 20, 400),
        (5, 4, 1, 60, 400),
        (6, 6, 3, 60, 700),
        (10, 10, 3, 120, 800),
    ],
)
def test_games_equal_the_reference_in_every_field(height, width, initial_length, max_steps, steps):
    number, rng = 32, random.Random(0)
    env = SnakeEnv(
        number, height, width, initial_length=initial_length, max_steps=max_steps,
        action_mask=True, seed=1,
    )  # fmt: skip
    references = [Reference(height, width, initial_length, max_steps) for _ in range(number)]
    now = env.reset()
    for reference, board in zip(references, now["observation"], strict=True):
        reference.told(board)
    ends = {"terminated": 0, "truncated": 0, "won": 0}

    def check(seen, alive):
        boards = seen["observation"].tolist()
        for i in alive:
            assert boards[i] == references[i].tokens()
        assert seen["step_count"].flatten().tolist() == [r.steps for r in references]
        assert seen["score"].flatten().tolist() == [r.score for r in references]
        lengths = [r.initial_length + r.score for r in references]
        assert seen["length"].flatten().tolist() == lengths
        masks = [[(a + 2) % 4 != r.direction for a in range(4)] for r in references]
        assert seen["action_mask"].tolist() == masks

    for _ in range(steps):
        now["action"] = torch.tensor([reference.choose(rng) for reference in references])
        actions = now["action"].tolist()
        now, following = env.step_and_maybe_reset(now)
        seen = now["next"]
        results = [r.step(action) for r, action in zip(references, actions, strict=True)]
        dead = {i for i, (reward, *_) in enumerate(results) if reward == -10}
        alive = [i for i in range(number) if i not in dead]
        for i in alive:
            references[i].told(seen["observation"][i])
        check(seen, alive)
        rewards, terminated, truncated = map(list, zip(*results, strict=True))
        assert torch.equal(seen["reward"].flatten(), torch.tensor(rewards))
        assert seen["terminated"].flatten().tolist() == terminated
        assert seen["truncated"].flatten().tolist() == truncated
        done = [a or b for a, b in zip(terminated, truncated, strict=True)]
        assert seen["done"].flatten().tolist() == done
        ends["terminated"] += len(dead)
        ends["truncated"] += sum(truncated)
        ends["won"] += sum(terminated) - len(dead)
        for i in (i for i in range(number) if done[i]):
            references[i].restart()
            references[i].told(following["observation"][i])
        check(following, range(number))
        assert not any(following[key].any() for key in ("terminated", "truncated", "done"))
        now = following
    assert ends["terminated"] > 0
    assert ends["won"] > 0 or height * width > 10
    assert ends["truncated"] > 0


@pytest.mark.parametrize(("height", "width"), [(3, 4), (6, 6)])
def test_planes_and_rgb3_are_what_their_definitions_say(height, width):
    number, rng = 8, random.Random(0)
    envs = {
        kind: SnakeEnv(number, height, width, observation=kind, max_steps=60, seed=3)
        for kind in ("tokens", "planes", "rgb3")
    }
    references = [Reference(height, width, 3, 60) for _ in range(number)]
    now = {kind: env.reset() for kind, env in envs.items()}
    for _ in range(150):
        for i, reference in enumerate(references):
            if reference.food is None:
                reference.told(now["tokens"]["observation"][i])
            torch.testing.assert_close(now["planes"]["observation"][i], reference.planes())
            assert torch.equal(now["rgb3"]["observation"][i], reference.rgb3())
        action = torch.tensor([reference.choose(rng) for reference in references])
        for kind, env in envs.items():
            now[kind]["action"] = action
            step, now[kind] = env.step_and_maybe_reset(now[kind])
        for i, reference in enumerate(references):
            reference.step(action[i].item())
            if step["next", "done"][i]:
                reference.restart()
    assert max(reference.score for reference in references) > 0


def test_a_hamiltonian_cycle_fills_the_board_and_wins():
    # Rows run left and right in turns over columns 0 to 4; column 5 leads back up.
    cycle = {(0, column): 3 for column in range(1, 6)} | {(row, 5): 0 for row in range(1, 6)}
    for row in range(1, 6):
        to_the_right = row % 2 == 1
        for column in range(5):
            cycle[row, column] = 1 if to_the_right else 3
    cycle |= {(0, 0): 2, (1, 4): 2, (2, 0): 2, (3, 4): 2, (4, 0): 2}
    env = SnakeEnv(16, 6, 6, max_steps=36 * 36, seed=0)
    now = env.reset()
    won = torch.zeros(16, dtype=torch.bool)
    for _ in range(36 * 36):
        heads = (now["observation"] == HEAD).nonzero()[:, 1:].tolist()
        now["action"] = torch.tensor([cycle[row, column] for row, column in heads])
        step, now = env.step_and_maybe_reset(now)
        end = step["next"][step["next", "done"].squeeze(1)]
        assert end["terminated"].all()
        assert (end["score"] == 33).all()
        assert (end["length"] == 36).all()
        assert (end["reward"] == 10).all()
        assert (end["observation"] >= BODY).all()
        won |= step["next", "done"].squeeze(1)
        if won.all():
            return
    raise AssertionError(f"{(~won).sum()} games are not won yet.")


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("after", ["restart", "meal"])
def test_food_falls_on_every_free_cell_with_equal_chance(after, dense):
    rules = Rules(5, 5)
    tables = make_tables(rules)
    games = new_games(rules, tables, 20_000, seed=0)
    if after == "restart":
        restart_(games, torch.ones(20_000, dtype=torch.bool), rules, tables, dense=dense)
    else:
        games.board[games.board == FOOD] = 0
        games.board[:, rules.start + 1] = FOOD
        step_(games, torch.full((20_000,), RIGHT), rules, tables, dense=dense)
        assert (games.score == 1).all()
    counts = (games.board == FOOD).sum(0)
    free = (games.board < BODY).all(0)
    assert free.sum() == 25 - 3 - (after == "meal")
    assert (counts[~free] == 0).all()
    assert chisquare(counts[free].numpy()).pvalue > 0.01


def test_food_is_independent_of_earlier_food_of_neighbours_and_of_other_seeds():
    rules = Rules(3, 3, initial_length=2)
    tables = make_tables(rules)
    games = new_games(rules, tables, 20_000, seed=0)

    def food():
        return (games.board == FOOD).int().argmax(1)

    first = food()
    restart_(games, torch.ones(20_000, dtype=torch.bool), rules, tables)
    second = food()
    games = new_games(rules, tables, 20_000, seed=1)
    neighbours = [(first[1:], first[:-1]), (first[1:], second[:-1]), (first[:-1], second[1:])]
    for a, b in ((first, second), *neighbours, (first, food())):
        table = torch.zeros(9, 9, dtype=torch.int64)
        table.index_put_((a, b), torch.ones_like(a), accumulate=True)
        used = table.sum(0) > 0
        assert chi2_contingency(table[used][:, used].numpy()).pvalue > 0.01


def test_random_numbers_are_splitmix64s():
    # The generator's first outputs for this seed, as its authors' C program prints them.
    state, outputs = torch.tensor([1234567]), [6457827717110365317, 3203168211198807973]
    for output in outputs:
        state = advance(state)
        assert uniform_below(state, 2**31).item() == output >> 33
        assert uniform_below(state, 97).item() == (output >> 33) * 97 >> 31


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 12345678901234567890])
def test_streams_begin_apart_for_every_seed(seed):
    streams = new_streams(seed, 1000)
    assert streams.unique().numel() == 1000
    assert torch.equal(new_streams(seed, 10), streams[:10])
    assert not set(streams.tolist()) & set(new_streams(seed + 1, 1000).tolist())


def play(dense, *, observation_ages=True, step=step_, number=64, steps=400):
    rules = Rules(4, 5, max_steps=50)
    tables = make_tables(rules)
    games = new_games(rules, tables, number, seed=5, ages=observation_ages)
    actions = torch.randint(4, (steps, number), generator=torch.Generator().manual_seed(0))
    outcomes = []
    for action in actions:
        outcome = step(games, action, rules, tables, dense=dense)
        restart_(games, outcome.terminated | outcome.truncated, rules, tables, dense=dense)
        outcomes.append(torch.stack([tensor.float() for tensor in outcome]))
    return games.state(), torch.stack(outcomes)


def test_the_dense_path_plays_the_same_games():
    (games, outcomes), (dense_games, dense_outcomes) = play(False), play(True)
    assert torch.equal(outcomes, dense_outcomes)
    assert (outcomes[:, 0] == 10).any()
    for name, value in games.items():
        assert torch.equal(value, dense_games[name]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_dense_step_is_one_graph(backend):
    compiled = torch.compile(step_, fullgraph=True, backend=backend)
    games, outcomes = play(True, number=16, steps=40)
    compiled_games, compiled_outcomes = play(True, step=compiled, number=16, steps=40)
    assert torch.equal(outcomes, compiled_outcomes)
    for name, value in games.items():
        assert torch.equal(value, compiled_games[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 1}, "height must be at least 2, but is 1"),
        ({"width": 0}, "width must be at least 2, but is 0"),
        ({"initial_length": 0}, "width // 2 [+] 1 = 6, but is 0"),
        ({"width": 5, "initial_length": 4}, "width // 2 [+] 1 = 3, but is 4"),
        ({"max_steps": 0}, "max_steps must be at least 1, but is 0"),
        ({"height": 6.0}, "height must be an integer, but is 6.0"),
        ({"initial_length": True}, "initial_length must be an integer, but is True"),
        ({"max_steps": 2.5}, "max_steps must be an integer, but is 2.5"),
        ({"max_steps": float("inf")}, "max_steps must be an integer, but is inf"),
    ],
)
def test_rules_out_of_bounds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rules(**arguments)
    with pytest.raises(ValueError, match=message):
        SnakeEnv(2, **arguments)
