"""Muon on a CUDA device."""

from __future__ import annotations

import copy

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
