"""SnakeEnv as TorchRL, Gymnasium and a resume use it."""

from __future__ import annotations

import io
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import ActionMask, EnvBase, RewardSum, TransformedEnv
from torchrl.envs.utils import check_env_specs

from muon_rl.data.evaluation import EvaluationEpisodes, ends
from muon_rl.envs import Snake, SnakeEnv, load_states, make_several, states_of
from muon_rl.envs.snake import to_gif, to_rgb, to_text

UP, RIGHT, DOWN, LEFT = range(4)
# Dies within few steps, or eats: every kind of step soon occurs.
SMALL = {"height": 4, "width": 5, "max_steps": 12}


def actions_of(number, steps, seed=0):
    return torch.randint(4, (steps, number), generator=torch.Generator().manual_seed(seed))


def play(env, actions, now=None, step=None):
    """Take actions; return the steps, stacked, and the tensordict to go on with."""
    step = step or env.step_and_maybe_reset
    now = env.reset() if now is None else now
    steps = []
    for action in actions:
        now["action"] = action
        taken, now = step(now)
        steps.append(taken.clone())
    return torch.stack(steps, 1), now


def assert_equal(a, b):
    assert set(a.keys(True, True)) == set(b.keys(True, True))
    assert (a == b).all()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "planes", "rgb3"])
def test_specs_hold(kind, mask):
    env = SnakeEnv(7, **SMALL, observation=kind, action_mask=mask, episode_return=mask, seed=0)
    check_env_specs(env)
    rollout = env.rollout(200, break_when_any_done=False)
    seen = rollout["next"].select(*env.observation_spec.keys())
    assert all(env.observation_spec.is_in(seen[:, step]) for step in range(200))
    assert (seen["step_count"] == SMALL["max_steps"]).any()
    assert ("action_mask" in rollout) == ("episode_return" in rollout) == mask


def test_keys_types_and_shapes_are_as_documented():
    now = SnakeEnv(3, 6, 8, seed=0).rollout(1)
    kinds = {
        "observation": (torch.uint8, (6, 8)), "reward": (torch.float32, (1,)),
        "step_count": (torch.int64, (1,)), "length": (torch.int64, (1,)),
        "score": (torch.int64, (1,)), "terminated": (torch.bool, (1,)),
        "truncated": (torch.bool, (1,)), "done": (torch.bool, (1,)),
    }  # fmt: skip
    assert {key: (v.dtype, v.shape[2:]) for key, v in now["next"].items()} == kinds
    assert now["action"].dtype == torch.int64
    assert now["action"].shape == (3, 1)


