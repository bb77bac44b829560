"""Steps per second of Snake on one core: this package, jumanji (JAX) and PufferLib's C code.

Boards of 10 x 10, 4096 games, uniformly random actions drawn beforehand, every step with its
observation and the restart of the games that ended. Each program runs in a process of its own,
pinned to one core, and they take turns, a different one first in each round, so that a slow spell
of the machine hits all of them. Ratios are medians over the rounds; CPU time stands beside
wall-clock time, from which it parts where the machine was busy.

What is measured of ours: the games alone (``games``: step, restart, a copy of the tokens), the
TorchRL environment (``env``, tokens and planes) and TorchRL's Collector around it with the same
actions (``collector``, rollouts of 32 steps).

jumanji is its published package: ``Snake`` in its own ``VmapAutoResetWrapper``, a jitted scan of
128 steps. PufferLib is its published C code, compiled with ``-O3 -march=native`` and called from a
loop in C, without the Python around it; its snake sees a window of 11 x 11 cells around its head,
begins with one cell anywhere, and a game never says that it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from machine import REPOSITORY, append_row, commit_of, processor

RESULTS = REPOSITORY / "benchmarks/results/snake_env.csv"
SIZE = 10
STEPS = 128  # actions drawn beforehand, used again and again
OURS = ("games", "env", "env-planes", "collector")
PUFFER_COMMIT = "496d42e871fba96122e0eb0c60b7d7edcdf4c8d6"
PUFFER_FOLDER = "pufferlib/environments/ocean/snake"
SETUP = f"""\
peers, each where it is asked for:

  python -m venv JUMANJI && JUMANJI/bin/pip install jumanji==1.1.2
      --jumanji-python JUMANJI/bin/python
  git clone https://github.com/PufferAI/PufferLib PUFFER
  git -C PUFFER checkout {PUFFER_COMMIT}
      --puffer-source PUFFER
  git clone --branch 5.0 https://github.com/raysan5/raylib RAYLIB    (PufferLib's code includes
      --raylib-include RAYLIB/src                                     its header, for pictures)
"""
PUFFER_LOOP = r"""
#include <string.h>
#include <time.h>
#include "snake.h"

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int argc, char** argv) {
    int games = atoi(argv[1]), size = atoi(argv[2]), steps = atoi(argv[3]), vision = 5;
    double limit = atof(argv[4]);
    int window = (2 * vision + 1) * (2 * vision + 1);
    char* observations = calloc(games, window);
    int* actions = calloc((long)steps * games, sizeof(int));
    int* action = calloc(games, sizeof(int));
    float* rewards = calloc(games, sizeof(float));
    unsigned char* terminals = calloc(games, 1);
    LogBuffer* logs = allocate_logbuffer(LOG_BUFFER_SIZE);
    CSnake* envs = calloc(games, sizeof(CSnake));
    for (long i = 0; i < (long)steps * games; i++) actions[i] = rand() % 4;
    for (int i = 0; i < games; i++) {
        envs[i] = (CSnake){
            .observations = observations + (long)i * window, .actions = action + i,
            .rewards = rewards + i, .terminals = terminals + i, .log_buffer = logs,
            .num_snakes = 1, .width = size + 2 * vision, .height = size + 2 * vision,
            .max_snake_length = size * size, .food = 1, .vision = vision,
            .reward_food = 1, .reward_death = -1,
        };
        init_csnake(&envs[i]);
        reset(&envs[i]);
    }
    double wall = 0, cpu = 0;
    long made = 0;
    for (int warm = 1; warm >= 0; warm--) {
        wall = now(CLOCK_MONOTONIC);
        cpu = now(CLOCK_PROCESS_CPUTIME_ID);
        made = 0;
        do {
            for (int s = 0; s < steps; s++) {
                memcpy(action, actions + (long)s * games, games * sizeof(int));
                for (int i = 0; i < games; i++) step(&envs[i]);
            }
            made += (long)steps * games;
        } while (now(CLOCK_MONOTONIC) - wall < (warm ? 0.3 : limit));
    }
    printf("{\"steps\": %ld, \"wall\": %f, \"cpu\": %f}\n", made,
           now(CLOCK_MONOTONIC) - wall, now(CLOCK_PROCESS_CPUTIME_ID) - cpu);
}
"""


# ------------------------------------------------------------------- in the measured processes


def timed(block: Callable[[], object], steps: int, seconds: float) -> dict[str, float]:
    """Return steps made by a block that is called again and again, and seconds, wall and CPU."""
    block()
    block()
    wall, cpu, made = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        block()
        made += steps
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"steps": made, "wall": wall, "cpu": cpu}


def measure_ours(name: str, games: int, seconds: float) -> dict[str, float]:
    """Measure one way to play this package's games."""
    import torch
    from torchrl.collectors import Collector

    from muon_rl.envs import SnakeEnv
    from muon_rl.envs.snake.games import new_games, restart_, step_
    from muon_rl.envs.snake.rules import Rules, make_tables

    torch.set_num_threads(1)
    torch.manual_seed(0)
    actions = list(torch.randint(4, (STEPS, games)))
    made = 0

    def policy(tensordict: Any) -> Any:
        nonlocal made
        made += 1
        return tensordict.set("action", actions[made % STEPS])

    if name == "games":
        rules = Rules(SIZE, SIZE)
        tables = make_tables(rules)
        state = new_games(rules, tables, games, seed=0)

        @torch.inference_mode()  # as the environment plays them
        def block() -> None:
            for action in actions:
                outcome = step_(state, action, rules, tables)
                restart_(state, outcome.terminated | outcome.truncated, rules, tables)
                state.board.clone()

        return timed(block, STEPS * games, seconds)

    env = SnakeEnv(
        games, SIZE, SIZE, observation="planes" if name == "env-planes" else "tokens", seed=0
    )
    if name == "collector":
        collector = Collector(env, policy, frames_per_batch=32 * games, total_frames=-1)
        batches = iter(collector)
        return timed(lambda: next(batches), 32 * games, seconds)

    now = env.reset()

    def block() -> None:
        nonlocal now
        for action in actions:
            _, now = env.step_and_maybe_reset(now.set("action", action))

    return timed(block, STEPS * games, seconds)


