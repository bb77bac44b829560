"""The pages about Muesli: their programs train, and their tables are what the code has."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Unbounded
from torchrl.envs import GymEnv

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.objectives import (
    CMPOLoss,
    DynamicsLoss,
    MuesliModelLoss,
    MuesliPolicyLoss,
    OneStepLookahead,
)
from muon_rl.objectives.presets import PRESETS
from muon_rl.specs import Specs

DOCS = Path(__file__).parent.parent / "docs"
PAGE, TUNING = (DOCS / "muesli.md").read_text(), (DOCS / "muesli_tuning.md").read_text()
PROTOCOL = (DOCS / "muesli_protocol.py").read_text()
LOOP = (DOCS / "muesli_cartpole.py").read_text()
LOSSES = (CMPOLoss, DynamicsLoss, MuesliModelLoss, MuesliPolicyLoss)
LAST = {"ppo": "ppo", "model": "model", "cmpo": "model", "full": "model"}
LINE = re.compile(r" *(\d+) frames  return +(\d+\.\d)")


def program(page: str, name: str) -> str:
    found = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(found) == 1
    return found[0]


def table(page: str, heading: str) -> list[list[str]]:
    """Return the rows of the table whose heading begins so."""
    lines = page.partition(f"\n| {heading}")[2].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("| "):
            break
        rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    assert rows
    return rows


def run(text: str) -> dict:
    names = {"__name__": "docs"}
    exec(compile(text, "docs", "exec"), names)
    return names


def policy_of(action) -> MuesliPolicy:
    return MuesliPolicy(WorldModel(Specs(Unbounded(4), action), latent=16))


@torch.no_grad()
def rollout(policy, frames: int = 64) -> TensorDict:
    torch.manual_seed(0)
    env = GymEnv("CartPole-v1", categorical_action_encoding=True)
    env.set_seed(0)
    return env.rollout(frames, policy, break_when_any_done=False)


def total(out) -> torch.Tensor:
    # DQN's only term is named "loss".
    return sum(value for key, value in out.items() if key.startswith("loss"))


# -- docs/muesli.md ----------------------------------------------------------------------------


def test_the_page_shows_the_loop_word_for_word():
    assert program(PAGE, "loop") == LOOP
    assert len(LOOP.splitlines()) <= 60
    assert "lightning" not in LOOP


def test_the_loop_trains(monkeypatch, capsys):
    assert LOOP.count("50_000") == 1
    short = LOOP.replace("50_000", "600")
    monkeypatch.setattr(sys, "argv", ["muesli_cartpole.py", "0"])
    first = run(short.partition("\ncollector = ")[0])  # the same seed, nothing collected
    names = run(short)
    # Three collections, ten updates each.
    states = names["optimizer"].state
    moved = dict(names["policy"].named_parameters())
    assert all(states[parameter]["step"] == 30 for parameter in moved.values())
    for name, parameter in first["policy"].named_parameters():
        assert not torch.equal(parameter, moved[name]), name
    assert {key for key, _ in names["out"].items() if key.startswith("loss_")} == {
        "loss_policy", "loss_value", "loss_cmpo", "loss_dynamics_reward", "loss_dynamics_returns",
        "loss_muesli_policy",
    }  # fmt: skip
    priors = [
        torch.cat([p.flatten() for p in x["cmpo"].target_actor_network_params.values(True, True)])
        for x in (first, names)
    ]
    assert not torch.equal(*priors)
    start = names["env"].reset()
    before, after = (x["policy"].world_model(start.clone())["value_pred"] for x in (first, names))
    assert before.abs() < 1 < 3 < after
    lines = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    lines = [line for line in lines if line]  # among TorchRL's own
    assert [int(line[1]) for line in lines] == [600]
    assert 8 < float(lines[-1][2]) < 500


def test_each_seed_of_the_page_reached_a_hundred():
    rows = [[float(cell) for cell in row] for row in table(PAGE, "frames |")]
    assert [row[0] for row in rows] == [5000 * k for k in range(1, 11)]
    assert all(max(row[seed] for row in rows) >= 100 for seed in (1, 2, 3))


def test_cmpo_trains_without_a_model():
    names = run(program(PAGE, "alone"))
    loss, optimizer = names["loss"], names["optimizer"]
    data = rollout(names["actor"])
    before = {name: p.clone() for name, p in loss.named_parameters()}
    for _ in range(5):
        optimizer.zero_grad()
        total(loss(data)).backward()
        optimizer.step()
        for target in names["targets"]:
            target.step()
    moved = {name for name, p in loss.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)


def test_cmpo_beside_sac_values_actions_by_the_critic_that_sac_trains():
    names = run(program(PAGE, "sac"))
    loss, sac, cmpo = (names[key] for key in ("loss", "sac", "cmpo"))
    flags = {key: torch.zeros(16, 1, dtype=torch.bool) for key in ("done", "terminated")}
    after = {"observation": torch.randn(16, 3), "reward": torch.randn(16, 1), **flags}
    now = {"observation": torch.randn(16, 3), "action": 2 * torch.rand(16, 1) - 1, "next": after}
    data = TensorDict(now, [16])
    before = {name: p.clone() for name, p in loss.named_parameters()}
    prior = cmpo.target_q_network_params.data.clone()
    for _ in range(3):
        out = loss(data)
        names["step"](sum(value for key, value in out.items() if key.startswith("loss_")))
    assert all(not torch.equal(p, before[name]) for name, p in loss.named_parameters())
    assert (cmpo.q_network_params.data == sac.qvalue_network_params.data[0]).all()
    assert not (cmpo.target_q_network_params.data == prior).any()


def cells(text: str) -> list:
    """Return what stands in backticks, as keys."""
    found = re.findall(r"`([^`]+)`", text)
    return [ast.literal_eval(x) if x.startswith("(") else x for x in found]


def test_the_table_of_losses_is_what_they_read_write_and_return():
    discrete = policy_of(Categorical(2))
    continuous = policy_of(Bounded(-torch.ones(1), torch.ones(1)))
    losses = [
        loss
        for policy in (discrete, continuous)
        for loss in (
            CMPOLoss(policy, OneStepLookahead(policy)),
            DynamicsLoss(policy),
            MuesliModelLoss(policy, own_unroll=False),
            MuesliModelLoss(policy, own_unroll=True),
            MuesliPolicyLoss(policy),
        )
    ]
    rows = {
        cells(row[0])[0]: [set(cells(cell)) for cell in row[1:]] for row in table(PAGE, "loss |")
    }
    assert set(rows) == {loss.__name__ for loss in LOSSES}
    for name, (reads, writes, returns) in rows.items():
        alike = [loss for loss in losses if type(loss).__name__ == name]
        needed = {key for loss in alike for key in loss.in_keys}
        assert needed <= reads, name
        assert reads - needed <= {"next", "value_target", "advantage"}, name  # where they are there
        written = {key for loss in alike for key in getattr(loss, "written_keys", ())}
        # What stands in the table once is written under "next" as well.
        ahead = (
            {("next", *key) for key in writes if key[0] == "cmpo"} if "next" in writes else set()
        )
        assert (writes - {"next"}) | ahead == written, name
        assert returns == {key for loss in alike for key in loss.out_keys}, name


def test_the_table_of_keys_is_what_set_keys_takes():
    rows = table(PAGE, "`set_keys`")
    for index, loss in enumerate(LOSSES):
        found = {cells(row[0])[0]: cells(row[1])[0] for row in rows if row[2 + index]}
        assert found == vars(loss.default_keys())
    assert {mark for row in rows for cell in row[2:] for mark in cell} == set("rwn ")


# -- docs/muesli_tuning.md ---------------------------------------------------------------------


def test_the_table_of_presets_is_the_presets():
    rows = {tuple(cells("".join(row[:2]))): row[2:] for row in table(TUNING, "loss | option")}
    for index, preset in enumerate(PRESETS.values()):
        expected = {(part, k): str(v) for part, x in preset.items() for k, v in x.items()}
        assert {key: row[index] for key, row in rows.items()} == expected


def test_the_table_of_options_is_what_the_losses_take():
    rows = table(TUNING, "option | default")
    for letter, loss in zip("CDMP", LOSSES, strict=True):
        taken = inspect.signature(loss).parameters.values()
        expected = {p.name: str(p.default) for p in taken if p.kind is p.KEYWORD_ONLY}
        found = {cells(row[0])[0]: row[1] for row in rows if letter in row[2].split()}
        assert found == expected, loss.__name__
    assert all(len(row) == 5 and all(row) for row in rows)


def test_the_page_shows_the_protocol_s_losses():
    assert program(TUNING, "protocol") in PROTOCOL
    assert [cells(row[0]) for row in table(TUNING, "configuration |")] == [[x] for x in LAST]


@pytest.mark.parametrize("configuration", LAST)
def test_each_configuration_trains(configuration, monkeypatch, capsys):
    short = PROTOCOL
    for long, brief in (("10_000", "500"), ("in range(5)", "in range(1)")):
        assert short.count(long) == 1
        short = short.replace(long, brief)
    monkeypatch.setattr(sys, "argv", ["muesli_protocol.py", configuration])
    first = run(short.partition("\ncollector = ")[0])
    names = run(short)
    assert list(names["losses"])[-1] == LAST[configuration]
    assert all(value.isfinite().all() for value in names["out"].values())
    after = dict(names["loss"].named_parameters())
    still = {k for k, p in first["loss"].named_parameters() if torch.equal(p, after[k])}
    # PPO has no use for the dynamics; all else is trained by somebody.
    assert all("dynamics" in key for key in still)
    assert bool(still) == (configuration == "ppo")
    printed = re.findall(r"^  (\w+) +-?\d+\.\d{4}$", capsys.readouterr().out, re.M)
    assert printed == list(names["out"].keys())


def test_the_metrics_to_be_watched_are_there(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["muesli_protocol.py", "full"])
    names = run(PROTOCOL.partition("\ncollector = ")[0])
    returned = {*names["loss"].out_keys, *MuesliPolicyLoss(names["policy"]).out_keys}
    tables = [table(TUNING, heading) for heading in ("ours |", "watched |")]
    named = {name for rows in tables for row in rows for name in cells(row[0])}
    assert len(named) > 10
    assert named <= returned
