"""The speed of training, and how much of its time the optimizer takes."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch


class Speed(NamedTuple):
    """What was measured since the last reading.

    Args:
        frames_per_second: of training time.
        optimizer_share: of training time, from 0 to 1: the optimizer's steps.
    """

    frames_per_second: float
    optimizer_share: float


class Clock:
    """Measures training time, in which warm-up and evaluation are left out."""

    def __init__(self) -> None:
        self._frames = 0
        self._since = 0.0
        self._paused_at = 0.0
        self._step_began: float | torch.cuda.Event | None = None
        self._step_seconds = 0.0
        self._step_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, frames: int) -> None:
        """Begin to measure.

        Args:
            frames: so far.
        """
        self._frames, self._since = frames, time.perf_counter()
        self._step_seconds, self._step_events = 0.0, []

    def pause(self) -> None:
        """Leave out the time from now on."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Go on after a pause."""
        self._since += time.perf_counter() - self._paused_at

    def begin_step(self, device: torch.device) -> None:
        """Note that the optimizer is about to step.

        Args:
            device: of the parameters; on CUDA its own time is taken, without waiting for it.
        """
        self._step_began = _event() if device.type == "cuda" else time.perf_counter()

    def end_step(self) -> None:
        """Note that the optimizer has stepped, if it had begun to."""
        began, self._step_began = self._step_began, None
        if isinstance(began, torch.cuda.Event):
            self._step_events.append((began, _event()))
        elif began is not None:
            self._step_seconds += time.perf_counter() - began

    def read(self, frames: int, *, by_rollout: bool = False) -> Speed | None:
        """Return what was measured since the last reading, and begin anew.

        Args:
            frames: so far.
            by_rollout: whether readings follow whole rollouts. The first was collected before the
                clock ran: the time of its updates alone is no round's, and is forgotten.

        Returns:
            ``None`` where there were no frames since.
        """
        if frames == self._frames:
            if by_rollout:
                self.start(frames)
            return None
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        if self._step_events:
            self._step_events[-1][1].synchronize()
            milliseconds = sum(began.elapsed_time(end) for began, end in self._step_events)
            self._step_seconds += milliseconds / 1000
        speed = Speed((frames - self._frames) / seconds, min(self._step_seconds / seconds, 1.0))
        self.start(frames)
        return speed


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
