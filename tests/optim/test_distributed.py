"""Muon in two gloo processes under DDP, ZeRO and FSDP2, against one that sees both halves.

The tests ask two more processes, which run this very file as a program, to train.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from datetime import timedelta
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from muon_rl.optim import Muon
from muon_rl.optim.sharded import zero_groups

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its import calls torch.jit.script
    from torch.distributed.optim import ZeroRedundancyOptimizer

WORLD = 2
PATIENCE = 60.0  # seconds until a call counts as hung
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SCHEDULE = {"momentum_start_step": 1, "momentum_warmup_steps": 2}
MATRICES = ("tall.weight", "square.weight", "conv.weight", "wide.weight", "head.weight")
STACKS = ("one", "two", "three", "kernels")


# --------------------------------------------------------------- a training, in any of the ways


class Net(nn.Module):
    """Matrices of all shapes, whole and stacked, most of which two processes share unevenly.

    Of ``one`` and ``head.weight`` the second process has nothing; in ``qkv.weight``, the
    processes meet within a split.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tall = nn.Linear(5, 17)
        self.square = nn.Linear(17, 17)
        self.conv = nn.Conv1d(1, 7, 3, padding=1)
        self.qkv = nn.Linear(17, 51)
        self.wide = nn.Linear(17, 6)
        self.head = nn.Linear(17, 1)
        self.one = nn.Parameter(0.2 * torch.randn(1, 17, 17))
        self.two = nn.Parameter(0.2 * torch.randn(2, 16, 17))
        self.three = nn.Parameter(0.2 * torch.randn(3, 17, 12))
        self.kernels = nn.Parameter(0.2 * torch.randn(3, 4, 3, 2))
        self.heads = nn.Parameter(0.2 * torch.randn(2, 51, 17))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        h = torch.tanh(self.tall(x))
        h = h + torch.tanh(self.square(h)) + torch.tanh(4 * self.conv(h[:, None])).mean(1)
        query, key, value = self.qkv(h).chunk(3, -1)
        h = h + torch.tanh(query * key) + value
        for stack in (self.one, self.two, self.three, self.kernels.flatten(2), self.heads):
            y = torch.tanh(torch.einsum("bi,qoi->bqo", h[:, : stack.shape[2]], stack))
            h = h + y.mean((1, 2)).unsqueeze(1)
        return torch.cat([self.head(h), self.wide(h)], -1)


def make_groups(net, **muon):
    """Return groups of every kind; ``muon`` goes to those with matrices."""
    named = dict(net.named_parameters())
    schedule = {option: muon[option] for option in SCHEDULE if option in muon}
    matrices = [(name, named[name]) for name in (*MATRICES, *STACKS)]
    biases = [(name, p) for name, p in named.items() if name.endswith("bias")]
    batch_dims = [0] * len(MATRICES) + [1] * len(STACKS)
    qkv, heads = [[("qkv.weight", net.qkv.weight)], [("heads", net.heads)]]
    return [
        {"params": matrices, "name": "matrices", "batch_dims": batch_dims, **muon},
        {"params": qkv, "name": "qkv", "splits": 3, "lr": 0.03, **muon},
        {"params": heads, "name": "heads", "splits": 3, "batch_dims": 1, **muon},
        {"params": biases, "name": "biases", "algorithm": "adamw", **schedule},
        {"params": [("log_scale", net.log_scale)], "algorithm": "adam", **schedule},
    ]