def measure_jumanji(games: int, seconds: float) -> dict[str, float]:
    """Measure jumanji's game in its own wrapper, in a jitted scan."""
    import jax
    from jumanji.environments import Snake
    from jumanji.wrappers import VmapAutoResetWrapper

    env = VmapAutoResetWrapper(Snake(num_rows=SIZE, num_cols=SIZE, time_limit=500))
    keys = jax.random.split(jax.random.PRNGKey(0), games)
    actions = jax.random.randint(jax.random.PRNGKey(1), (STEPS, games), 0, 4)

    @jax.jit
    def play(carry: Any) -> Any:
        # The last observation is part of the carry, so each step's is computed.
        return jax.lax.scan(lambda now, action: (env.step(now[0], action), None), carry, actions)[0]

    carry = jax.jit(env.reset)(keys)

    def block() -> None:
        nonlocal carry
        carry = jax.block_until_ready(play(carry))

    return timed(block, STEPS * games, seconds)


def measure(name: str, games: str, seconds: str) -> None:
    """Measure a program in this process and print the result."""
    if name == "jumanji":
        result = measure_jumanji(int(games), float(seconds))
    else:
        result = measure_ours(name, int(games), float(seconds))
    print(json.dumps(result))


# ------------------------------------------------------------------------------ the launcher


def compile_puffer(source: Path, raylib: Path, folder: Path) -> Path:
    """Compile PufferLib's game with a loop around it, without its pictures."""
    if commit_of(source) != PUFFER_COMMIT:
        raise SystemExit(f"{source} is not at commit {PUFFER_COMMIT}")
    program, loop = folder / "puffer", folder / "loop.c"
    loop.write_text(PUFFER_LOOP)
    flags = ["-O3", "-march=native", "-w", "-ffunction-sections", "-Wl,--gc-sections"]
    include = [f"-I{source / PUFFER_FOLDER}", f"-I{raylib}"]
    subprocess.run(["gcc", *flags, *include, str(loop), "-o", str(program), "-lm"], check=True)
    return program


def run(command: list[str], core: int) -> dict[str, float]:
    """Run a program on one core and return what it printed last."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    if command[0] == sys.executable:
        own["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        command,
        env=inherited | own,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_summary(rates: dict[str, list[tuple[float, float]]]) -> None:
    """Print medians, and the median of the rounds' ratios to every peer."""
    peers = [name for name in ("jumanji", "puffer") if name in rates]
    titles = "".join(f"{'/ ' + peer:>20}" for peer in peers)
    print(f"\n{'M steps/s, wall / CPU':24}{titles}")
    for name, own in rates.items():
        wall, cpu = (median(pair[kind] for pair in own) / 1e6 for kind in (0, 1))
        line = f"{name:11}{wall:6.2f} /{cpu:6.2f}"
        for peer in peers:
            ratios = (
                median(a[kind] / b[kind] for a, b in zip(own, rates[peer], strict=True))
                for kind in (0, 1)
            )
            line += f"{' / '.join(f'{ratio:.2f}' for ratio in ratios):>20}"
        print(line)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=SETUP, formatter_class=layout)
    parser.add_argument("--jumanji-python", type=Path, help="an interpreter that has jumanji")
    parser.add_argument("--puffer-source", type=Path, help="a checkout of PufferLib")
    parser.add_argument("--raylib-include", type=Path, help="a folder that holds raylib.h")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="each; default: %(default)s")
    parser.add_argument("--games", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--core", type=int, default=0, help="to run on; default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure the programs in turn, writing each row as its run finishes."""
    options = parse(sys.argv[1:])
    limits = [str(options.games), str(options.seconds)]
    commands = {name: [sys.executable, __file__, "measure", name, *limits] for name in OURS}
    with tempfile.TemporaryDirectory() as folder:
        if options.jumanji_python:
            python = str(options.jumanji_python.absolute())
            commands["jumanji"] = [python, __file__, "measure", "jumanji", *limits]
        else:
            print("jumanji: not compared, no --jumanji-python")
        if options.puffer_source and options.raylib_include:
            program = compile_puffer(options.puffer_source, options.raylib_include, Path(folder))
            board = [limits[0], str(SIZE), str(STEPS), limits[1]]
            commands["puffer"] = [str(program), *board]
        else:
            print("PufferLib: not compared, no --puffer-source or no --raylib-include")
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        turns = list(commands)
        for number in range(1, options.rounds + 1):
            for name in turns:
                measured = run(commands[name], options.core)
                steps = measured["steps"]
                rates[name].append((steps / measured["wall"], steps / measured["cpu"]))
                append_row(
                    options.output,
                    {
                        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        "commit": commit_of(),
                        "cpu": processor(),
                        "program": name,
                        "games": options.games,
                        "round": number,
                        "steps_per_second": round(rates[name][-1][0]),
                        "steps_per_cpu_second": round(rates[name][-1][1]),
                    },
                )
            turns.append(turns.pop(0))
    print_summary(rates)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main()
