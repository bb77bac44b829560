"""One config a network: which groups it becomes, and that they train as configured."""

import copy
import re
from dataclasses import fields

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn.distributions import AddStateIndependentNormalScale
from torch import nn

from muon_rl.optim import Muon, MuonConfig, OptimizerConfig, build_optimizer

BOTH_MUON = {"actor": {"case": "muon"}, "critic": {"case": "muon"}}
CRITIC = "qvalue_network_params.module"
ACTOR = "actor_network_params.module.0.module.0"


def names(optimizer):
    """Return each group's parameter names by the group's name."""
    return {group["name"]: set(group["param_names"]) for group in optimizer.param_groups}


def group_of(optimizer, name):
    (group,) = [group for group in optimizer.param_groups if group["name"] == name]
    return group


def plain(width=16):
    """Build a holder of one network ``actor`` with first, hidden and last layer."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "actor": nn.Sequential(
                nn.Linear(3, width),
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.Linear(width, 2),
            )
        }
    )


FIRST, HIDDEN, LAST = "actor.0.weight", "actor.2.weight", "actor.3.weight"
REST = {"actor.0.bias", "actor.1.weight", "actor.1.bias", "actor.2.bias", "actor.3.bias"}


def batch():
    """Build a batch of transitions for the SAC loss."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(32, *shape, generator=generator)

    return TensorDict(
        {
            "observation": normal(5),
            "action": normal(2).tanh(),
            "next": {
                "observation": normal(5),
                "reward": normal(1),
                "done": torch.zeros(32, 1, dtype=torch.bool),
                "terminated": torch.zeros(32, 1, dtype=torch.bool),
            },
        },
        [32],
    )


def backward(loss):
    losses = loss(batch())
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()


# ------------------------------------------------------------------------------ which groups


def test_sac_on_muon_leaves_heads_biases_and_norms_to_the_auxiliary_part(sac):
    assert names(build_optimizer(sac, **BOTH_MUON)) == {
        "actor/muon": {f"{ACTOR}.0.weight", f"{ACTOR}.2.weight"},
        "actor/aux": {f"{ACTOR}.4.weight"} | {f"{ACTOR}.{i}.bias" for i in (0, 2, 4)},
        "critic/muon": {f"{CRITIC}.0.weight", f"{CRITIC}.3.weight"},
        "critic/aux": {f"{CRITIC}.6.weight"}
        | {f"{CRITIC}.{i}.bias" for i in (0, 1, 3, 4, 6)}
        | {f"{CRITIC}.{i}.weight" for i in (1, 4)},
        "alpha/adam": {"log_alpha"},
    }


def test_stacked_matrices_of_sac_carry_their_batch_dim_into_the_group(sac):
    optimizer = build_optimizer(sac, **BOTH_MUON)
    assert group_of(optimizer, "critic/muon")["batch_dims"] == 1
    assert group_of(optimizer, "actor/muon")["batch_dims"] == 0
    assert group_of(optimizer, "critic/muon")["splits"] == 1


def test_matrices_of_different_batch_dims_have_one_number_each(iql):
    # IQL's critic is stacked action values and one state value.
    group = group_of(build_optimizer(iql, **BOTH_MUON), "critic/muon")
    stacked = [int(name.startswith("qvalue")) for name in group["param_names"]]
    assert group["batch_dims"] == stacked
    assert set(stacked) == {0, 1}
    assert group["splits"] == 1


def test_every_parameter_of_sac_is_in_exactly_one_group(sac):
    optimizer = build_optimizer(sac, **BOTH_MUON)
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in sac.parameters())


@pytest.mark.parametrize("alpha", ["muon", "adamw", "adam"])
@pytest.mark.parametrize("critic", ["muon", "adamw", "adam"])
@pytest.mark.parametrize("actor", ["muon", "adamw", "adam"])
def test_each_network_has_a_case_of_its_own(sac, actor, critic, alpha):
    configs = {"actor": {"case": actor}, "critic": {"case": critic}, "alpha": {"case": alpha}}
    if alpha == "muon":
        with pytest.raises(ValueError, match=r"no matrix to take in 'alpha': .*log_alpha \(other"):
            build_optimizer(sac, **configs)
        configs.pop("alpha")
        alpha = "adam"
    optimizer = build_optimizer(sac, **configs)
    endings = {"muon": ["muon", "aux"], "adamw": ["adamw"], "adam": ["adam"]}
    expected = [
        f"{network}/{ending}"
        for network, case in (("actor", actor), ("critic", critic), ("alpha", alpha))
        for ending in endings[case]
    ]
    assert [group["name"] for group in optimizer.param_groups] == expected
    for group in optimizer.param_groups:
        network, _, ending = group["name"].partition("/")
        aux = "adamw" if ending == "aux" else ending
        assert group["algorithm"] == aux
        if ending in ("adamw", "adam"):
            given = {n for n, p in sac.named_parameters() if any(p is q for q in group["params"])}
            prefix = {"actor": "actor", "critic": "qvalue", "alpha": "log_alpha"}[network]
            assert given == {n for n, _ in sac.named_parameters() if n.startswith(prefix)}


