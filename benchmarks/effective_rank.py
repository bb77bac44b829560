"""What watching the critics' effective rank costs: a measurement's share of the training time.

A SAC agent on cheetah-run (2x256, batch 256, 2 critics) makes updates on a full replay buffer and,
at the callback's defaults, one measurement on 512 transitions every 1000 updates. Both are timed in
one process, in turns: a measurement, then a few updates, so a busy machine slows both. The share is

    median seconds of a measurement / (1000 x median seconds of an update)

of loss, backward, optimizer step and target networks alone, without environment, Lightning and
tracking: of a whole run it is smaller. It must stay below 2%. The default case, adam, has the
cheapest update, so the largest share.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import commit_of, processor
from muon_rl.recipes.sac import SAC, SACOptimizers
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from muon_rl.callbacks import EffectiveRank
from muon_rl.callbacks.effective_rank import find_critic
from muon_rl.diagnostics import measures
from muon_rl.envs import DMControl
from muon_rl.optim import OptimizerConfig

RESULTS = Path(__file__).parent / "results" / "effective_rank.csv"
ENV = DMControl("cheetah", "run", action_repeat=2)
BATCH, TRANSITIONS = 256, 100_000
BOUND = 0.02


def filled_buffer() -> ReplayBuffer:
    """Return a buffer of Gaussian transitions with cheetah-run's shapes."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(TRANSITIONS), batch_size=BATCH)
    observation = torch.randn(TRANSITIONS, ENV.specs.observation.shape[-1])
    shape = [TRANSITIONS, 1]
    following = {
        "observation": torch.randn_like(observation),
        "reward": torch.rand(shape),
        "done": torch.zeros(shape, dtype=torch.bool),
        "terminated": torch.zeros(shape, dtype=torch.bool),
    }
    action = 2 * torch.rand(TRANSITIONS, ENV.specs.action.shape[-1]) - 1
    transitions = {"observation": observation, "action": action, "next": following}
    buffer.extend(TensorDict(transitions, [TRANSITIONS]).auto_batch_size_(1))
    return buffer


def update_of(agent: SAC, buffer: ReplayBuffer) -> Callable[[], None]:
    """Return what makes one update."""
    optimizer = agent.build_optimizer()

    def update() -> None:
        output = agent.loss(buffer.sample())
        optimizer.zero_grad()
        sum(term for name, term in output.items() if name.startswith("loss_")).backward()
        optimizer.step()
        for target in agent.targets:
            target.step()

    return update


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return the wall-clock and the CPU time of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Run the benchmark, print the share and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25, help="measurements (default 25)")
    parser.add_argument("--updates", type=int, default=10, help="updates a round (default 10)")
    parser.add_argument("--case", default="adam", help="optimizer of actor and critic")
    parser.add_argument("--dry", action="store_true", help="leave the results file as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    config = OptimizerConfig(case=options.case)
    agent, buffer = SAC(ENV, optimizer=SACOptimizers(config, config)), filled_buffer()
    update, callback = update_of(agent, buffer), EffectiveRank(enabled=True)
    with torch.no_grad():
        batch = buffer[: callback.max_samples]
        features = torch.stack(list(find_critic(agent.loss).features(batch)))
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "update": (update, options.updates),
        "measurement": (lambda: callback.measure(agent.loss, buffer), 1),
        "singular values": (lambda: measures(features), 1),
        "finding the critic": (lambda: find_critic(agent.loss), 1),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(options.rounds + 2):
        for name, (call, repeats) in calls.items():
            taken = [seconds(call) for _ in range(repeats)]
            if number >= 2:  # the first ones warm up
                times[name] += taken

    row = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "case": options.case,
           "every_n_updates": callback.every_n_updates, "max_samples": callback.max_samples,
           "rounds": options.rounds}  # fmt: skip
    print(f"{'':20} {'wall ms':>9} {'CPU ms':>9}   {' x '.join(map(str, features.shape))} features")
    for name, pairs in times.items():
        walls, cpus = zip(*pairs, strict=True)
        print(f"{name:20} {1e3 * median(walls):9.3f} {1e3 * median(cpus):9.3f}")
        row[f"{name.replace(' ', '_')}_wall_ms"] = f"{1e3 * median(walls):.4f}"
        row[f"{name.replace(' ', '_')}_cpu_ms"] = f"{1e3 * median(cpus):.4f}"
    shares = []
    for index, clock in enumerate(("wall", "cpu")):
        measurement, one = (median(p[index] for p in times[n]) for n in ("measurement", "update"))
        shares.append(measurement / (callback.every_n_updates * one))
        row[f"share_{clock}"] = f"{shares[-1]:.6f}"
    print(f"share of the training time: {shares[0]:.3%} (CPU {shares[1]:.3%}), bound {BOUND:.0%}")
    row |= {"commit": commit_of(), "cpu": processor(), "torch": torch.__version__}
    if not options.dry:
        write(row)
    if max(shares) >= BOUND:
        sys.exit("The measurement costs too much.")


def write(row: dict) -> None:
    """Add a row to the results file."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