def test_a_new_snake_lies_in_the_centre_row_and_heads_right():
    for height, width in ((10, 10), (5, 7)):
        board = SnakeEnv(1, height, width).reset()["observation"][0]
        expected = torch.zeros(height, width, dtype=torch.uint8)
        middle = width // 2
        expected[height // 2, middle - 2 : middle + 1] = torch.tensor([3, 3, 6])
        assert torch.equal(torch.where(board == 1, 0, board), expected)


def test_a_reversal_keeps_the_direction():
    env = SnakeEnv(1, seed=0)
    left, right = (play(env_, torch.tensor([[a], [a]]))[0]["next", "observation"] for env_, a in (
        (env, LEFT), (SnakeEnv(1, seed=0), RIGHT)))  # fmt: skip
    assert torch.equal(left, right)


def test_the_cell_that_the_tail_leaves_is_free():
    env = SnakeEnv(64, 4, 4, initial_length=3, seed=0)
    env.reset()
    # A loop of four cells with a snake of three, then of four where one has eaten on its way.
    steps, _ = play(env, torch.tensor([UP, LEFT, DOWN, RIGHT] * 4).unsqueeze(1).expand(16, 64))
    fed = (steps["next", "length"][:, 3] == 4).squeeze(1)
    full_loop = fed & (steps["next", "length"][:, 15] == 4).squeeze(1)
    assert full_loop.any()
    assert not steps["next", "terminated"][full_loop].any()


def test_truncation_is_not_termination():
    env = SnakeEnv(2, max_steps=4, seed=0)
    steps, now = play(env, torch.tensor([UP, LEFT, DOWN, LEFT]).unsqueeze(1).expand(4, 2))
    flags = {key: steps["next", key][:, :, 0].tolist() for key in ("truncated", "terminated")}
    assert flags["truncated"] == [[False, False, False, True]] * 2
    assert flags["terminated"] == [[False] * 4] * 2
    assert steps["next", "done"][:, 3].all()
    assert (steps["next", "step_count"][:, 3] == 4).all()
    assert (now["step_count"] == 0).all()


def test_a_death_at_the_horizon_is_no_truncation():
    env = SnakeEnv(1, max_steps=5, seed=0)
    steps, _ = play(env, torch.full((5, 1), RIGHT))
    assert steps["next", "terminated"].flatten().tolist() == [False] * 4 + [True]
    assert not steps["next", "truncated"].any()
    assert steps["next", "reward"][0, -1] == -10


def test_score_and_length_stay_at_a_death():
    steps, _ = play(SnakeEnv(64, 4, 4, seed=0), actions_of(64, 200))
    died = steps["next", "reward"] == -10
    fed = died & (steps["score"] > 0)
    assert fed.any()
    for key in ("score", "length"):
        assert torch.equal(steps["next", key][fed], steps[key][fed])


def test_rewards_are_the_ones_asked_for():
    env = SnakeEnv(
        64, 3, 3, initial_length=1, food_reward=2, death_reward=-3, step_reward=0.5, seed=0
    )
    steps, _ = play(env, actions_of(64, 60))
    reward, ate = steps["next", "reward"], steps["next", "score"] > steps["score"]
    died = steps["next", "terminated"] & ~ate
    assert died.any()
    assert ate.any()
    expected = torch.full_like(reward, 0.5).masked_fill(ate, 2.0).masked_fill(died, -3.0)
    assert torch.equal(reward, expected)


@pytest.mark.parametrize("number", [1, 2, 48])
def test_the_short_way_through_a_step_equals_torchrls_own(number):
    actions = actions_of(number, 80)
    ours, theirs = (
        SnakeEnv(number, **SMALL, action_mask=True, episode_return=True, seed=2) for _ in range(2)
    )
    first, second = ours.reset(), theirs.reset()
    for action in actions:
        for now in (first, second):
            now["action"] = action
            now["log_prob"] = action.float()  # what a policy adds stays
            now["agents", "hidden"] = now["observation"].float()
            now["reward"] = torch.ones(number, 1)  # and the last step's reward goes
        step, first = ours.step_and_maybe_reset(first)
        their_step, second = EnvBase._step_and_maybe_reset(theirs, second)
        assert_equal(step, their_step)
        assert_equal(first, second)


def test_a_subclass_may_add_to_the_short_way():
    class Marked(SnakeEnv):
        def _post_step_mdp_hooks(self, step, following):
            return step, following.set("mark", torch.ones(self.num_envs))

    _, now = play(Marked(3, **SMALL, seed=0), actions_of(3, 1))
    assert now["mark"].all()


def test_a_step_without_a_look_at_the_data_plays_the_same_games():
    env, dense = (SnakeEnv(48, **SMALL, observation="planes", seed=2) for _ in range(2))
    dense._dense = True  # as on a GPU
    actions = actions_of(48, 80)
    (steps, now), (dense_steps, dense_now) = play(env, actions), play(dense, actions)
    assert_equal(steps, dense_steps)
    assert_equal(now, dense_now)


def test_a_random_policy_can_keep_to_the_mask():
    env = TransformedEnv(SnakeEnv(32, 6, 6, action_mask=True, seed=0), ActionMask())
    steps = env.rollout(60, break_when_any_done=False)
    taken = steps["action_mask"].gather(-1, steps["action"].view(32, -1, 1))
    assert taken.all()
    assert not steps["action_mask"].all()


def test_a_game_that_is_over_can_be_stepped_without_harm():
    env = SnakeEnv(64, 3, 4, initial_length=1, seed=0)
    now = env.reset()
    for action in actions_of(64, 600):
        now = env.step_mdp(env.step(now.set("action", action)))
    env.set_seed(1)
    fresh = SnakeEnv(64, 3, 4, initial_length=1, seed=1)
    assert_equal(env.reset(), fresh.reset())


def test_transforms_see_the_same_games():
    env = SnakeEnv(16, **SMALL, episode_return=True, seed=4)
    summed = TransformedEnv(
        SnakeEnv(16, **SMALL, seed=4), RewardSum(["reward"], ["episode_return"])
    )
    actions = actions_of(16, 60)
    (steps, now), (their_steps, their_now) = play(env, actions), play(summed, actions)
    assert_equal(steps, their_steps)
    assert_equal(now, their_now)


@pytest.mark.parametrize("shape", [(10, 1), (10,)])
def test_resetting_some_games_leaves_the_others(shape):
    env, twin = (SnakeEnv(10, seed=0) for _ in range(2))
    actions = actions_of(10, 30)
    (_, now), (_, twin_now) = play(env, actions[:3]), play(twin, actions[:3])
    marked = torch.zeros(10, 1, dtype=torch.bool)
    marked[[2, 7]] = True
    before = now.clone()
    now = env.reset(now.set("_reset", marked.clone().view(shape)))
    others = ~marked.squeeze(1)
    assert_equal(now[others], before.exclude("_reset")[others])
    assert (now["step_count"][~others] == 0).all()
    # Their random numbers are left too: food falls where it would have fallen.
    steps, _ = play(env, actions[3:], now)
    twin_steps, _ = play(twin, actions[3:], twin_now)
    assert_equal(steps[others], twin_steps[others])
    assert (steps["next", "score"][others].amax() > 0) or steps["next", "done"][others].any()


def test_games_that_are_over_and_not_reset_stay_over():
    env = SnakeEnv(10, max_steps=2, seed=0)
    now = env.reset()
    for action in torch.full((2, 10), UP):
        now = env.step_mdp(env.step(now.set("action", action)))
    assert now["truncated"].all()
    marked = torch.arange(10).view(-1, 1) % 2 == 0
    now = env.reset(now.set("_reset", marked.clone()))
    assert torch.equal(now["truncated"], ~marked)
    assert torch.equal(now["done"], ~marked)


def test_games_that_are_not_to_step_are_held():
    env, twin = (SnakeEnv(10, **SMALL, seed=0) for _ in range(2))
    actions = actions_of(10, 40)
    now, twin_now = env.reset(), twin.reset()
    chosen = torch.arange(10) % 2 == 0
    for action in actions[:2]:
        before = now.clone()
        step = env.step(now.set("action", action).set("_step", chosen.clone()))["next"]
        for key in ("observation", "step_count", "terminated", "truncated"):
            assert torch.equal(step[key][~chosen], before[key][~chosen])
        assert (step["reward"][~chosen] == 0).all()
        now = env.step_mdp(before.set("next", step))
    assert (now["step_count"].squeeze(1) == torch.where(chosen, 2, 0)).all()
    for action in actions[2:]:
        _, twin_now = twin.step_and_maybe_reset(twin_now.set("action", action))
        _, now = env.step_and_maybe_reset(now.set("action", action))
    assert_equal(now[~chosen], twin_now[~chosen])


def test_games_that_are_held_stay_ended():
    env = SnakeEnv(10, **SMALL, seed=0)
    now = env.reset()
    for action in actions_of(10, SMALL["max_steps"]):
        now = env.step_mdp(env.step(now.set("action", action)))
        if now["terminated"].any() and not now["done"].all():
            break
    before, running = now.clone(), ~now["done"].squeeze(1)
    now = env.step(now.set("action", torch.full((10,), UP)).set("_step", running))["next"]
    for key in ("terminated", "truncated", "done"):
        assert torch.equal(now[key][~running], before[key][~running])


@pytest.mark.parametrize("kind", ["tokens", "planes", "rgb3"])
def test_what_was_handed_out_never_changes_and_may_be_written_to(kind):
    env, twin = (
        SnakeEnv(12, **SMALL, observation=kind, action_mask=True, episode_return=True, seed=0)
        for _ in range(2)
    )
    actions = actions_of(12, 60)
    now, kept, copies = env.reset(), [], []
    for action in actions:
        step, now = env.step_and_maybe_reset(now.set("action", action))
        for part in (step, now):
            kept.append(part.copy())
            copies.append(part.clone())
    for part, copy in zip(kept, copies, strict=True):
        assert_equal(part, copy)
        # Else a network could not learn from them: a backward refuses tensors of inference mode.
        assert not any(tensor.is_inference() for tensor in part.values(True, True))
    now = twin.reset()
    for action, copy in zip(actions, copies[::2], strict=True):
        step, now = twin.step_and_maybe_reset(now.set("action", action))
        assert_equal(step["next"], copy["next"])
        for tensor in (*step.values(True, True), *now.values(True, True)):
            tensor.zero_()


def test_equal_seeds_give_equal_games_and_others_do_not():
    actions = actions_of(32, 50)
    first, again, other = (play(SnakeEnv(32, seed=s), actions)[0] for s in (5, 5, 6))
    assert_equal(first, again)
    assert not torch.equal(first["observation"], other["observation"])
    assert_equal(play(SnakeEnv(np.int32(32), seed=np.int64(5)), actions)[0], first)
    seeded = SnakeEnv(32)
    seeded.rollout(7)
    seeded.set_seed(5)
    assert_equal(play(seeded, actions)[0], first)


def test_a_reset_does_not_begin_the_random_numbers_again():
    env = SnakeEnv(64, seed=0)
    first, second = env.reset()["observation"], env.reset()["observation"]
    assert not torch.equal(first, second)
    env.set_seed(0)
    assert torch.equal(env.reset()["observation"], first)
    assert torch.equal(env.reset()["observation"], second)


def test_games_draw_apart_and_leave_torchs_generator_alone():
    state = torch.get_rng_state()
    env = SnakeEnv(64, seed=0)
    boards = play(env, torch.full((20, 64), UP))[1]["observation"]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(board.flatten().tolist()) for board in boards}) > 30
    torch.manual_seed(3)
    first = SnakeEnv(64).reset()["observation"]
    torch.manual_seed(3)
    assert torch.equal(SnakeEnv(64).reset()["observation"], first)
    assert not torch.equal(SnakeEnv(64).reset()["observation"], first)


