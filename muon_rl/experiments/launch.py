"""Where the jobs of a study run: processes of this machine."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

PARENT = "MUON_RL_PARENT"  # environment variable: the process that a training ends with


class Launcher(Protocol):
    """Starts commands, each under a key of its own, and tells which have ended."""

    def start(self, key: Hashable, command: Sequence[str], log: Path) -> None:
        """Run a command, whose output is put behind what the log has."""

    def ended(self) -> dict[Hashable, int]:
        """Return the exit codes of the commands that have ended since the last call."""

    def stop(self) -> None:
        """Ask all commands to save and end."""

    def kill(self) -> None:
        """End all commands at once."""

    def close(self) -> None:
        """Give back what the launcher holds."""


class LocalLauncher:
    """Runs each command in a process of this machine.

    The processes get a SIGTERM when this one dies in whatever way. A terminal's Ctrl-C does not
    reach them by itself.

    Args:
        environment: of each process, on top of this one's.
        keep_open: file descriptors that each process inherits, such as that of a lock.
    """

    def __init__(self, environment: Mapping[str, str], keep_open: Sequence[int] = ()) -> None:
        self._environment = with_parent(environment)
        self._keep_open = tuple(keep_open)
        self._processes: dict[Hashable, subprocess.Popen] = {}

    def start(self, key: Hashable, command: Sequence[str], log: Path) -> None:
        """Run a command, whose output is put behind what the log has."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            self._processes[key] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                pass_fds=self._keep_open,
            )

    def ended(self) -> dict[Hashable, int]:
        """Return the exit codes of the processes that have ended since the last call."""
        codes = {key: process.poll() for key, process in self._processes.items()}
        done = {key: code for key, code in codes.items() if code is not None}
        for key in done:
            del self._processes[key]
        return done

    def stop(self) -> None:
        """Send SIGTERM to all processes: a fit then saves and ends."""
        for process in self._processes.values():
            process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to all processes, and to what they started."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Hold nothing: a process that runs goes on."""


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the process dies that started this one by a launcher."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it has died already
        signal.raise_signal(signal.SIGTERM)


def with_parent(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which a command ends with this process.

    Args:
        environment: that it is to have, on top of this one's.
    """
    return {**os.environ, **environment, PARENT: str(os.getpid())}