def half(step, rank):
    """Return a process's half of a step's batch: inputs and targets."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(32, 5, generator=generator), torch.randn(32, 7, generator=generator)


def whole(tensor):
    """Return a copy of a tensor as all processes together have it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Traffic(TorchDispatchMode):
    """Counts the collectives, by name and the dtype that they carry."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # until it has come down to what this process does
        name = func.overloadpacket.__name__
        local = name in ("wait_tensor", "_wrap_tensor_autograd")
        if func.namespace in ("c10d", "_c10d_functional") and not local:
            tensor = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            self.sent[name, tensor.dtype] += 1
        return func(*args, **(kwargs or {}))


class Training:
    """A training with Muon by one process, or by two, of which each takes half of a batch.

    Args:
        kind: ``"single"``, ``"ddp"``, ``"zero"`` (in DDP) or ``"fsdp"``.
        double: whether parameters, data and iteration are of float64.
        mesh: of FSDP2, ``(shard,)`` or ``(replicate, shard)``.
        place: for FSDP2, the dim that a parameter of a shape is sharded on, default 0.
        parted: whether the groups are those that ZeRO takes, which always has them.
        views: whether ZeRO's parameters are views of its buckets.
        annealed: whether a scheduler halves the rates at each step.
        arguments: of Muon.
        muon: options of Muon's groups.
    """

    def __init__(self, kind, *, double=False, mesh=(WORLD,), place=None, parted=False, views=False,
                 annealed=False, arguments=None, **muon):  # fmt: skip
        self.kind, self.dtype = kind, FP64 if double else FP32
        self.net = self.model = Net().to(self.dtype)
        if double:
            muon["dtype"] = FP64
        if kind in ("ddp", "zero"):
            self.model = DistributedDataParallel(self.net)
        if kind == "fsdp":
            shard = partial(
                fully_shard,
                mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("a", "b")[: len(mesh)]),
                shard_placement_fn=place and (lambda p: Shard(place.get(p.shape, 0))),
            )
            shard(self.net.qkv)
            shard(self.net, ignored_params={self.net.log_scale})
        self.optimizer = Muon(make_groups(self.net, **muon), **(arguments or {}))
        groups = zero_groups(self.optimizer)
        if kind == "zero":
            self.optimizer = ZeroRedundancyOptimizer(
                groups, optimizer_class=Muon, parameters_as_bucket_view=views
            )
        elif parted:
            self.optimizer = Muon(groups, **(arguments or {}))
        self.scheduler = LambdaLR(self.optimizer, lambda step: 0.5**step) if annealed else None

    def backward(self, step, poisoned):
        self.optimizer.zero_grad()
        single = self.kind == "single"
        for rank in range(WORLD) if single else [distributed.get_rank()]:
            inputs, targets = (x.to(self.dtype) for x in half(step, rank))
            if poisoned == (step, rank):
                inputs[0, 0] = float("nan")
            loss = (self.model(inputs) - targets).square().mean() + self.net.log_scale.exp()
            (loss / WORLD if single else loss).backward()

    def spoil(self, name, index, value):
        """Set a row of a gradient where it lies; of one that is not sharded, on one process."""
        p = self.net.get_parameter(name)
        if isinstance(p, DTensor):
            rows = -(-p.shape[0] // WORLD)
            if p.device_mesh.get_local_rank() == index // rows:
                p.grad.to_local()[index % rows] = value
        elif self.kind == "single" or distributed.get_rank() == 1:
            p.grad.view(-1, *p.shape[1:])[index] = value

    def run(self, steps, *, start=0, clip=None, spoiled=None, poisoned=None):
        """Make steps; return what has come of them.

        Args:
            steps: how many.
            start: number of the first.
            clip: largest norm of the gradients.
            spoiled: step, parameter, row and the value that its gradient gets.
            poisoned: step and process whose inputs get a NaN.
        """
        sent, errors = [], []
        for step in range(start, start + steps):
            self.backward(step, poisoned)
            if clip is not None:
                # torch's norm takes ordinary gradients or sharded ones, not both.
                params = [p for p in self.net.parameters() if p.ndim]
                assert whole(nn.utils.clip_grad_norm_(params, clip)) > 2 * clip
            if spoiled is not None and spoiled[0] == step:
                self.spoil(*spoiled[1:])
            with Traffic() as traffic:
                try:
                    self.optimizer.step()
                except FloatingPointError as error:
                    errors.append(str(error))
            sent.append(traffic.sent)
            if self.scheduler is not None:
                self.scheduler.step()
        named = dict(self.net.named_parameters())
        state = self.optimizer.state
        momenta = {n: state[p].get("momentum_buffer") for n, p in named.items() if state.get(p)}
        return {
            "parameters": {name: whole(p) for name, p in named.items()},
            "momenta": {
                name: whole(buffer) for name, buffer in momenta.items() if buffer is not None
            },
            "errors": errors,
            "sent": sent,
            "counted": {group["momentum_step"] for group in self.optimizer.param_groups},
            "skipped": getattr(self.optimizer, "skipped_steps", None),
        }


def train(kind, steps, *, to=None, since=None, flat=None, start=0, clip=None, spoiled=None,
          poisoned=None, **options):  # fmt: skip
    """Train, maybe from a checkpoint and maybe to one, and return what has come of it.

    Args:
        kind: and options, as :class:`Training` takes them.
        steps: and others, as :meth:`Training.run` takes them.
        to: where to save.
        since: what to load first.
        flat: whether torch.distributed.checkpoint flattens the optimizer; ``None`` for torch.save.
    """
    training = Training(kind, **options)
    if since is not None:
        (load_plainly if flat is None else load_sharded)(training, since, flat)
    result = training.run(steps, start=start, clip=clip, spoiled=spoiled, poisoned=poisoned)
    if to is not None:
        (save_plainly if flat is None else save_sharded)(training, to, flat)
    return result


def save_plainly(training, path, flat):
    if training.kind == "zero":
        training.optimizer.consolidate_state_dict(to=0)
    if training.kind == "single" or distributed.get_rank() == 0:
        torch.save([training.net.state_dict(), training.optimizer.state_dict()], path)


def load_plainly(training, path, flat):
    net, optimizer = torch.load(path, weights_only=True)
    training.net.load_state_dict(net)
    training.optimizer.load_state_dict(optimizer)


def save_sharded(training, path, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_state_dict(training.net, training.optimizer, options=options)
    save(dict(zip(("net", "optimizer"), state, strict=True)), checkpoint_id=path)


def load_sharded(training, path, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    both = (training.net, training.optimizer)
    state = dict(zip(("net", "optimizer"), get_state_dict(*both, options=options), strict=True))
    load(state, checkpoint_id=path)
    set_state_dict(
        *both,
        model_state_dict=state["net"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


# --------------------------------------------------------------------------- the two processes


def work(connection, rank, rendezvous):
    """Do what the tests ask for, until they go."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            program, arguments, options = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, globals()[program](*arguments, **options))
        except Exception:
            answer = (False, traceback.format_exc())
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        connection.send_bytes(buffer.getvalue())


