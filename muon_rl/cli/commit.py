"""The commit that a program runs at; apart from the rest, as it needs no heavy import."""

from __future__ import annotations

import subprocess


def git_commit() -> dict[str, str]:
    """Return the commit of the working folder, and whether files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"git_commit": commit + "+changes" * dirty} if commit else {}
