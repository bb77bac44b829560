"""The programs in docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from muon_rl.recipes.sac import SAC

from muon_rl.cli import help, recipes
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
    assert len(optimizers) == ("optim" in program)
    # Where it is said how to train, every group has made its steps.
    if ".step()" in program or ".fit(" in program:
        assert all(group["step"] >= 10 for group in optimizers[0].param_groups)


def test_the_table_of_groups_is_what_a_real_sac_explains():
    agent = SAC(DMControl("cheetah", "run", action_repeat=2))
    assert agent.build_optimizer().explanation() in (DOCS / "optimizer.md").read_text()


def test_the_table_of_knobs_is_what_the_study_recipe_takes():
    text = help.render("fit", help.load([str(recipes.shipped()["sac_rank"])]))
    keys: dict[str, str] = {}
    for entry in re.split(r"\n  --", text)[1:]:
        key, _, meaning = " ".join(entry.partition("\n\n")[0].split()).partition(" ")
        if not key.startswith(("env.", "data.", "model.", "effective_rank.")):
            continue
        # Critics take what actors take, and every network what the actor's optimizer takes.
        if key.startswith(("model.critic.", "model.optimizer.critic.", "model.optimizer.alpha.")):
            key = re.sub(r"critic\.|alpha\.", "actor.", key)
            assert key in keys
            continue
        default = re.search(r" \[(?!.* \[)(.*)\]$", meaning)
        keys[key] = default[1] if default else "-"
    assert len(keys) > 50
    page = (DOCS / "sac_study.md").read_text().partition("<!-- knobs -->")[2]
    rows = re.findall(r"^\| `(\S+)` \| (.*?) \| ", page, re.M)
    table = {key.replace("{actor,critic}", "actor"): default for key, default in rows}
    for key in ("model.actor", "model.critic"):
        del keys[key]
    assert table == keys
