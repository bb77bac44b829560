"""A small convolutional network over a board."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import TensorSpec

from muon_rl.modules.boards import KINDS, WALL, BoardLayout
from muon_rl.modules.mlp import _ACTIVATIONS, Init
from muon_rl.modules.representation import GridEncoder


class GridConvolution(nn.Module):
    """Convolutions over a board within walls, then one layer to a vector.

    The walls around the board, as wide as the convolutions eat away, are of the kind 7, or planes
    of zeros: each cell keeps its place, and a border is seen.

    Args:
        spec: of the observation, ``uint8`` tokens ``(height, width)`` or float planes
            ``(channels, height, width)``.
        channels_last: whether planes are ``(height, width, channels)`` instead; ``None`` is no,
            but refuses a last dim of 3, as of Snake's ``rgb3``.
        features: size of the output.
        channels: of each convolution's output, at least one.
        kernel: edge of each convolution's kernel, in cells, odd.
        cell_width: size of the embedding of a token; planes need none.
        activation: as of :func:`~muon_rl.modules.mlp`.
        init: default is torch's; orthogonal scales by the activation, biases are 0.

    Attributes:
        out_features: size of the output.

    Raises:
        ValueError: if a size is below 1, the observation is no board, the kernel even, or an option
            none of those named.

    Example:
        >>> import torch
        >>> from torchrl.data import Unbounded
        >>> network = GridConvolution(Unbounded((10, 10), dtype=torch.uint8))
        >>> network(torch.zeros(7, 5, 10, 10, dtype=torch.uint8)).shape
        torch.Size([7, 5, 128])
    """

    def __init__(
        self,
        spec: TensorSpec,
        *,
        channels_last: bool | None = None,
        features: int = 128,
        channels: Sequence[int] = (32, 32),
        kernel: int = 3,
        cell_width: int = 16,
        activation: str = "relu",
        init: Init = "default",
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, but is {kernel}.")
        if min(features, cell_width, *channels) < 1:
            raise ValueError(
                "Needs features, channels and cell_width >= 1, but has "
                f"{features=}, {channels=}, {cell_width=}."
            )
        self.layout = layout = BoardLayout.of(spec, channels_last)
        self.out_features = features
        self.cells = None if layout.channels else nn.Embedding(KINDS, cell_width)
        self.walls = kernel // 2 * len(channels)
        height, width = layout.height + 2 * self.walls, layout.width + 2 * self.walls
        self.convolutions = GridEncoder(
            (height, width, layout.channels or cell_width), channels,
            kernel=kernel, channels_last=True, activation=activation, init=init,
        )  # fmt: skip
        kind, gain = _ACTIVATIONS[activation]
        self.layer = nn.Linear(self.convolutions.out_features, features)
        if init == "orthogonal":
            nn.init.orthogonal_(self.layer.weight, gain)
            nn.init.zeros_(self.layer.bias)
        self.activation = kind()

    def forward(self, observation: Tensor) -> Tensor:
        """Return the features of boards.

        Args:
            observation: as in the spec, behind any batch dims.

        Returns:
            ``(*batch, features)``.
        """
        walls = [0, 0, *[self.walls] * 4]
        board = self.layout.flat(observation)
        if self.cells is None:
            cells = F.pad(board, walls)
        else:
            cells = self.cells(F.pad(board, walls, value=WALL).squeeze(-1).int())
        batch = observation.shape[: observation.ndim - len(self.layout.shape)]
        x = self.activation(self.layer(self.convolutions(cells)))
        return x.reshape((*batch, self.out_features))
