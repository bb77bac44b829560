"""Multi-layer perceptrons, plain and residual, with the norms that agents use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrl.modules import MLP

from muon_rl.choices import check_choice
from muon_rl.modules.spectral import SpectralLinear

ActivationNorm = Literal["none", "layernorm", "l2"]
Init = Literal["default", "orthogonal"]

# The gain that keeps the second moment; torch knows none of the smooth ones, which are near ReLU.
_ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {
    "relu": (nn.ReLU, math.sqrt(2)),
    "leaky_relu": (nn.LeakyReLU, nn.init.calculate_gain("leaky_relu", 0.01)),
    "elu": (nn.ELU, math.sqrt(2)),
    "selu": (nn.SELU, nn.init.calculate_gain("selu")),
    "gelu": (nn.GELU, math.sqrt(2)),
    "silu": (nn.SiLU, math.sqrt(2)),
    "mish": (nn.Mish, math.sqrt(2)),
    "tanh": (nn.Tanh, nn.init.calculate_gain("tanh")),
}


class L2Norm(nn.Module):
    r"""Unit length: :math:`x / \sqrt{|x|^2 + 10^{-8}}` over the last dim.

    The length is 1 to within :math:`10^{-5}` where :math:`|x| > 0.03`. Zero stays zero, and the
    gradient, at most :math:`10^4`, is finite there.

    Args:
        normalized_shape: size of the last dim, as in :class:`torch.nn.LayerNorm`.

    Example:
        >>> L2Norm(2)(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    def __init__(self, normalized_shape: int) -> None:
        super().__init__()
        self.normalized_shape = normalized_shape

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` ``(*batch, features)`` with its last dim of unit length."""
        return x * (x.square().sum(-1, keepdim=True) + 1e-8).rsqrt()


_NORMS = {"layernorm": nn.LayerNorm, "l2": L2Norm}


class ResidualBlock(nn.Module):
    r"""Pre-norm residual block :math:`x + L_2(\phi(L_1(\mathrm{norm}(x))))`.

    Args:
        width: size of input and output, and of the layer between.
        layer: makes the linear layers :math:`L` of two sizes.
        norm: makes the norm of the width, if there is one.
        activation: makes :math:`\phi`.

    Example:
        >>> ResidualBlock(4, norm=nn.LayerNorm)(torch.ones(7, 4)).shape
        torch.Size([7, 4])

    Source: He et al. 2016, arXiv:1603.05027; Lee et al. 2024, arXiv:2410.09754, whose layer between
    is four times as wide.
    """

    def __init__(
        self,
        width: int,
        *,
        layer: Callable[[int, int], nn.Linear] = nn.Linear,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.norm = norm(width) if norm else nn.Identity()
        self.first = layer(width, width)
        self.activation = activation()
        self.second = layer(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` ``(*batch, width)`` and the branch, of the same shape."""
        return x + self.second(self.activation(self.first(self.norm(x))))


class ResidualMLP(nn.Sequential):
    """A linear layer to the width, residual blocks, a norm, and a linear head.

    No activation stands before the head: it reads the sum of all blocks, as in SimBa.

    Args:
        inputs: size of all inputs together.
        outputs: size of the output.
        width: of every block.
        blocks: their number.
        layer: makes the linear layers below the head, of two sizes.
        norm: makes the norms of the width, in the blocks and after the last, if there are any.
        activation: makes the activation within each block.

    Example:
        >>> ResidualMLP(5, 1, width=8, blocks=2)(torch.ones(7, 3), torch.ones(7, 2)).shape
        torch.Size([7, 1])

    Source: Lee et al. 2024, arXiv:2410.09754, section 4.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int,
        blocks: int,
        layer: Callable[[int, int], nn.Linear] = nn.Linear,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        options: dict[str, Any] = {"layer": layer, "norm": norm, "activation": activation}
        super().__init__(
            layer(inputs, width),
            *(ResidualBlock(width, **options) for _ in range(blocks)),
            *([norm(width)] if norm else []),
            nn.Linear(width, outputs),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return ``(*batch, outputs)`` for inputs ``(*batch, features)``, concatenated."""
        return super().forward(torch.cat(inputs, -1))


def mlp(
    inputs: int,
    outputs: int,
    hidden: Sequence[int] = (256, 256),
    *,
    residual: bool = False,
    activation: str = "relu",
    activation_norm: ActivationNorm = "none",
    spectral_norm: bool = False,
    init: Init = "default",
) -> nn.Sequential:
    r"""Return a multi-layer perceptron, whose last layer is a linear head.

    Plain, it is torchrl's ``MLP``: for each hidden layer :math:`x \leftarrow \phi(\mathrm{norm}(W x
    + b))`. Residual, it is a :class:`ResidualMLP`: :math:`x \leftarrow x + W_2\,\phi(W_1\,
    \mathrm{norm}(x))`. Several inputs are concatenated.

    Args:
        inputs: size of all inputs together.
        outputs: size of the output.
        hidden: width of each hidden layer, or of each residual block, in units; without one, a
            plain network is linear.
        residual: whether there are residual blocks, all of one width.
        activation: relu, leaky_relu, elu, selu, gelu, silu, mish or tanh.
        activation_norm: what stands before each activation (before each residual block's first
            layer and the head): none, layernorm, or l2 for unit length.
        spectral_norm: whether each weight below the head has spectral norm 1
            (:class:`~muon_rl.modules.SpectralLinear`). The head's has not: it gives what comes out
            its scale, as returns need it.
        init: default is torch's; orthogonal has zero biases, and weights with orthogonal rows or
            columns, times the activation's gain (:math:`\sqrt 2` for relu and its like) where an
            activation follows, else 1, as in the head.

    Raises:
        ValueError: if a width is no positive integer, residual blocks differ in width or there are
            none, or an option is none of those named.

    Example:
        >>> mlp(3, 1, [8], activation="silu", activation_norm="l2")
        MLP(
          (0): Linear(in_features=3, out_features=8, bias=True)
          (1): L2Norm()
          (2): SiLU()
          (3): Linear(in_features=8, out_features=1, bias=True)
        )

    Source: the norm's place in a plain network is DroQ's, Hiraoka et al. 2022, arXiv:2110.02034;
    spectral norm below the head, Gogianu et al. 2021, arXiv:2105.05246, and Bjorck et al. 2021,
    arXiv:2106.01151; orthogonal weights, Saxe et al. 2014, arXiv:1312.6120.
    """
    check_choice("activation", activation, _ACTIVATIONS)
    check_choice("activation_norm", activation_norm, ["none", *_NORMS])
    check_choice("init", init, ["default", "orthogonal"])
    widths = list(hidden)
    if not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"hidden must hold widths, positive integers, but is {hidden!r}.")
    kind, gain = _ACTIVATIONS[activation]
    norm, layer = _NORMS.get(activation_norm), SpectralLinear if spectral_norm else nn.Linear
    network: nn.Sequential
    if residual:
        if len(set(widths)) != 1:
            raise ValueError(
                "With residual=True hidden needs one entry for each block, at least one and all "
                f"equal, for the width that they share, but is {hidden!r}."
            )
        network = ResidualMLP(
            inputs, outputs, width=widths[0], blocks=len(widths),
            layer=layer, norm=norm, activation=kind,
        )  # fmt: skip
        activated = [block.first for block in network if isinstance(block, ResidualBlock)]
    else:
        network = MLP(
            inputs, outputs, num_cells=widths, layer_class=layer, activation_class=kind,
            norm_class=norm, norm_kwargs=[{"normalized_shape": width} for width in widths],
        )  # fmt: skip
        if isinstance(network[-1], SpectralLinear):
            network[-1] = nn.Linear(network[-1].in_features, outputs)
        activated = [part for part in list(network)[:-1] if isinstance(part, nn.Linear)]
    if init == "orthogonal":
        for part in network.modules():
            if isinstance(part, nn.Linear):
                nn.init.orthogonal_(part.weight, gain if part in activated else 1.0)
                nn.init.zeros_(part.bias)
            if isinstance(part, SpectralLinear):
                part.reset_vectors()
    return network
