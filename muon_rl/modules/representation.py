"""Networks from an observation, a vector or a grid, to the hidden state of a world model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.modules import LSTMModule

from muon_rl.choices import check_choice
from muon_rl.modules.latent import LatentNorm, latent_norm_of
from muon_rl.modules.mlp import _ACTIVATIONS, ActivationNorm, Init, mlp

Encoder = Literal["mlp", "conv"]


class ToUnitFloat(nn.Module):
    """Numbers of any dtype, boolean too, as floats of the network's precision; bytes to [0, 1].

    Args:
        spec: of what comes in: ``uint8`` is divided by its upper bound, 255 if it has none.

    Example:
        >>> from torchrl.data import Bounded
        >>> ToUnitFloat(Bounded(0, 255, 2, dtype=torch.uint8))(torch.tensor([0, 51]).byte())
        tensor([0.0000, 0.2000])
    """

    scale: Tensor

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        high = getattr(spec.space, "high", None) if spec.dtype == torch.uint8 else None
        largest = 1.0 if high is None else max(1.0, float(high.max()))
        self.register_buffer("scale", torch.tensor(1 / largest))

    def forward(self, x: Tensor) -> Tensor:
        """Return floats of the same shape."""
        return x.to(self.scale.dtype) * self.scale


class GridEncoder(nn.Module):
    """Convolutions without padding, an activation after each, to one vector of features.

    Args:
        shape: of a grid, ``(channels, height, width)``, or with the channels last.
        channels: of each convolution's output, at least one.
        kernel: edge of each convolution's kernel, in cells.
        stride: of each convolution, in cells.
        channels_last: whether grids come as ``(height, width, channels)``.
        activation: as of :func:`~muon_rl.modules.mlp`.
        init: default is torch's; orthogonal scales by the activation, biases are 0.

    Raises:
        ValueError: if ``shape`` is no grid or smaller than the kernels need, or there is no such
            activation.

    Example:
        >>> encoder = GridEncoder((10, 10, 4), [16, 32], channels_last=True)
        >>> encoder(torch.zeros(7, 5, 10, 10, 4)).shape
        torch.Size([7, 5, 1152])

    Source: the network of Young and Tian 2019, arXiv:1903.03176, is one such convolution.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int] = (16, 32),
        *,
        kernel: int = 3,
        stride: int = 1,
        channels_last: bool = False,
        activation: str = "relu",
        init: Init = "default",
    ) -> None:
        super().__init__()
        if len(shape) != 3 or not channels:
            raise ValueError(
                "A convolutional encoder needs channels and a grid (channels, height, width) as "
                f"observation, but the shape is {tuple(shape)} and channels is {channels!r}."
            )
        check_choice("activation", activation, _ACTIVATIONS)
        self.shape, self.channels_last = tuple(shape), channels_last
        size, *edges = (shape[-1], *shape[:-1]) if channels_last else shape
        kind, gain = _ACTIVATIONS[activation]
        layers: list[nn.Module] = []
        for width in channels:
            convolution = nn.Conv2d(size, width, kernel, stride)
            if init == "orthogonal":
                nn.init.orthogonal_(convolution.weight, gain)
                nn.init.zeros_(cast(Tensor, convolution.bias))
            layers += [convolution, kind()]
            size, edges = width, [(edge - kernel) // stride + 1 for edge in edges]
            if min(edges) < 1:
                raise ValueError(
                    f"Convolutions {list(channels)} of {kernel=} and {stride=} leave nothing of a "
                    f"grid of shape {tuple(shape)} (channels_last={channels_last}): use fewer, or "
                    "a smaller kernel or stride."
                )
        self.layers = nn.Sequential(*layers)
        self.out_features = size * edges[0] * edges[1]

    def forward(self, grid: Tensor) -> Tensor:
        """Return the features of grids.

        Args:
            grid: floats, ``(*batch, channels, height, width)``, or with the channels last.

        Returns:
            ``(*batch, out_features)``.
        """
        batch = grid.shape[:-3]
        flat = grid.reshape((batch.numel(), *self.shape))
        features = self.layers(flat.movedim(-1, -3) if self.channels_last else flat)
        return features.reshape((*batch, self.out_features))


def representation(
    spec: TensorSpec,
    latent: int = 256,
    *,
    encoder: Encoder = "mlp",
    hidden: Sequence[int] = (256,),
    channels: Sequence[int] = (16, 32),
    kernel: int = 3,
    stride: int = 1,
    channels_last: bool = False,
    lstm: bool = False,
    latent_norm: LatentNorm = "minmax",
    residual: bool = False,
    activation: str = "relu",
    activation_norm: ActivationNorm = "none",
    init: Init = "default",
) -> TensorDictModuleBase:
    """Return the network that reads ``observation`` and writes ``hidden_state`` ``(*batch, H)``.

    With an LSTM it also reads ``recurrent_state_h``, ``recurrent_state_c`` (zeros where missing)
    and ``is_init``, and writes the two states under ``next``, as torchrl's ``LSTMModule``: the
    environment needs ``InitTracker`` and the primers of ``get_primers_from_module``, and on
    trajectories ``(*batch, time)`` it runs under ``set_recurrent_mode(True)``, as every loss does.

    Args:
        spec: of the observation, a vector for ``mlp``, a grid for ``conv``; of any dtype, as
            boolean and ``uint8`` become floats in [0, 1].
        latent: H, width of the hidden state.
        encoder: mlp, or conv for convolutions below the perceptron.
        hidden: width of each hidden layer of the perceptron.
        channels: of each convolution's output.
        kernel: edge of each convolution's kernel, in cells.
        stride: of each convolution, in cells.
        channels_last: whether grids come as ``(height, width, channels)``, as MinAtar's.
        lstm: whether an LSTM of width H stands between the perceptron and the norm.
        latent_norm: of the hidden state: minmax to [0, 1], layernorm or none.
        residual: whether the perceptron has residual blocks, all of one width.
        activation: as of :func:`~muon_rl.modules.mlp`.
        activation_norm: as of :func:`~muon_rl.modules.mlp`.
        init: as of :func:`~muon_rl.modules.mlp`.

    Raises:
        ValueError: if the observation does not fit the encoder, or an option is none of those
            named.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Binary
        >>> network = representation(
        ...     Binary(shape=(10, 10, 4)), 32, encoder="conv", channels_last=True)
        >>> network(TensorDict(observation=torch.ones(7, 10, 10, 4, dtype=torch.bool)))[
        ...     "hidden_state"].shape
        torch.Size([7, 32])
    """
    grid: list[nn.Module] = []
    if encoder == "mlp":
        if len(spec.shape) != 1:
            raise ValueError(
                "encoder='mlp' needs a vector as observation, but the environment's has shape "
                f"{tuple(spec.shape)}: a grid takes encoder='conv'."
            )
        features = spec.shape[-1]
    elif encoder == "conv":
        convolutions = GridEncoder(
            spec.shape, channels, kernel=kernel, stride=stride, channels_last=channels_last,
            activation=activation, init=init,
        )  # fmt: skip
        grid, features = [convolutions], convolutions.out_features
    else:
        raise ValueError(f"encoder must be one of mlp, conv, but is {encoder!r}.")
    body = mlp(
        features, latent, hidden, residual=residual, activation=activation,
        activation_norm=activation_norm, init=init,
    )  # fmt: skip
    norm = latent_norm_of(latent_norm, latent)
    layers = [ToUnitFloat(spec), *grid, body]
    if not lstm:
        return TensorDictModule(
            nn.Sequential(*layers, norm), in_keys=["observation"], out_keys=["hidden_state"]
        )
    states = ["recurrent_state_h", "recurrent_state_c"]
    return TensorDictSequential(
        TensorDictModule(
            nn.Sequential(*layers), in_keys=["observation"], out_keys=["hidden_state"]
        ),
        LSTMModule(
            latent,
            latent,
            in_keys=["hidden_state", *states],
            out_keys=["hidden_state", *(("next", state) for state in states)],
        ),
        TensorDictModule(norm, in_keys=["hidden_state"], out_keys=["hidden_state"]),
    )
