"""World models that predict rewards, values and policies, as MuZero's and Muesli's do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.nn.distributions import NormalParamExtractor
from torch import Tensor, nn

from muon_rl.modules.latent import (
    ActionFeatures,
    Dynamics,
    LatentNorm,
    Prediction,
    ScalarHead,
    latent_norm_of,
)
from muon_rl.modules.mlp import ActivationNorm, Init, mlp
from muon_rl.modules.representation import Encoder, representation
from muon_rl.modules.two_hot import SignedHyperbolicTwoHot
from muon_rl.specs import Specs
from muon_rl.unroll import unroll

_FIRST_PREDICTIONS = 0.01  # share of the heads' weights that they begin with


class WorldModel(TensorDictModuleBase):
    r"""Model of the environment in a hidden state, learnt from rewards, values and policies only.

    :math:`h_0 = f(o), \quad (h_{k+1}, \hat r_{k+1}) = g(h_k, a_k), \quad (\hat v_k, \hat\pi_k) =
    p(h_k)`, with :math:`g` the norm of :math:`h_k` plus a perceptron's output. Three
    TensorDictModules:

    - ``representation``: ``observation`` to ``hidden_state`` ``(*batch, H)``; with an LSTM also its
      states and ``is_init``, see :func:`~muon_rl.modules.representation`.
    - ``dynamics``: ``hidden_state``, ``action`` to ``("next", "hidden_state")`` and ``reward_pred``
      ``(*batch, 1)``, in units of reward.
    - ``prediction``: ``hidden_state`` to ``value_pred`` ``(*batch, 1)``, in units of return, and
      ``logits`` ``(*batch, A)`` of a discrete policy, in nats and not normalised, or ``loc`` and
      ``scale`` ``(*batch, a)`` of a tanh-Gaussian before its squashing.

    With bins ``value_logits`` and ``reward_logits`` ``(*batch, bins)`` stand beside the two
    scalars, which are decoded from them: a loss takes the cross-entropy by ``code.loss``.

    Called, it writes what representation and prediction give and, where there is an ``action``,
    the reward for it; the next hidden state stays out of the tensordict. The heads begin with 1 %
    of their weights: the first predictions are near 0, and the first policy near uniform.

    Args:
        specs: of the environment; the action is one Categorical, OneHot or bounded vector.
        latent: H, width of the hidden state.
        hidden: width of each hidden layer of the representation, in units.
        dynamics_hidden: width of each hidden layer of the dynamics.
        head_hidden: width of each hidden layer of the heads of reward, value and policy.
        bins: of value and reward, or None for plain scalars, to be trained by squared errors.
        limit: last bin, in signed-hyperbolic units; 30 stands for 904.7.
        encoder: mlp for a vector, conv for a grid.
        channels: of each convolution's output.
        kernel: edge of each convolution's kernel, in cells.
        stride: of each convolution, in cells.
        channels_last: whether grids come as ``(height, width, channels)``, as MinAtar's.
        lstm: whether the representation has an LSTM of width H.
        latent_norm: of the hidden state: minmax to [0, 1], layernorm or none.
        min_scale: smallest ``scale`` of a continuous policy.
        residual: whether representation and dynamics have residual blocks, all of one width.
        activation: as of :func:`~muon_rl.modules.mlp`.
        activation_norm: as of :func:`~muon_rl.modules.mlp`.
        init: as of :func:`~muon_rl.modules.mlp`.

    Attributes:
        specs: the specs; those of a discrete action list all actions by ``specs.action.enumerate``.
        latent: as given.
        code: the :class:`~muon_rl.modules.SignedHyperbolicTwoHot` of value and reward, or None.

    Raises:
        ValueError: if observation or action do not fit, or an option is none of those named.

    Example:
        >>> from torchrl.data import Categorical, Unbounded
        >>> model = WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16)
        >>> first = model(TensorDict(observation=torch.zeros(7, 4), batch_size=[7]))
        >>> first["value_pred"].shape, first["value_logits"].shape, first["logits"].shape
        (torch.Size([7, 1]), torch.Size([7, 61]), torch.Size([7, 3]))
        >>> actions = torch.zeros(7, 5, dtype=torch.int64)
        >>> model.unroll(first["hidden_state"], actions)["reward_pred"].shape
        torch.Size([7, 5, 1])

    Source: Schrittwieser et al. 2020, arXiv:1911.08265 (model, range of the hidden state); Hessel
    et al. 2021, arXiv:2104.06159, eq. 13; small heads at the start, Andrychowicz et al. 2021,
    arXiv:2006.05990, and Hafner et al. 2023, arXiv:2301.04104.
    """

    def __init__(
        self,
        specs: Specs,
        *,
        latent: int = 256,
        hidden: Sequence[int] = (256,),
        dynamics_hidden: Sequence[int] = (256,),
        head_hidden: Sequence[int] = (128,),
        bins: int | None = 61,
        limit: float = 30.0,
        encoder: Encoder = "mlp",
        channels: Sequence[int] = (16, 32),
        kernel: int = 3,
        stride: int = 1,
        channels_last: bool = False,
        lstm: bool = False,
        latent_norm: LatentNorm = "minmax",
        min_scale: float = 0.1,
        residual: bool = False,
        activation: str = "relu",
        activation_norm: ActivationNorm = "none",
        init: Init = "default",
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "activation": activation, "activation_norm": activation_norm, "init": init,
        }  # fmt: skip

        def head(outputs: int) -> nn.Sequential:
            network = mlp(latent, outputs, head_hidden, **options)
            with torch.no_grad():
                for parameter in network[-1].parameters():
                    parameter.mul_(_FIRST_PREDICTIONS)
            return network

        self.specs, self.latent = specs, latent
        self.code = None if bins is None else SignedHyperbolicTwoHot(bins, limit)
        action = ActionFeatures(specs.action)
        self.representation = representation(
            specs.observation, latent, encoder=encoder, hidden=hidden, channels=channels,
            kernel=kernel, stride=stride, channels_last=channels_last, lstm=lstm,
            latent_norm=latent_norm, residual=residual, **options,
        )  # fmt: skip
        transition = mlp(
            latent + action.features, latent, dynamics_hidden, residual=residual, **options
        )
        norm = latent_norm_of(latent_norm, latent)
        self.dynamics = TensorDictModule(
            Dynamics(action, transition, norm, ScalarHead(head(bins or 1), self.code)),
            in_keys=["hidden_state", "action"],
            out_keys=[("next", "hidden_state"), "reward_pred", "reward_logits"][: 3 if bins else 2],
        )
        value = ScalarHead(head(bins or 1), self.code)
        if action.discrete:
            network = Prediction(value, head(action.features), None)
        else:
            extract = NormalParamExtractor("biased_softplus_1.0", min_scale)
            network = Prediction(value, head(2 * action.features), extract)
        self.prediction = TensorDictModule(
            network,
            in_keys=["hidden_state"],
            out_keys=[
                *(["value_pred", "value_logits"] if bins else ["value_pred"]),
                *(["logits"] if action.discrete else ["loc", "scale"]),
            ],
        )
        # An action may be missing, as before the first one is chosen: so it is no in_key.
        self.in_keys = self.representation.in_keys
        self.out_keys = [
            *self.representation.out_keys, *self.prediction.out_keys, *self.dynamics.out_keys[1:],
        ]  # fmt: skip

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the hidden state, what is predicted from it and, for an action, the reward."""
        self.prediction(self.encode(tensordict))
        action = tensordict.get("action", None)
        if action is not None:
            outs = self.dynamics.module(tensordict.get("hidden_state"), action)
            tensordict.update(dict(zip(self.dynamics.out_keys[1:], outs[1:], strict=False)))
        return tensordict

    def encode(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``hidden_state`` (and an LSTM's states) for the observation, and return it all."""
        return self.representation(tensordict)

    def predict(self, hidden_state: Tensor) -> TensorDict:
        """Return value and policy of a hidden state.

        Args:
            hidden_state: ``(*batch, H)``.

        Returns:
            A tensordict of ``batch`` with the out_keys of ``prediction``.
        """
        outs = self.prediction.module(hidden_state)
        return TensorDict(
            dict(zip(self.prediction.out_keys, outs, strict=True)), hidden_state.shape[:-1]
        )

    def step(self, hidden_state: Tensor, action: Tensor) -> TensorDict:
        """Return the next hidden state, and the reward on the way to it.

        Args:
            hidden_state: ``(*batch, H)``.
            action: ``(*batch, *action_shape)``, as in the specs.

        Returns:
            A tensordict of ``batch`` with the next ``hidden_state``, ``reward_pred`` and, with
            bins, ``reward_logits``.

        Raises:
            ValueError: if the shapes do not fit.
        """
        self._check(hidden_state, action, steps=0)
        outs = self.dynamics.module(hidden_state, action)
        keys = ["hidden_state", *self.dynamics.out_keys[1:]]
        return TensorDict(dict(zip(keys, outs, strict=True)), hidden_state.shape[:-1])

    def unroll(
        self, hidden_state: Tensor, actions: Tensor, *, grad_scale: float = 1.0
    ) -> TensorDict:
        r"""Return the predictions along actions, none of which sees a later observation.

        Step :math:`k = 1, \dots, K` has :math:`(h_k, \hat r_k) = g(h_{k-1}, a_{k-1})` and
        :math:`(\hat v_k, \hat\pi_k) = p(h_k)`. What flows back from step :math:`k + 1` into
        :math:`h_k` is scaled for :math:`k \ge 1`; the gradient into the given state, and that of
        each step's own predictions, is whole.

        Args:
            hidden_state: :math:`h_0`, ``(*batch, H)``.
            actions: ``(*batch, K, *action_shape)``, K >= 1; the first is taken in :math:`h_0`.
            grad_scale: factor of the gradient through each :math:`h_k` to the dynamics; 0.5 is
                MuZero's.

        Returns:
            A tensordict of shape ``(*batch, K)``, whose k-th entry holds the ``hidden_state``
            :math:`h_k`, its value and policy, and the reward between :math:`h_{k-1}` and it: the
            keys of :meth:`step` and :meth:`predict`.

        Raises:
            ValueError: if the shapes do not fit, or there is no action.
        """
        self._check(hidden_state, actions, steps=1)
        return unroll(self, hidden_state, actions, grad_scale=grad_scale)

    def _check(self, hidden_state: Tensor, action: Tensor, *, steps: int) -> None:
        """Raise if the action does not fit."""
        batch, own = hidden_state.shape[:-1], self.specs.action.shape
        between = action.shape[len(batch) : action.ndim - len(own)]
        fits = action.shape == (*batch, *between, *own)
        if not fits or len(between) != steps or 0 in between:
            raise ValueError(
                f"A hidden state of shape {tuple(hidden_state.shape)} needs actions of shape "
                f"(*{tuple(batch)}, {'K >= 1, ' * steps}*{tuple(own)}), but they are "
                f"{tuple(action.shape)}."
            )
