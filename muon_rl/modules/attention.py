"""Pre-norm transformer blocks that compute the rows that are read, and positions of a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from muon_rl.modules.mlp import Init


class SelfAttention(nn.Module):
    r"""Multi-head attention :math:`\mathrm{softmax}(Q K^\top / \sqrt{d_h})\, V`, heads joined by a
    linear layer.

    Query, key and value have a layer each: as quick as one of three times the rows on a CPU, and
    three matrices for an optimizer that takes each as a whole. Keys have no bias, which would add
    the same to all scores of a query.

    Args:
        width: of what comes in and what goes out, a multiple of ``heads``.
        heads: their number.

    Raises:
        ValueError: if the heads do not divide the width.

    Example:
        >>> attention = SelfAttention(8, 2)
        >>> attention(torch.zeros(7, 1, 8), torch.zeros(7, 5, 8)).shape
        torch.Size([7, 1, 8])

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"num_heads must divide d_model, but is {heads} for {width}.")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, asking: Tensor, asked: Tensor) -> Tensor:
        """Return what rows read from others.

        Args:
            asking: ``(N, queries, width)``.
            asked: ``(N, rows, width)``.

        Returns:
            ``(N, queries, width)``.
        """
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, asking), (self.key, asked), (self.value, asked))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LossDropout(nn.Dropout):
    """Dropout where a loss is trained: not in evaluation mode, nor without gradients.

    A collector plays with a policy in training mode but without gradients, so the policy that acts
    is the one that is evaluated.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, parts of it set to 0 and the others scaled up, or as it is."""
        return F.dropout(x, self.p, self.training and torch.is_grad_enabled())


class Block(nn.Module):
    r"""Pre-norm block: :math:`y = x + \mathrm{attention}(\mathrm{norm}(x))`, then
    :math:`y + W_2\, \mathrm{gelu}(W_1\, \mathrm{norm}(y))`, four times as wide between.

    Args:
        width: of each row.
        heads: of the attention.
        dropout: share of each branch's output that is set to 0 (:class:`LossDropout`).
        init: default is torch's; orthogonal has zero biases, and scales by the activation.

    Raises:
        ValueError: if the heads do not divide the width.

    Example:
        >>> Block(8, 2)(torch.zeros(7, 5, 8)).shape
        torch.Size([7, 5, 8])

    Source: Xiong et al. 2020, arXiv:2002.04745, figure 1b.
    """

    def __init__(
        self, width: int, heads: int, dropout: float = 0.0, *, init: Init = "default"
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = LossDropout(dropout) if dropout else nn.Identity()
        if init == "orthogonal":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    activated = layer is self.feedforward[0]
                    nn.init.orthogonal_(layer.weight, math.sqrt(2) if activated else 1.0)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, only: Tensor | None = None) -> Tensor:
        """Return the rows after the block, or one of them.

        Args:
            x: ``(N, rows, width)``.
            only: number of the row that is read, ``(N,)``; the work for the others is left out.

        Returns:
            ``(N, rows, width)``, or ``(N, 1, width)``.
        """
        asked = asking = self.attention_norm(x)
        if only is not None:
            at = only.reshape(-1, 1, 1)
            x, asking = x.take_along_dim(at, 1), asked.take_along_dim(at, 1)
        x = x + self.dropout(self.attention(asking, asked))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


def sinusoidal_positions(rows: int, columns: int, width: int) -> Tensor:
    r"""Return fixed positions of a grid: the first half tells the row, the second the column.

    Each half holds :math:`\sin(t\,\omega_i)` at :math:`2i` and :math:`\cos(t\,\omega_i)` at
    :math:`2i + 1`, with :math:`\omega_i = 10000^{-2i/h}`, :math:`h` half the width and :math:`t`
    the row or the column, counted from 0.

    Args:
        rows: of the grid.
        columns: of the grid.
        width: of a position, a multiple of 4.

    Returns:
        ``(rows * columns, width)``, row by row.

    Raises:
        ValueError: if the width is no multiple of 4.

    Example:
        >>> sinusoidal_positions(1, 2, 4)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.0000, 1.0000, 0.8415, 0.5403]])

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, for each dimension.
    """
    if width % 4:
        raise ValueError(f"Sinusoidal positions need a d_model in multiples of 4, not {width}.")
    frequencies = 10_000 ** -torch.arange(0, 1, 4 / width, dtype=torch.float64)

    def along(length: int) -> Tensor:
        angles = torch.arange(length).unsqueeze(-1) * frequencies
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

    grid = (rows, columns, -1)
    halves = [along(rows).unsqueeze(1).expand(grid), along(columns).expand(grid)]
    return torch.cat(halves, -1).flatten(0, 1).to(torch.get_default_dtype())
