"""Frames per second of PPO on Snake: the whole ``muon-rl fit`` against a stock TorchRL program.

Both train the transformer of ``ppo_snake_adam_small`` on 128 boards of 6 x 6, rollouts of 4096
steps, 3 epochs of 8 minibatches, gradients clipped at 0.5. Ours is the command as it is, with
MLflow, checkpoints' machinery and metrics on, once with Adam and once with Muon. The stock program
is put together as TorchRL's own PPO examples are: the collector runs the actor, ``GAE`` runs the
critic on states and next states, ``ClipPPOLoss`` runs the trunk for the actor and again for the
critic, ``torch.optim.Adam`` steps. It takes its advantages once a rollout (the examples: once an
epoch) and tracks nothing. Where an interpreter with JAX is named, ``ppo_jax.py`` is one more: all
of a rollout and its updates in one jitted function.

Every program runs in a process of its own, held to as many cores as it has threads, and they take
turns. What is timed lies between the end of the first rollout's updates (JAX compiles before) and
the end of the last one's; no evaluation is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from machine import REPOSITORY, append_row, commit_of, processor

RESULTS = REPOSITORY / "benchmarks/results/ppo_throughput.csv"
PROGRAMS = ("ours-adam", "ours-muon", "stock")
GAMES, STEPS, EPOCHS, MINIBATCHES = 128, 4096, 3, 8
SETUP = """\
the peer, where it is asked for:

  python -m venv JAX && JAX/bin/pip install jumanji==1.1.2 jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
      --jax JAX/bin/python
"""

Mark = tuple[int, float, float]  # frames, seconds by the clock, seconds of the processor


def mark(frames: int) -> Mark:
    """Return the present."""
    return frames, time.perf_counter(), time.process_time()


def ours(case: str, rollouts: int) -> list[Mark]:
    """Run the command in this process, and return a mark for each rollout."""
    from muon_rl.recipes.ppo import PPO

    from muon_rl.cli import main

    marks: list[Mark] = []
    track = PPO.track

    def marked(agent: PPO, metrics: dict[str, float]) -> None:
        track(agent, metrics)
        if "train/entropy" in metrics:
            marks.append(mark(agent.frames))

    PPO.track = marked
    main(
        ["fit", f"--config=ppo_snake_{case}_small", f"--data.total_frames={rollouts * STEPS}",
         f"--data.eval_every={rollouts * STEPS}"]
    )  # fmt: skip
    return marks


def stock(rollouts: int) -> list[Mark]:
    """Train with TorchRL's parts alone, and return a mark for each rollout."""
    import torch
    from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictSequential
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    from muon_rl.envs import Snake
    from muon_rl.modules import TransformerActorCritic

    torch.manual_seed(0)
    rewards = {"food_reward": 1.0, "death_reward": -1.0, "step_reward": -0.001}
    env = Snake(6, 6, num_envs=GAMES, **rewards)
    trunk, value, logits, sample = TransformerActorCritic(env.specs, head_hidden=[64]).module
    actor = ProbabilisticTensorDictSequential(trunk, logits, sample)
    critic = TensorDictSequential(trunk, value)
    collector = Collector(env.make(seed=0), actor, frames_per_batch=STEPS, total_frames=-1)
    advantages = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(
        actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, critic_coeff=0.5,
        normalize_advantage=True,
    )  # fmt: skip
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(STEPS),
        sampler=SamplerWithoutReplacement(),
        batch_size=STEPS // MINIBATCHES,
    )
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    marks: list[Mark] = []
    for number, rollout in enumerate(collector, start=1):
        with torch.no_grad():
            advantages(rollout)
        for _ in range(EPOCHS):
            buffer.extend(rollout.reshape(-1))
            for batch in buffer:
                terms = loss(batch)
                total = terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]
                total.backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        marks.append(mark(number * STEPS))
        if number == rollouts:
            break
    collector.shutdown()
    return marks


def measure(name: str, rollouts: str) -> None:
    """Run a program in this process, and write what it took as the last line."""
    marks = stock(int(rollouts)) if name == "stock" else ours(name[5:], int(rollouts))
    frames, wall, cpu = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
    print(json.dumps({"frames": frames, "wall": wall, "cpu": cpu}))


def run(name: str, rollouts: int, threads: int, jax: Path | None) -> dict[str, float]:
    """Run a program in a process and a folder of its own, on as many cores as threads."""
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), "measure", name, str(rollouts)]
    if name == "jax":
        # XLA has as many threads as the process has cores; with one, let it make no pool at all.
        alone = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": alone if threads == 1 else ""}
        program = REPOSITORY / "benchmarks/ppo_jax.py"
        command = [str(jax), str(program), "measure", str(rollouts)]
    environment = os.environ | variables
    environment.pop("MLFLOW_TRACKING_URI", None)
    if name == "jax":
        environment.pop("PYTHONPATH", None)
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    if done.returncode:
        raise SystemExit(f"{done.stderr[-3000:]}\n\n{name} ended without a result")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run the rounds, print rates and ratios, and add the rows to the results."""
    layout = argparse.RawDescriptionHelpFormatter
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(description=summary, epilog=SETUP, formatter_class=layout)
    parser.add_argument("--jax", type=Path, help="an interpreter that has jax, jumanji and optax")
    parser.add_argument(
        "--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS, help="beside JAX's; all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of all programs (default 5)")
    parser.add_argument("--rollouts", type=int, default=8, help="of 4096 frames (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to add rows to")
    options = parser.parse_args()
    turns = list(options.programs)
    if options.jax:
        options.jax = options.jax.absolute()
        turns.append("jax")
    else:
        print("jax: not compared, no --jax")
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for number in range(1, options.rounds + 1):
        for name in turns:
            measured = run(name, options.rollouts, options.threads, options.jax)
            rate = measured["frames"] / measured["wall"], measured["frames"] / measured["cpu"]
            rates[name].append(rate)
            append_row(options.output, {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "commit": commit_of(), "cpu": processor(), "program": name,
                "threads": options.threads, "round": number,
                "frames_per_second": round(rate[0]), "frames_per_cpu_second": round(rate[1]),
            })  # fmt: skip
        turns.append(turns.pop(0))
    peers = [name for name in ("stock", "jax") if name in rates]
    titles = "".join(f"{'/ ' + peer:>16}" for peer in peers)
    print(f"frames/s, medians: wall / CPU{titles}")
    for name, own in rates.items():
        wall, cpu = (median(rate[kind] for rate in own) for kind in (0, 1))
        line = f"{name:10} {wall:8.0f} / {cpu:7.0f}"
        for peer in peers:
            ratios = (
                median(mine[kind] / its[kind] for mine, its in zip(own, rates[peer], strict=True))
                for kind in (0, 1)
            )
            line += f"{' / '.join(f'{ratio:.2f}' for ratio in ratios):>16}"
        print(line)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main()