def test_ppo_has_actor_and_critic(ppo):
    optimizer = build_optimizer(ppo, actor={"case": "muon"}, critic={"case": "adamw"})
    assert list(names(optimizer)) == ["actor/muon", "actor/aux", "critic/adamw"]
    assert len(names(optimizer)["critic/adamw"]) == 6


def test_the_heads_of_all_networks_of_the_critic_of_iql_are_left_to_the_auxiliary_part(iql):
    groups = names(build_optimizer(iql, **BOTH_MUON))
    heads = {"qvalue_network_params.module.6.weight", "value_network_params.module.4.weight"}
    assert heads <= groups["critic/aux"]
    assert len(groups["critic/muon"]) == 4


def test_a_learned_scale_of_the_actor_is_left_to_the_auxiliary_part():
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2), AddStateIndependentNormalScale(2))
    groups = names(build_optimizer(nn.ModuleDict({"actor": net}), actor={"case": "muon"}))
    assert groups["actor/muon"] == {"actor.0.weight"}
    assert "actor.2.state_independent_scale" in groups["actor/aux"]


@pytest.mark.parametrize(
    ("layer", "name", "splits"),
    [
        (nn.MultiheadAttention(16, 2), "in_proj_weight", 3),
        (nn.GRU(16, 16), "weight_hh_l0", 3),
        (nn.LSTM(16, 16), "weight_ih_l0", 4),
    ],
    ids=["attention", "gru", "lstm"],
)
def test_fused_matrices_carry_their_splits_into_the_group(layer, name, splits):
    net = nn.Sequential(nn.Linear(3, 16), layer, nn.Linear(16, 2))
    optimizer = build_optimizer(nn.ModuleDict({"net": net}), net={"case": "muon"})
    group = group_of(optimizer, "net/muon")
    assert dict(zip(group["param_names"], group["splits"], strict=True))[f"net.1.{name}"] == splits
    assert group["splits"][0] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {FIRST, HIDDEN}),
        ({"apply_first_layer": False}, {HIDDEN}),
        ({"apply_last_layer": True}, {FIRST, HIDDEN, LAST}),
        ({"apply_first_layer": False, "apply_last_layer": True}, {HIDDEN, LAST}),
        ({"exclude": ["*0.weight"]}, {HIDDEN}),
        ({"exclude": ["actor.0.*"]}, {HIDDEN}),
        ({"include": ["*3.weight"]}, {FIRST, HIDDEN, LAST}),
        ({"include": ["*3.weight"], "exclude": ["actor.3.*"]}, {FIRST, HIDDEN}),
        ({"include": [FIRST], "apply_first_layer": False}, {FIRST, HIDDEN}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # for xdist
)
def test_layers_and_patterns_choose_what_muon_takes(options, expected):
    optimizer = build_optimizer(plain(), actor={"case": "muon", "muon": options})
    rest = REST | ({FIRST, HIDDEN, LAST} - expected)
    assert names(optimizer) == {"actor/muon": expected, "actor/aux": rest}


def test_an_included_table_of_embeddings_goes_to_muon():
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    agent = nn.ModuleDict({"actor": net})
    config = {"case": "muon", "muon": {"include": ["actor.0.*"]}}
    assert names(build_optimizer(agent, actor=config))["actor/muon"] == {
        "actor.0.weight",
        "actor.1.weight",
    }
    without = build_optimizer(agent, actor={"case": "muon"})
    assert names(without)["actor/muon"] == {"actor.1.weight"}


def test_an_included_bias_is_refused_by_name():
    config = {"case": "muon", "muon": {"include": ["*2.bias"]}}
    with pytest.raises(ValueError, match=r"needs matrices, but 'actor.2.bias' has shape \(16,\)"):
        build_optimizer(plain(), actor=config)


