"""An average of the policy over the updates of a training, which evaluation plays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class PolicyAverage(Callback):
    r"""Averages the policy's parameters over the updates, and has the average evaluated and saved.

    After update :math:`n` the average moves towards the parameters,

    .. math:: \bar\theta_n = d_n \bar\theta_{n-1} + (1 - d_n)\,\theta_n,
        \qquad d_n = \min(d, (n - 1) / n),

    so that it is the plain mean at first, and later that of about the last 1/(1 - d) updates. It
    plays the evaluations; :func:`muon_rl.load_policy` and ``muon-rl validate`` take it from the
    checkpoint. What trains, acts in training and goes on in a resume is the policy itself: training
    is the same, bit by bit, without an average. Buffers stay the policy's own: with a spectral
    norm, whose vectors follow the trained weights, the norms of an average are only near 1.

    Lightning's ``EMAWeightAveraging`` (2.6.6) would average all of the agent, and cannot copy a
    TorchRL loss, whose copy has its parameters in another order.

    Args:
        enabled: whether to average at all.
        decay: d, in [0, 1): the average's share of itself that an update leaves.

    Raises:
        ValueError: if ``decay`` is out of its bounds.

    Source: Polyak and Juditsky 1992; Tarvainen and Valpola 2017, arXiv:1703.01780, equation 2.
    """

    def __init__(self, enabled: bool = False, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"policy_average.decay must be in [0, 1), but is {decay}.")
        self.enabled = enabled
        self.decay = decay
        self._updates = 0  # averaged over so far
        self._average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] | None = None  # while the average stands in its place
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with a checkpoint's average, where the policy is."""
        self._last_step = trainer.global_step
        parameters = dict(pl_module.policy.named_parameters())
        self._average = {name: x.to(parameters[name]) for name, x in self._average.items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move the average towards what the update has made, if this batch ended one."""
        # An update may take several batches, whose gradients are accumulated.
        if not self.enabled or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._updates += 1
        now = {name: x.detach() for name, x in pl_module.policy.named_parameters()}
        if self._updates == 1:
            self._average = {name: x.clone() for name, x in now.items()}
            return
        decay = min(self.decay, (self._updates - 1) / self._updates)
        move = get_ema_multi_avg_fn(decay)
        move([self._average[name] for name in now], list(now.values()), self._updates)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the average play."""
        if self._average:
            policy = pl_module.policy
            self._trained = {name: x.detach().clone() for name, x in policy.named_parameters()}
            put(self._average, policy)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let training go on with what it trains, before a checkpoint is saved."""
        if self._trained is not None:
            put(self._trained, pl_module.policy)
            self._trained = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Do so too if an evaluation breaks: a checkpoint may follow."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See that a checkpoint in the middle of an evaluation holds the trained policy."""
        if self._trained is not None:
            put(self._trained, pl_module.policy)
            checkpoint["state_dict"] = {k: x.clone() for k, x in pl_module.state_dict().items()}
            put(self._average, pl_module.policy)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and over how many updates it is."""
        return {"updates": self._updates, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Args:
            state_dict: of the same policy.
        """
        self._updates = state_dict["updates"]
        self._average = dict(state_dict["average"])


def averaged(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the averaged parameters of a checkpoint, by name; none if it holds no average.

    Args:
        checkpoint: as Lightning saves it.
    """
    saved = checkpoint.get("callbacks", {}).get(PolicyAverage.__qualname__, {})
    return saved.get("average", {})


@torch.no_grad()
def put(parameters: Mapping[str, Tensor], policy: TensorDictModuleBase) -> None:
    """Copy parameters into a policy, and so into the loss that shares them.

    Args:
        parameters: by their names in the policy, all of them.
        policy: whose parameters are overwritten.
    """
    for name, parameter in policy.named_parameters():
        parameter.copy_(parameters[name])
