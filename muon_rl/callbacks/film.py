"""A film of an evaluation episode beside the run's metrics."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger
from tensordict import TensorDictBase

from muon_rl.data import length


class Film(Callback):
    """Logs the first episode of each evaluation to MLflow, as ``films/<frames>.gif``.

    Only environments that can be seen have one: :meth:`muon_rl.envs.EnvFactory.film`.
    """

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any,
        batch: TensorDictBase, batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Log the episode, or the first of several games."""
        first = batch_idx == 0 and dataloader_idx == 0
        loggers = [logger for logger in trainer.loggers if isinstance(logger, MLFlowLogger)]
        if not (first and loggers and trainer.is_global_zero and trainer.state.fn == "fit"):
            return
        game = batch.flatten(0, -2)[0] if batch.ndim > 1 else batch
        film = trainer.datamodule.env.film(game[: length(game)])
        if film is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{pl_module.frames:012d}.gif"
            path.write_bytes(film)
            for logger in loggers:
                logger.experiment.log_artifact(logger.run_id, str(path), "films")
