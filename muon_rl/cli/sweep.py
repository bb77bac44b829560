"""``muon-rl sweep``: a study of many trainings, each in a process of its own."""

from __future__ import annotations

import shlex
import sys

from muon_rl.cli import sweep_options
from muon_rl.cli.sweep_plan import plan_of


def main(arguments: list[str]) -> None:
    """Run ``sweep``; help and mistakes in its own options come before anything heavy is imported.

    Args:
        arguments: of the command line, the subcommand first.
    """
    if {"-h", "--help"} & set(arguments):
        sweep_options.parser().print_help()
        return
    options, passed = sweep_options.read(arguments[1:])
    plan = plan_of(options, passed)

    try:
        from muon_rl.cli.sweep_run import SweepRun

        SweepRun(plan, options, shlex.join(["muon-rl", *arguments])).run()
    except KeyboardInterrupt:  # later ones let the trainings save
        sys.stderr.write("Stopped before any training began.\n")
        raise SystemExit(130) from None