def test_an_included_stacked_bias_is_refused_by_name(sac):
    config = {"case": "muon", "muon": {"include": [f"{CRITIC}.0.bias"]}}
    with pytest.raises(ValueError, match=rf"'{CRITIC}.0.bias' has shape \(2, 16\)"):
        build_optimizer(sac, actor={}, critic=config)


def test_frozen_parameters_are_left_out_and_do_not_move_the_roles_of_others():
    agent = plain()
    agent["actor"][3].requires_grad_(False)
    optimizer = build_optimizer(agent, actor={"case": "muon"})
    assert names(optimizer) == {"actor/muon": {FIRST, HIDDEN}, "actor/aux": REST - {"actor.3.bias"}}


def test_a_frozen_network_needs_no_config():
    agent = plain()
    agent["encoder"] = nn.Linear(3, 3).requires_grad_(False)
    optimizer = build_optimizer(agent, actor={"case": "adam"})
    assert list(names(optimizer)) == ["actor/adam"]


def test_a_group_without_parameters_is_left_out():
    agent = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 3, bias=False))})
    config = {"case": "muon", "muon": {"apply_last_layer": True}}
    assert list(names(build_optimizer(agent, net=config))) == ["net/muon"]


# ------------------------------------------------------------------------------ their values


def test_defaults_of_each_case_are_those_of_the_docs(sac):
    optimizer = build_optimizer(sac, **BOTH_MUON)
    muon, aux, alpha = (
        group_of(optimizer, name) for name in ("critic/muon", "critic/aux", "alpha/adam")
    )
    expected = {
        "algorithm": "muon",
        "lr": 0.02,
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.0,
        "ns_steps": 5,
        "coefficients": "quintic",
        "adjust_lr": "original",
        "eps": 1e-7,
    }
    assert {option: muon[option] for option in expected} == expected
    adam = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert {option: aux[option] for option in ["algorithm", *adam]} == {
        "algorithm": "adamw",
        **adam,
    }
    assert {option: alpha[option] for option in ["algorithm", *adam]} == {
        "algorithm": "adam",
        **adam,
    }


def test_only_case_adamw_decays(sac):
    config = {"weight_decay": 0.3, "muon": {"weight_decay": 0.2}}
    decays = {}
    for case in ("muon", "adamw", "adam"):
        optimizer = build_optimizer(sac, actor={"case": case, **config}, critic={"case": "adamw"})
        decays |= {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {
        "actor/muon": 0.2,
        "actor/aux": 0.0,
        "actor/adamw": 0.3,
        "actor/adam": 0.0,
        "critic/adamw": 0.01,
        "alpha/adam": 0.0,
    }


@pytest.mark.parametrize("aux", ["adamw", "adam"])
@pytest.mark.parametrize(("aux_lr", "expected"), [(None, 1e-3), (5e-4, 5e-4), (0.0, 0.0)])
def test_the_auxiliary_part_has_its_own_kind_and_rate(aux, aux_lr, expected):
    config = {"lr": 1e-3, "aux": aux, "aux_lr": aux_lr, "betas": (0.8, 0.9), "eps": 1e-5}
    group = group_of(build_optimizer(plain(), actor=config), "actor/aux")
    given = {option: group[option] for option in ("algorithm", "lr", "betas", "eps")}
    assert given == {"algorithm": aux, "lr": expected, "betas": (0.8, 0.9), "eps": 1e-5}


def test_without_an_auxiliary_part_what_muon_does_not_take_is_refused_by_name():
    rest = "actor.0.bias, actor.1.weight, actor.1.bias, actor.2.bias, actor.3.weight, actor.3.bias"
    message = f"Muon does not take {rest} in 'actor', and actor.aux is none: set it to adamw or"
    with pytest.raises(ValueError, match=re.escape(message)):
        build_optimizer(plain(), actor={"aux": None})


def test_without_an_auxiliary_part_a_network_of_matrices_trains():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16, bias=False), nn.Linear(16, 2, bias=False))
    agent = nn.ModuleDict({"actor": net})
    config = {"aux": None, "muon": {"apply_last_layer": True}}
    optimizer = build_optimizer(agent, actor=config)
    assert list(names(optimizer)) == ["actor/muon"]
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_muons_own_settings_reach_its_group():
    given = {
        "lr": 0.05,
        "momentum": 0.8,
        "nesterov": False,
        "weight_decay": 0.1,
        "ns_steps": 7,
        "coefficients": [[1.5, -0.5, 0.0]],
        "adjust_lr": None,
    }
    group = group_of(build_optimizer(plain(), actor={"muon": given}), "actor/muon")
    assert {option: group[option] for option in given} == given


