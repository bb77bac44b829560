"""Where the time of PPO on Snake goes: milliseconds of the processor a rollout, part by part.

Runs ``muon-rl fit --config ppo_snake_adam_small`` with every part timed from outside, on one
thread, and prints means over the rollouts after the first. An indented part belongs to the one
above it. ``ppo_jax.py parts`` prints the same of the jitted program.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from muon_rl.recipes.ppo import PPO, PPOData, TrunkOncePPOLoss
from ppo_throughput import EPOCHS, MINIBATCHES, STEPS
from torchrl.objectives import ClipPPOLoss

from muon_rl.cli import main as muon_rl
from muon_rl.envs import SnakeEnv
from muon_rl.modules import GridActorCritic
from muon_rl.optim import Muon, muon

# label, where it lives, its name there
PARTS: list[tuple[str, Any, str]] = [
    ("all of it", _TrainingEpochLoop, "advance"),
    ("  collect", PPOData, "collect"),
    ("    policy", GridActorCritic, "forward"),
    ("    games", SnakeEnv, "step_and_maybe_reset"),
    ("  advantages", PPOData, "_prepared"),
    ("  updates: forward", TrunkOncePPOLoss, "forward"),
    ("    heads and loss", ClipPPOLoss, "forward"),
    ("  updates: backward", PPO, "backward"),
    ("  updates: clipping", PPO, "configure_gradient_clipping"),
    ("  updates: finiteness", Muon, "_gradients_are_finite"),
    ("  updates: Muon", muon, "step_matrices"),
    ("  updates: Adam", muon, "step_adam"),
    ("  tracking", PPO, "track"),
]


class Times:
    """Seconds of each part within the training loop, without those of the first rollout."""

    def __init__(self) -> None:
        self.of: dict[str, list[float]] = defaultdict(list)
        self._updates = 0
        self._training = False

    def timed(self, label: str, function: Callable) -> Callable:
        """Return a function that takes down its seconds, unless it evaluates."""
        whole = label == PARTS[0][0]

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._training |= whole
            if not self._training:
                return function(*args, **kwargs)
            begin = time.process_time()
            result = function(*args, **kwargs)
            self.of[label].append(time.process_time() - begin)
            if whole:
                self._training = False
                self._updates += 1
                if self._updates == EPOCHS * MINIBATCHES:
                    self.of.clear()
            return result

        return wrapper


def main() -> None:
    """Run the profile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rollouts", type=int, default=10, help="that count (default 10)")
    parser.add_argument("--case", default="adam", choices=("adam", "muon"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = Times()
    for label, owner, name in PARTS:
        setattr(owner, name, times.timed(label, getattr(owner, name)))
    frames = STEPS * (1 + options.rollouts)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        muon_rl(
            ["fit", f"--config=ppo_snake_{options.case}_small", f"--data.total_frames={frames}",
             f"--data.eval_every={frames}"]
        )  # fmt: skip
        os.chdir("/")
    print(f"\n{'part':24} {'ms/rollout':>10} {'calls':>6}")
    for label, _, _ in PARTS:
        counted = times.of[label]
        share = 1e3 * sum(counted) / options.rollouts
        print(f"{label:24} {share:10.1f} {len(counted) / options.rollouts:6.1f}")


if __name__ == "__main__":
    main()
