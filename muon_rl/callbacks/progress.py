"""A progress bar that counts frames."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class FramesProgressBar(TQDMProgressBar):
    """Shows frames, frames per second, time left and the latest evaluation's return.

    Each evaluation also leaves a line of its own.
    """

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar of training."""
        return Tqdm(
            desc="Training",
            unit=" frames",
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.5 if sys.stdout.isatty() else 30.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n:,}/{total:,} frames "
            "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            total=self.trainer.datamodule.total_frames,
        )

    def init_validation_tqdm(self) -> Tqdm:
        """Return no bar: an evaluation leaves a line instead."""
        return Tqdm(disable=True)

    def get_metrics(self, *_: Any) -> dict[str, Any]:
        """Return nothing: the evaluation alone writes the postfix."""
        return {}

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Leave the bar as it was made: the one epoch is the run."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to count where training begins: warm-up and resumed frames make no speed."""
        if batch_idx == 0:
            bar = self.train_progress_bar
            bar.initial = bar.n = bar.last_print_n = trainer.datamodule.frames
            bar.start_t = bar.last_print_t = time.time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Move the bar."""
        bar, frames = self.train_progress_bar, trainer.datamodule.frames
        # Whole rollouts may go past the budget, and tqdm forgets a total that is passed.
        bar.total = max(bar.total, frames)
        bar.update(frames - bar.n)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the postfix as the last evaluation set it."""

    def on_validation_batch_start(self, *_: Any) -> None:
        """Leave the hidden bar of an evaluation alone."""

    def on_validation_batch_end(self, *_: Any) -> None:
        """Leave the hidden bar of an evaluation alone."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say in the bar why it stands still."""
        if trainer.state.fn == "fit" and not self.is_disabled:
            self.train_progress_bar.set_postfix_str("evaluating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the evaluation's line and show its return in the bar."""
        if trainer.state.fn != "fit" or self.is_disabled:
            return
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("eval/")
        }
        values = "  ".join(f"{name} {value:.1f}" for name, value in sorted(metrics.items()))
        self.train_progress_bar.write(f"{trainer.datamodule.frames:>11,} frames  {values}")
        self.train_progress_bar.set_postfix_str(f"return {metrics['eval/return']:.1f}")