def test_alpha_takes_a_config_of_its_own(sac):
    optimizer = build_optimizer(sac, **BOTH_MUON, alpha={"case": "adamw", "lr": 1e-2})
    group = group_of(optimizer, "alpha/adamw")
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.01)


def test_dicts_dataclasses_and_a_mix_of_both_build_the_same_optimizer(sac):
    muon = {"lr": 0.03, "coefficients": "polar_express", "exclude": ["*0.weight"]}
    dicts = {"actor": {"case": "adam", "lr": 1e-3}, "critic": {"aux": "adam", "muon": muon}}
    classes = {
        "actor": OptimizerConfig(case="adam", lr=1e-3),
        "critic": OptimizerConfig(aux="adam", muon=MuonConfig(**muon)),
    }
    mix = {"actor": OptimizerConfig(case="adam", lr=1e-3), "critic": dict(dicts["critic"])}
    mix["critic"]["muon"] = MuonConfig(**muon)
    before = copy.deepcopy(dicts)
    first, *others = [
        [
            {key: value for key, value in group.items() if key != "params"}
            for group in build_optimizer(sac, **configs).param_groups
        ]
        for configs in (dicts, classes, mix)
    ]
    assert first[1]["lr"] == 0.03
    assert all(other == first for other in others)
    assert dicts == before


def test_every_option_of_muon_in_a_config_is_one_of_the_optimizer_or_a_choice_of_layers():
    choices = {"apply_first_layer", "apply_last_layer", "include", "exclude"}
    options = {field.name for field in fields(MuonConfig)} - choices
    assert options <= set(Muon([nn.Parameter(torch.zeros(2, 2))]).defaults)


@pytest.mark.parametrize("on_nonfinite", ["propagate", "raise", "skip"])
def test_on_nonfinite_reaches_the_optimizer(on_nonfinite):
    optimizer = build_optimizer(plain(), actor={}, on_nonfinite=on_nonfinite)
    assert optimizer.on_nonfinite == on_nonfinite


# ------------------------------------------------------------------------------- they train


@pytest.mark.parametrize("case", ["muon", "adamw", "adam"])
def test_updates_of_sac_change_every_parameter(make_sac, case):
    loss = make_sac()
    optimizer = build_optimizer(loss, actor={"case": case}, critic={"case": case})
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    assert not [name for name, p in loss.named_parameters() if torch.equal(p, before[name])]


def test_a_step_of_sac_equals_torch_muon_on_each_critic_and_torch_adamw_on_the_rest(make_sac):
    loss, twin = make_sac(), make_sac()
    optimizer = build_optimizer(
        loss,
        actor={"case": "adam"},
        critic={"case": "muon", "muon": {"lr": 0.05, "weight_decay": 0.1}},
    )
    for group in optimizer.param_groups:
        if group["algorithm"] == "muon":
            group["dtype"] = torch.bfloat16
    chosen = [f"{CRITIC}.0.weight", f"{CRITIC}.3.weight"]
    named = dict(twin.named_parameters())
    stacked = [named[name] for name in chosen]
    separate = [nn.Parameter(m.detach().clone()) for p in stacked for m in p]
    rest = [p for n, p in named.items() if n.startswith("qvalue") and n not in chosen]
    others = [p for n, p in named.items() if not n.startswith("qvalue")]
    torch_muon = torch.optim.Muon(separate, lr=0.05, weight_decay=0.1)
    torch_adamw = torch.optim.AdamW(rest, lr=3e-4, weight_decay=0.0, fused=True)
    torch_adam = torch.optim.Adam(others, lr=3e-4, fused=True)
    for step in range(3):
        for each in (loss, twin):
            each.zero_grad()
            torch.manual_seed(step)
            backward(each)
        gradients = [gradient for p in stacked for gradient in p.grad]
        for matrix, gradient in zip(separate, gradients, strict=True):
            matrix.grad = gradient.clone()
        for each in (optimizer, torch_muon, torch_adamw, torch_adam):
            each.step()
        with torch.no_grad():
            for p, matrices in zip(stacked, (separate[:2], separate[2:]), strict=True):
                p.copy_(torch.stack(matrices))
    ours = dict(loss.named_parameters())
    assert not [name for name, p in named.items() if not torch.equal(ours[name], p)]


