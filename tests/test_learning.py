"""That agents learn: minutes each, so marked slow."""

from __future__ import annotations

import pytest

from muon_rl.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sac_with_muon_swings_the_cartpole_up_in_60k_frames(seed, workspace):
    main(["fit", "--config=sac_cartpole_swingup", f"--seed_everything={seed}",
          "--trainer.enable_progress_bar=false"])  # fmt: skip
    frames, value = workspace.history("eval/return")[-1]
    assert frames == 60_000
    assert value >= 700