class Processes:
    """Two processes that make the same call at the same time."""

    def __init__(self, folder):
        self.folder = folder
        self.members = []

    def start(self):
        rendezvous = self.folder / f"rendezvous-{time.monotonic_ns()}"
        for rank in range(WORLD):
            ours, theirs = Pipe()
            with theirs:
                descriptor = theirs.fileno()
                command = [sys.executable, __file__, descriptor, rank, rendezvous]
                process = subprocess.Popen([*map(str, command)], pass_fds=[descriptor])
            self.members.append((process, ours))

    def stop(self):
        for process, connection in self.members:
            process.kill()
            process.wait()
            connection.close()
        self.members = []

    def __call__(self, program, *arguments, **options):
        """Return a program's results in order of the processes, or fail with their tracebacks."""
        if not self.members:
            self.start()
        for _, connection in self.members:
            connection.send((program.__name__, arguments, options))
        deadline = time.monotonic() + PATIENCE
        answers = [self.answer(connection, deadline) for _, connection in self.members]
        if not all(done for done, _ in answers):
            self.stop()
            pytest.fail("\n".join(str(result) for done, result in answers if not done))
        return [result for _, result in answers]

    @staticmethod
    def answer(connection, deadline):
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            return False, f"No answer after {PATIENCE} s."
        try:
            return torch.load(io.BytesIO(connection.recv_bytes()))
        except EOFError:
            return False, "A process has died."


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return a caller of a program in two processes."""
    processes = Processes(tmp_path_factory.mktemp("processes"))
    yield processes
    processes.stop()


# --------------------------------------------------------------------------- equal to what

RULES = {
    "default": {},
    "decay": {"weight_decay": 0.1, "nesterov": False, "adjust_lr": "match_rms_adamw"},
    "schedule": {"weight_decay": 0.1, **SCHEDULE},
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def assert_same_bits(results, expected):
    """Compare all processes' parameters, and momenta where an optimizer has them at hand."""
    for result in results:
        for kind in ("parameters", "momenta"):
            for name, tensor in result[kind].items():
                same = torch.equal(tensor.nan_to_num(), expected[kind][name].nan_to_num())
                assert same, f"{kind}: {name}"


def assert_close(results, expected, atol):
    """Compare parameters and momenta with one process, and the processes in every bit."""
    assert_same_bits(results[1:], results[0])
    for kind in ("parameters", "momenta"):
        torch.testing.assert_close(
            results[0][kind], expected[kind], rtol=0, atol=atol, equal_nan=True
        )


# -------------------------------------------------------------------------------- DDP and ZeRO


@rules
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["ddp", "zero"])
def test_two_processes_equal_one_with_both_halves_in_every_bit(both, kind, dtype, rule):
    results = both(train, kind, 4, dtype=dtype, **rule)
    assert_same_bits(results, train("single", 4, dtype=dtype, **rule))
    assert not torch.equal(results[0]["parameters"]["two"], Net().two)
    for result in results:
        assert result["counted"] == {
            sum(SCHEDULE.values()) if SCHEDULE.keys() <= rule.keys() else 0
        }


