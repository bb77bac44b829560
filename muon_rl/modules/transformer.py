"""A transformer over the patches of a board."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torchrl.data import TensorSpec

from muon_rl.modules.attention import Block, sinusoidal_positions
from muon_rl.modules.boards import BoardLayout, Patches
from muon_rl.modules.mlp import Init

Readout = Literal["head", "token", "mean"]
Positions = Literal["learned", "sinusoidal"]


class GridTransformer(nn.Module):
    """Pre-norm transformer over the patches of a board, read out as one vector.

    Each patch's cells go through one linear layer, get their position and pass the blocks. With
    the readouts ``head`` and ``token`` the last block computes the one row that is read; the
    output is that of the whole.

    Args:
        spec: of the observation, ``uint8`` tokens ``(height, width)`` or float planes
            ``(channels, height, width)``.
        channels_last: whether planes are ``(height, width, channels)`` instead; ``None`` is no,
            but refuses a last dim of 3, as of Snake's ``rgb3``.
        d_model: width of each row, and of the output.
        num_layers: blocks.
        num_heads: of each block's attention, a divisor of ``d_model``.
        patch: edge of a patch in cells; ``None`` is 2 where height and width are even, else 1.
        readout: head for the patch of the snake's head (of a board without one, as after a death,
            the first patch), token for a row of its own, mean over all patches.
        positions: learned, or sinusoidal in rows and columns.
        cell_width: size of the embedding of a token; planes need none.
        dropout: share of each branch that is set to 0 where a loss is trained; never while acting
            or evaluating.
        init: default is torch's; orthogonal scales by the activation, biases are 0.

    Attributes:
        out_features: size of the output.

    Raises:
        ValueError: if a size is below 1, the observation is no board, ``head`` is to be read from
            planes that show none, the patches do not tile it, or an option is none of those named.

    Example:
        >>> from torchrl.data import Unbounded
        >>> network = GridTransformer(Unbounded((10, 10), dtype=torch.uint8))
        >>> network(torch.full((7, 5, 10, 10), 6, dtype=torch.uint8)).shape
        torch.Size([7, 5, 64])

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, figure 1 (patches, token, blocks).
    """

    positions: Tensor

    def __init__(
        self,
        spec: TensorSpec,
        *,
        channels_last: bool | None = None,
        d_model: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        patch: int | None = None,
        readout: Readout = "head",
        positions: Positions = "learned",
        cell_width: int = 16,
        dropout: float = 0.0,
        init: Init = "default",
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("readout", readout, get_args(Readout)),
            ("positions", positions, get_args(Positions)),
            ("init", init, get_args(Init)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, but is {value!r}.")
        if min(d_model, num_layers, cell_width) < 1 or not 0 <= dropout < 1:
            raise ValueError(
                "Needs d_model, num_layers and cell_width >= 1 and dropout in [0, 1), but has "
                f"{d_model=}, {num_layers=}, {cell_width=}, {dropout=}."
            )
        self.layout = layout = BoardLayout.of(spec, channels_last)
        if readout == "head" and not layout.shows_head:
            raise ValueError(
                "readout='head' needs tokens, or four planes of which the first shows the head, "
                f"but the observation has {layout.channels} planes: take readout='token'."
            )
        if patch is None:
            patch = 1 if layout.height % 2 or layout.width % 2 else 2
        self.readout, self.out_features = readout, d_model
        self.patches = Patches(layout, patch, cell_width)
        self.project = nn.Linear(self.patches.out_features, d_model)
        rows, columns = self.patches.rows, self.patches.columns
        if positions == "learned":
            self.positions = nn.Parameter(_vectors(rows * columns, d_model))
        else:
            self.register_buffer(
                "positions", sinusoidal_positions(rows, columns, d_model), persistent=False
            )
        self.token = nn.Parameter(_vectors(1, d_model)) if readout == "token" else None
        self.blocks = nn.ModuleList(
            Block(d_model, num_heads, dropout, init=init) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        if init == "orthogonal":
            nn.init.orthogonal_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, observation: Tensor) -> Tensor:
        """Return the features of boards.

        Args:
            observation: as in the spec, behind any batch dims.

        Returns:
            ``(*batch, d_model)``.
        """
        patches, head = self.patches(observation)
        x = self.project(patches) + self.positions
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, -1), x], 1)
        only = {"head": head, "token": torch.zeros_like(head), "mean": None}[self.readout]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = self.norm(last(x, only)).mean(1)
        batch = observation.shape[: observation.ndim - len(self.layout.shape)]
        return x.reshape((*batch, self.out_features))


def _vectors(number: int, width: int) -> Tensor:
    """Return rows of normal numbers with the second moment of sines and cosines."""
    return torch.randn(number, width) / math.sqrt(2)
