"""Layers in the hidden state of a world model: its norm, its dynamics and its heads."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict.nn.distributions import NormalParamExtractor
from torch import Tensor, nn
from torchrl.data import Bounded, Categorical, MultiOneHot, OneHot, TensorSpec

from muon_rl.modules.two_hot import SignedHyperbolicTwoHot

LatentNorm = Literal["minmax", "layernorm", "none"]


class MinMaxNorm(nn.Module):
    r"""Range [0, 1]: :math:`(x - \min x) / \max(\max x - \min x, 10^{-5})` over the last dim.

    Example:
        >>> MinMaxNorm()(torch.tensor([3.0, 4.0, 7.0]))
        tensor([0.0000, 0.2500, 1.0000])

    Source: Schrittwieser et al. 2020, arXiv:1911.08265, appendix G.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` ``(*batch, features)`` in [0, 1], of the same shape."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return (x - low) / (high - low).clamp_min(1e-5)


def latent_norm_of(kind: LatentNorm, width: int) -> nn.Module:
    """Return the norm of a hidden state.

    Args:
        kind: minmax, layernorm or none.
        width: of the hidden state.

    Raises:
        ValueError: if ``kind`` is none of these.
    """
    if kind == "minmax":
        return MinMaxNorm()
    if kind == "layernorm":
        return nn.LayerNorm(width)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"latent_norm must be one of minmax, layernorm, none, but is {kind!r}.")


class ActionFeatures(nn.Module):
    """Actions as vectors: one-hot, or the bounds of continuous ones as -1 and 1."""

    low: Tensor
    high: Tensor

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        index = isinstance(spec, Categorical)
        one_hot = isinstance(spec, OneHot) and not isinstance(spec, MultiOneHot)
        box = isinstance(spec, Bounded) and spec.dtype.is_floating_point
        if len(spec.shape) != (0 if index else 1) or not (index or one_hot or box):
            raise ValueError(
                "A world model needs one action of Categorical (shape ()) or OneHot, or a bounded "
                f"float vector, but the environment's is {type(spec).__name__} of shape "
                f"{tuple(spec.shape)} and dtype {spec.dtype}."
            )
        self.index, self.discrete = index, index or one_hot
        self.features = spec.space.n if self.discrete else spec.shape[-1]
        if not self.discrete:
            self.register_buffer("low", spec.space.low.clone())
            self.register_buffer("high", spec.space.high.clone())

    def forward(self, action: Tensor) -> Tensor:
        if self.index:
            return action.unsqueeze(-1) == torch.arange(self.features, device=action.device)
        return action if self.discrete else 2 * (action - self.low) / (self.high - self.low) - 1


class ScalarHead(nn.Module):
    """A scalar ``(*batch, 1)``; with bins after it the logits that it is decoded from."""

    def __init__(self, network: nn.Sequential, code: SignedHyperbolicTwoHot | None) -> None:
        super().__init__()
        self.network, self.code = network, code

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, ...]:
        out = self.network(hidden_state)
        return (out,) if self.code is None else (self.code(out), out)


class Dynamics(nn.Module):
    """The next hidden state, ``norm(h + f(h, a))``, and what the reward's head gives for it."""

    def __init__(
        self, action: ActionFeatures, network: nn.Module, norm: nn.Module, reward: ScalarHead
    ) -> None:
        super().__init__()
        self.action, self.network, self.norm, self.reward = action, network, norm, reward

    def forward(self, hidden_state: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        features = self.action(action).to(hidden_state.dtype)
        following = self.norm(hidden_state + self.network(hidden_state, features))
        return (following, *self.reward(following))


class Prediction(nn.Module):
    """What the value's head gives, and the parameters of the policy's distribution."""

    def __init__(
        self, value: ScalarHead, policy: nn.Sequential, extract: NormalParamExtractor | None
    ) -> None:
        super().__init__()
        self.value, self.policy, self.extract = value, policy, extract

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, ...]:
        out = self.policy(hidden_state)
        if self.extract is None:
            return (*self.value(hidden_state), out)
        loc_and_scale = self.extract(out)
        return (*self.value(hidden_state), loc_and_scale[0], loc_and_scale[1])
