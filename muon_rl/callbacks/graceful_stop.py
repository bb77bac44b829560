"""Ctrl-C and SIGTERM that lose nothing."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class GracefulStop(Callback):
    """Turns the first Ctrl-C into a SIGTERM, on which Lightning stops between two updates.

    A second Ctrl-C stops at once, without saving. ``interrupted`` tells whether the stop came
    from the keyboard.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over Ctrl-C for a fit."""
        if stage == "fit":
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give Ctrl-C back."""
        self._restore()

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        sys.stderr.write("\nStopping after this update; Ctrl-C once more stops at once, unsaved.\n")
        signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
