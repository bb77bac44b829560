"""What a config may have wrong although each of its values parses."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from muon_rl.cli import ConfigError

_SECTIONS = ("checkpoint", "effective_rank", "loss_health", "policy_average")
_WITHIN = ("spawn", "fork", "notebook")


def check(settings: Any) -> None:
    """Raise if a config cannot become a run, before any part of it is made.

    Args:
        settings: the subcommand's part of the config.

    Raises:
        ConfigError: naming the key, what it is and what it may be.
    """
    if settings.get("env") is None:
        raise ConfigError(
            "env is missing: name a recipe, --config=NAME (see muon-rl recipes), or an "
            "environment, --env=CLASS."
        )
    for key in _SECTIONS:
        if not isinstance(settings[key], Namespace):
            raise ConfigError(
                f"{key} must have keys of its own, but is {settings[key]!r}: to switch it off set "
                f"{key}.enabled to false."
            )
    _check_precision(str(settings.trainer.precision))
    _check_strategy(settings.trainer.strategy)


def _check_precision(precision: str) -> None:
    is_true = precision.endswith("-true") and precision != "32-true"
    if is_true or precision == "64":
        raise ConfigError(
            f"trainer.precision must be 32-true, bf16-mixed or 16-mixed, but is {precision!r}: "
            "environments and buffers hold float32, and training or evaluation fails on another."
        )


def _check_strategy(strategy: Any) -> None:
    if isinstance(strategy, str) and any(word in strategy for word in _WITHIN):
        raise ConfigError(
            f"trainer.strategy must start its processes anew, but is {strategy!r}, whose processes "
            "keep what they trained: ddp does the same for a command."
        )
