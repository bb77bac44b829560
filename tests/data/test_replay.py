"""The replay stream: how many updates when, evaluations by frames, bad numbers."""

from __future__ import annotations

import pytest
import torch
from data_module import make
from tensordict import TensorDict

from muon_rl.data import ends
from muon_rl.envs import DMControl

ENV = DMControl("cartpole", "swingup", action_repeat=2)


@pytest.mark.parametrize(
    ("updates_per_step", "steps_per_collection", "updates"),
    [(1.0, 1, 60), (2.0, 1, 120), (0.5, 1, 30), (1.0, 20, 60), (4.0, 20, 240)],
)
def test_updates_follow_the_agent_steps_after_the_warm_up(
    updates_per_step, steps_per_collection, updates
):
    data = make(ENV, updates_per_step=updates_per_step, steps_per_collection=steps_per_collection)
    stream = data.train_dataloader()
    assert len(stream) == updates
    seen = [(batch.shape, data.frames) for batch in stream]
    assert len(seen) == updates
    assert {shape for shape, _ in seen} == {torch.Size([16])}
    assert data.frames == 200
    for index, (_, frames) in enumerate(seen):
        # Update number index + 1 comes with the first collection that allows it.
        steps = -(-(index + 1) / updates_per_step // steps_per_collection) * steps_per_collection
        assert frames == 80 + 2 * int(steps)


def test_the_warm_up_is_uniform_and_what_follows_is_the_policy():
    data = make(ENV, total_frames=2000, init_random_frames=1600, batch_size=16)
    stream = iter(data.train_dataloader())
    next(stream)
    actions = data.buffer[:]["action"][:800]
    # A uniform action has a standard deviation of 1/sqrt(3); the policy's begins near tanh(N(0,1)).
    assert actions.std().item() == pytest.approx(3**-0.5, abs=0.03)
    assert actions.abs().max() <= 1


def test_the_buffer_holds_what_the_loss_reads_and_no_more():
    data = make(ENV)
    next(iter(data.train_dataloader()))
    keys = set(data.buffer[:].keys(include_nested=True, leaves_only=True))
    assert keys - {"index"} == {
        "observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done"),
        ("next", "terminated"),
    }  # fmt: skip


def test_evaluations_are_due_as_frames_pass_and_at_the_end():
    data = make(ENV, total_frames=230, init_random_frames=80, eval_every=50)
    due = []
    for _ in data.train_dataloader():
        if data.evaluation_due:
            due.append(data.frames)
            data.evaluated_frames = data.frames
    assert due == [100, 150, 200, 230]


def test_no_evaluation_between_the_updates_of_one_step():
    data = make(ENV, eval_every=100, updates_per_step=3.0)
    due = [data.updates for _ in data.train_dataloader() if data.evaluation_due]
    assert due[0] == 30  # all three updates of the step that reaches frame 100
    assert data.frames == 200


def test_a_resumed_stream_serves_what_is_left_from_the_same_numbers():
    torch.manual_seed(0)
    data = make(ENV)
    stream = iter(data.train_dataloader())
    for _ in range(25):
        next(stream)
    state = data.state_dict()
    expected = [batch.clone() for batch in stream]

    torch.manual_seed(1)
    resumed = make(ENV)
    resumed.trainer.lightning_module.load_state_dict(data.trainer.lightning_module.state_dict())
    resumed.load_state_dict(state)
    rest = resumed.train_dataloader()
    assert len(rest) == 35
    for batch, other in zip(rest, expected, strict=True):
        assert (batch == other).all()


def test_a_full_buffer_is_restored_in_its_order():
    data = make(ENV, buffer_size=30)
    for _ in data.train_dataloader():
        pass
    other = make(ENV, buffer_size=30)
    other.load_state_dict(data.state_dict())
    assert (other.buffer[:] == data.buffer[:]).all()
    assert other.buffer.writer.state_dict() == data.buffer.writer.state_dict()


@pytest.mark.parametrize("frames", [170, 200])
def test_a_wrapped_buffer_moves_into_a_larger_one_oldest_first(frames):
    data = make(ENV, buffer_size=30, total_frames=frames)
    for _ in data.train_dataloader():
        pass
    larger = make(ENV, buffer_size=60, total_frames=frames)
    larger.load_state_dict(data.state_dict())
    cursor = data.buffer.writer.state_dict()["_cursor"] % 30
    order = torch.arange(30).roll(-cursor)
    assert torch.equal(larger.buffer[:]["observation"], data.buffer[:]["observation"][order])
    assert larger.buffer.writer.state_dict()["_cursor"] == 30


def test_seeds_of_the_environment_follow_the_global_seed():
    first = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        first.append(make(ENV).collect()["observation"])
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_the_metrics_of_an_episode_are_given_once():
    data = make(ENV, total_frames=1200, init_random_frames=1100)
    for _ in data.train_dataloader():
        pass
    assert data.take_episode_metrics()["train/episode_length"] == 1000
    assert data.take_episode_metrics() == {}


def test_evaluation_leaves_the_random_numbers_of_training_alone():
    data = make(ENV, eval_episodes=1)
    before = torch.get_rng_state()
    (episodes,) = data.val_dataloader()
    first = [episode["next", "episode_return"][-1] for episode in episodes]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again = [episode["next", "episode_return"][-1] for episode in episodes]
    assert first == again


def test_the_end_of_each_game_is_its_first_done_step():
    done = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 1, 0]], dtype=torch.bool)
    score = torch.arange(15.0).reshape(3, 5, 1)
    games = TensorDict({"next": {"done": done[..., None], "score": score}}, [3, 5])
    assert ends(games)["score"].flatten().tolist() == [2, 9, 10]
    assert ends(games[1])["score"].tolist() == [9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 41}, r"batch_size is 41, .* only 40 transitions .*\(action repeat 2\)"),
        ({"batch_size": 41, "init_random_frames": 0}, "gives only 0 transitions"),
        ({"buffer_size": 8}, "buffer_size is 8"),
        ({"total_frames": 80}, "init_random_frames=80 leaves nothing of data.total_frames=80"),
        ({"total_frames": 0}, "data.total_frames must be at least 1, but is 0"),
        ({"eval_every": 0}, "data.eval_every must be at least 1"),
        ({"eval_seed": -1}, r"data.eval_seed must be from 0 to .*, but is -1"),
        ({"eval_seed": 2**32 - 1, "eval_episodes": 2}, "data.eval_seed must be from 0"),
        ({"updates_per_step": 0}, "data.updates_per_step must be above 0"),
        ({"updates_per_step": 0.001}, "leave no update"),
        ({"updates_per_step": float("nan")}, "data.updates_per_step must be above 0"),
        ({"steps_per_collection": 0}, "data.steps_per_collection must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(ENV, **options)