# -------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (
            {**BOTH_MUON, "policy": {"case": "muon"}},
            "No trainable network named policy in SACLoss; it has .*actor, critic",
        ),
        ({"actor": {}}, r"No optimizer config for the trainable network\(s\) critic of SACLoss"),
        ({}, r"trainable network\(s\) actor, critic of SACLoss: pass one for each"),
        (
            {**BOTH_MUON, "actor": {"rate": 0.1}},
            r"Unknown option\(s\) rate for actor; allowed: case, lr, betas",
        ),
        (
            {**BOTH_MUON, "critic": {"muon": {"nesterow": True}}},
            r"Unknown option\(s\) nesterow for critic.muon; allowed: lr, momentum",
        ),
        (
            {**BOTH_MUON, "actor": {"case": "sgd"}},
            "actor.case must be one of muon, adamw, adam, but is 'sgd'",
        ),
        (
            {**BOTH_MUON, "actor": OptimizerConfig(case="sgd")},
            "actor.case must be one of muon, adamw, adam, but is 'sgd'",
        ),
        (
            {**BOTH_MUON, "critic": {"aux": "muon"}},
            "critic.aux must be one of adamw, adam, None, but is 'muon'",
        ),
        (
            {**BOTH_MUON, "critic": {"muon": {"momentum": 1.5}}},
            r"momentum must be in \[0, 1\), but is 1.5 in group 'critic/muon'",
        ),
        (
            {**BOTH_MUON, "critic": {"muon": {"coefficients": "nonic"}}},
            "Unknown coefficients 'nonic'",
        ),
        (
            {**BOTH_MUON, "actor": {"lr": -1.0}},
            "lr must be at least 0, but is -1.0 in group 'actor/aux'",
        ),
    ],
    ids=[
        "unknown-network",
        "missing-critic",
        "missing-both",
        "unknown-option",
        "unknown-muon-option",
        "unknown-case",
        "unknown-case-dataclass",
        "unknown-aux",
        "momentum",
        "coefficients",
        "lr",
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_named(sac, configs, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(sac, **configs)


@pytest.mark.parametrize("config", ["muon", None, 0.02], ids=str)
def test_a_config_of_another_type_is_refused_by_network(sac, config):
    with pytest.raises(
        TypeError, match="optimizer of 'actor' must be an OptimizerConfig or a dict"
    ):
        build_optimizer(sac, actor=config, critic={})


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (nn.Linear(3, 2), {}),
        (nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)), {"apply_last_layer": True}),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {"apply_first_layer": False}),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {"exclude": ["*.weight"]}),
    ],
    ids=["head-only", "no-layer", "first-left-out", "excluded"],
)
def test_a_network_without_a_matrix_for_muon_is_refused_by_name(net, options):
    with pytest.raises(ValueError, match=r"no matrix to take in 'model': .*weight \(.*adamw"):
        build_optimizer(nn.ModuleDict({"model": net}), model={"case": "muon", "muon": options})


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_fits_no_parameter_is_refused(option):
    module = nn.ModuleDict({"actor": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))})
    with pytest.raises(ValueError, match=r"'\*typo\*' in actor\.muon fits no parameter"):
        build_optimizer(module, actor={"muon": {option: ["*typo*"]}})


def test_none_is_a_word_too(sac):
    optimizer = build_optimizer(
        sac, actor={"case": "muon", "muon": {"adjust_lr": "none"}}, critic={"case": "adamw"}
    )
    assert optimizer.param_groups[0]["adjust_lr"] is None
    with pytest.raises(ValueError, match=r"actor\.aux is none: set it to adamw or adam"):
        build_optimizer(sac, actor={"aux": "none"}, critic={})


@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay"])
def test_a_number_that_yaml_read_as_a_word_is_refused(sac, option):
    with pytest.raises(TypeError, match=rf"{option} must be a number, but is '3e-4' .* 3\.0e-4"):
        build_optimizer(sac, actor={"case": "adamw", option: "3e-4"}, critic={})


def test_a_state_of_other_groups_of_equal_sizes_is_refused_and_names_them():
    def net():
        return nn.ModuleDict({"actor": nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))})

    saved = build_optimizer(net(), actor={}).state_dict()
    other = {"apply_first_layer": False, "apply_last_layer": True}
    with pytest.raises(
        ValueError, match=r"'actor/muon' holds actor\.1\.weight, actor\.2\.weight, but"
    ):
        build_optimizer(net(), actor={"muon": other}).load_state_dict(saved)