def test_zero_with_views_of_its_buckets_equals_one_process_in_every_bit(both):
    assert_same_bits(both(train, "zero", 3, views=True), train("single", 3))


@pytest.mark.parametrize("kind", ["ddp", "zero"])
def test_a_scheduler_sets_the_rates_of_all_processes(both, kind):
    annealed = both(train, kind, 3, annealed=True)
    assert_same_bits(annealed, train("single", 3, annealed=True))
    constant = train("single", 3)["parameters"]
    assert not any(torch.equal(p, constant[name]) for name, p in annealed[0]["parameters"].items())


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_under_ddp_a_nan_in_one_half_stops_the_step_of_both_processes(both, on_nonfinite):
    options = {"poisoned": (2, 1), "arguments": {"on_nonfinite": on_nonfinite}, **SCHEDULE}
    results = both(train, "ddp", 4, **options)
    expected = train("single", 4, **options)
    assert_same_bits(results, expected)
    for result in results:
        assert result["errors"] == expected["errors"]
        assert len(result["errors"]) == (on_nonfinite == "raise")
        assert result["skipped"] == (on_nonfinite == "skip")


def zero_dealing():
    """Return what ZeRO has dealt to this process, by group."""
    inner = Training("zero").optimizer.optim
    return [len(group["params"]) for group in inner.param_groups]


def test_zero_deals_each_matrix_to_one_process_and_some_groups_to_none(both):
    first, second = both(zero_dealing)
    groups = Training("single").optimizer.param_groups
    assert sum(first) + sum(second) == sum(len(group["params"]) for group in groups)
    assert 0 in first
    assert 0 in second


def zero_refusal(*, lists=False, **arguments):
    """Return with what message ZeRO's Muon refuses its groups."""
    training = Training("single")
    groups = zero_groups(training.optimizer)
    if lists:
        groups[0]["batch_dims"] = [0] * len(groups[0]["params"])
    try:
        ZeroRedundancyOptimizer(groups, optimizer_class=Muon, **arguments)
    except ValueError as error:
        return str(error)
    return ""


def test_zero_refuses_a_list_with_a_number_for_each_parameter(both):
    for message in both(zero_refusal, lists=True):
        assert "batch_dims must be one number" in message


def test_zero_refuses_on_nonfinite_which_only_one_process_would_notice(both):
    for message in both(zero_refusal, on_nonfinite="skip"):
        assert "Unknown option(s) on_nonfinite" in message


# --------------------------------------------------------------------------------------- FSDP2


@rules
@pytest.mark.parametrize(
    ("arithmetic", "steps", "atol"),
    [({"double": True}, 4, 1e-13), ({"dtype": FP32}, 3, 1e-6), ({"dtype": BF16}, 3, 5e-4)],
    ids=["fp64", "fp32", "bf16"],
)
def test_fsdp_equals_one_process(both, arithmetic, steps, atol, rule):
    results = both(train, "fsdp", steps, **arithmetic, **rule)
    expected = train("single", steps, **arithmetic, **rule)
    assert_close(results, expected, atol)


@pytest.mark.parametrize("arithmetic", [FP32, BF16], ids=["fp32", "bf16"])
def test_fsdp_costs_one_all_gather_for_each_matrix_that_is_cut_and_nothing_else(both, arithmetic):
    gathered = len([*MATRICES, "qkv.weight"])
    for result in both(train, "fsdp", 2, dtype=arithmetic, weight_decay=0.1):
        assert result["sent"] == [{("all_gather_into_tensor", arithmetic): gathered}] * 2


def test_stacks_cut_along_their_rows_cost_one_all_gather_each(both):
    place = {Net().two.shape: 1, Net().kernels.shape: 1}
    results = both(train, "fsdp", 3, double=True, place=place)
    assert_close(results, train("single", 3, double=True), 1e-13)
    gathered = len([*MATRICES, "qkv.weight", *place])
    for result in results:
        assert result["sent"] == [{("all_gather_into_tensor", FP64): gathered}] * 3


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)], ids=str)
def test_hybrid_sharding_equals_one_process(both, mesh):
    options = {"double": True, "weight_decay": 0.1}
    assert_close(both(train, "fsdp", 3, mesh=mesh, **options), train("single", 3, **options), 1e-13)


