"""Scalars as categorical distributions over bins that are even in signed-hyperbolic space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrl.modules.functional import signed_hyperbolic
from torchrl.objectives import two_hot_encode

from muon_rl.two_hot import two_hot_bins, two_hot_loss, two_hot_value


class SignedHyperbolicTwoHot(nn.Module):
    r"""Categorical code of a scalar, two-hot between the bins next to its squashed value.

    :math:`x = h^{-1}\big(\sum_i p_i\, b_i\big)` with :math:`h(x) = \mathrm{sign}(x)(\sqrt{|x| + 1}
    - 1) + 10^{-3} x` and bins :math:`b_i` even on :math:`[-B, B]`. Called with logits ``(*batch,
    bins)`` it returns the value ``(*batch, 1)``. The methods are those of torchrl's
    ``SymExpTwoHot``, which interpolates between bins in raw space; this one does so in squashed
    space, as MuZero and Muesli.

    Args:
        bins: their number, at least 2; an odd one has a bin at 0.
        limit: :math:`B`, the last bin, in squashed units, > 0; 30 stands for values up to 904.7.

    Raises:
        ValueError: if ``bins`` is below 2 or ``limit`` not above 0.

    Example:
        >>> code = SignedHyperbolicTwoHot()
        >>> code.decode(code.encode(torch.tensor([-7.5, 250.0])).log())
        tensor([ -7.5000, 250.0000])

    Source: Pohlen et al. 2018, arXiv:1805.11593 (the transform); Schrittwieser et al. 2020,
    arXiv:1911.08265, appendix F (the bins, there 601 on 300).
    """

    bins: Tensor

    def __init__(self, bins: int = 61, limit: float = 30.0) -> None:
        super().__init__()
        if bins < 2 or not limit > 0:
            raise ValueError(f"Needs bins >= 2 and limit > 0, but has {bins=} and {limit=}.")
        self.limit = limit
        self.register_buffer("bins", two_hot_bins(torch.empty(bins), limit=limit))

    def encode(self, target: Tensor) -> Tensor:
        """Return the two-hot probabilities of values; those beyond the last bin are clipped.

        Args:
            target: values, shape ``(*batch)``.

        Returns:
            Probabilities, ``(*batch, bins)``.
        """
        return two_hot_encode(signed_hyperbolic(target), self.bins)

    def decode(self, logits: Tensor) -> Tensor:
        """Return the values that logits stand for.

        Args:
            logits: in nats, not normalised, shape ``(*batch, bins)``.

        Returns:
            Values, ``(*batch)``.

        Raises:
            ValueError: if the last dim is not the number of bins.
        """
        return two_hot_value(self._checked(logits), limit=self.limit)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of logits to the two-hot code of values.

        Args:
            logits: in nats, not normalised, shape ``(*batch, bins)``.
            target: values, shape ``(*batch)`` or ``(*batch, 1)``.

        Returns:
            Nats, ``(*batch)``.

        Raises:
            ValueError: if the shapes do not fit.
        """
        return two_hot_loss(self._checked(logits), target, limit=self.limit)

    def forward(self, logits: Tensor) -> Tensor:
        """Return the values ``(*batch, 1)`` that logits ``(*batch, bins)`` stand for."""
        return self.decode(logits).unsqueeze(-1)

    def _checked(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] != len(self.bins):
            raise ValueError(
                f"The code has {len(self.bins)} bins, but the logits' shape is "
                f"{tuple(logits.shape)}."
            )
        return logits
