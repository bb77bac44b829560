"""The best and the last checkpoint of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


class Checkpoints(ModelCheckpoint):
    """Keeps ``best.ckpt`` and ``last.ckpt`` of a run.

    The last one is saved after each evaluation, at the end, and when the run is stopped or breaks.

    Args:
        folder: under which runs are kept, each in ``<method_name>/seed_<seed>/<run>``.
        monitor: the evaluation metric that the best checkpoint is chosen by.
        mode: whether the best is the max or the min.
        enabled: whether to save at all.
    """

    def __init__(
        self,
        folder: str = "checkpoints",
        monitor: Literal["eval/return", "eval/length", "eval/score"] = "eval/return",
        mode: Literal["max", "min"] = "max",
        enabled: bool = True,
    ) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1 if enabled else 0,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.folder = folder
        self.enabled = enabled
        self.saved_frames: int | None = None  # of the last checkpoint
        self._training = False

    @property
    def last_path(self) -> Path:
        """Where the last checkpoint is saved."""
        return Path(self.dirpath or self.folder) / "last.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save from now on: what a resumed run goes on from has been restored."""
        super().on_train_start(trainer, pl_module)
        self._training = True

    def on_train_batch_end(self, *_: object) -> None:
        """Save nothing: an evaluation, the end or a stop does."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best checkpoint if it is one, and the last in any case."""
        _write_logs(trainer)
        super().on_validation_end(trainer, pl_module)
        # Lightning would save a last checkpoint only beside a better one.
        self._save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last checkpoint."""
        _write_logs(trainer)
        self._save_last(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the last checkpoint, unless a second Ctrl-C asks for no delay."""
        # Half restored, a run would overwrite the checkpoint that it was to go on from.
        if not self._training:
            return
        # Numbers that are not finite may lie in the buffer: what was saved before them is better.
        if isinstance(exception, (KeyboardInterrupt, FloatingPointError)):
            return
        try:
            self._save_last(trainer)
        except OSError as error:
            # What broke the run is to be seen, and its status to be set, on a full disk too.
            sys.stderr.write(f"The last checkpoint could not be saved: {error}\n")

    def _save_last(self, trainer: L.Trainer) -> None:
        frames: int = trainer.datamodule.frames
        if self.enabled and trainer.state.fn == TrainerFn.FITTING and frames > 0:
            if self.saved_frames != frames:
                trainer.save_checkpoint(self.last_path)
            self.last_model_path = str(self.last_path)
            self.saved_frames = frames


def _write_logs(trainer: L.Trainer) -> None:
    """Have loggers write what they hold: a resumed run logs nothing older than its checkpoint."""
    for logger in trainer.loggers:
        logger.save()
