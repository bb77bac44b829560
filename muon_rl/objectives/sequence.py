"""Several losses as one, whose order the keys that they read and write decide."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import nn
from torchrl.objectives import LossModule
from torchrl.objectives.value import ValueEstimatorBase

from muon_rl.objectives.order import check_order, keys_after, twice, written_by


class LossSequence(LossModule):
    r"""Several TorchRL losses as one, called in order on the same data: their terms side by side.

    A loss may read what an earlier one wrote into the data (its ``written_keys``), and say by
    ``keys_after`` what it then reads and returns. Whether each reads after it was written is
    checked here and at each switch, from the keys that the losses have at that moment. ``in_keys``
    are those of all that are on, less what comes from within.

    Coefficients, keys and masks are set at the single losses, ``sequence.losses["cmpo"]``;
    ``set_keys`` and ``loss_mask_key`` of the sequence go to all. So does ``make_value_estimator``,
    to all that estimate values. A TorchRL ``SoftUpdate`` finds no targets in a sequence: it takes
    one for each loss that has some. What the losses share stays shared when the sequence is moved,
    not in a ``deepcopy``, which TorchRL's parameters do not survive as one: build anew, and load
    the state.

    Args:
        losses: TorchRL's or ours, by name, in the order to be called.
        enabled: ``False`` for the names of those that are off for now; all others are on.
        policy: what acts, if no loss holds it as a network: it is asked for ``hidden_state``,
            ``value_pred``, ``logits`` (or ``loc`` and ``scale``) and ``reward_pred``, where a loss
            reads them in the data.

    Attributes:
        losses: as given, an ``nn.ModuleDict``.

    Raises:
        ValueError: if a loss reads what a later one, one that is off, none, or a policy without it
            was to write; if two write a term or metric of one name; if a name is unknown or there
            is no loss.

    Example:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule
        >>> from torch.distributions import Categorical
        >>> from torchrl.modules import ProbabilisticActor
        >>> from torchrl.objectives import SoftUpdate
        >>> from muon_rl.objectives import CMPOLoss, MuesliPolicyLoss
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(nn.Linear(4, 3), ["observation"], ["logits"]),
        ...     in_keys=["logits"],
        ...     distribution_class=Categorical,
        ... )
        >>> q_network = TensorDictModule(nn.Linear(4, 3), ["observation"], ["action_value"])
        >>> loss = LossSequence(
        ...     {"policy": MuesliPolicyLoss(actor), "cmpo": CMPOLoss(actor, q_network)}
        ... )
        >>> targets = [SoftUpdate(loss.losses["cmpo"], tau=0.1)]
        >>> loss.switch(policy=False)
        >>> out = loss(TensorDict(observation=torch.randn(7, 4), batch_size=[7]))
        >>> [name for name in out.keys() if name.startswith("loss_")]
        ['loss_cmpo']

    Source: the losses of Hessel et al. 2021, arXiv:2104.06159, eqs. 9 to 13, are such a sum.
    """

    losses: nn.ModuleDict

    def __init__(
        self,
        losses: Mapping[str, LossModule],
        *,
        enabled: Mapping[str, bool] | None = None,
        policy: TensorDictModuleBase | None = None,
    ) -> None:
        super().__init__()
        if not losses:
            raise ValueError("LossSequence needs at least one loss, but has none.")
        for name, loss in losses.items():
            if not isinstance(loss, LossModule):
                raise TypeError(
                    f"LossSequence takes TorchRL losses, but {name!r} is a {type(loss).__name__}."
                )
        self.losses = nn.ModuleDict(losses)
        # Not as a submodule: its parameters are those of the losses, or none to be trained.
        self.__dict__["policy"] = policy
        self._enabled = dict.fromkeys(losses, True)
        self._selected: list[NestedKey] | None = None
        self.switch(**dict(enabled or {}))

    # -- which are on, and in what order -----------------------------------------------------------

    @property
    def enabled(self) -> dict[str, bool]:
        """Which losses are on, by name: a copy, see :meth:`switch`."""
        return dict(self._enabled)

    def switch(self, **enabled: bool) -> None:
        """Turn losses on or off by name; nothing is turned if what is left could not run.

        Raises:
            ValueError: as the class does.
        """
        if unknown := sorted(set(enabled) - set(self._enabled)):
            raise ValueError(
                f"No loss is named {', '.join(unknown)}; there are {', '.join(self._enabled)}."
            )
        before, self._enabled = self._enabled, {**self._enabled, **enabled}
        try:
            self.check()
        except ValueError:
            self._enabled = before
            raise

    def _all(self) -> dict[str, Any]:
        return dict(self.losses.items())

    def _single(self) -> dict[str, Any]:
        """Return the losses by name, those of a sequence within as ``"outer.inner"``."""
        found: dict[str, Any] = {}
        for name, loss in self._all().items():
            within = loss._single() if isinstance(loss, LossSequence) else None
            if within is None:
                found[name] = loss
            else:
                found.update({f"{name}.{inner}": each for inner, each in within.items()})
        return found

    def _on(self) -> Iterator[tuple[str, Any]]:
        return ((name, loss) for name, loss in self._all().items() if self._enabled[name])

    def check(self) -> None:
        """Check order and names by the keys that the losses have now, after a ``set_keys`` of one.

        Raises:
            ValueError: as the class does.
        """
        if not any(self._enabled.values()):
            raise ValueError("LossSequence needs at least one loss that is on, but all are off.")
        for _, loss in self._on():
            if isinstance(loss, LossSequence):
                loss.check()
        check_order(self._all(), self._enabled, self.policy)

    # -- as a loss ---------------------------------------------------------------------------------

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the losses that are on read from the data."""
        return self.keys_after(())[0]

    @property
    def written_keys(self) -> list[NestedKey]:
        """What the losses that are on write into the data."""
        return [key for _, loss in self._on() for key in getattr(loss, "written_keys", ())]

    @property
    def out_keys(self) -> list[NestedKey]:
        """The terms and metrics of the losses that are on."""
        if self._selected is not None:
            return self._selected
        return self.keys_after(())[1]

    @out_keys.setter
    def out_keys(self, keys: list[NestedKey]) -> None:
        self._selected = keys

    def keys_after(self, written: Collection[NestedKey]) -> tuple[list[NestedKey], list[NestedKey]]:
        """Return ``in_keys``, and what is returned, where the data hold what others wrote.

        Args:
            written: their keys.
        """
        reads: dict[NestedKey, None] = {}
        returns: list[NestedKey] = []
        within: set[NestedKey] = set()
        for _, loss in self._on():
            found, returned = keys_after(loss, within.union(written))
            reads.update(dict.fromkeys(key for key in found if key not in within))
            returns += returned
            within |= written_by(loss)
        return list(reads), returns

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the terms and metrics of the losses that are on, called in order."""
        done = tensordict.get(("next", "done"), None)
        if done is not None and not tensordict.batch_size:
            # By name, dispatch knows of no batch; TorchRL's flags have one axis more.
            tensordict.batch_size = done.shape[:-1]
        out = TensorDict({}, [])
        wrote: dict[str, str] = {}
        for name, loss in self._on():
            for key, value in loss(tensordict).items():
                if key in wrote:
                    raise ValueError(twice(key, wrote[key], name))
                wrote[key] = name
                out.set(key, value)
        return out

    # -- what goes to all --------------------------------------------------------------------------

    def set_keys(self, **kwargs: Any) -> None:
        """Set keys in all losses that have a key of that name.

        Raises:
            ValueError: if none has, or a loss then reads what is not written before.
        """
        for name, key in kwargs.items():
            takers = [
                loss
                for loss in self._single().values()
                if name in getattr(loss._AcceptedKeys, "__dataclass_fields__", {})
            ]
            if not takers:
                raise ValueError(f"{name} is not an accepted tensordict key of any of the losses.")
            for loss in takers:
                loss.set_keys(**{name: key})
        self.check()

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> LossSequence:
        """Make one in each loss that estimates values, of its own default kind if none is given.

        Raises:
            ValueError: if no loss does, or several would share one instance.
        """
        takers = self._estimating()
        if not takers:
            raise ValueError("No loss of the sequence estimates values.")
        if isinstance(value_type, ValueEstimatorBase) and len(takers) > 1:
            raise ValueError(
                f"An estimator serves one loss, but {', '.join(takers)} estimate values: give it "
                "to one by sequence.losses[name].make_value_estimator."
            )
        for loss in takers.values():
            loss.make_value_estimator(value_type, **hyperparams)
        return self

    @property
    def value_estimator(self) -> Any:
        """That of the one loss that estimates values."""
        takers = self._estimating()
        if len(takers) != 1:
            # Not an AttributeError, of which nn.Module would make a riddle.
            raise ValueError(
                "value_estimator needs one loss that estimates values, but there are "
                f"{', '.join(takers) or 'none'}: ask sequence.losses[name]."
            )
        return next(iter(takers.values())).value_estimator

    def _estimating(self) -> dict[str, Any]:
        own = LossModule.make_value_estimator
        return {
            name: loss
            for name, loss in self._single().items()
            if type(loss).make_value_estimator is not own
        }

    @property
    def loss_mask_key(self) -> Any:
        """As of a loss; assigned, it goes to all."""
        return self._loss_mask_key

    @loss_mask_key.setter
    def loss_mask_key(self, key: Any) -> None:
        for loss in self._all().values():
            loss.loss_mask_key = key
        self._loss_mask_key = key

    def reset_parameters_recursive(self) -> None:
        """Draw the parameters of all losses anew."""
        for loss in self._all().values():
            loss.reset_parameters_recursive()

    def set_vmap_randomness(self, value: str) -> None:
        """Set it in all losses."""
        for loss in self._all().values():
            loss.set_vmap_randomness(value)
