"""What a row of a benchmark names: the processor and the commit that were measured."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def processor() -> str:
    """Return the processor's name, from the kernel where it tells, and the number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{found[1] if found else 'unknown CPU'}, {os.cpu_count()} cores"


def commit_of(checkout: Path = REPOSITORY) -> str:
    """Return a checkout's commit, marked where files differ from it other than the results."""
    git = ["git", "-C", str(checkout)]
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    edited = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
    return head + "-edited" * bool(subprocess.call(edited))