def test_a_collector_and_whole_rollouts_run():
    env = SnakeEnv(6, **SMALL, seed=0)
    policy = TensorDictModule(lambda o: o.flatten(1).sum(1).long() % 4, ["observation"], ["action"])
    collector = Collector(env, policy, frames_per_batch=6 * 50, total_frames=600)
    for batch in collector:
        assert batch.shape == (6, 50)
        done = batch["next", "done"][:, :-1]
        assert done.any()
        begun = batch["step_count"][:, 1:] == 0
        assert torch.equal(begun, done)
        ids = batch["collector", "traj_ids"]
        assert torch.equal((ids[:, 1:] != ids[:, :-1]), done.squeeze(-1))
    collector.shutdown()


def test_evaluation_plays_whole_games_and_keeps_their_ends():
    policy = TensorDictModule(
        lambda o: (o.flatten(1).long() * torch.arange(1, 21)).sum(1) % 4,
        ["observation"], ["action"],
    )  # fmt: skip
    factory = Snake(**SMALL, num_envs=5)
    first, second = (
        torch.stack([ends(e) for e in EvaluationEpisodes(factory, policy, episodes=8, seed=1)])
        for _ in range(2)
    )
    assert first.shape == (1, 8)  # as many games as episodes, whatever training has
    assert first["done"].all()
    assert first["step_count"].unique().numel() > 1
    assert_equal(first, second)
    score, steps = first["score"].float(), first["step_count"].float()
    died = (first["terminated"] & (first["length"] < 20)).float()
    expected = 10 * score - 10 * died - 0.01 * (steps - score - died)
    torch.testing.assert_close(first["episode_return"], expected)


