"""Linear layers of spectral norm 1 that stack, as TorchRL's losses stack critics under vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FIRST_CALLS = 15


def spectral_normalize(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    r"""Return a weight, or each of a stack, divided by its largest singular value.

    :math:`W / \sigma` with :math:`\sigma = u^\top W v`; a weight with :math:`\sigma = 0` stays.

    Args:
        weight: :math:`W`, ``(*stack, out, in)``.
        u: leading left singular vector, of unit length, ``(*stack, out)``.
        v: leading right singular vector, of unit length, ``(*stack, in)``.

    Returns:
        ``(*stack, out, in)``, of spectral norm 1 as far as the vectors are right.

    Example:
        >>> critics = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), 5 * torch.eye(2)])
        >>> first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> spectral_normalize(critics, first, first)[:, 0, 0]
        tensor([1., 1.])

    Source: Miyato et al. 2018, arXiv:1802.05957, eq. 8.
    """
    sigma = (u * _times(weight, v)).sum(-1)
    return weight / torch.where(sigma == 0, 1.0, sigma)[..., None, None]


class SpectralLinear(nn.Linear):
    r"""Linear layer whose weight is divided by its largest singular value.

    :math:`y = x W^\top / \sigma + b` with :math:`\sigma = u^\top W v`; ``weight`` is the raw
    :math:`W`, and gradients flow through :math:`\sigma` with ``u`` and ``v`` constant. These two
    buffers follow the leading singular vectors: a forward in training mode first moves them on,
    in place, one in evaluation mode leaves them. In a TorchRL loss each network of a stack has
    vectors of its own; the loss keeps the mode that its first critic had, out of reach of
    ``loss.eval()``.

    With ``iterations=1`` this is :func:`torch.nn.utils.parametrizations.spectral_norm`, which vmap
    has no rule for: :math:`u \leftarrow W v/|W v|, v \leftarrow W^\top u/|W^\top u|`. More of them
    go before that as a Chebyshev polynomial of :math:`W^\top W`, which is at most 1 below
    :math:`|W v|^2` and grows fastest above, because a power iteration lags behind Muon, whose every
    update has as much of each direction. In SAC's first 120 updates at width 256 one iteration is
    off by up to 22 % with Muon at 0.02 and 16 % with Adam at 3e-4, eight by 3 % and 2 %.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        bias: whether there is a bias, which is not normalised.
        device: of the parameters and vectors.
        dtype: of the parameters and vectors.
        iterations: pairs of products with :math:`W` and :math:`W^\top` in each forward in training
            mode, at least 1.

    Raises:
        ValueError: if ``iterations`` is below 1.

    Example:
        >>> layer = SpectralLinear(3, 8)
        >>> layer(torch.ones(5, 3)).shape
        torch.Size([5, 8])
        >>> round(torch.linalg.matrix_norm(layer.normalized_weight(), 2).item(), 3)
        1.0

    Source: Miyato et al. 2018, arXiv:1802.05957, algorithm 1; of networks in reinforcement
    learning Gogianu et al. 2021, arXiv:2105.05246; the polynomial is Saad 2011, Numerical Methods
    for Large Eigenvalue Problems, section 7.4.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        iterations: int = 8,
    ) -> None:
        if iterations < 1:
            raise ValueError(f"SpectralLinear needs iterations of at least 1, not {iterations}.")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.iterations = iterations
        self.register_buffer("u", self.weight.new_empty(out_features))
        self.register_buffer("v", self.weight.new_empty(in_features))
        self.reset_vectors()

    def reset_parameters(self) -> None:
        """Draw a new weight and bias, and find the vectors."""
        super().reset_parameters()
        if "u" in self._buffers:  # not yet when nn.Linear's own constructor calls
            self.reset_vectors()

    @torch.no_grad()
    def reset_vectors(self) -> None:
        """Find the vectors anew from random ones: call it after a weight was set by hand."""
        u, v = (F.normalize(torch.randn_like(old), dim=-1) for old in (self.u, self.v))
        for _ in range(_FIRST_CALLS):
            u, v = _follow(self.weight, u, v, self.iterations)
        self.u.copy_(u)
        self.v.copy_(v)

    def normalized_weight(self) -> Tensor:
        """Return the weight of spectral norm 1, ``(out, in)``, by the vectors as they stand."""
        return spectral_normalize(self.weight, self.u.clone(), self.v.clone())

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the normalised weight, plus the bias.

        Args:
            input: ``(*batch, in_features)``.

        Returns:
            ``(*batch, out_features)``.
        """
        if self.training:
            with torch.no_grad():
                u, v = _follow(self.weight, self.u, self.v, self.iterations)
                self.u.copy_(u)
                self.v.copy_(v)
        else:
            # A backward needs them as they are now, whatever a later forward writes.
            u, v = self.u.clone(), self.v.clone()
        return F.linear(input, spectral_normalize(self.weight, u, v), self.bias)

    def extra_repr(self) -> str:
        """Return the options, for the representation as text."""
        return f"{super().extra_repr()}, iterations={self.iterations}"


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the product of a matrix and a vector, or of each of a stack."""
    # As a row: a batch of columns takes ten times as long on a CPU (torch 2.13).
    return (vector.unsqueeze(-2) @ matrix.mT).squeeze(-2)


def _follow(weight: Tensor, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return new tensors nearer to the leading singular vectors."""
    image = _times(weight, v)
    if iterations > 1:
        # A Rayleigh quotient bounds what is damped: sigma can only rise towards the largest.
        bound = image.square().sum(-1, keepdim=True).clamp(min=torch.finfo(image.dtype).tiny)
        before, x = v, 2 / bound * _times(weight.mT, image) - v
        for _ in range(iterations - 2):
            mapped = 2 / bound * _times(weight.mT, _times(weight, x)) - x
            before, x = x, 2 * mapped - before
            size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            before, x = before / size, x / size
        image = _times(weight, x)
    u = _direction(image, u)
    return u, _direction(_times(weight.mT, u), v)


def _direction(vector: Tensor, otherwise: Tensor) -> Tensor:
    """Return a vector of unit length; where its length is 0, as of a weight of zeros, another."""
    size = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return torch.where(size > 0, vector / size, otherwise)
