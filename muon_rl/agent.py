"""The agent: any TorchRL loss, one optimizer, target networks and evaluation, under Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torchrl.objectives import LossModule, TargetNetUpdater

from muon_rl.clock import Clock
from muon_rl.data import AgentData, ends
from muon_rl.optim import Muon, OptimizerConfig, build_optimizer
from muon_rl.optim.clipping import check_max_norm, clip_gradients
from muon_rl.optim.groups import next_momentum
from muon_rl.optim.schedules import anneal_learning_rates, refresh_learning_rates


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
        max_grad_norm: bound on the norm of all gradients together, or a dict of bounds for single
            networks; ``None`` for none.
        anneal_lr: whether all learning rates fall along a line, to 0 after the last update; or
            what makes one of torch's schedulers, stepped after each update, of the optimizer.

    Raises:
        ValueError: if the optimizer's configs, the bounds or the scheduler do not fit the loss's
            networks.
    """

    def __init__(
        self,
        *,
        loss: LossModule,
        policy: TensorDictModuleBase,
        optimizer: Mapping[str, OptimizerConfig | Mapping[str, Any]],
        targets: Sequence[TargetNetUpdater] = (),
        max_grad_norm: float | Mapping[str, float] | None = None,
        anneal_lr: bool | Callable[[Optimizer], LRScheduler] = False,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.policy = policy
        self.optimizer_configs = dict(optimizer)
        self.targets = list(targets)
        self.max_grad_norm = max_grad_norm
        self.anneal_lr = anneal_lr
        self.output: TensorDictBase | None = None  # of the loss, for callbacks until the backward
        self._clock = Clock()
        self._updates: list[dict[str, Tensor]] = []  # metrics of a rollout's so far
        self._evaluated: dict[str, list[float]] = {}
        # Built once here, so that a mistake in a config shows before a run begins.
        built = self.build_optimizer()
        if max_grad_norm is not None:
            try:
                check_max_norm(built, max_grad_norm)
            except ValueError as error:
                raise ValueError(f"model.max_grad_norm: {error}") from error
        if not isinstance(anneal_lr, bool):
            _try_scheduler(anneal_lr, built)

    def _apply(self, *args: Any, **kwargs: Any) -> Agent:
        """Move to a device or dtype, and let policy and loss share their buffers as before.

        A move keeps parameters but replaces buffers, in the policy and in the loss apart: vectors
        of a spectral norm would go on in one of them only.
        """
        super()._apply(*args, **kwargs)
        names = {name for name, _ in self.policy.named_parameters()}
        for loss in self.loss.modules():  # a sequence of losses has them below
            actor = getattr(loss, "actor_network_params", None)
            if actor is not None and names <= set(dict(actor.flatten_keys(".").items())):
                actor.to_module(self.policy)
                break
        return self

    @property
    def frames(self) -> int:
        """Frames collected so far: the axis of every metric."""
        return self.trainer.datamodule.frames

    def build_optimizer(self) -> Muon:
        """Return a new optimizer over the loss's networks."""
        return build_optimizer(self.loss, on_nonfinite="raise", **self.optimizer_configs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the metrics of a rollout's updates so far: its means are over all of them."""
        checkpoint["rollout_metrics"] = self._updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a resumed fit begin a new epoch over the batches that are left.

        Lightning's own counters would call a finished run's one epoch done, and train 0 steps when
        it is given more frames; what has been served is counted by the data module. The count of
        optimizer steps alone goes on.
        """
        self._updates = checkpoint.get("rollout_metrics", [])
        loops, checkpoint["loops"] = checkpoint["loops"], None
        if loops is not None and self.trainer.state.fn == TrainerFn.FITTING:
            progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
            name = "epoch_loop.automatic_optimization.optim_progress"
            progress.load_state_dict(loops["fit_loop"][name])

    def build_scheduler(
        self, optimizer: Muon, data: AgentData, batches_per_step: int = 1
    ) -> LRScheduler | None:
        """Return a new scheduler of the learning rates over a run, or ``None`` for constant ones.

        Args:
            optimizer: whose rates they are.
            data: knows the number of the run's batches.
            batches_per_step: batches whose gradients are summed up for one optimizer step, >= 1.

        Raises:
            ValueError: if the scheduler ends before the run does, or an optimizer step would
                reach from one rollout into the next.
        """
        steps = -(-data.total_updates // batches_per_step)
        if isinstance(self.anneal_lr, bool):
            if not self.anneal_lr:
                return None
            per_rate, rest = divmod(data.updates_per_rate, batches_per_step)
            if rest and data.updates_per_rate > 1:
                raise ValueError(
                    f"trainer.accumulate_grad_batches={batches_per_step} must divide the "
                    f"{data.updates_per_rate} batches of a rollout, which share a learning rate "
                    "with model.anneal_lr=true."
                )
            per_rate = max(per_rate, 1)
            horizon = -(-steps // per_rate)
            return anneal_learning_rates(optimizer, horizon, steps_per_update=per_rate)
        scheduler = self.anneal_lr(optimizer)
        # Alone among torch's, this one raises after its last step.
        if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
            raise ValueError(
                f"model.anneal_lr has total_steps={scheduler.total_steps}, but the run makes "
                f"{steps} updates: raise it to at least as many."
            )
        return scheduler

    def configure_optimizers(self) -> Any:
        """Return the one optimizer that Lightning drives, and its schedule if it has one."""
        optimizer = self.build_optimizer()
        scheduler = self.build_scheduler(
            optimizer, self.trainer.datamodule, self.trainer.accumulate_grad_batches
        )
        if scheduler is None:
            return optimizer
        lr_scheduler = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler}

    def on_train_start(self) -> None:
        """Let the rates of a resumed run follow its own horizon from the first update on."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                refresh_learning_rates(config.scheduler)

    # -- training ------------------------------------------------------------------------------

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> Tensor:
        """Return the sum of the loss's terms for one batch."""
        if batch_idx == 0:
            self._clock.start(self.frames)
        output = self.loss(batch)
        terms = {name: term for name, term in output.items() if name.startswith("loss_")}
        # Every target is detached, so one step on the sum is exact for each network.
        total = torch.stack(list(terms.values())).sum()
        self.output = output
        self._log_training(output)
        return total

    def on_after_backward(self) -> None:
        """Let go of what the loss returned, and of its graph."""
        self.output = None

    def _log_training(self, output: TensorDictBase) -> None:
        """Log an update in N; of updates that share a rollout, and so their frames, the means."""
        data = self.trainer.datamodule
        together = data.updates_per_rate > 1
        if not together and (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:
            return
        scalars = {name: x.detach() for name, x in output.items() if x.numel() == 1}
        if together:
            self._updates.append(scalars)
            if not data.is_up_to_date:
                return
            scalars = {
                name: torch.stack([update[name].to(x.device) for update in self._updates]).mean()
                for name, x in scalars.items()
            }
            self._updates = []
        metrics = {f"train/{name}": value.item() for name, value in scalars.items()}
        if speed := self._clock.read(self.frames, by_rollout=together):
            metrics |= {f"train/{name}": value for name, value in speed._asdict().items()}
        self.track(metrics | self.rates() | data.take_episode_metrics())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then the target networks."""
        super().optimizer_step(*args, **kwargs)
        self._clock.end_step()
        # Not in on_train_batch_end: a checkpoint is saved before it, and would miss this.
        for target in self.targets:
            target.step()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip the gradients that the optimizer is about to step on."""
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        if self.max_grad_norm is not None:
            clip_gradients(optimizer, self.max_grad_norm)
        # Lightning steps with a closure that ends here: what follows is the optimizer's own work.
        self._clock.begin_step(self.device)

    def on_train_batch_end(self, *args: Any) -> None:
        """Tell Lightning whether to evaluate: it counts batches, an evaluation is due by frames."""
        # Read right after this hook. With inf, it evaluates after the last batch alone.
        due = self.trainer.datamodule.evaluation_due
        self.trainer.val_check_batch = 1 if due else math.inf

    # -- evaluation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Stop the clock, since evaluation is not training time, and begin an empty record."""
        self._clock.pause()
        self._evaluated = {}

    def validation_step(
        self, episode: TensorDictBase, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record one evaluation episode (or a batch of games), of shape ``(*games, steps)``.

        Its length is in frames; a ``score`` is recorded where the environment counts one. A second
        set of episodes is the greedy policy's.
        """
        end = ends(episode)
        name = "eval/greedy_" if dataloader_idx else "eval/"
        frames = end["step_count"].float().mean() * self.trainer.datamodule.env.action_repeat
        metrics = {f"{name}return": end["episode_return"].mean(), f"{name}length": frames}
        if end.get("score", None) is not None:
            metrics[f"{name}score"] = end["score"].float().mean()
        for key, value in metrics.items():
            self._evaluated.setdefault(key, []).append(value.item())

    def on_validation_epoch_end(self) -> None:
        """Log the means over the episodes, before a checkpoint is saved by them."""
        means = {name: sum(values) / len(values) for name, values in self._evaluated.items()}
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
        """Return the learning rates and momenta that the next step applies, by metric name."""
        metrics: dict[str, float] = {}
        groups = self.trainer.optimizers[0].param_groups
        # Where there is a trunk, the actor is a head of it.
        trunk = any(group["name"].startswith("trunk/") for group in groups)
        for group in groups:
            network, part = group["name"].split("/")
            kind = "aux_learning_rate" if part == "aux" else "learning_rate"
            metrics[f"train/{kind}/{network}"] = float(group["lr"])
            if network == ("trunk" if trunk else "actor"):
                metrics[f"train/{kind}"] = float(group["lr"])
            metrics[f"train/momentum/{group['name']}"] = float(next_momentum(group))
        return metrics


def _try_scheduler(make: Callable[[Optimizer], LRScheduler], optimizer: Muon) -> None:
    """Make a scheduler and step it twice: some mistakes show only then.

    Args:
        make: of ``anneal_lr``.
        optimizer: one that is used no further; without gradients its steps change nothing.

    Raises:
        ValueError: if that fails, or what comes is no scheduler that counts steps alone.
    """
    try:
        scheduler = make(optimizer)
        if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
            for _ in range(2):
                optimizer.step()
                scheduler.step()
            return
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"model.anneal_lr makes no scheduler that works: {error}") from error
    raise ValueError(
        "model.anneal_lr must be true, false, or make a scheduler of torch's that needs no metric, "
        f"but makes {type(scheduler).__name__}."
    )
