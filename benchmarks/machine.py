"""A row of a benchmark: the processor and the commit that were measured, the file it goes to."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from pathlib import Path
from typing import Any

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


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the CSV file, with a header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