def test_clipping_by_norm_before_the_step_equals_one_process(both):
    options = {"double": True, "clip": 0.05}
    assert_close(both(train, "fsdp", 3, **options), train("single", 3, **options), 1e-13)


# Rows of which the other process has no more than zeros' gradients, if it has anything.
PLACES = [
    ("head.weight", 0), ("one", 0), ("square.weight", 16), ("three", 2), ("qkv.bias", 50),
    ("log_scale", 0),
]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), -float("inf")], ids=str)
@pytest.mark.parametrize(("name", "row"), PLACES)
def test_with_raise_all_processes_name_the_parameter_and_change_nothing(both, name, row, value):
    options = {"double": True, "arguments": {"on_nonfinite": "raise"}, **SCHEDULE}
    results = both(train, "fsdp", 3, spoiled=(2, name, row, value), **options)
    assert_close(results, train("single", 2, **options), 1e-13)
    for result in results:
        (message,) = result["errors"]
        assert f"gradient of {name!r}" in message


@pytest.mark.parametrize(("name", "row"), PLACES)
def test_with_skip_all_processes_leave_the_same_step_out(both, name, row):
    options = {"double": True, "arguments": {"on_nonfinite": "skip"}, **SCHEDULE}
    options["spoiled"] = (1, name, row, float("nan"))
    results = both(train, "fsdp", 4, **options)
    assert_close(results, train("single", 4, **options), 1e-13)
    assert [result["skipped"] for result in results] == [1, 1]


@pytest.mark.parametrize(("name", "row"), PLACES[:-1])
def test_with_propagate_a_nan_spoils_the_same_matrix_on_all_processes(both, name, row):
    options = {"double": True, "spoiled": (1, name, row, float("nan"))}
    results = both(train, "fsdp", 2, **options)
    expected = train("single", 2, **options)
    assert_close(results, expected, 1e-13)
    spoiled = [n for n, p in expected["parameters"].items() if p.isnan().any()]
    assert spoiled == [name]


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_large_finite_gradient_on_one_process_stops_none(both, on_nonfinite):
    # Its square, and so the norm of all gradients, is infinite.
    options = {"double": True, "spoiled": (1, "square.weight", 16, 1e200)}
    options["arguments"] = {"on_nonfinite": on_nonfinite}
    results = both(train, "fsdp", 2, **options)
    assert_close(results, train("single", 2, **options), 1e-13)
    for result in results:
        assert result["errors"] == []
        assert result["skipped"] == 0


def test_the_check_of_the_gradients_costs_one_all_reduce(both):
    for result in both(train, "fsdp", 1, arguments={"on_nonfinite": "raise"}, dtype=FP32):
        (sent,) = result["sent"]
        assert sorted(sent.values()) == [1, len([*MATRICES, "qkv.weight"])]
        assert sent["allreduce_", torch.int32] == 1


# --------------------------------------------------------------------------------- checkpoints


def train_on(both, kind, *arguments, **options):
    """Train as ``kind`` says, in one process or in two."""
    return (
        [train(kind, *arguments, **options)]
        if kind == "single"
        else both(train, kind, *arguments, **options)
    )


@pytest.mark.parametrize("rule", [RULES["default"], RULES["schedule"]], ids=["default", "schedule"])
@pytest.mark.parametrize(
    ("before", "after"),
    [("ddp", "single"), ("single", "ddp"), ("zero", "single"), ("single", "zero"), ("ddp", "zero")],
)
def test_a_state_dict_moves_between_one_and_two_processes(both, tmp_path, before, after, rule):
    path = str(tmp_path / "state.pt")
    parted = "zero" in (before, after)
    train_on(both, before, 2, to=path, parted=parted, **rule)
    results = train_on(both, after, 3, start=2, since=path, parted=parted, **rule)
    assert_same_bits(results, train("single", 5, **rule))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("before", "after"), [("fsdp", "single"), ("single", "fsdp"), ("fsdp", "fsdp")]
)
@pytest.mark.parametrize("rule", [RULES["schedule"]], ids=["schedule"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_moves_between_one_and_two_processes(
    both, tmp_path, before, after, flat, rule
):
    options = {"double": True, "flat": flat, **rule}
    train_on(both, before, 2, to=str(tmp_path), **options)
    results = train_on(both, after, 3, start=2, since=str(tmp_path), **options)
    assert_close(results, train("single", 5, double=True, **rule), 1e-13)


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
