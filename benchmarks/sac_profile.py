"""Where the time of a SAC run goes: milliseconds per update of each part of the loop.

Runs ``muon-rl fit`` on cheetah-run with every part timed from outside, on one thread, and prints
the median and mean over the updates after the first 500. Parts that contain others say so.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections import defaultdict
from statistics import mean, median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives import SACLoss, SoftUpdate

from muon_rl.agent import Agent
from muon_rl.cli import main as muon_rl
from muon_rl.data import AgentData
from muon_rl.optim import Muon

# label, class, method; an indented label is a part of the one above it
PARTS = [
    ("one update, all of it", _TrainingEpochLoop, "advance"),
    ("  collect (environment, policy)", AgentData, "collect"),
    ("  buffer: extend", TensorDictReplayBuffer, "extend"),
    ("  buffer: sample", TensorDictReplayBuffer, "sample"),
    ("  optimizer_step, with what follows", Agent, "optimizer_step"),
    ("    loss: forward", SACLoss, "forward"),
    ("    backward", Agent, "backward"),
    ("    finiteness of the gradients", Muon, "_gradients_are_finite"),
    ("    Adam", Muon, "_adam"),
    ("    Muon", Muon, "_muon"),
    ("    target networks", SoftUpdate, "step"),
]
FIRST = 500  # updates left out


def timed(times: dict[str, list[float]], label: str, function):
    """Return a function that adds its seconds to a list; the first updates clear all lists."""

    counting: list[bool] = []

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[label].append(time.perf_counter() - begin)
            if label == PARTS[0][0] and len(times[label]) == FIRST and not counting:
                times.clear()
                counting.append(True)

    return wrapper


def main() -> None:
    """Run the profile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=1500, help="updates that count")
    parser.add_argument("--case", default="adam", help="optimizer of actor and critic")
    parser.add_argument("--precision", default="highest", help="matmul precision")
    options = parser.parse_args()
    torch.set_num_threads(1)

    times: dict[str, list[float]] = defaultdict(list)
    for label, owner, method in PARTS:
        setattr(owner, method, timed(times, label, getattr(owner, method)))
    updates = options.updates + FIRST
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        muon_rl([
            "fit", "--config=sac_cheetah", "--env.action_repeat=1",
            f"--model.optimizer.actor.case={options.case}",
            f"--model.optimizer.critic.case={options.case}", "--data.init_random_frames=1000",
            f"--data.total_frames={1000 + updates}", "--data.eval_every=1000000",
            "--data.eval_episodes=1", f"--matmul_precision={options.precision}",
        ])  # fmt: skip
    print(f"\n{'part':40} {'ms/update':>10} {'calls/update':>13} {'median ms':>10}")
    for label, _, _ in PARTS:
        if counted := times[label]:
            calls = len(counted) / options.updates
            print(
                f"{label:40} {1e3 * mean(counted) * calls:10.2f} {calls:13.2f} "
                f"{1e3 * median(counted):10.2f}"
            )


if __name__ == "__main__":
    main()
