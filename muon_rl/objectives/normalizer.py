r"""The scale that advantages are divided by: a running second moment, part of the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMALIZERS = ("second_moment", "variance")


class AdvantageNormalizer(nn.Module):
    r"""Keep an exponential moving average of how large advantages are.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) \, E[x^2], \qquad
        \sigma_t = \sqrt{\max(m_t / (1 - \beta^t), \epsilon)}

    The moment is about zero: an advantage that has the same sign in all states stays large.
    Calling the module updates the average in training mode, and returns :math:`\sigma` in both.
    No value leaves the device. The average is that of one process.

    A batch that is masked throughout, or whose average is not finite, changes nothing: a NaN shows
    in the loss that it came to, and does not stay here for all batches to come.

    Args:
        decay: :math:`\beta`, dimensionless, in [0, 1).
        min_advantage_variance: :math:`\epsilon`, reward units squared, > 0.
        normalizer: ``"second_moment"``; or ``"variance"``, what a well-known implementation does,
            to reproduce its runs: the unbiased variance of the batch about its own mean, averaged
            from 1 on without correction, plus :math:`\epsilon`, and **no root**.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> normalizer = AdvantageNormalizer()
        >>> for advantage in (2.0, 2.0, 4.0):
        ...     scale = normalizer(torch.tensor([advantage, -advantage]))
        ...     print(f"{scale:.4f}, squared {normalizer.second_moment:.6f}")
        2.0000, squared 4.000000
        2.0000, squared 4.000000
        2.8355, squared 8.040268

    Source: Hessel et al. 2021, arXiv:2104.06159, section 4.5.
    """

    moment: Tensor
    weight: Tensor

    def __init__(
        self,
        decay: float = 0.99,
        *,
        min_advantage_variance: float = 1e-8,
        normalizer: str = "second_moment",
    ) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), but is {decay}.")
        if not min_advantage_variance > 0.0:
            raise ValueError(
                f"min_advantage_variance must be above 0, but is {min_advantage_variance}."
            )
        if normalizer not in NORMALIZERS:
            raise ValueError(
                f"normalizer must be {' or '.join(map(repr, NORMALIZERS))}, but is {normalizer!r}."
            )
        self.decay = decay
        self.min_advantage_variance = min_advantage_variance
        self.normalizer = normalizer
        # How much of the average has been filled; started full, nothing is corrected.
        filled = 1.0 if normalizer == "variance" else 0.0
        self.register_buffer("moment", torch.tensor(filled))
        self.register_buffer("weight", torch.tensor(filled))

    def forward(self, advantage: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the scale, after an update with the advantages in training mode.

        Args:
            advantage: reward units, any shape; detached here.
            mask: ``False`` for what does not count, bool, broadcasts to the same shape.
        """
        if self.training:
            self.update(advantage, mask)
        return self.scale()

    @torch.no_grad()
    def update(self, advantage: Tensor, mask: Tensor | None = None) -> None:
        """Take a batch into the average.

        Args:
            advantage: reward units, any shape.
            mask: ``False`` for what does not count, bool, broadcasts to the same shape; what lies
                there is not read, be it NaN.
        """
        values = advantage.to(self.moment.dtype)
        here = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
        count = here.sum()
        if self.normalizer == "variance":
            mean = torch.where(here, values, 0.0).sum() / count
            squares = torch.where(here, values - mean, 0.0).square().sum()
            found = squares / (count - 1).clamp(min=0)  # 0 / 0 of none or one
            found = found.clamp(min=self.min_advantage_variance)
        else:
            found = torch.where(here, values, 0.0).square().sum() / count
        for buffer, new in ((self.moment, found), (self.weight, torch.ones_like(found))):
            average = self.decay * buffer + (1.0 - self.decay) * new
            buffer.copy_(torch.where(found.isfinite(), average, buffer))

    @property
    def second_moment(self) -> Tensor:
        """The corrected average, reward units squared, shape ``()``; 1 before the first update."""
        started = self.weight > 0
        return torch.where(started, self.moment / torch.where(started, self.weight, 1.0), 1.0)

    def scale(self) -> Tensor:
        """Return what to divide advantages by, shape ``()``; 1 before the first update."""
        if self.normalizer == "variance":
            return self.second_moment + self.min_advantage_variance
        return self.second_moment.clamp(min=self.min_advantage_variance).sqrt()

    def extra_repr(self) -> str:
        return (
            f"decay={self.decay}, min_advantage_variance={self.min_advantage_variance}, "
            f"normalizer={self.normalizer!r}"
        )
