"""The programs in docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from muon_rl.recipes.sac import SAC

from muon_rl.envs import DMControl
from muon_rl.optim import Muon

DOCS = Path(__file__).parent.parent / "docs"
PROGRAM = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)
PROGRAMS = [
    pytest.param(program, id=f"{page.stem}-{number}")
    for page in sorted(DOCS.glob("*.md"))
    for number, program in enumerate(PROGRAM.findall(page.read_text()))
]


def test_there_are_programs():
    assert len(PROGRAMS) >= 3


# Lightning's own, as a user of it sees them.
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*litlogger.*", "ignore:.*num_workers.*")
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_the_docs_runs(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    exec(compile(program, "docs", "exec"), names)
    optimizers = [value for value in names.values() if isinstance(value, Muon)]
    optimizers += names["trainer"].optimizers if "trainer" in names else []
    assert len(optimizers) == 1
    # Where it is said how to train, every group has made its steps.
    if ".step()" in program or ".fit(" in program:
        assert all(group["step"] >= 10 for group in optimizers[0].param_groups)


def test_the_table_of_groups_is_what_a_real_sac_explains():
    agent = SAC(DMControl("cheetah", "run", action_repeat=2))
    assert agent.build_optimizer().explanation() in (DOCS / "optimizer.md").read_text()
