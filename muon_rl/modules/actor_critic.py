"""Actors and critics of multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict.nn import TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

from muon_rl.modules.mlp import ActivationNorm, Init, mlp
from muon_rl.specs import Specs


class TanhNormalActor(ProbabilisticActor):
    r"""Gaussian policy squashed by tanh into the bounds of the action.

    :math:`a = l + (h - l)\,(1 + \tanh u)/2` with :math:`u \sim N(\mu(s), \sigma(s)^2)`; mean and
    scale are one fused head. Reads ``observation`` ``(*batch, features)``; writes ``loc`` and
    ``scale`` ``(*batch, actions)`` and ``action`` ``(*batch, actions)``, which is sampled or, under
    ``ExplorationType.DETERMINISTIC``, :math:`\tanh \mu` in the bounds.

    Args:
        specs: of the environment; the action must be bounded, the observation a vector.
        hidden: width of each hidden layer, in units.
        min_scale: smallest standard deviation before the squashing.
        residual: whether the network has residual blocks, all of one width.
        activation: relu, leaky_relu, elu, selu, gelu, silu, mish or tanh.
        activation_norm: none, layernorm or l2 (unit length), before each activation.
        spectral_norm: whether each weight below the head has spectral norm 1.
        init: default is torch's; orthogonal scales by the activation, biases are 0.

    Raises:
        ValueError: if the action is not a bounded vector, the observation not a vector, or an
            option not one of :func:`~muon_rl.modules.mlp`.

    Example:
        >>> from muon_rl.envs import DMControl
        >>> actor = TanhNormalActor(DMControl("cartpole", "swingup").specs, hidden=[32])
        >>> import torch; from tensordict import TensorDict
        >>> actor(TensorDict({"observation": torch.zeros(7, 5)}, [7]))["action"].shape
        torch.Size([7, 1])

    Source: Haarnoja et al. 2018, arXiv:1812.05905, appendix C.
    """

    def __init__(
        self,
        specs: Specs,
        hidden: Sequence[int] = (256, 256),
        min_scale: float = 0.1,
        *,
        residual: bool = False,
        activation: str = "relu",
        activation_norm: ActivationNorm = "none",
        spectral_norm: bool = False,
        init: Init = "default",
    ) -> None:
        features = _features(specs)
        action = specs.action
        if not isinstance(action, Bounded) or len(action.shape) != 1:
            raise ValueError(
                "TanhNormalActor needs a bounded vector as action, but the environment's is "
                f"{type(action).__name__} of shape {tuple(action.shape)}."
            )
        body = mlp(
            features, 2 * action.shape[-1], hidden, residual=residual, activation=activation,
            activation_norm=activation_norm, spectral_norm=spectral_norm, init=init,
        )  # fmt: skip
        head = NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=min_scale)
        network = nn.Sequential(body, head)
        super().__init__(
            TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
            spec=action,
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            distribution_kwargs={"low": action.space.low, "high": action.space.high},
        )


class QCritic(ValueOperator):
    """Action-value network: observation and action, concatenated, to one value.

    Reads ``observation`` ``(*batch, features)`` and ``action`` ``(*batch, actions)``; writes
    ``state_action_value`` ``(*batch, 1)`` in units of return.

    Args:
        specs: of the environment; observation and action must be vectors.
        hidden: width of each hidden layer, in units.
        residual: whether the network has residual blocks, all of one width.
        activation: relu, leaky_relu, elu, selu, gelu, silu, mish or tanh.
        activation_norm: none, layernorm or l2 (unit length), before each activation.
        spectral_norm: whether each weight below the head has spectral norm 1.
        init: default is torch's; orthogonal scales by the activation, biases are 0.

    Raises:
        ValueError: if the observation or the action is not a vector, or an option not one of
            :func:`~muon_rl.modules.mlp`.

    Example:
        >>> from muon_rl.envs import DMControl
        >>> critic = QCritic(DMControl("cartpole", "swingup").specs, activation_norm="layernorm")
        >>> import torch
        >>> critic(observation=torch.zeros(7, 5), action=torch.zeros(7, 1)).shape
        torch.Size([7, 1])
    """

    def __init__(
        self,
        specs: Specs,
        hidden: Sequence[int] = (256, 256),
        *,
        residual: bool = False,
        activation: str = "relu",
        activation_norm: ActivationNorm = "none",
        spectral_norm: bool = False,
        init: Init = "default",
    ) -> None:
        inputs = _features(specs) + specs.action.shape[-1]
        network = mlp(
            inputs, 1, hidden, residual=residual, activation=activation,
            activation_norm=activation_norm, spectral_norm=spectral_norm, init=init,
        )  # fmt: skip
        super().__init__(
            network,
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        )


def _features(specs: Specs) -> int:
    """Return the length of the observation vector."""
    if len(specs.observation.shape) != 1:
        raise ValueError(
            f"A multi-layer perceptron needs a vector as observation, but the environment's has "
            f"shape {tuple(specs.observation.shape)}."
        )
    return specs.observation.shape[-1]
