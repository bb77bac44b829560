"""Training steps per second of SAC: this package, CleanRL and TorchRL's own script.

Every program trains SAC on dm_control's cheetah-run on one CPU thread (two hidden layers of 256
units, batches of 256, one update per environment step, action repeat 1), each in its own virtual
environment and from its own unedited source. A launcher counts the calls of dm_control's
``Environment.step`` in the same way inside every process and reads the clocks at two of them, the
first 1000 steps after the first update: imports, random steps and the first updates are left out,
and no program's log is relied on. The programs take turns, a different one first in each round,
so that a slow spell of the machine hits all of them. CPU time per step stands beside the
wall-clock rate: they part where the machine was busy.

The window is a multiple of 1000 steps because TorchRL's script collects 1000 steps and then makes
1000 updates; between two such boundaries every program has made equally many of both.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from machine import REPOSITORY, append_row, commit_of, processor

RESULTS = REPOSITORY / "benchmarks/results/sac_throughput.csv"
PACKAGES = ("torch", "numpy", "mujoco", "dm_control")  # the same versions everywhere
BLOCK = 1000  # steps that TorchRL's script collects before it updates
ENDLESS = 1_000_000  # steps to ask for: every program is stopped at the end of its window
TIME_LIMIT = 1800.0  # seconds for one run
CLEANRL_COMMIT = "fe8d8a03c41a7ef5b523e2e354bd01c363e786bb"
TORCHRL_COMMIT = "6e18e35b2c68be1a56afebfb0676d217925114cd"
SETUP = f"""\
layout of --peer-dir DIR (torch goes first, as a CPU build; common packages are of one version):

  for peer in cleanrl torchrl; do
      python -m venv DIR/$peer/venv
      DIR/$peer/venv/bin/pip install torch==2.13.0 numpy==2.4.6
      DIR/$peer/venv/bin/pip install mujoco==3.17.0 dm_control==1.0.50
  done
  git clone https://github.com/vwxyzjn/cleanrl DIR/cleanrl/source
  git -C DIR/cleanrl/source checkout {CLEANRL_COMMIT}
  DIR/cleanrl/venv/bin/pip install gymnasium==0.29.1 shimmy==1.3.0 'imageio<3' h5py \\
      tyro==1.0.17 tensorboard==2.21.0
  git clone https://github.com/pytorch/rl DIR/torchrl/source
  git -C DIR/torchrl/source checkout {TORCHRL_COMMIT}
  DIR/torchrl/venv/bin/pip install torchrl==0.14.1 tensordict==0.14.3 'hydra-core<1.4' tqdm
  (this package is measured in the virtual environment that runs the benchmark)
"""
OUR_ARGUMENTS = (
    "fit --config sac_cheetah --env.init_args.action_repeat=1"
    " --model.optimizer.actor.case=adam --model.optimizer.critic.case=adam"
    f" --data.total_frames={ENDLESS} --data.init_random_frames={BLOCK}"
    f" --data.eval_every={ENDLESS} --matmul_precision={{precision}}"
)
CLEANRL_ARGUMENTS = (
    f"--env-id=flat/cheetah-run-v0 --learning-starts={BLOCK} --total-timesteps={ENDLESS} --no-cuda"
)
# One environment, as the others have: it then steps in the script's own process.
TORCHRL_ARGUMENTS = (
    "env.library=dm_control env.name=cheetah env.task=run collector.env_per_collector=1"
    f" collector.frames_per_batch={BLOCK} collector.init_random_frames={BLOCK}"
    f" collector.total_frames={ENDLESS} collector.device=cpu network.device=cpu"
    f" logger.backend= logger.eval_iter={ENDLESS}"
)


@dataclass(frozen=True)
class Program:
    """A training program: where it is installed and how it is told to run the common task."""

    name: str
    python: Path
    source: Path
    script: Path
    arguments: str
    commit: str | None = None  # the commit it must be at; None: whatever is checked out

    def command(self, steps: int, precision: str, result: Path) -> list[str]:
        """This file as the launcher, in the program's interpreter, then the program itself."""
        launcher = [__file__, "launch", self.name, precision, str(steps), str(result)]
        own_arguments = self.arguments.format(precision=precision).split()
        return [str(self.python), *launcher, str(self.script), *own_arguments]

    def environment(self) -> dict[str, str]:
        """One thread, no display, and no modules but those of the program's own interpreter."""
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        return {**inherited, **threads, "MUJOCO_GL": "disabled", "PYTHONUNBUFFERED": "1"}

    def check(self) -> None:
        """Stop with a clear message where the program is not installed as it should be."""
        if not (self.python.exists() and self.script.exists()):
            raise SystemExit(f"{self.name}: no {self.python} or {self.script}; see --help")
        if self.commit not in (None, commit_of(self.source)):
            raise SystemExit(f"{self.name}: {self.source} is not at commit {self.commit}")


