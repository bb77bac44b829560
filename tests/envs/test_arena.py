"""The arena of several agents: what they see, what a heart is worth, how episodes begin and end."""

from __future__ import annotations

import sys

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from muon_rl.envs import Arena
from muon_rl.envs.arena import ArenaEnv, make_world, planes

pytest.importorskip("mettagrid")

SMALL = {"num_agents": 3, "mission": "navigation", "chests": 12, "hearts": 2, "view": 7}
HEART = 12  # mettagrid's feature of a unit's hearts
CENTRE = SMALL["view"] // 2


def played(steps, *, seed=0, actions=1, **options):
    """Play random actions; return the steps of all episodes."""
    env = Arena(**SMALL | {"max_steps": 15} | options).make(seed=seed)
    torch.manual_seed(actions)
    return env.rollout(steps, break_when_any_done=False)


def test_planes_equal_a_loop_over_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (5, 2, 400, 3), generator=generator, dtype=torch.uint8)
    tokens[..., 1] %= 6
    tokens[..., 2] %= 9
    tokens[:, :, ::7, 0], tokens[:, :, 1::7, 0] = 254, 255
    scale = torch.tensor([1.0, 2.0, 4.0, 1.0])
    seen = planes(tokens, scale=scale, tag=2, tags=7, height=5, width=9)
    expected = torch.zeros(5, 2, 4 + 7, 5, 9)
    counted = 0
    for i in range(5):
        for j in range(2):
            for place, feature, value in tokens[i, j].tolist():
                row, column = (2, 4) if place == 254 else (place // 16, place % 16)
                if place == 255 or row >= 5 or column >= 9:
                    continue
                if feature == 2 and value < 7:
                    expected[i, j, 4 + value, row, column] += 1
                elif feature != 2 and feature < 4:
                    expected[i, j, feature, row, column] += value / scale[feature]
                counted += 1
    assert counted > 100
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("mission", ["arena", "navigation"])
def test_specs_hold_and_keys_are_those_of_every_factory(mission):
    factory = Arena(**SMALL | {"mission": mission})
    env = factory.make(seed=0)
    check_env_specs(env)
    steps = env.rollout(3)
    assert steps.batch_size == (3, 3)
    assert {"observation", "action", "step_count", "episode_return"} <= set(steps.keys())
    assert steps["observation"].shape[2:] == factory.specs.observation.shape
    assert factory.task == f"{mission}-3"
    env.close()


def test_each_heart_is_a_reward_of_1_and_seen_by_its_owner():
    steps = played(160, max_steps=80)
    after = steps["next"]
    taken = after["episode_return"].squeeze(-1)
    assert taken.max() > 3
    assert set(after["reward"].unique().tolist()) == {0.0, 1.0}
    hearts = 256 * after["observation"][:, :, HEART, CENTRE, CENTRE]
    assert torch.equal(hearts, taken)
    # All that was taken was there.
    ends = after["done"].squeeze(-1)
    assert (taken.T[ends.T].view(-1, 3).sum(1) <= 12 * 2).all()


def test_an_empty_chest_goes():
    steps = played(200, num_agents=1, chests=30, hearts=1, view=15, max_steps=200)
    # The tags end with agent, chest, wall; who takes a heart stays where it is.
    now, after = (x["observation"][:, :, -2].sum((-1, -2)) for x in (steps, steps["next"]))
    taken = steps["next", "reward"].squeeze(-1) == 1
    assert taken.sum() > 3
    assert (now - after)[taken].eq(1).all()


def test_agents_end_together_truncated_at_the_horizon():
    after = played(40)["next"]
    expected = torch.zeros(3, 40, 1, dtype=torch.bool)
    expected[:, 14::15] = True
    assert torch.equal(after["truncated"], expected)
    assert torch.equal(after["done"], expected)
    assert not after["terminated"].any()
    assert after["step_count"].max() == 15


@pytest.mark.parametrize("mission", ["arena", "navigation"])
def test_equal_seeds_give_equal_episodes_and_each_has_a_map_of_its_own(mission):
    first, again, other = (
        played(20, seed=seed, mission=mission)["observation"] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[:, 0], other[:, 0])
    assert not torch.equal(first[:, 0], first[:, 15])


def test_agents_see_each_other_and_themselves():
    world = make_world("navigation", 3, chests=1, hearts=1, max_steps=20, view=15)
    seen = ArenaEnv(world, seed=0).reset()["observation"]
    agents = seen[:, -3]  # tags by the alphabet: agent, chest, wall
    assert (agents[:, 7, 7] == 1).all()
    assert (agents.sum((1, 2)) == 3).any()


def test_some_agents_alone_cannot_begin_anew():
    env = Arena(**SMALL).make(seed=0)
    now = env.reset()
    with pytest.raises(ValueError, match="reset all of them, or none"):
        env.reset(now.set("_reset", torch.tensor([[True], [False], [True]])))


@pytest.mark.parametrize(("mission", "chests"), [("arena", 612), ("navigation", 97)])
def test_a_full_map_has_every_chest_and_a_fuller_one_is_refused(mission, chests):
    world = {"hearts": 1, "max_steps": 5, "view": 15}
    full = make_world(mission, 3, chests=chests, **world)
    grid = full.game.map_builder.create().build().grid
    assert (grid == "chest").sum() == chests
    assert ArenaEnv(full, seed=0).rollout(2).shape == (3, 2)
    with pytest.raises(ValueError, match=f"env.num_agents=3 and env.chests={chests + 1} do not"):
        make_world(mission, 3, chests=chests + 1, **world)
    # mettagrid would look for room for these without end.
    with pytest.raises(ValueError, match="do not fit on the map"):
        make_world(mission, 700, chests=1, **world)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_agents": 0}, "env.num_agents must be at least 1, but is 0"),
        ({"chests": 0}, "env.chests must be at least 1, but is 0"),
        ({"hearts": -1}, "env.hearts must be at least 1, but is -1"),
        ({"max_steps": 0}, "env.max_steps must be at least 1, but is 0"),
        ({"view": 6}, "env.view must be odd and 3 to 15, but is 6"),
        ({"view": 17}, "env.view must be odd and 3 to 15, but is 17"),
        ({"mission": "war"}, "env.mission must be arena or navigation, but is 'war'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Arena(**options)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mettagrid.builder", None)
    with pytest.raises(
        ValueError, match=r"mettagrid is not installed: pip install 'muon-rl\[arena\]'"
    ):
        Arena()