def test_a_restored_environment_goes_on_bit_for_bit(tmp_path):
    factory = Snake(**SMALL, num_envs=20, observation="planes")
    env = make_several(factory, 1, seed=0)
    actions = actions_of(20, 80)
    _, now = play(env, actions[:40])
    torch.save((states_of(factory, env), now.to_dict()), tmp_path / "state.pt")
    expected, _ = play(env, actions[40:], now)

    state, kept = torch.load(tmp_path / "state.pt", weights_only=True)
    for _ in range(2):  # what was loaded stays as it is
        other = factory.make(seed=99)
        other.rollout(9)
        load_states(factory, other, state)
        got, _ = play(other, actions[40:], now.empty().update(kept))
        assert_equal(got, expected)
    third = SnakeEnv(20, **SMALL, observation="planes", episode_return=True)
    third.load_state_dict(env.state_dict())
    assert torch.equal(third.reset()["observation"], env.reset()["observation"])


def test_a_state_of_other_games_is_refused():
    with pytest.raises(ValueError, match=r"'board': \(2, 100\).*has .*'board': \(3, 100\)"):
        SnakeEnv(2).set_extra_state(SnakeEnv(3).get_extra_state())


def test_moving_to_a_device_keeps_the_games():
    env, twin = SnakeEnv(8, **SMALL, seed=0), SnakeEnv(8, **SMALL, seed=0, device="cpu")
    actions = actions_of(8, 20)
    play(env, actions[:5]), play(twin, actions[:5])
    assert env.device is None
    assert env.to("cpu").device == torch.device("cpu")
    check_env_specs(SnakeEnv(2).to("cpu"))
    assert_equal(play(env, actions[5:])[0], play(twin, actions[5:])[0])


