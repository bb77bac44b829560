"""Each point of the SAC study: a short real run, whose record shows that its knob turned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from muon_rl.cli import recipes
from muon_rl.experiments import read_sweep

# 20 updates, all of them logged.
SHORT = (
    "--env.time_limit=1.0", "--data.total_frames=140", "--data.init_random_frames=100",
    "--data.eval_every=1000",
    "--data.steps_per_collection=1", "--data.eval_episodes=1", "--data.batch_size=32",
    "--data.buffer_size=1000", "--model.actor.hidden=[16,16]", "--model.critic.hidden=[16,16]",
    "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
)  # fmt: skip
UPDATES = 20
START = 8  # of delayed momentum
# A hypothesis has a recipe and a sweep of one name.
SWEEPS = {
    name: read_sweep(path)
    for name, path in recipes.sweeps().items()
    if name.startswith("sac_") and name in recipes.shipped()
}
NETWORKS = {"actor": "actor_network", "critic": "qvalue_network"}


def fit(workspace, sweep: str, point: dict, *more: str) -> None:
    values = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in point.items()]
    workspace.options = (f"--config={SWEEPS[sweep].config}", *SHORT)
    workspace.fit(*values, *more)


def groups_by_parameter(workspace) -> dict[str, str]:
    """Return the group of each parameter, from the table that the run logged."""
    (record,) = workspace.records
    path = workspace.client.download_artifacts(record.info.run_id, "optimizer.txt")
    lines = Path(path).read_text().splitlines()
    place = lines[0].index("group")
    return {line.split()[0]: line[place:].split()[0] for line in lines[1:] if line.strip()}


def values(workspace, metric: str) -> list[float]:
    return [value for _, value in workspace.history(metric)]


def points(sweep: str):
    """Parametrize over the points of a sweep: every third is quick to have, the others are slow."""
    return pytest.mark.parametrize(
        "point",
        [
            pytest.param(
                point,
                id="-".join(map(str, point.values())),
                marks=[pytest.mark.slow] if index % 3 else [],
            )
            for index, point in enumerate(SWEEPS[sweep].points)
        ],
    )


@pytest.mark.parametrize("sweep", SWEEPS)
def test_methods_of_a_sweep_have_names_of_their_own(sweep):
    keys = {key for point in SWEEPS[sweep].points for key in point}
    recipe = yaml.safe_load(recipes.shipped()[SWEEPS[sweep].config].read_text())
    told = {key for key in keys if f"${{{key}}}" in recipe["method_name"]}
    names = [tuple(point.get(key, "default") for key in told) for point in SWEEPS[sweep].points]
    assert len(set(map(str, names))) == len(names)


@points("sac_optimizer")
def test_optimizer(workspace, point):
    fit(workspace, "sac_optimizer", point)
    groups = groups_by_parameter(workspace)
    for network, prefix in NETWORKS.items():
        case = point[f"model.optimizer.{network}.case"]
        found = {group for name, group in groups.items() if name.startswith(prefix)}
        assert found == (
            {f"{network}/muon", f"{network}/aux"} if case == "muon" else {f"{network}/{case}"}
        )


@points("sac_momentum")
def test_momentum(workspace, point):
    fit(workspace, "sac_momentum", point)
    state = torch.load(workspace.checkpoint(), weights_only=True)["optimizer_states"][0]
    groups = {group["name"]: group for group in state["param_groups"]}
    for network in NETWORKS:
        if f"model.optimizer.{network}.betas" in point:
            betas = point[f"model.optimizer.{network}.betas"]
            assert values(workspace, f"train/momentum/{network}/adamw") == [betas[0]] * UPDATES
            assert groups[f"{network}/adamw"]["betas"][1] == betas[1] == 0.999
        else:
            momentum = point[f"model.optimizer.{network}.muon.momentum"]
            assert values(workspace, f"train/momentum/{network}/muon") == [momentum] * UPDATES
            assert values(workspace, f"train/momentum/{network}/aux") == [0.9] * UPDATES


@points("sac_layers")
def test_layers(workspace, point):
    fit(workspace, "sac_layers", point)
    groups = groups_by_parameter(workspace)
    weights = {
        network: [groups[n] for n in groups if n.startswith(prefix) and n.endswith("weight")]
        for network, prefix in NETWORKS.items()
    }
    for network in NETWORKS:
        assert len(weights[network]) == 3
        expected = {f"{network}/muon": 2, f"{network}/aux": 1}  # all but the head
        if point.get(f"model.optimizer.{network}.muon.apply_last_layer"):
            expected = {f"{network}/muon": 3}
        if point.get(f"model.optimizer.{network}.muon.apply_first_layer") is False:
            expected = {f"{network}/muon": 1, f"{network}/aux": 2}
        if point.get(f"model.optimizer.{network}.case") == "adamw":
            expected = {f"{network}/adamw": 3}
        assert {group: weights[network].count(group) for group in weights[network]} == expected


@points("sac_delayed_momentum")
def test_delayed_momentum(workspace, point):
    start = [
        f"--model.optimizer.{network}.momentum_schedule.start_step={START}" for network in NETWORKS
    ]
    fit(workspace, "sac_delayed_momentum", point, *start)
    for network in NETWORKS:
        case = point[f"model.optimizer.{network}.case"]
        late = START if point[f"model.optimizer.{network}.momentum_schedule.enabled"] else 0
        own = {"muon": 0.95, "adamw": 0.9}[case]
        expected = [0.0] * late + [own] * (UPDATES - late)
        assert values(workspace, f"train/momentum/{network}/{case}") == expected


@points("sac_rank")
def test_rank(workspace, point):
    fit(workspace, "sac_rank", point, "--effective_rank.every_n_updates=10")
    measured = workspace.history("repr/q_effective_rank_mean")
    assert [frame for frame, _ in measured] == [120, 140]
    assert all(1.0 <= rank <= 16.0 for _, rank in measured)
    for critic in (1, 2):
        for name in ("effective_rank", "top10_mass", "stable_rank", "dormant_share"):
            assert len(workspace.history(f"repr/q{critic}_{name}")) == 2
    weights = torch.load(workspace.checkpoint(), weights_only=True)["state_dict"]
    critics = [name for name in weights if name.startswith("loss.qvalue_network_params")]
    spectral = point.get("model.critic.spectral_norm", False)
    assert any(name.endswith(".u") for name in critics) == spectral
    (record,) = workspace.records
    norm = point.get("model.critic.activation_norm", "none")
    assert record.data.params["model.critic.activation_norm"] == norm
    normed = sum(weights[name].ndim == 2 and name.endswith("weight") for name in critics)
    assert normed == (2 if norm == "layernorm" else 0)  # stacked vectors
    case = point["model.optimizer.critic.case"]
    assert f"train/momentum/critic/{case}" in record.data.metrics
