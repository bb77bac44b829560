"""Which optimizer, momentum, schedule and auxiliary loss make a deep RL agent learn faster?"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    # Lazily: `import muon_rl` and `muon-rl --help` stay free of torch.
    if name == "load_policy":
        from muon_rl.policy import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
