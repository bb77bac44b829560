"""What a step of Muon costs: the full optimizer step against torch's Muon, AdamW and optax.

Five sets of parameters, as real networks have them; each contender steps on copies of the same
parameters and gradients. All run in one process, interleaved round by round, so a busy machine
slows all of them; the ratios are medians over the rounds. Two bounds are measured in the same run:
the matrix products of the iteration alone, at their own shapes and batches, and the same number of
operations at the rate of a product of two 1024 x 1024 matrices, the machine's peak.

All make the same update: torch.optim.Muon and optax, which know neither stacks of critics nor fused
matrices (query, key and value), are handed the matrices of ours as separate parameters.
optax runs where it is installed (``pip install optax``), jitted, in XLA's own threads: compare its
CPU time. For a machine without bfloat16, set ONEDNN_MAX_CPU_ISA=AVX2.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from machine import commit_of, processor
from torch import Tensor, nn
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SACLoss

from muon_rl.modules import QCritic, TanhNormalActor
from muon_rl.optim import Muon, build_optimizer
from muon_rl.optim.groups import matrix_shape, per_parameter
from muon_rl.optim.orthogonalize import arithmetic, computes_bf16
from muon_rl.specs import Specs

try:
    import jax
    import optax
except ImportError:
    optax = None

RESULTS = Path(__file__).parent / "results" / "muon_step.csv"
NS_STEPS = 5


@dataclass
class Contender:
    """A step to time.

    Args:
        name: in the table.
        step: makes one full optimizer step.
    """

    name: str
    step: Callable[[], object]


# ------------------------------------------------------------------------------- parameter sets


def sac(width: int, *, first: bool) -> Muon:
    """Return the optimizer of a SAC agent on cheetah-run: 17 observations, 6 actions, 2 critics."""

    specs = Specs(observation=Unbounded((17,)), action=Bounded(-torch.ones(6), torch.ones(6)))
    actor = TanhNormalActor(specs, hidden=[width, width])
    loss = SACLoss(actor, [QCritic(specs, hidden=[width, width]) for _ in range(2)])
    config = {"case": "muon", "muon": {"apply_first_layer": first}}
    return build_optimizer(loss, actor=config, critic=config)


def transformer(width: int, layers: int, heads: int) -> Muon:
    """Return the optimizer of a grid transformer with a policy and a value head."""
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, norm_first=True, batch_first=True)
    network = nn.Sequential(
        nn.Linear(16, width),
        nn.TransformerEncoder(block, layers, enable_nested_tensor=False),
        nn.LayerNorm(width),
        nn.Linear(width, 5),
    )
    return build_optimizer(nn.ModuleDict({"actor": network}), actor={"case": "muon"})


SETS: dict[str, Callable[[], Muon]] = {
    "SAC 256, hidden": lambda: sac(256, first=False),
    "SAC 256 + first layer": lambda: sac(256, first=True),
    "SAC 512, hidden": lambda: sac(512, first=False),
    "transformer d64": lambda: transformer(64, 2, 4),
    "transformer d128": lambda: transformer(128, 4, 8),
    "SAC 1024, hidden": lambda: sac(1024, first=False),
}
SLOW = {"SAC 1024, hidden"}  # on request: its step takes half a second


def matrices(optimizer: Muon) -> tuple[list[Tensor], list[Tensor]]:
    """Return copies of the matrices that Muon orthogonalizes, and of the auxiliary parameters."""
    plain, rest = [], []
    for group in optimizer.param_groups:
        if group["algorithm"] != "muon":
            rest += [p.detach().clone() for p in group["params"]]
            continue
        for p, shape in shapes(group):
            plain += [matrix.clone() for matrix in p.detach().reshape(-1, *shape)]
    return plain, rest


def shapes(group: dict) -> list[tuple[Tensor, tuple[int, int]]]:
    """Return Muon's parameters, each with rows and columns of its matrices."""
    options = (per_parameter(group, "batch_dims"), per_parameter(group, "splits"))
    members = zip(group["params"], *options, strict=True)
    return [(p, matrix_shape(p.shape, *dims)) for p, *dims in members]


def give_gradients(parameters: list[Tensor]) -> None:
    """Give each parameter a Gaussian gradient of its shape."""
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = 1e-2 * torch.randn(p.shape, generator=generator)


