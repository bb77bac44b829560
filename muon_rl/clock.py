"""The speed of training."""

from __future__ import annotations

import time


class Clock:
    """Measures frames per second of training time: warm-up and evaluation are left out."""

    def __init__(self) -> None:
        self._frames = 0
        self._since = 0.0
        self._paused_at = 0.0

    def start(self, frames: int) -> None:
        """Begin to measure.

        Args:
            frames: so far.
        """
        self._frames, self._since = frames, time.perf_counter()

    def pause(self) -> None:
        """Leave out the time from now on."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Go on after a pause."""
        self._since += time.perf_counter() - self._paused_at

    def read(self, frames: int) -> float:
        """Return the rate since the last reading, frames per second.

        Args:
            frames: so far.
        """
        now = time.perf_counter()
        rate = (frames - self._frames) / max(now - self._since, 1e-9)
        self._frames, self._since = frames, now
        return rate
