"""A training whose optimizer steps by a compiled graph."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback


class CompiledOptimizer(Callback):
    """Compiles the optimizer's step when a training begins: :meth:`muon_rl.optim.Muon.compile`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compile it: what a checkpoint brings is in it by now."""
        trainer.optimizers[0].compile()  # type: ignore[attr-defined]