def known_programs(peers: Path) -> dict[str, Program]:
    """The programs that can be measured, by name."""
    python = Path(sys.executable)
    programs = [Program("ours", python, REPOSITORY, python.with_name("muon-rl"), OUR_ARGUMENTS)]
    for name, script, arguments, commit in (
        ("cleanrl", "cleanrl/sac_continuous_action.py", CLEANRL_ARGUMENTS, CLEANRL_COMMIT),
        ("torchrl", "sota-implementations/sac/sac.py", TORCHRL_ARGUMENTS, TORCHRL_COMMIT),
    ):
        python, source = peers / name / "venv/bin/python", peers / name / "source"
        programs.append(Program(name, python, source, source / script, arguments, commit))
    return {program.name: program for program in programs}


def launch(name: str, precision: str, steps: str, result: str, *command: str) -> None:
    """In the measured process: prepare it, then run the script as its interpreter would."""
    import torch

    os.setsid()  # so that the end of the window ends any helpers of the program with it
    script = Path(command[0])
    sys.argv = list(command)
    sys.path[0] = str(script.parent)
    if name == "cleanrl":
        sys.path.insert(1, str(script.parents[1]))  # its cleanrl_utils is not installed
        register_flat_cheetah()
    if name != "ours":  # TorchRL's script would set "high" for itself as it starts
        torch.set_float32_matmul_precision(precision)
        torch.set_float32_matmul_precision = lambda precision: None
    install_clock(int(steps), Path(result))
    runpy.run_path(str(script), run_name="__main__")


def register_flat_cheetah() -> None:
    """Give CleanRL's SAC the flat dm_control observation that its PPO script makes for itself."""
    import gymnasium

    def make(**_: object) -> Any:
        return gymnasium.wrappers.FlattenObservation(gymnasium.make("dm_control/cheetah-run-v0"))

    # The inner make has added the checking wrappers already.
    gymnasium.register("flat/cheetah-run-v0", make, disable_env_checker=True, order_enforce=False)


def install_clock(steps: int, result: Path) -> None:
    """Read the clocks at the window's two ends; at the second, write the result and exit."""
    import torch
    from dm_control.rl.control import Environment
    from torch.optim.optimizer import register_optimizer_step_post_hook

    environment_step = Environment.step
    counts = Counter(steps=0, updates=0)
    begun = (0.0, 0.0, 0)

    def clocks() -> tuple[float, float, int]:
        return time.perf_counter(), time.process_time(), counts["updates"]

    def clocked_step(self: Any, action: Any) -> Any:
        nonlocal begun
        timestep = environment_step(self, action)
        counts["steps"] += counts["updates"] > 0
        if counts["steps"] == BLOCK:
            begun = clocks()
        elif counts["steps"] == BLOCK + steps:
            wall, cpu, made = (end - start for start, end in zip(begun, clocks(), strict=True))
            measured = {
                "steps_per_second": round(steps / wall, 2),
                "cpu_seconds_per_step": round(cpu / steps, 6),
                "optimizer_steps_per_step": round(made / steps, 2),
                "threads": torch.get_num_threads(),
                "precision": torch.get_float32_matmul_precision(),
                **{package: metadata.version(package) for package in PACKAGES},
            }
            result.write_text(json.dumps(measured))
            os.killpg(0, signal.SIGKILL)  # the rest of the training is not wanted
        return timestep

    register_optimizer_step_post_hook(lambda *_: counts.update(updates=1))
    Environment.step = clocked_step