# ----------------------------------------------------------------------------------- contenders


def ours(make: Callable[[], Muon]) -> Contender:
    """Return this project's optimizer, as a recipe builds it."""
    optimizer = make()
    give_gradients([p for group in optimizer.param_groups for p in group["params"]])
    return Contender("muon_rl", optimizer.step)


def compiled(make: Callable[[], Muon]) -> Contender:
    """Return the same, compiled: Python and the passes over memory are fused away."""
    optimizer = make()
    give_gradients([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.compile(fullgraph=True)
    return Contender("muon_rl, compiled", optimizer.step)


def torch_muon(make: Callable[[], Muon]) -> Contender:
    """Return torch's Muon on every matrix by itself, and torch's fused AdamW on the rest."""
    plain, rest = (list(map(nn.Parameter, group)) for group in matrices(make()))
    give_gradients(plain + rest)
    muon = torch.optim.Muon(plain, lr=0.02, weight_decay=0.0)
    adamw = torch.optim.AdamW(rest, lr=3e-4, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return Contender("torch Muon + fused AdamW", step)


def fused_adamw(make: Callable[[], Muon]) -> Contender:
    """Return torch's fused AdamW on everything."""
    optimizer = make()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    give_gradients(parameters)
    return Contender("fused AdamW alone", torch.optim.AdamW(parameters, lr=3e-4, fused=True).step)


def optax_muon(make: Callable[[], Muon]) -> Contender:
    """Return optax's Muon with its own AdamW for the rest, jitted with donated buffers."""
    plain, rest = matrices(make())
    parameters = {
        **{f"muon{i}": jax.numpy.asarray(p.numpy()) for i, p in enumerate(plain)},
        **{f"rest{i}": jax.numpy.asarray(p.numpy()) for i, p in enumerate(rest)},
    }
    gradients = jax.tree.map(lambda p: 1e-2 * jax.numpy.ones_like(p) * (1 + p), parameters)
    dims = {
        name: optax.contrib.MuonDimensionNumbers(0, 1) if name.startswith("muon") else None
        for name in parameters
    }
    transform = optax.contrib.muon(0.02, muon_weight_dimension_numbers=dims)

    @jax.jit
    def update(parameters, state, gradients):
        updates, state = transform.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    held = [parameters, transform.init(parameters)]

    def step() -> None:
        held[:] = update(*held, gradients)
        jax.block_until_ready(held[0])

    return Contender("optax Muon (XLA's threads)", step)


# --------------------------------------------------------------------------------------- timing


def seconds(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def stacks(optimizer: Muon) -> Counter[tuple[int, int]]:
    """Return how many matrices there are of each shape, the smaller side first."""
    counts: Counter[tuple[int, int]] = Counter()
    for group in optimizer.param_groups:
        if group["algorithm"] == "muon":
            for p, (rows, columns) in shapes(group):
                counts[min(rows, columns), max(rows, columns)] += p.numel() // (rows * columns)
    return counts


def products_alone(make: Callable[[], Muon]) -> Contender:
    """Return the matrix products of the iteration and nothing else: the bound.

    In the dtype, the form and the batches that are quickest here, with the scaled sums that a
    product takes along (``beta * C + alpha * A B``), into memory that is there.
    """
    calls: list[Callable[[], Tensor]] = []
    for (m, n), count in stacks(make()).items():
        dtype = arithmetic("cpu", m, n)
        size = count if m < 512 else 1  # larger matrices one by one: they stay in the cache
        x = torch.randn(size, m, n).to(dtype)
        x /= torch.linalg.matrix_norm(x.float(), keepdim=True).to(dtype)
        x = x[0] if size == 1 else x
        gram, polynomial, result = x @ x.mT, x @ x.mT, torch.empty_like(x)
        plain, fused = (torch.mm, torch.addmm) if size == 1 else (torch.bmm, torch.baddbmm)
        whole = partial(plain, x, x.mT, out=gram)
        square = partial(fused, gram, gram, gram, beta=-0.1, alpha=0.1, out=polynomial)
        if dtype == torch.float32 and 2 * n > 3 * m:
            once = [whole, *[square] * (4 * NS_STEPS - 3), partial(plain, gram, x, out=result)]
        else:
            once = [whole, square, partial(fused, x, polynomial, x, beta=3.4, out=result)]
            once *= NS_STEPS
        calls += once * (count // size)

    def step() -> None:
        for call in calls:
            call()

    return Contender("bound: its products alone", step)


def flop(optimizer: Muon) -> float:
    """Return the products' operations of one step, in the cheaper form of the iteration."""
    return sum(
        count * min(20 * m * m * n + 10 * m**3, 4 * m * m * n + 34 * m**3)
        for (m, n), count in stacks(optimizer).items()
    )


def product_rate(steps: int) -> tuple[float, float]:
    """Return seconds per operation of a large product, wall-clock and CPU: the machine's best."""
    dtype = torch.bfloat16 if computes_bf16("cpu") else torch.float32
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    wall, cpu = seconds(lambda: a @ b, steps)
    return wall / (2 * 1024**3), cpu / (2 * 1024**3)


def measure(make: Callable[[], Muon], *, rounds: int, threads: int, steps: int) -> dict:
    """Return for each contender its milliseconds, wall-clock and CPU, one pair a round."""
    torch.compiler.reset()  # code is compiled for a number of threads
    torch.set_num_threads(threads)
    makers = [torch_muon, fused_adamw, ours, compiled, products_alone]
    contenders = [maker(make) for maker in [*makers, *([optax_muon] if optax else [])]]
    operations = flop(make())
    for contender in contenders:
        seconds(contender.step, 3)
    times: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    times["its operations at the peak"] = []
    for number in range(rounds):
        # In turns from both ends, so that no contender always follows the same one.
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            contender.step()  # brings back what its neighbour drove out of the caches
            times[contender.name].append(seconds(contender.step, steps))
        wall, cpu = product_rate(max(1, steps // 4))
        times["its operations at the peak"].append((wall * operations, cpu * operations))
    return times


def main() -> None:
    """Run the benchmark and print one table a set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--steps", type=int, default=20, help="steps a round (default 20)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    usual = [name for name in SETS if name not in SLOW]
    parser.add_argument("--set", dest="sets", nargs="+", default=usual, choices=SETS)
    parser.add_argument("--dry", action="store_true", help="leave the results file as it is")
    options = parser.parse_args()

    native = computes_bf16("cpu")
    where = {
        "commit": commit_of(), "cpu": processor(), "torch": torch.__version__,
        "optax": optax.__version__ if optax else "",
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "all"), "bf16": native,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    rows = []
    for name in options.sets:
        for threads in options.threads:
            torch.manual_seed(0)
            times = measure(SETS[name], rounds=options.rounds, threads=threads, steps=options.steps)
            rows += report(name, threads, times, where)
    if not options.dry:
        write(rows, where)


def report(name: str, threads: int, times: dict, where: dict) -> list[dict]:
    """Print a set's table and return its rows."""
    reference = times["torch Muon + fused AdamW"]
    print(f"\n{name}, {threads} thread(s)")
    print(f"  {'':28} {'wall ms':>8} {'CPU ms':>8} {'wall':>6} {'CPU':>6}  of torch Muon's")
    rows = []
    for contender, pairs in times.items():
        walls, cpus = zip(*pairs, strict=True)
        # The ratio of each round by itself: what slows one contender slows its neighbours.
        wall_ratio = median(a[0] / b[0] for a, b in zip(pairs, reference, strict=True))
        cpu_ratio = median(a[1] / b[1] for a, b in zip(pairs, reference, strict=True))
        print(
            f"  {contender:28} {1e3 * median(walls):8.3f} {1e3 * median(cpus):8.3f} "
            f"{wall_ratio:6.2f} {cpu_ratio:6.2f}"
        )
        rows.append({
            "set": name, "threads": threads, "contender": contender, "rounds": len(pairs),
            "wall_ms": f"{1e3 * median(walls):.4f}", "cpu_ms": f"{1e3 * median(cpus):.4f}",
            "wall_ratio": f"{wall_ratio:.3f}", "cpu_ratio": f"{cpu_ratio:.3f}", **where,
        })  # fmt: skip
    return rows


def write(rows: list[dict], where: dict) -> None:
    """Put the rows into the results file, in place of those of the same kind of arithmetic."""
    kept = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["isa"] != where["isa"]]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows([*kept, *rows])
    print(f"\nwrote {RESULTS}")


if __name__ == "__main__":
    main()
