"""Actor and critic of a board on one trunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torch.distributions import Categorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import MultiOneHot, OneHot, TensorSpec
from torchrl.modules import (
    MaskedCategorical,
    MaskedOneHotCategorical,
    OneHotCategorical,
    ValueOperator,
)

from muon_rl.modules.convolution import GridConvolution
from muon_rl.modules.mlp import Init, mlp
from muon_rl.modules.transformer import GridTransformer, Positions, Readout
from muon_rl.specs import Specs

_FIRST_LOGITS = 0.01  # share of the actor head's weights that they begin with


class GridActorCritic(ProbabilisticTensorDictSequential):
    """Policy and value of a board, which share a trunk that is computed once.

    Called, it reads ``observation`` and writes ``embed`` ``(*batch, features)``, ``state_value``
    ``(*batch, 1)`` in units of return, ``logits`` ``(*batch, actions)`` in nats, not normalised,
    ``action`` and ``action_log_prob`` ``(*batch,)`` in nats: a collector stores the values with
    the steps. A loss that is given :attr:`actor` and :attr:`critic`, which read ``embed``, trains
    the trunk in one pass, once it has run :attr:`trunk` on the batch.

    The actor's head begins with 1 % of its weights: the first policy is near uniform.

    Args:
        encoder: from the observation to features; its ``out_features`` tells their number.
        action: spec of the action, Categorical or OneHot.
        head_hidden: width of each hidden layer of either head.
        masked: whether only actions are possible that ``action_mask``, boolean of shape
            ``(*batch, actions)``, allows.
        init: default is torch's; orthogonal has zero biases.

    Raises:
        ValueError: if the action is not one of a list, or a width is no positive integer.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Unbounded
        >>> encoder = GridConvolution(Unbounded((6, 6), dtype=torch.uint8))
        >>> policy = GridActorCritic(encoder, CategoricalSpec(4))
        >>> boards = TensorDict(observation=torch.zeros(7, 6, 6, dtype=torch.uint8), batch_size=7)
        >>> policy(boards)["action"].shape, boards["state_value"].shape
        (torch.Size([7]), torch.Size([7, 1]))

    Source: small first logits, Andrychowicz et al. 2021, arXiv:2006.05990.
    """

    def __init__(
        self,
        encoder: nn.Module,
        action: TensorSpec,
        *,
        head_hidden: Sequence[int] = (),
        masked: bool = False,
        init: Init = "default",
    ) -> None:
        one_hot = isinstance(action, OneHot) and not isinstance(action, MultiOneHot)
        if not one_hot and not (isinstance(action, CategoricalSpec) and not action.shape):
            raise ValueError(
                "An actor of a board needs one action of Categorical (shape ()) or OneHot, but the "
                f"environment's is {type(action).__name__} of shape {tuple(action.shape)}."
            )
        features: Any = encoder.out_features
        options: dict[str, Any] = {"activation": "gelu", "init": init}
        value = mlp(features, 1, head_hidden, **options)
        logits = mlp(features, action.space.n, head_hidden, **options)
        with torch.no_grad():
            for parameter in logits[-1].parameters():
                parameter.mul_(_FIRST_LOGITS)
        plain, with_mask = (
            (OneHotCategorical, MaskedOneHotCategorical)
            if one_hot
            else (Categorical, MaskedCategorical)
        )
        inputs = {"logits": "logits"}
        super().__init__(
            TensorDictModule(encoder, in_keys=["observation"], out_keys=["embed"]),
            ValueOperator(value, in_keys=["embed"]),
            TensorDictModule(logits, in_keys=["embed"], out_keys=["logits"]),
            ProbabilisticTensorDictModule(
                in_keys={**inputs, "mask": "action_mask"} if masked else inputs,
                out_keys=["action"],
                distribution_class=with_mask if masked else plain,
                return_log_prob=True,
            ),
        )

    @property
    def trunk(self) -> TensorDictModule:
        """Reads ``observation``, writes ``embed``."""
        return self.module[0]

    @property
    def critic(self) -> ValueOperator:
        """Reads ``embed``, writes ``state_value``."""
        return self.module[1]

    @property
    def actor(self) -> ProbabilisticTensorDictSequential:
        """Reads ``embed`` (and ``action_mask``), writes logits, action and its log-probability."""
        return ProbabilisticTensorDictSequential(self.module[2], self.module[3])


class TransformerActorCritic(GridActorCritic):
    """A :class:`GridActorCritic` on a :class:`GridTransformer`, whose options these are.

    Args:
        specs: of the environment.
        d_model: width of each row, and of the trunk's output.
        num_layers: blocks.
        num_heads: of each block's attention, a divisor of ``d_model``.
        channels_last: whether planes are ``(height, width, channels)``, as Snake's ``rgb3``;
            ``None`` is no, but refuses a last dim of 3.
        patch: edge of a patch in cells; ``None`` is 2 where height and width are even, else 1.
        readout: head (of the snake), token or mean.
        positions: learned or sinusoidal.
        cell_width: size of the embedding of a token.
        dropout: share of each branch that is set to 0 where a loss is trained.
        head_hidden: width of each hidden layer of the heads of policy and value.
        masked: whether only actions are possible that ``action_mask`` allows.
        init: default is torch's; orthogonal has zero biases.

    Raises:
        ValueError: if observation or action do not fit, an option is none of those named, or
            there is no mask to be read.

    Example:
        >>> from torchrl.data import Unbounded
        >>> specs = Specs(Unbounded((10, 10), dtype=torch.uint8), CategoricalSpec(4))
        >>> policy = TransformerActorCritic(specs, d_model=128, num_layers=4, num_heads=8)
        >>> policy.trunk.out_keys, policy.actor.in_keys, policy.critic.out_keys
        (['embed'], ['embed'], ['state_value'])
    """

    def __init__(
        self,
        specs: Specs,
        d_model: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        *,
        channels_last: bool | None = None,
        patch: int | None = None,
        readout: Readout = "head",
        positions: Positions = "learned",
        cell_width: int = 16,
        dropout: float = 0.0,
        head_hidden: Sequence[int] = (),
        masked: bool = False,
        init: Init = "default",
    ) -> None:
        encoder = GridTransformer(
            specs.observation, channels_last=channels_last, d_model=d_model,
            num_layers=num_layers, num_heads=num_heads, patch=patch, readout=readout,
            positions=positions, cell_width=cell_width, dropout=dropout, init=init,
        )  # fmt: skip
        _check_mask(specs, masked)
        super().__init__(encoder, specs.action, head_hidden=head_hidden, masked=masked, init=init)


class ConvolutionActorCritic(GridActorCritic):
    """A :class:`GridActorCritic` on a :class:`GridConvolution`, whose options these are.

    Args:
        specs: of the environment.
        features: size of the trunk's output.
        channels_last: whether planes are ``(height, width, channels)``, as Snake's ``rgb3``;
            ``None`` is no, but refuses a last dim of 3.
        channels: of each convolution's output, at least one.
        kernel: edge of each convolution's kernel, in cells, odd.
        cell_width: size of the embedding of a token.
        head_hidden: width of each hidden layer of the heads of policy and value.
        masked: whether only actions are possible that ``action_mask`` allows.
        init: default is torch's; orthogonal scales by the activation, biases are 0.

    Raises:
        ValueError: if observation or action do not fit, an option is none of those named, or
            there is no mask to be read.

    Example:
        >>> from torchrl.data import Unbounded
        >>> from torchrl.data import Binary
        >>> specs = Specs(Unbounded((4, 6, 6)), CategoricalSpec(4), action_mask=Binary(4))
        >>> ConvolutionActorCritic(specs, masked=True).actor.in_keys
        ['embed', 'action_mask']
    """

    def __init__(
        self,
        specs: Specs,
        features: int = 128,
        *,
        channels_last: bool | None = None,
        channels: Sequence[int] = (32, 32),
        kernel: int = 3,
        cell_width: int = 16,
        head_hidden: Sequence[int] = (),
        masked: bool = False,
        init: Init = "default",
    ) -> None:
        encoder = GridConvolution(
            specs.observation, channels_last=channels_last, features=features, channels=channels,
            kernel=kernel, cell_width=cell_width, init=init,
        )  # fmt: skip
        _check_mask(specs, masked)
        super().__init__(encoder, specs.action, head_hidden=head_hidden, masked=masked, init=init)


def _check_mask(specs: Specs, masked: bool) -> None:
    """Raise if a mask is to be read that the environment does not write."""
    if masked and specs.action_mask is None:
        raise ValueError(
            "masked=True needs an action_mask, but the environment writes none: have it write one "
            "(Snake with action_mask=True), or take masked=False."
        )
