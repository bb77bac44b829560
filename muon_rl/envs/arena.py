"""A multi-agent arena: agents with one policy gather the hearts of a world that they share."""

from __future__ import annotations

import random
import warnings
from functools import partial
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, PettingZooWrapper

from muon_rl.envs.base import EnvFactory

Mission = Literal["arena", "navigation"]
_GROUP = "agents"
_GLOBAL, _PADDING = 0xFE, 0xFF  # in a token's first byte: about the agent itself, and no token
_TAG = "tag"  # the feature whose value says what a thing is


def planes(
    tokens: Tensor, *, scale: Tensor, tag: int, tags: int, height: int, width: int
) -> Tensor:
    """Return mettagrid's tokens as planes around an agent: one a feature, then one a tag.

    A token is ``(16 * row + column, feature, value)``, where 254 in place of a cell is about the
    agent itself, whose cell is the centre, and 255 no token. What lies outside is left out.

    Args:
        tokens: uint8, ``(*batch, tokens, 3)``.
        scale: what the values of each feature are divided by, float32, ``(features,)``.
        tag: the feature whose values are not numbers but names: each has a plane of its own.
        tags: number of those names.
        height: rows of what an agent sees, at most 15.
        width: columns, at most 15.

    Returns:
        float32, ``(*batch, features + tags, height, width)``.

    Example:
        >>> tokens = torch.tensor([[0x01, 1, 0], [0x12, 0, 5], [0xFE, 0, 2], [0xFF, 255, 255]])
        >>> seen = planes(tokens.byte(), scale=torch.tensor([10.0, 1.0]), tag=1, tags=1, height=3,
        ...               width=3)
        >>> seen[0], seen[2]
        (tensor([[0.0000, 0.0000, 0.0000],
                [0.0000, 0.2000, 0.5000],
                [0.0000, 0.0000, 0.0000]]), tensor([[0., 1., 0.],
                [0., 0., 0.],
                [0., 0., 0.]]))
    """
    place, feature, value = tokens.long().unbind(-1)
    features = len(scale)
    row, column = place >> 4, place & 15
    row = row.masked_fill(place == _GLOBAL, height // 2)
    column = column.masked_fill(place == _GLOBAL, width // 2)
    named = feature == tag
    plane = torch.where(named, features + value, feature)
    told = (place != _PADDING) & (row < height) & (column < width)
    told &= torch.where(named, value < tags, feature < features)
    shown = value / scale[feature.clamp(max=features - 1)]
    shown = torch.where(named, torch.ones_like(shown), shown).masked_fill(~told, 0)
    cell = ((plane * height + row) * width + column).masked_fill(~told, 0)
    channels = features + tags
    seen = torch.zeros(*place.shape[:-1], channels * height * width, device=tokens.device)
    return seen.scatter_add_(-1, cell, shown).unflatten(-1, (channels, height, width))


class Arena(EnvFactory):
    """A world of mettagrid as one environment of batch size ``(num_agents,)``, an agent a row.

    Agents move (or stay) by one cell; walking into a chest takes a heart out of it, which is a
    reward of 1, and an empty chest goes. They see the cells around them as planes (see
    :func:`planes`), each other included, and end together, truncated at the horizon. Each episode
    has a map of its own. A resumed run begins a new episode: mettagrid does not tell its state.

    Args:
        num_agents: agents that share the world and the policy, >= 1.
        mission: ``arena``, a walled field of 25 x 25 cells with obstacles, or ``navigation``, an
            open room of 10 x 10, both mettagrid's own.
        chests: that are scattered over the map, >= 1.
        hearts: in each, >= 1.
        max_steps: steps of an episode, >= 1.
        view: rows and columns that an agent sees, odd, 3 to 15.

    Raises:
        ValueError: if mettagrid is not installed, a number is out of its bounds, or agents and
            chests do not fit on the map.

    Example:
        >>> rollout = Arena(num_agents=3, view=5).make(seed=0).rollout(4)
        >>> rollout.batch_size, rollout["observation"].shape[2:]
        (torch.Size([3, 4]), torch.Size([21, 5, 5]))
    """

    steps_together = True

    def __init__(
        self,
        num_agents: int = 4,
        mission: Mission = "arena",
        *,
        chests: int = 20,
        hearts: int = 5,
        max_steps: int = 500,
        view: int = 11,
    ) -> None:
        super().__init__()
        bounds = {"num_agents": num_agents, "chests": chests, "hearts": hearts}
        for name, number in (bounds | {"max_steps": max_steps}).items():
            if number < 1:
                raise ValueError(f"env.{name} must be at least 1, but is {number}.")
        if not 3 <= view <= 15 or view % 2 == 0:
            raise ValueError(f"env.view must be odd and 3 to 15, but is {view}.")
        self.num_envs = num_agents
        self.mission = mission
        self._world = make_world(
            mission, num_agents, chests=chests, hearts=hearts, max_steps=max_steps, view=view
        )

    @property
    def task(self) -> str:
        """The mission and the number of agents, as in ``arena-4``."""
        return f"{self.mission}-{self.num_envs}"

    def build(self) -> EnvBase:
        """Make the environment without counters."""
        return ArenaEnv(self._world)


def make_world(
    mission: Mission, num_agents: int, *, chests: int, hearts: int, max_steps: int, view: int
) -> Any:
    """Return mettagrid's config of a mission, with chests of hearts, that rewards each heart by 1.

    Args:
        mission: ``arena`` or ``navigation``.
        num_agents: agents on the map.
        chests: that are scattered over the map.
        hearts: in each of them.
        max_steps: steps after which an episode is truncated.
        view: rows and columns that an agent sees.

    Raises:
        ValueError: if mettagrid is not installed, there is no such mission, or its map is too
            small: mettagrid would leave chests out, or look for a place for agents without end.
    """
    try:
        from mettagrid.builder import envs
        from mettagrid.config.handler_config import Handler, withdraw
        from mettagrid.config.mettagrid_config import GridObjectConfig, InventoryConfig
    except ImportError as error:
        raise ValueError("mettagrid is not installed: pip install 'muon-rl[arena]'.") from error
    if mission not in get_args(Mission):
        raise ValueError(f"env.mission must be arena or navigation, but is {mission!r}.")
    world = getattr(envs, f"make_{mission}")(num_agents)
    game = world.game
    # The arena's map is a room within walls, which scatters the objects.
    room = game.map_builder.instance if mission == "arena" else game.map_builder
    room.objects["chest"] = chests
    cells = game.map_builder.width * game.map_builder.height
    if sum(room.objects.values()) + num_agents > cells:
        raise ValueError(
            f"env.num_agents={num_agents} and env.chests={chests} do not fit on the map of "
            f"{mission}, which has {cells} cells, {room.objects.get('wall', 0)} of them walls: "
            "lower one of them."
        )
    take = Handler(mutations=[withdraw({"heart": 1}, remove_when_empty=True)])
    inventory = InventoryConfig(initial={"heart": hearts})
    game.objects["chest"] = GridObjectConfig(name="chest", inventory=inventory, on_use_handler=take)
    game.resource_names = ["heart", "armor", "laser"]
    game.actions.change_vibe.enabled = False
    game.protocol_details_obs = False
    game.obs.height = game.obs.width = view
    game.max_steps, game.episode_truncates = max_steps, True
    world.desync_episodes = False
    return world


class ArenaEnv(EnvBase):
    """A world of mettagrid whose agents are the rows of a batch.

    Steps and resets go through TorchRL's wrapper of PettingZoo; this takes the group of agents out
    of it, turns their tokens into planes and gives every episode a seed of its own.

    Args:
        world: of :func:`make_world`.
        seed: of the first episode and, through it, of all that follow; ``None`` draws one from
            torch's generator.
    """

    batch_locked = True

    def __init__(self, world: Any, seed: int | None = None) -> None:
        from mettagrid.envs.pettingzoo_env import MettaGridPettingZooEnv
        from mettagrid.policy.policy_env_interface import PolicyEnvInterface
        from mettagrid.simulator import Simulator

        world = world.model_copy(deep=True)
        game = MettaGridPettingZooEnv(Simulator(), world)
        agents = len(game.possible_agents)
        super().__init__(batch_size=(agents,))
        with warnings.catch_warnings():
            # It was tested with one old version; tests here step it with the one installed.
            warnings.filterwarnings("ignore", "PettingZoo in TorchRL is tested")
            self._world = PettingZooWrapper(game, group_map={_GROUP: game.possible_agents})
        self._map_builder = world.game.map_builder
        seen = PolicyEnvInterface.from_mg_cfg(world)
        features = sorted(seen.obs_features, key=lambda feature: feature.id)
        (tag,) = (feature.id for feature in features if feature.name == _TAG)
        self._planes = partial(
            planes,
            scale=torch.tensor([max(1.0, feature.normalization) for feature in features]),
            tag=tag,
            tags=len(seen.tags),
            height=seen.obs_height,
            width=seen.obs_width,
        )
        channels = len(features) + len(seen.tags)
        shape = (agents, channels, seen.obs_height, seen.obs_width)
        self.observation_spec = Composite(observation=Unbounded(shape), shape=(agents,))
        self.action_spec = Categorical(len(seen.action_names), (agents,), dtype=torch.int64)
        self.reward_spec = Unbounded((agents, 1))
        flag = Categorical(2, (agents, 1), dtype=torch.bool)
        self.full_done_spec = Composite(
            terminated=flag, truncated=flag.clone(), done=flag.clone(), shape=(agents,)
        )
        self.set_seed(seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = TensorDict({_GROUP: tensordict.select("action")}, [])
        return self._told(self._world.step(actions).get("next").get(_GROUP), "reward")

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        where = None if tensordict is None else tensordict.get("_reset", None)
        if where is not None and not where.all():
            raise ValueError("Agents of one arena share its episode: reset all of them, or none.")
        seed = self._seeds.getrandbits(31)
        self._map_builder.seed = seed  # else mettagrid draws the map from anywhere
        return self._told(self._world.reset(seed=seed).get(_GROUP))

    def _told(self, agents: TensorDictBase, *others: str) -> TensorDict:
        """Return what the group says, its tokens as planes."""
        entries = {key: agents.get(key) for key in (*others, "terminated", "truncated", "done")}
        seen = self._planes(agents.get("observation"))
        return TensorDict({"observation": seen, **entries}, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self._seeds = random.Random(seed)

    def close(self, **options: Any) -> None:
        """Close the world."""
        super().close(**options)
        self._world.close()
