"""A data module as Lightning's trainer would set it up."""

from __future__ import annotations

from types import SimpleNamespace

from muon_rl.recipes.sac import SAC, SACData

from muon_rl.envs import EnvFactory


def make(env: EnvFactory, **options) -> SACData:
    """Return SAC's data on an environment, with an agent of its own, ready to fit."""
    defaults = {"total_frames": 200, "init_random_frames": 80, "batch_size": 16}
    data = SACData(env, **{**defaults, **options})
    data.trainer = SimpleNamespace(
        lightning_module=SAC(env),
        received_sigterm=False,
        global_rank=0,
        state=SimpleNamespace(fn="fit"),
    )
    data.setup("fit")
    return data