@pytest.mark.gpu
def test_a_gpu_plays_the_same_games():
    actions = actions_of(64, 200)
    here, _ = play(SnakeEnv(64, **SMALL, seed=0), actions)
    there, _ = play(SnakeEnv(64, **SMALL, seed=0, device="cuda"), actions.cuda())
    assert_equal(here, there.cpu())


def test_the_factory_names_its_task_and_gives_specs_without_batch_dims():
    factory = Snake(6, 8, num_envs=3)
    assert factory.task == "snake-6x8"
    assert factory.action_repeat == 1
    assert factory.specs.observation.shape == (6, 8)
    assert factory.specs.action.shape == ()
    assert factory.specs.action.n == 4
    env = factory.make(seed=7)
    assert torch.equal(env.reset()["observation"], SnakeEnv(3, 6, 8, seed=7).reset()["observation"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, but is 0"),
        ({"num_envs": 2.0}, "num_envs must be an integer, but is 2.0"),
        ({"observation": "pixels"}, "tokens, planes, rgb3, but is 'pixels'"),
    ],
)
def test_arguments_out_of_bounds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SnakeEnv(**{"num_envs": 2, **arguments})
    with pytest.raises(ValueError, match=message):
        Snake(**arguments)


# -- pictures ----------------------------------------------------------------------------------

BOARD = torch.tensor([[0, 4, 5, 1], [3, 6, 2, 0]], dtype=torch.uint8)


def test_text_shows_every_kind_of_cell():
    assert to_text(BOARD) == "-v<*\n>@^-"
    env = SnakeEnv(2, 4, 4, seed=0)
    boards = env.reset()["observation"]
    assert [env.render("text", game=i) for i in (0, 1)] == [to_text(board) for board in boards]


def test_rgb_shows_every_kind_of_cell():
    picture = to_rgb(BOARD, cell=10)
    assert picture.shape == (20, 40, 3)
    assert picture.dtype == torch.uint8
    centres = [tuple(color) for color in picture[5::10, 5::10].reshape(8, 3).tolist()]
    empty, body, food, head = centres[0], centres[1], centres[3], centres[5]
    assert len({empty, body, food, head}) == 4
    assert centres == [empty, body, body, food, body, head, body, empty]
    assert torch.equal(to_rgb(torch.stack([BOARD, BOARD]), cell=10)[1], picture)
    env = SnakeEnv(2, 4, 4, seed=0, observation="planes")
    env.reset()
    assert torch.equal(env.render("rgb", game=1), to_rgb(env.boards()[1]))
    with pytest.raises(ValueError, match="mode must be one of text, rgb, but is 'human'"):
        env.render("human")
    with pytest.raises(ValueError, match="cell must be at least 1, but is 0"):
        to_rgb(BOARD, cell=0)


