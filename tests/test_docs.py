"""The programs in docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from muon_rl.recipes.sac import SAC

from muon_rl.envs import DMControl

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
    exec(compile(program, "docs", "exec"), {"__name__": "docs"})


def test_the_table_of_groups_is_what_a_real_sac_explains():
    agent = SAC(DMControl("cheetah", "run", action_repeat=2))
    assert agent.build_optimizer().explanation() in (DOCS / "optimizer.md").read_text()
