"""Turns at a tracking store that many processes write into."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from filelock import FileLock


def one_process_at_a_time(tracking_uri: str) -> AbstractContextManager:
    """Return a lock on a sqlite store, for those who make its tables or write into it.

    Args:
        tracking_uri: of the store; any other needs no lock.
    """
    if not tracking_uri.startswith("sqlite:///"):
        return nullcontext()
    return FileLock(tracking_uri.removeprefix("sqlite:///") + ".lock")
