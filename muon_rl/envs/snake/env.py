"""Snake as a TorchRL environment: many games that step together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from muon_rl.envs.snake import observe, render
from muon_rl.envs.snake.games import Games, new_games, restart_, step_
from muon_rl.envs.snake.rules import HEAD, Rules, make_tables, require_integers
from muon_rl.envs.snake.streams import new_streams


class SnakeEnv(EnvBase):
    """Games of Snake that step together, on tensors alone, on any device.

    The rules are :class:`~muon_rl.envs.snake.rules.Rules`: walls and body kill, the tail's cell
    vacates, a full board wins, a reversal keeps the direction, food falls on any free cell with
    equal chance. The batch size is ``(num_envs,)``, and the keys are

    ==================  ===========================================================
    ``action``          int64 ``(N,)``: 0 up, 1 right, 2 down, 3 left
    ``observation``     as asked for, row 0 at the top
    ``reward``          float32 ``(N, 1)``
    ``terminated``      bool ``(N, 1)``: died, or filled the board
    ``truncated``       bool ``(N, 1)``: reached ``max_steps`` and did neither
    ``done``            bool ``(N, 1)``: either of them
    ``step_count``      int64 ``(N, 1)``: steps of this game
    ``length``          int64 ``(N, 1)``: cells of the snake
    ``score``           int64 ``(N, 1)``: apples eaten in this game
    ``action_mask``     bool ``(N, 4)``, if asked for: all moves but the reversal
    ``episode_return``  float32 ``(N, 1)``, if asked for: rewards of this game, summed
    ==================  ===========================================================

    Each game has a stream of random numbers of its own: what befalls it follows from the seed,
    its place in the batch and its own actions, on every device. ``reset`` does not begin the
    streams again; ``set_seed`` does. Tensors that were handed out never change afterwards.

    Where games end in a step, :meth:`step_and_maybe_reset` does what
    :class:`~torchrl.envs.EnvBase` does, with less work around it.

    Args:
        num_envs: games, >= 1.
        height: rows, >= 2.
        width: columns, >= 2.
        initial_length: cells of a new snake, 1 to ``width // 2 + 1``.
        max_steps: steps after which a game is truncated, >= 1.
        food_reward: for a step that eats.
        death_reward: for a step that dies.
        step_reward: for any other step.
        observation: ``tokens`` (uint8 ``(N, H, W)``: 0 empty, 1 food, 2 + direction in which the
            snake left a body cell, 6 head), ``planes`` (float32 ``(N, 4, H, W)``: head, body with
            age, food, empty) or ``rgb3`` (float32 ``(N, H, W, 3)``: body, food, empty);
            see :mod:`muon_rl.envs.snake.observe`.
        action_mask: whether to write ``action_mask``.
        episode_return: whether to write ``episode_return``, as TorchRL's ``RewardSum`` would.
        device: of all tensors; ``None`` is the CPU, with tensordicts of no device.
        seed: of all random numbers; ``None`` draws one from torch's generator.

    Raises:
        ValueError: if a number is out of its bounds, or no integer where it counts, or the
            observation is not one of the three.

    Example:
        >>> env = SnakeEnv(2, height=6, width=6, seed=0)
        >>> reset = env.reset()
        >>> print(env.render("text"))
        ------
        ------
        ------
        ->>@--
        *-----
        ------
        >>> env.rollout(3)["observation"].shape
        torch.Size([2, 3, 6, 6])
    """

    batch_locked = True

    def __init__(
        self,
        num_envs: int,
        height: int = 10,
        width: int = 10,
        *,
        initial_length: int = 3,
        max_steps: int = 500,
        food_reward: float = 10.0,
        death_reward: float = -10.0,
        step_reward: float = -0.01,
        observation: Literal["tokens", "planes", "rgb3"] = "tokens",
        action_mask: bool = False,
        episode_return: bool = False,
        device: torch.device | str | int | None = None,
        seed: int | None = None,
    ) -> None:
        require_integers(num_envs=num_envs)
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, but is {num_envs}.")
        if observation not in observe.OBSERVATIONS:
            kinds = ", ".join(observe.OBSERVATIONS)
            raise ValueError(f"observation must be one of {kinds}, but is {observation!r}.")
        self.rules = Rules(
            height, width, initial_length, max_steps, food_reward, death_reward, step_reward
        )
        self.num_envs = num_envs
        super().__init__(device=device, batch_size=(num_envs,))
        self._kind = observation
        self._with_mask = action_mask
        self._with_return = episode_return
        self._tables = make_tables(self.rules, self._place)
        # Elsewhere, to do more work costs less than to wait for a number of rows.
        self._dense = self._place.type != "cpu"
        self._games = new_games(
            self.rules,
            self._tables,
            num_envs,
            seed=0,
            returns=episode_return,
            ages=observation == "planes",
        )
        self._make_specs()
        self.set_seed(seed)

    @property
    def _place(self) -> torch.device:
        return self.device or torch.device("cpu")

    def _make_specs(self) -> None:
        n, device, rules = self.num_envs, self.device, self.rules
        board = (n, rules.height, rules.width)
        observation = {
            "tokens": Bounded(0, HEAD, board, dtype=torch.uint8, device=device),
            "planes": Bounded(0, 1, (n, 4, *board[1:]), dtype=torch.float32, device=device),
            "rgb3": Bounded(0, 1, (*board, 3), dtype=torch.float32, device=device),
        }[self._kind]
        counters = {
            key: Bounded(0, high, (n, 1), dtype=torch.int64, device=device)
            for key, high in (
                ("step_count", rules.max_steps),
                ("length", rules.cells),
                ("score", rules.cells),
            )
        }
        entries = {"observation": observation, **counters}
        if self._with_mask:
            entries["action_mask"] = Binary(4, (n, 4), dtype=torch.bool, device=device)
        if self._with_return:
            entries["episode_return"] = Unbounded((n, 1), dtype=torch.float32, device=device)
        self.observation_spec = Composite(entries, shape=(n,), device=device)
        self.action_spec = Categorical(4, (n,), dtype=torch.int64, device=device)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32, device=device)
        flag = Categorical(2, (n, 1), dtype=torch.bool, device=device)
        self.full_done_spec = Composite(
            terminated=flag, truncated=flag.clone(), done=flag.clone(), shape=(n,), device=device
        )

    # -- TorchRL -------------------------------------------------------------------------------

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        games, rules = self._games, self.rules
        held = tensordict.get("_step", None)  # TorchRL's: the games that are to make this step
        if held is not None:
            held, before = ~held.view(-1), games.state()
        action = tensordict.get("action")
        # Many small operations, none of them differentiated: inference mode makes each cheaper.
        with torch.inference_mode():
            outcome = step_(games, action, rules, self._tables, dense=self._dense)
            if held is not None:
                games.take_back_(before, held)
        # What leaves are ordinary tensors.
        reward, terminated, truncated = (tensor.clone().unsqueeze(1) for tensor in outcome)
        if held is not None:
            held = held.unsqueeze(1)
            reward = reward.masked_fill(held, 0)
            running = torch.zeros_like(held)
            terminated = torch.where(held, tensordict.get("terminated", running), terminated)
            truncated = torch.where(held, tensordict.get("truncated", running), truncated)
        return self._tensordict(
            **self._seen(),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            done=terminated | truncated,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        where = None if tensordict is None else tensordict.get("_reset", None)
        if where is None:
            where = torch.ones(self.num_envs, dtype=torch.bool, device=self._place)
        where = where.view(-1, 1)
        self._restart(where)
        flags = {}
        for key in ("terminated", "truncated", "done"):
            old = None if tensordict is None else tensordict.get(key, None)
            flags[key] = torch.zeros_like(where) if old is None else old & ~where
        return self._tensordict(**self._seen(), **flags)

    @torch.inference_mode()
    def _restart(self, where: Tensor) -> None:
        """Begin the games anew that a mask of shape ``(N, 1)`` marks."""
        restart_(self._games, where.view(-1), self.rules, self._tables, dense=self._dense)

    def _step_proc_data(self, next_tensordict_out: TensorDictBase) -> TensorDictBase:
        return next_tensordict_out  # complete and of the right shapes as it is

    def _step_and_maybe_reset(
        self, tensordict: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        if self._post_step_mdp_hooks is not None:
            return super()._step_and_maybe_reset(tensordict)
        if tensordict.device != self.device:
            tensordict = tensordict.to(self.device)
        tensordict = self.step(tensordict)
        done = tensordict.get("next").get("done")
        if not (self._dense or done.any()):
            return tensordict, self._step_mdp(tensordict)
        # TorchRL merges each entry of the games that go on with that of those that begin; here
        # the state itself holds both.
        self._restart(done)
        begun = self._seen() | {key: torch.zeros_like(done) for key in self.done_keys}
        following = tensordict.exclude("next", "reward", "_reset", *begun)
        if self._dense or not done.all():
            # As TorchRL does: what a policy wrote is blank where a game begins.
            following = following.where(~done.squeeze(1), following.empty(), pad=0)
        return tensordict, following.update(begun)

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        self._games.streams = new_streams(seed, self.num_envs, self._place)

    def _seen(self) -> dict[str, Tensor]:
        """Return what agents see of the games now, in new tensors."""
        games = self._games
        seen = {
            "observation": observe.OBSERVATIONS[self._kind](games, self.rules),
            "step_count": games.steps.clone().unsqueeze(1),
            "length": (games.score + self.rules.initial_length).unsqueeze(1),
            "score": games.score.clone().unsqueeze(1),
        }
        if self._with_mask:
            seen["action_mask"] = observe.action_mask(games)
        if games.returned is not None:
            seen["episode_return"] = games.returned.clone().unsqueeze(1)
        return seen

    def _tensordict(self, **entries: Tensor) -> TensorDict:
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    # -- state, device, pictures ---------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return copies of the state of the games, the random numbers included, by name.

        It is in ``state_dict()``, and an environment of equal arguments that loads it goes on bit
        for bit.
        """
        return self._games.state()

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Set the games to what :meth:`get_extra_state` returned.

        Args:
            state: of an environment with equal arguments, on any device.

        Raises:
            ValueError: if that environment had boards of another size, another number of games,
                or observations that ask for another state.
        """
        ours = self._games.state()
        shapes = [{key: tuple(value.shape) for key, value in s.items()} for s in (ours, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"The state must have the shapes {shapes[0]}, but has {shapes[1]}.")
        self._games = Games(**state).to(self._place)

    def to(self, device: torch.device | str | int) -> SnakeEnv:
        """Move specs and games to a device.

        Args:
            device: where to.
        """
        super().to(device)
        self._dense = self._place.type != "cpu"
        self._tables = make_tables(self.rules, self._place)
        self._games = self._games.to(self._place)
        return self

    def boards(self) -> Tensor:
        """Return the tokens of all games as they stand, whatever agents see of them.

        Returns:
            uint8, ``(N, H, W)``, a copy.
        """
        return observe.tokens(self._games, self.rules)

    def render(self, mode: Literal["text", "rgb"] = "text", game: int = 0) -> str | Tensor:
        """Return a picture of a game as it stands.

        Args:
            mode: ``text`` (a line a row) or ``rgb`` (uint8, ``(rows, columns, 3)``).
            game: which one.

        Raises:
            ValueError: if the mode is neither.
        """
        if mode not in render.MODES:
            raise ValueError(f"mode must be one of {', '.join(render.MODES)}, but is {mode!r}.")
        return render.MODES[mode](self.boards()[game])
