"""Muon on several processes: shards of matrices under FSDP2, and groups that ZeRO can deal out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from muon_rl.optim.groups import per_parameter


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this process, sharing its memory.

    Args:
        tensor: an ordinary one, which is returned as it is, or a ``DTensor``.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def any_of(tensors: Sequence[Tensor]) -> bool:
    """Tell whether one of some tensors is a ``DTensor``.

    Args:
        tensors: any.
    """
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def gradient(parameter: Any) -> Tensor:
    """Return a parameter's gradient, placed as the parameter is.

    Args:
        parameter: one that has a gradient.
    """
    grad = parameter.grad
    if isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        return grad.redistribute(placements=parameter.placements)
    return grad


def cuts_matrices(tensor: Tensor, batch_dims: int) -> bool:
    """Tell whether a tensor is sharded along a dim of its matrices, not only along their stack.

    Args:
        tensor: any; an ordinary one is not sharded.
        batch_dims: number of leading dims that stack matrices.
    """
    # Not by class: where FSDP2 meets tensor parallelism, the placement is none of Shard's.
    return isinstance(tensor, DTensor) and not all(
        placement.is_replicate() or getattr(placement, "dim", batch_dims) < batch_dims
        for placement in tensor.placements
    )


def gather(shard: Tensor, like: DTensor, dtype: torch.dtype) -> Tensor:
    """Return the whole of a tensor: one all-gather, of as few bytes as the arithmetic needs.

    Args:
        shard: this process's part.
        like: a tensor of that shape and placement.
        dtype: of the arithmetic to come; the result has it if it is narrower than the part's.
    """
    if dtype.itemsize < shard.dtype.itemsize:
        shard = shard.to(dtype)
    return _placed(shard, like).full_tensor()


def scatter(whole: Tensor, like: DTensor) -> Tensor:
    """Return this process's part of a tensor that every process has whole: no communication.

    Args:
        whole: the tensor.
        like: a tensor of that shape, placed as the part shall be.
    """
    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()


def agree(fine: Tensor, parameters: Sequence[Any]) -> Tensor:
    """Return what is fine on all processes that share parameters: one all-reduce a mesh dim.

    Args:
        fine: flags of this process, any shape.
        parameters: ordinary ones, which need no communication, and sharded ones.
    """
    for mesh in dict.fromkeys(p.device_mesh for p in parameters if isinstance(p, DTensor)):
        votes = fine.to(mesh.device_type, torch.int32)
        for group in mesh.get_all_groups():
            distributed.all_reduce(votes, distributed.ReduceOp.MIN, group)
        fine = votes.bool()
    return fine


def zero_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return a Muon's groups as ``ZeroRedundancyOptimizer`` takes them.

    It deals a group's parameters out, but leaves lists with one entry a parameter as they are. So
    each of these groups has one number of ``batch_dims`` and of ``splits``, and no names; a group
    with several numbers falls apart into groups of its name.

    Args:
        optimizer: a :class:`~muon_rl.optim.Muon`, which is left as it is.
    """
    parts = []
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        if group["algorithm"] != "muon":
            parts.append({**options, "params": list(group["params"])})
            continue
        numbers = (per_parameter(group, "batch_dims"), per_parameter(group, "splits"))
        members: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for p, *pair in zip(group["params"], *numbers, strict=True):
            members[tuple(pair)].append(p)
        for (batch_dims, splits), params in members.items():
            part = {"params": params, "batch_dims": batch_dims, "splits": splits}
            parts.append({**options, **part})
    return parts


def _placed(shard: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
