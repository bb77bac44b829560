"""The agent: any TorchRL loss, one optimizer, target networks and evaluation, under Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.objectives import LossModule, TargetNetUpdater

from muon_rl.data import ends
from muon_rl.optim import Muon, OptimizerConfig, build_optimizer


class Agent(L.LightningModule):
    """Trains a policy by the sum of a loss's ``loss_*`` terms and one optimizer step each.

    A recipe builds the networks and the loss and hands them over here. Metrics are logged every
    ``trainer.log_every_n_steps`` updates and at each evaluation, against frames.

    Args:
        loss: any TorchRL loss: a tensordict in, ``loss_*`` terms and metrics out.
        policy: acts in the environment; shares its parameters with the loss.
        optimizer: an :class:`~muon_rl.optim.OptimizerConfig`, or a dict of its fields, for each
            network of the loss (see :func:`~muon_rl.optim.build_optimizer`).
        targets: updaters of the loss's target networks, stepped after each update.
        max_grad_norm: bound on the norm of all gradients together; ``None`` for none.

    Raises:
        ValueError: if the optimizer's configs do not fit the loss's networks.
    """

    def __init__(
        self,
        *,
        loss: LossModule,
        policy: TensorDictModuleBase,
        optimizer: Mapping[str, OptimizerConfig | Mapping[str, Any]],
        targets: Sequence[TargetNetUpdater] = (),
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"model.max_grad_norm must be above 0, but is {max_grad_norm}.")
        self.loss = loss
        self.policy = policy
        self.optimizer_configs = dict(optimizer)
        self.targets = list(targets)
        self.max_grad_norm = max_grad_norm
        self._clock = _Clock()
        self._episodes: list[dict[str, float]] = []
        # Built once here, so that a mistake in a config shows before a run begins.
        self.build_optimizer()

    @property
    def frames(self) -> int:
        """Frames collected so far: the axis of every metric."""
        return self.trainer.datamodule.frames

    def build_optimizer(self) -> Muon:
        """Return a new optimizer over the loss's networks."""
        return build_optimizer(self.loss, on_nonfinite="raise", **self.optimizer_configs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a resumed fit begin a new epoch over the batches that are left.

        Lightning's own counters would call a finished run's one epoch done, and train 0 steps when
        it is given more frames; what has been served is counted by the data module. The count of
        optimizer steps alone goes on.
        """
        loops, checkpoint["loops"] = checkpoint["loops"], None
        if loops is not None and self.trainer.state.fn == TrainerFn.FITTING:
            progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
            name = "epoch_loop.automatic_optimization.optim_progress"
            progress.load_state_dict(loops["fit_loop"][name])

    def configure_optimizers(self) -> Muon:
        """Return the one optimizer that Lightning drives."""
        return self.build_optimizer()

    # -- training ------------------------------------------------------------------------------

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> Tensor:
        """Return the sum of the loss's terms for one batch."""
        if batch_idx == 0:
            self._clock.start(self.frames)
        output = self.loss(batch)
        terms = {name: term for name, term in output.items() if name.startswith("loss_")}
        # Every target is detached, so one step on the sum is exact for each network.
        total = torch.stack(list(terms.values())).sum()
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            scalars = {name: value for name, value in output.items() if value.numel() == 1}
            metrics = {f"train/{name}": value.item() for name, value in scalars.items()}
            metrics["train/frames_per_second"] = self._clock.read(self.frames)
            self.track(metrics | self.rates() | self.trainer.datamodule.take_episode_metrics())
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then the target networks."""
        super().optimizer_step(*args, **kwargs)
        # Not in on_train_batch_end: a checkpoint is saved before it, and would miss this.
        for target in self.targets:
            target.step()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip all gradients together, before the optimizer sees them."""
        if self.max_grad_norm is None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
        else:
            torch.nn.utils.clip_grad_norm_(self.loss.parameters(), self.max_grad_norm)

    def on_train_batch_end(self, *args: Any) -> None:
        """Tell Lightning whether to evaluate: it counts batches, an evaluation is due by frames."""
        # Read right after this hook. With inf, it evaluates after the last batch alone.
        due = self.trainer.datamodule.evaluation_due
        self.trainer.val_check_batch = 1 if due else math.inf

    # -- evaluation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Stop the clock, since evaluation is not training time, and begin an empty record."""
        self._clock.pause()
        self._episodes = []

    def validation_step(self, episode: TensorDictBase, batch_idx: int) -> None:
        """Record one evaluation episode (or a batch of games), of shape ``(*games, steps)``.

        Its length is in frames; a ``score`` is recorded where the environment counts one.
        """
        end = ends(episode)
        frames = end["step_count"].float().mean() * self.trainer.datamodule.env.action_repeat
        metrics = {"eval/return": end["episode_return"].mean(), "eval/length": frames}
        if end.get("score", None) is not None:
            metrics["eval/score"] = end["score"].float().mean()
        self._episodes.append({name: value.item() for name, value in metrics.items()})

    def on_validation_epoch_end(self) -> None:
        """Log the means over the episodes, before a checkpoint is saved by them."""
        means = {
            name: sum(episode[name] for episode in self._episodes) / len(self._episodes)
            for name in self._episodes[0]
        }
        self.log_dict(means, logger=False)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.trainer.datamodule.evaluated_frames = self.frames
            self.track(means)
        self._clock.resume()

    # -- logging -------------------------------------------------------------------------------

    def track(self, metrics: Mapping[str, float]) -> None:
        """Send metrics to every logger, against the frames so far.

        Args:
            metrics: names and values, numbers on the host.
        """
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(metrics), step=self.frames)

    def rates(self) -> dict[str, float]:
        """Return the learning rates and momenta of the optimizer's groups, by metric name."""
        metrics: dict[str, float] = {}
        for group in self.trainer.optimizers[0].param_groups:
            network, part = group["name"].split("/")
            kind = "aux_learning_rate" if part == "aux" else "learning_rate"
            metrics[f"train/{kind}/{network}"] = float(group["lr"])
            if network == "actor":
                metrics[f"train/{kind}"] = float(group["lr"])
            momentum = group["momentum"] if part == "muon" else group["betas"][0]
            metrics[f"train/momentum/{group['name']}"] = float(momentum)
        return metrics


class _Clock:
    """Measures frames per second of training time: warm-up and evaluation are left out."""

    def __init__(self) -> None:
        self._frames = 0
        self._since = 0.0
        self._paused_at = 0.0

    def start(self, frames: int) -> None:
        self._frames, self._since = frames, time.perf_counter()

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        self._since += time.perf_counter() - self._paused_at

    def read(self, frames: int) -> float:
        """Return the rate since the last reading, frames per second."""
        now = time.perf_counter()
        rate = (frames - self._frames) / max(now - self._since, 1e-9)
        self._frames, self._since = frames, now
        return rate
