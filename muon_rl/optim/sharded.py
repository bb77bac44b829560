"""Parameters that FSDP2 shards: what of a DTensor lies here, and how a whole matrix is had."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this process, sharing its memory.

    Args:
        tensor: an ordinary one, which is returned as it is, or a ``DTensor``.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
    return isinstance(tensor, DTensor) and any(
        isinstance(placement, Shard) and placement.dim >= batch_dims
        for placement in tensor.placements
    )


def gather(shard: Tensor, like: DTensor) -> Tensor:
    """Return the whole of a tensor: one all-gather.

    Args:
        shard: this process's part.
        like: a tensor of that shape and placement.
    """
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


def _placed(shard: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
