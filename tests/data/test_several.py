"""Several environments and returns of several steps, on episodes that end both ways."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torchrl
from data_module import make
from muon_rl.recipes.sac import SACData
from tensordict import TensorDict
from walk import register

from muon_rl.envs import DMControl, Gym, Snake, make_several

GAMMA = 0.99


def collected(data) -> tuple[TensorDict, TensorDict]:
    """Run a data module to its end, and return all raw steps, per environment, and the buffer."""
    rollouts = []
    collect = data.collect

    def recorded():
        rollouts.append(collect().clone())
        return rollouts[-1]

    data.collect = recorded
    batches = [batch.clone() for batch in data.train_dataloader()]
    assert batches
    steps = torch.cat(rollouts, -1)
    return steps if steps.ndim == 2 else steps[None], data.buffer[:]


def sums(steps: TensorDict, env: int, start: int, n_steps: int) -> tuple[float, int]:
    """Return the discounted sum of at most n rewards from a step on, and how many it has."""
    total = 0.0
    for k in range(n_steps):
        step = steps[env, start + k]["next"]
        total += GAMMA**k * step["reward"].item()
        if step["done"].item():
            break
    return total, k + 1


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps_per_collection", [1, 7])
@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_transitions_sum_n_rewards_up_to_an_episodes_end(num_envs, steps_per_collection, n_steps):
    data = make(
        Gym(register()),
        total_frames=300,
        init_random_frames=150,
        num_envs=num_envs,
        steps_per_collection=steps_per_collection,
        n_steps=n_steps,
    )
    steps, stored = collected(data)
    ends = steps["next", "done"].sum(), steps["next", "terminated"].sum()
    assert ends[0] > ends[1] > 3  # both kinds
    waiting = n_steps * num_envs if n_steps > 1 else 0
    assert len(stored) == data.frames - waiting == steps.numel() - waiting
    bootstrapped = 0
    for row in stored:
        (place,) = (steps["observation"] == row["observation"]).all(-1).nonzero().tolist()
        total, number = sums(steps, *place, n_steps)
        last = steps[place[0], place[1] + number - 1]["next"]
        assert row["next", "reward"].item() == pytest.approx(total, rel=1e-5)
        assert torch.equal(row["next", "observation"], last["observation"])
        assert torch.equal(row["next", "terminated"], last["terminated"])
        # What TorchRL's estimator makes of it.
        target = data.trainer.lightning_module.loss.value_estimator.value_estimate(
            row[None], next_value=torch.full((1, 1), 100.0)
        )
        expected = total + GAMMA**number * 100.0 * (not last["terminated"].item())
        assert target.item() == pytest.approx(expected, rel=1e-5)
        bootstrapped += number < n_steps and not last["terminated"].item()
    assert bootstrapped > 0 or n_steps == 1  # cut short by truncation


@pytest.mark.parametrize("options", [{}, {"n_steps": 3}], ids=["one-step", "three-step"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_resumed_stream_goes_on_in_the_middle_of_every_episode(num_envs, options):
    env = DMControl("cartpole", "swingup", action_repeat=2)
    options = {**options, "num_envs": num_envs, "total_frames": 300}
    torch.manual_seed(0)
    data = make(env, **options)
    stream = iter(data.train_dataloader())
    for _ in range(25):
        next(stream)
    state = data.state_dict()
    expected = [batch.clone() for batch in stream]

    torch.manual_seed(1)
    resumed = make(env, **options)
    resumed.trainer.lightning_module.load_state_dict(data.trainer.lightning_module.state_dict())
    resumed.load_state_dict(state)
    for batch, other in zip(resumed.train_dataloader(), expected, strict=True):
        assert (batch == other).all()


def test_environments_start_from_seeds_of_their_own():
    data = make(DMControl("cartpole", "swingup", action_repeat=2), num_envs=3)
    first = data.collect()["observation"][:, 0]
    assert len({tuple(row.tolist()) for row in first}) == 3


def test_collections_are_whole_steps_of_all_environments():
    data = make(Gym(register()), num_envs=4, steps_per_collection=10)
    assert data.collect().shape == (4, 3)
    assert data.frames == 12


def test_another_number_of_environments_begins_new_episodes():
    data = make(Gym(register()), num_envs=2, n_steps=3)
    next(iter(data.train_dataloader()))
    resumed = make(Gym(register()), num_envs=3, n_steps=3)
    resumed.load_state_dict(data.state_dict())
    assert len(resumed.buffer) == len(data.buffer)
    assert resumed.multi_step._buffer is None  # nothing of the old episodes is summed on
    assert resumed.collect()["step_count"].max() == 0


def test_environments_that_move_into_processes_begin_new_episodes():
    """What a process of its own runs cannot be set from here."""
    env = DMControl("cartpole", "swingup", action_repeat=2)
    data = make(env, num_envs=2, n_steps=2)
    next(iter(data.train_dataloader()))
    resumed = make(env, num_envs=2, n_steps=2, env_processes=True)
    try:
        resumed.load_state_dict(data.state_dict())
        assert len(resumed.buffer) == len(data.buffer)
        assert resumed.collect()["step_count"].max() == 0
    finally:
        resumed.teardown("fit")


def test_transitions_of_another_kind_are_refused():
    data = make(Gym(register()), n_steps=3)
    next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match=r"another data\.n_steps than 1"):
        make(Gym(register())).load_state_dict(data.state_dict())


def test_processes_of_their_own_leave_ctrl_c_to_the_trainer():
    data = make(DMControl("cartpole", "swingup", 2), num_envs=2, env_processes=True, n_steps=2)
    try:
        stream = iter(data.train_dataloader())
        next(stream)
        workers = data.collector.env._workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
        rest = sum(1 for _ in stream)
        assert rest == data.total_updates - 1
        assert all(worker.is_alive() for worker in workers)
        assert data.state_dict()["env"] is None  # a resumed run begins new episodes
    finally:
        data.teardown("fit")
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("processes", [False, True])
def test_torchs_threads_stay_what_they_were(processes, monkeypatch):
    monkeypatch.setattr(torchrl, "_THREAD_POOL_INIT", 16)  # up to which TorchRL would raise them
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    env = make_several(DMControl("cartpole", "swingup", 2), 3, processes=processes)
    try:
        env.reset()
        running = torch.get_num_threads()
    finally:
        env.close()
        after = torch.get_num_threads()
        torch.set_num_threads(before)
    assert (running, after) == (4, 4)


@pytest.mark.parametrize("name", ["num_envs", "n_steps"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"data\.{name} must be at least 1, but is 0"):
        make(Gym(register()), **{name: 0})


def test_a_warm_up_that_waits_for_its_rewards_is_counted():
    with pytest.raises(ValueError, match=r"gives only 8 transitions .* data\.n_steps=5"):
        make(Gym(register()), init_random_frames=28, batch_size=16, num_envs=4, n_steps=5)


def test_a_collection_is_rounded_up_to_whole_steps_of_games_that_step_together():
    data = SACData(Snake(6, 6, num_envs=4), total_frames=20_000, steps_per_collection=10)
    assert data.steps_per_collection == 12
