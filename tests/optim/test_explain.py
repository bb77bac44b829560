"""The table that says of each parameter what it is, which group has it, and why."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from muon_rl.optim import Muon, build_optimizer, parameter_roles

SHAPES = {"weight": (2, 3), "bias": (4,), "scale": ()}
HEADING = ["name", "shape", "role", "group", "reason"]


def rows(text):
    """Return the table's lines by name, each as shape, role, group and reason."""
    heading, *lines = [re.split(r" {2,}", line) for line in text.splitlines()]
    assert heading == HEADING
    table = {name: tuple(cells) for name, *cells in lines}
    assert len(table) == len(lines)
    return table


def agent():
    """Build a holder of one network with a layer of each kind."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    net.register_parameter("temperature", nn.Parameter(torch.zeros(())))
    return nn.ModuleDict({"actor": net})


def test_for_sac_it_has_each_parameter_once_with_its_shape_role_and_group(sac, capsys):
    optimizer = build_optimizer(sac, actor={"case": "muon"}, critic={"case": "muon"})
    assert optimizer.explain() is None
    table = rows(capsys.readouterr().out)
    roles = parameter_roles(sac)
    owners = {id(p): group["name"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: cells[:3] for name, cells in table.items()} == {
        name: (str(tuple(p.shape)), roles[name].role, owners[id(p)])
        for name, p in sac.named_parameters()
    }


def test_for_sac_it_says_why_each_parameter_is_in_its_group(sac):
    optimizer = build_optimizer(sac, actor={"case": "adam"}, critic={"case": "muon"})
    table = rows(optimizer.explanation())
    critic, actor = "qvalue_network_params.module", "actor_network_params.module.0.module.0"
    assert table[f"{critic}.0.weight"] == (
        "(2, 16, 7)", "first", "critic/muon", "apply_first_layer is true",
    )  # fmt: skip
    assert table[f"{critic}.3.weight"] == (
        "(2, 16, 16)", "hidden", "critic/muon", "matrix of a hidden layer",
    )  # fmt: skip
    assert table[f"{critic}.6.weight"] == (
        "(2, 1, 16)", "last", "critic/aux", "apply_last_layer is false",
    )  # fmt: skip
    assert table[f"{critic}.1.weight"] == ("(2, 16)", "norm", "critic/aux", "no matrix: norm")
    assert table[f"{critic}.0.bias"] == ("(2, 16)", "bias", "critic/aux", "no matrix: bias")
    assert table[f"{actor}.2.weight"] == ("(16, 16)", "hidden", "actor/adam", "case adam")
    assert table["log_alpha"] == ("()", "other", "alpha/adam", "case adam")


@pytest.mark.parametrize(
    ("options", "name", "role", "group", "reason"),
    [
        ({}, "1.weight", "first", "aux", "apply_first_layer is false"),
        ({}, "3.weight", "hidden", "muon", "matrix of a hidden layer"),
        ({}, "4.weight", "last", "muon", "apply_last_layer is true"),
        ({}, "0.weight", "embedding", "aux", "no matrix: embedding"),
        ({}, "2.weight", "norm", "aux", "no matrix: norm"),
        ({}, "1.bias", "bias", "aux", "no matrix: bias"),
        ({}, "temperature", "other", "aux", "no known layer owns it"),
        ({"include": ["*0.weight"]}, "0.weight", "embedding", "muon", "include '*0.weight'"),
        ({"include": ["*1.weight"]}, "1.weight", "first", "muon", "include '*1.weight'"),
        ({"exclude": ["*.4.*"]}, "4.weight", "last", "aux", "exclude '*.4.*'"),
        ({"exclude": ["*.4.*"]}, "4.bias", "bias", "aux", "exclude '*.4.*'"),
        (
            {"include": ["*3.weight"], "exclude": ["*.3.*"]},
            "3.weight", "hidden", "aux", "exclude '*.3.*'",
        ),
    ],
)  # fmt: skip
def test_each_rule_that_decides_is_named(options, name, role, group, reason):
    layers = {"apply_first_layer": False, "apply_last_layer": True}
    optimizer = build_optimizer(agent(), actor={"case": "muon", "muon": {**layers, **options}})
    assert rows(optimizer.explanation())[f"actor.{name}"][1:] == (role, f"actor/{group}", reason)


@pytest.mark.parametrize("case", ["adamw", "adam"])
def test_a_network_on_adam_has_its_case_as_the_reason(case):
    table = rows(build_optimizer(agent(), actor={"case": case}).explanation())
    assert {cells[2:] for cells in table.values()} == {(f"actor/{case}", f"case {case}")}
    assert len(table) == len(list(agent().parameters()))


def test_a_frozen_parameter_is_not_in_it():
    module = agent()
    module["actor"][3].requires_grad_(False)
    table = rows(build_optimizer(module, actor={"case": "muon"}).explanation())
    assert not [name for name in table if name.startswith("actor.3")]
    assert len(table) == len(list(module.parameters())) - 2


@pytest.mark.parametrize("named", [True, False])
def test_without_build_optimizer_it_says_what_the_parameters_were_given_to(capsys, named):
    entries = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    entries = entries if named else [p for _, p in entries]
    Muon(
        [
            {"params": entries[:1], "name": "hidden"},
            {"params": entries[1:], "algorithm": "adamw"},
            {"params": [], "algorithm": "adam", **({"param_names": []} if named else {})},
        ]
    ).explain()
    names = list(SHAPES) if named else ["hidden[0]", "group1[0]", "group1[1]"]
    assert rows(capsys.readouterr().out) == {
        names[0]: ("(2, 3)", "-", "hidden", "given to muon"),
        names[1]: ("(4,)", "-", "group1", "given to adamw"),
        names[2]: ("()", "-", "group1", "given to adamw"),
    }


def test_a_group_added_to_a_built_optimizer_is_in_it():
    optimizer = build_optimizer(agent(), actor={"case": "muon"})
    before = rows(optimizer.explanation())
    extra = {"params": [("extra", nn.Parameter(torch.zeros(4)))], "algorithm": "adam", "name": "x"}
    optimizer.add_param_group(extra)
    assert rows(optimizer.explanation()) == before | {"extra": ("(4,)", "-", "x", "given to adam")}


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_explains_itself_as_its_original_does(sac, copied):
    optimizer = build_optimizer(sac, actor={}, critic={"muon": {"exclude": ["*3.weight"]}})
    twin = copied(optimizer)
    assert twin.explanation() == optimizer.explanation()
    assert "exclude '*3.weight'" in twin.explanation()


def test_loading_a_state_keeps_the_reasons(make_sac):
    first, second = (build_optimizer(make_sac(), actor={}, critic={}) for _ in range(2))
    expected = second.explanation()
    second.load_state_dict(first.state_dict())
    assert second.explanation() == expected
    assert "given to" not in expected


def test_columns_are_aligned_and_lines_have_no_trailing_space(sac):
    heading, *lines = build_optimizer(sac, actor={}, critic={}).explanation().splitlines()
    start = heading.index("reason")
    assert {line[start - 2 : start] for line in lines} == {"  "}
    assert not {line[start] for line in lines} & {" "}
    assert all(line == line.rstrip() for line in [heading, *lines])