@pytest.mark.parametrize(
    ("moves", "frames"), [([UP, LEFT, DOWN, LEFT], 5), ([RIGHT] * 3, 3)], ids=["truncated", "died"]
)
def test_a_film_shows_the_last_board_unless_the_snake_died(moves, frames):
    factory = Snake(6, 6, max_steps=4)
    steps, _ = play(factory.make(seed=0), torch.tensor(moves).unsqueeze(1))
    assert steps["next", "terminated"][0, -1] == (frames == 3)
    assert Image.open(io.BytesIO(factory.film(steps[0]))).n_frames == frames
    assert Snake(6, 6, observation="planes").film(steps[0]) is None


def test_a_gif_holds_the_games_boards():
    steps, _ = play(SnakeEnv(1, 6, 6, seed=0), torch.tensor([[UP], [LEFT], [DOWN]]))
    boards = steps["next", "observation"][0]
    picture = Image.open(io.BytesIO(to_gif(boards, cell=8, milliseconds=50)))
    assert picture.format == "GIF"
    assert picture.n_frames == 3
    assert picture.info["loop"] == 0
    durations = []
    for number, frame in enumerate(to_rgb(boards, cell=8)):
        picture.seek(number)
        durations.append(picture.info["duration"])
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), frame.numpy())
    assert durations == [50, 50, 1000]
    with pytest.raises(ValueError, match="at least one board"):
        to_gif(boards[:0])
    with pytest.raises(ValueError, match="milliseconds must be at least 20, but is 5"):
        to_gif(boards, milliseconds=5)


# -- Gymnasium ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{}, {"height": 2, "width": 2, "initial_length": 1}, {"observation": "planes"},
     {"observation": "rgb3", "action_mask": True}],
)  # fmt: skip
def test_gymnasiums_checker_passes(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("muon_rl/Snake-v0", render_mode="ansi", **arguments).unwrapped)


@pytest.mark.parametrize("render_mode", ["ansi", "rgb_array", None])
def test_the_gymnasium_game_is_a_game_of_the_batch(render_mode):
    game = gymnasium.make("muon_rl/Snake-v0", render_mode=render_mode, **SMALL, action_mask=True)
    env = SnakeEnv(1, **SMALL, action_mask=True, seed=11)
    now = env.reset()
    observation, info = game.reset(seed=11)
    ended = 0
    for action in actions_of(1, 60, seed=1):
        np.testing.assert_array_equal(observation, now["observation"][0])
        assert info["score"] == now["score"].item()
        assert info["length"] == now["length"].item()
        assert info["action_mask"].tolist() == now["action_mask"][0].int().tolist()
        assert info["action_mask"][game.action_space.sample(info["action_mask"])]
        if render_mode == "ansi":
            assert game.render() == env.render("text")
        elif render_mode == "rgb_array":
            np.testing.assert_array_equal(game.render(), env.render("rgb"))
        observation, reward, terminated, truncated, info = game.step(action.item())
        step, now = env.step_and_maybe_reset(now.set("action", action))
        assert reward == step["next", "reward"].item()
        assert (terminated, truncated) == tuple(
            step["next", key].item() for key in ("terminated", "truncated")
        )
        np.testing.assert_array_equal(observation, step["next", "observation"][0])
        if terminated or truncated:
            observation, info = game.reset()
            ended += 1
    assert ended > 2


def test_the_gymnasium_game_refuses_what_it_does_not_know():
    game = gymnasium.make("muon_rl/Snake-v0").unwrapped
    game.reset(seed=0)
    with pytest.raises(ValueError, match="action must be 0, 1, 2 or 3, but is 4"):
        game.step(4)
    with pytest.raises(ValueError, match="None, not 'human'"):
        type(game)(render_mode="human")
