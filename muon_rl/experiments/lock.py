"""One sweep of a study at a time."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

TRAININGS = "trainings.lock"


class StudyLock:
    """Two locks: one that this process holds, one that the trainings it starts hold as well.

    The second, shared by them, outlives a sweep that is killed: its trainings save and end, and are
    waited for.

    Args:
        folder: of the study.
        patience: seconds to wait for the trainings of a killed sweep.

    Raises:
        BlockingIOError: if another sweep runs, or trainings of a killed one do not end; the message
            says which.
    """

    def __init__(self, folder: Path, patience: float = 60.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._own = _open(folder / "sweep.lock")
        self.inherited = _open(folder / TRAININGS)
        if not _taken(self._own):
            process = os.pread(self._own, 20, 0).decode().strip()
            self.release()
            raise BlockingIOError(f"it is being run by process {process}")
        os.ftruncate(self._own, 0)
        os.pwrite(self._own, str(os.getpid()).encode(), 0)
        until, told = time.monotonic() + patience, False
        while not _taken(self.inherited):
            if time.monotonic() > until:
                self.release()
                raise BlockingIOError("trainings of a sweep that was killed still run")
            if not told:
                sys.stderr.write("Waiting for the trainings of a sweep that was killed to end.\n")
                told = True
            time.sleep(0.2)
        fcntl.flock(self.inherited, fcntl.LOCK_SH)

    def release(self) -> None:
        """Let go of both; trainings that run hold the second on."""
        os.close(self._own)
        os.close(self.inherited)


def join_lock(folder: Path) -> int:
    """Return a descriptor that holds the trainings' lock, for a training on another machine.

    Args:
        folder: of the study.
    """
    descriptor = _open(folder / TRAININGS)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
