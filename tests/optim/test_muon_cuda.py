"""Muon on a CUDA device."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from muon_rl.optim import Muon, build_optimizer, orthogonalize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256), (2, 128, 96)])
def test_orthogonalize_agrees_with_the_cpu_in_float32(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    on_cpu = orthogonalize(x, dtype=torch.float32)
    on_gpu = orthogonalize(x.cuda(), dtype=torch.float32)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_a_step_follows_torch_muon():
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(64, 32, device="cuda"))
    theirs = nn.Parameter(ours.detach().clone())
    muon = Muon([ours], lr=0.02)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0)
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_state_moves_between_devices():
    module = nn.ModuleDict({"actor": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))})
    other = copy.deepcopy(module).cuda()
    first, second = (build_optimizer(m, actor={}) for m in (module, other))
    module["actor"](torch.ones(4, 8)).sum().backward()
    first.step()
    second.load_state_dict(first.state_dict())
    other["actor"](torch.ones(4, 8, device="cuda")).sum().backward()
    second.step()
    assert all(torch.isfinite(p).all() for p in other.parameters())


def mixed(**options):
    """Build a stack, a matrix and two vectors on the device, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 96, 80), (96, 80), (80,), (5,)]
    params = [nn.Parameter(torch.randn(s, generator=generator).cuda()) for s in shapes]
    groups = [
        {"params": params[:2], "batch_dims": [1, 0]},
        {"params": params[2:3], "algorithm": "adamw"},
        {"params": params[3:], "algorithm": "adam", "fused": True},
    ]
    return Muon(groups, weight_decay=0.1, **options), params


def set_gradients(params, step):
    """Write each gradient into the memory that it has from the first step on."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        gradient = torch.randn(p.shape, generator=generator).cuda()
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)


def test_a_captured_step_replays_as_eager_steps():
    optimizer, params = mixed(capturable=True, dtype=torch.float32)
    twin, twin_params = mixed(dtype=torch.float32)
    for step in range(8):
        set_gradients(twin_params, step)
        twin.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 8):
        set_gradients(params, step)
        graph.replay()
    for p, other in zip(params, twin_params, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_step_does_not_wait_for_the_device(dtype, capturable):
    optimizer, params = mixed(capturable=capturable, dtype=dtype)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    set_gradients(params, 1)
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256), (2, 96, 80)], ids=str)
def test_20_steps_in_bfloat16_end_half_a_percent_from_those_in_float32(shape):
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.zeros(shape, device="cuda"))
        optimizer = Muon([{"params": [p], "batch_dims": len(shape) - 2}], dtype=dtype)
        for step in range(20):
            set_gradients([p], step)
            optimizer.step()
        ends.append(p.detach())
    assert 2e-3 < float((ends[1] - ends[0]).norm() / ends[0].norm()) < 1e-2


@pytest.mark.parametrize("capturable", [False, True])
def test_a_state_that_was_mapped_to_the_cpu_continues_on_the_device(capturable):
    optimizer, params = mixed(capturable=capturable, dtype=torch.float32)
    set_gradients(params, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, resumed_params = mixed(capturable=capturable, dtype=torch.float32)
    resumed.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for p, other in zip(resumed_params, params, strict=True):
        p.data.copy_(other.detach())
    for each, each_params in ((optimizer, params), (resumed, resumed_params)):
        set_gradients(each_params, 1)
        each.step()
    for p, other in zip(params, resumed_params, strict=True):
        torch.testing.assert_close(p, other)
