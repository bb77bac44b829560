"""Muesli's recipes: each configuration trains every network, and says what it cannot do."""

from __future__ import annotations

import json

import pytest
import torch

from muon_rl.cli import main, recipes
from muon_rl.cli.recipe_cli import RecipeCLI
from muon_rl.experiments import read_sweep

PROTOCOL = read_sweep(recipes.sweeps()["muesli_protocol"])
SHORT = (
    "--data.total_frames=400", "--data.eval_every=1000", "--data.eval_episodes=1",
    "--model.world_model.latent=16", "--model.world_model.hidden=[16]",
    "--model.world_model.dynamics_hidden=[16]", "--model.world_model.head_hidden=[16]",
    "--trainer.log_every_n_steps=5", "--trainer.enable_progress_bar=false",
)  # fmt: skip
TERMS = {
    "ppo": {"objective", "critic", "entropy"},
    "ppo_model": {"muesli_policy", "muesli_value", "muesli_reward"},
    "ppo_model_cmpo": {"muesli_policy", "muesli_value", "muesli_reward", "cmpo", "q_head"},
    "ppo_model_cmpo_dynamics": {
        "muesli_policy", "dynamics_reward", "dynamics_returns", "cmpo", "q_head",
    },
    "muesli": {
        "policy", "value", "cmpo", "muesli_policy", "dynamics_reward", "dynamics_returns",
    },
}  # fmt: skip


def fit(workspace, config: str, *options: str) -> None:
    workspace.options = (f"--config={config}", *SHORT)
    workspace.fit(*options)


def expected_terms(method: str) -> set[str]:
    if method.startswith("muesli"):
        return TERMS["muesli"]
    return TERMS[method] | TERMS["ppo"]


def untrained(workspace) -> list[str]:
    """Return the groups that have a parameter whose moments are 0."""
    state = torch.load(workspace.checkpoint(), weights_only=True)["optimizer_states"][0]
    return [
        group["name"]
        for group in state["param_groups"]
        for index in group["params"]
        if not any(
            x.abs().sum() > 0 for k, x in state["state"].get(index, {}).items() if k != "step"
        )
    ]


@pytest.mark.parametrize("point", PROTOCOL.points, ids=lambda point: point["method_name"])
def test_each_configuration_of_the_protocol_trains_its_terms(point, workspace):
    values = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in point.items()]
    fit(workspace, PROTOCOL.config, *values, *SHORT[:2])  # but of its budget
    (record,) = workspace.records
    logged = {name.removeprefix("train/loss_") for name in record.data.metrics if "/loss_" in name}
    assert logged == expected_terms(point["method_name"])
    groups = set(untrained(workspace))
    # PPO alone leaves the dynamics as they were drawn: nothing unrolls them.
    assert not groups or point["method_name"] == "ppo"
    assert record.data.tags["method"] == point["method_name"]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("muesli_minatar_breakout", ["--data.steps_per_collection=160"]),
        ("muesli_lunarlander", []),
        ("muesli_snake", []),
        ("muesli_cartpole_swingup", []),
        ("muesli_arena", ["--data.total_frames=2000", "--env.max_steps=50"]),
    ],
)
def test_each_recipe_trains_every_network(config, options, workspace):
    if config == "muesli_snake":
        options = ["--data.total_frames=1280", "--data.eval_episodes=32"]
    fit(workspace, config, "--data.batch_size=4", *options)
    assert untrained(workspace) == []
    (record,) = workspace.records
    assert record.info.status == "FINISHED"


def test_presets_and_what_is_given_in_their_place(workspace):
    fit(workspace, "muesli_cartpole", "--model.preset=aggressive", "--model.kl_coef=0.3")
    (record,) = workspace.records
    assert record.data.params["model.preset"] == "aggressive"
    loss = torch.load(workspace.checkpoint(), weights_only=True)["state_dict"]
    assert loss["loss.losses.cmpo.kl_coef"].item() == pytest.approx(0.3)
    assert loss["loss.losses.model.policy_pred_coef"].item() == pytest.approx(0.005)
    assert loss["loss.losses.dynamics.returns_pred_coef"].item() == 1.0


def test_what_retrace_and_its_loss_are_given(workspace):
    config = recipes.find("muesli_cartpole")
    options = ["--model.value_target=state_value", "--model.max_importance_ratio=2"]
    policy = RecipeCLI(["fit", f"--config={config}", *options]).model.loss.losses["policy"]
    assert policy.value_estimator.target == "state_value"
    assert policy.max_importance_ratio == 2.0
    policy = RecipeCLI(["fit", f"--config={config}"]).model.loss.losses["policy"]
    assert policy.value_estimator.target == "action_value"
    assert policy.max_importance_ratio is None


