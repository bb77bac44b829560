"""The command ``muon-rl``: finds the subcommand before anything heavy is imported."""

from __future__ import annotations

import difflib
import importlib
import sys

from muon_rl import __version__

# name: (where it lives, what it does)
COMMANDS = {
    "fit": ("muon_rl.cli.training:main", "train an agent as a recipe says"),
    "validate": ("muon_rl.cli.training:main", "play evaluation episodes with a checkpoint"),
    "sweep": ("muon_rl.cli.sweep:main", "train at every point of a grid or search, with seeds"),
    "compare": ("muon_rl.cli.compare:main", "compare groups of runs, with intervals"),
    "recipes": ("muon_rl.cli.recipes:main", "list the recipes that are shipped"),
}

HELP = """\
usage: muon-rl COMMAND [options]

Which optimizer, momentum, schedule and auxiliary loss make a deep RL agent learn faster?

commands:
{commands}

examples:
  muon-rl recipes
  muon-rl fit --config sac_cartpole_swingup
  muon-rl fit --config sac_cheetah --model.optimizer.critic.case=adamw
  muon-rl fit --config sac_cheetah --ckpt_path=last      (go on where it stopped)
  muon-rl sweep sac_cheetah --grid model.optimizer.critic.case=adamw,muon --seeds 0:5
  muon-rl compare sac_cheetah_sweep --group-by point    (a table with intervals)
  muon-rl fit --config sac_cheetah --help                (all that this recipe lets you set)
"""


class ConfigError(Exception):
    """A mistake in what was asked for, told in a line or two."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: without the program's name; ``None`` takes the process's own.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items())
        sys.stdout.write(HELP.format(commands=rows))
        return
    if arguments[0] == "--version":
        sys.stdout.write(f"muon-rl {__version__}\n")
        return
    command = arguments[0]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}."
        sys.stderr.write(f"muon-rl: unknown command {command!r}; {hint}\n")
        raise SystemExit(2)
    module, function = COMMANDS[command][0].split(":")
    try:
        getattr(importlib.import_module(module), function)(arguments)
    except ConfigError as error:
        sys.stderr.write(f"muon-rl: {error}\n")
        raise SystemExit(2) from None