def measure(program: Program, steps: int, precision: str) -> dict[str, Any]:
    """Run a program in a fresh directory to the end of its window; return what it measured."""
    with tempfile.TemporaryDirectory() as name:
        result, log = Path(name, "result.json"), Path(name, "output.log")
        command, environment = program.command(steps, precision, result), program.environment()
        with log.open("wb") as output, suppress(subprocess.TimeoutExpired):
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            subprocess.run(command, cwd=name, env=environment, timeout=TIME_LIMIT, **streams)
        if not result.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise SystemExit(f"{tail}\n\n{program.name} ended without a result")
        measured: dict[str, Any] = json.loads(result.read_text())
    conditions = (measured["threads"], measured["precision"])
    if conditions != (1, precision) or measured["optimizer_steps_per_step"] < 1:
        raise SystemExit(f"{program.name} did not keep to the conditions: {measured}")
    return measured


def print_summary(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Medians of every program; ours by each peer's, and the median of the rounds' ratios."""
    rates = {name: [row["steps_per_second"] for row in own] for name, own in rows.items()}
    print(f"\n{'program':10}{'steps/s':>9}{'min':>8}{'max':>8}{'CPU ms/step':>13}   ours / it")
    for name, own in rates.items():
        cpu = 1000 * median(row["cpu_seconds_per_step"] for row in rows[name])
        line = f"{name:10}{median(own):9.1f}{min(own):8.1f}{max(own):8.1f}{cpu:13.2f}"
        if name != "ours" and "ours" in rates:
            paired = median(mine / its for mine, its in zip(rates["ours"], own, strict=True))
            line += f"   {median(rates['ours']) / median(own):.2f}, by round {paired:.2f}"
        print(line)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read and check the command line."""
    names = list(known_programs(Path()))
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=SETUP, formatter_class=layout)
    parser.add_argument("--peer-dir", type=Path, default=Path("peers"), help="see below")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3 * BLOCK, help="default: %(default)s")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--only", default=",".join(names), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if not set(options.only) <= set(names):
        parser.error(f"--only takes names out of {', '.join(names)}")
    if options.rounds < 1 or options.steps < 1 or options.steps % BLOCK:
        parser.error(f"--rounds must be at least 1, and --steps a multiple of {BLOCK}")
    return options


def main() -> None:
    """Measure the chosen programs in turn, writing each row as its run finishes."""
    options = parse(sys.argv[1:])
    programs = [known_programs(options.peer_dir.absolute())[name] for name in options.only]
    for program in programs:
        program.check()
        print(f"{program.name} at commit {commit_of(program.source)}")
    print(f"{datetime.now(timezone.utc):%Y-%m-%d}, {processor()}, {options.precision} precision")
    rows: dict[str, list[dict[str, Any]]] = {program.name: [] for program in programs}
    for number in range(1, options.rounds + 1):
        for program in programs:
            conditions = {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "our_commit": commit_of(),
                "cpu": processor(),
                "program": program.name,
                "program_commit": commit_of(program.source),
                "round": number,
                "steps": options.steps,
            }
            measured = measure(program, options.steps, options.precision)
            print(f"round {number}, {program.name}: {measured}", flush=True)
            append_row(options.output, {**conditions, **measured})
            rows[program.name].append(measured)
        programs.append(programs.pop(0))
    print_summary(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        launch(*sys.argv[2:])
    else:
        main()