def losses_of(*options: str):
    """Return the agent that a config makes, and its losses."""
    config = recipes.find("muesli_cartpole")
    agent = RecipeCLI(["fit", f"--config={config}", *options]).model
    return agent, agent.loss.losses


def test_what_all_losses_share_reaches_each_of_them(workspace):
    agent, losses = losses_of(
        "--model.gamma=0.9", "--model.lmbda=0.8", "--model.tau=0.3", "--model.advantage_clip=0.5",
        "--model.value_coef=0.7", "--model.unroll_steps=2",
    )  # fmt: skip
    retrace = losses["policy"].value_estimator
    assert (retrace.gamma.item(), retrace.lmbda.item()) == pytest.approx((0.9, 0.8))
    assert losses["policy"].value_pred_coef.item() == pytest.approx(0.7)
    assert losses["cmpo"].q_network.gamma == pytest.approx(0.9)
    clips = losses["cmpo"].advantage_clip_min, losses["cmpo"].advantage_clip_max
    assert clips == pytest.approx((-0.5, 0.5))
    for name in ("dynamics", "model"):
        assert (losses[name].unroll_steps, losses[name].policy_horizon) == (2, 2)
    # Every loss that has target networks, and no other, has them moved, each by the same share.
    assert [target.loss_module for target in agent.targets] == [
        losses[name] for name in ("policy", "cmpo", "dynamics")
    ]
    assert [target.eps for target in agent.targets] == pytest.approx([0.7] * 3)


def test_what_ppo_and_the_q_head_are_given(workspace):
    agent, losses = losses_of(
        "--model.policy_gradient=ppo", "--model.action_values=q_head", "--model.dynamics=false",
        "--model.gamma=0.9", "--model.lmbda=0.8", "--model.clip=0.1", "--model.entropy_coef=0.02",
        "--model.value_coef=0.7", "--model.preset=conservative", "--model.value_pred_coef=0.6",
        "--model.reward_pred_coef=0.5", "--model.policy_pred_coef=0.4", "--model.kl_coef=0.3",
    )  # fmt: skip
    ppo, gae = losses["policy"], losses["policy"].value_estimator
    assert (float(gae.gamma), float(gae.lmbda)) == pytest.approx((0.9, 0.8))
    assert ppo.clip_epsilon.item() == pytest.approx(0.1)
    coefficients = ppo.entropy_coeff.item(), ppo.critic_coeff.item()
    assert coefficients == pytest.approx((0.02, 0.7))
    assert ppo.normalize_advantage and ppo.loss_critic_type == "smooth_l1"
    assert losses["q_head"].value_estimator.gamma.item() == pytest.approx(0.9)
    assert losses["cmpo"].kl_coef.item() == pytest.approx(0.3)
    model = losses["model"]
    coefficients = (model.policy_pred_coef, model.value_pred_coef, model.reward_pred_coef)
    assert [c.item() for c in coefficients] == pytest.approx([0.4, 0.6, 0.5])
    assert model.own_unroll and (model.unroll_steps, model.policy_horizon) == (3, 1)
    assert [target.loss_module for target in agent.targets] == [
        losses[name] for name in ("q_head", "cmpo", "model")
    ]


def test_a_prior_that_is_mixed_with_the_behaviour_and_the_uniform_policy(workspace):
    mixture = "--model.prior_mixture=[0.9,0.06,0.04]"
    assert tuple(losses_of(mixture)[1]["cmpo"].prior_mixture.shares) == (0.9, 0.06, 0.04)
    assert losses_of()[1]["cmpo"].prior_mixture is None
    fit(workspace, "muesli_cartpole", mixture)  # the behaviour's logits are in the buffer
    assert untrained(workspace) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.prior_mixture=[0.9,0,0.2]"], "prior_mixture"),
        (["--model.max_importance_ratio=0"], "max_importance_ratio must be above 0"),
        (["--model.action_values=none"], "model.model_policy=cmpo needs CMPO"),
        (["--model.gamma=1.5"], "model.gamma must be in"),
        (["--model.tau=0"], "model.tau must be in"),
        (["--model.clip=0"], "model.clip must be above 0"),
        (["--model.unroll_steps=0"], "unroll_steps must be"),
        (
            ["--config=muesli_cartpole_swingup", "--model.action_values=q_head"],
            "A Q-head values each of the actions",
        ),
    ],
)
def test_a_mistake_is_told_in_a_line(options, message, workspace, capsys):
    (workspace.folder / "mlflow.db").unlink()
    with pytest.raises(SystemExit):
        main(["fit", "--config=muesli_cartpole", *options])
    text = capsys.readouterr().err
    assert message in text
    assert len(text.strip().splitlines()) == 1
    assert not (workspace.folder / "mlflow.db").exists()
