"""PPO on Snake through the command line: metrics a rollout, rates, evaluations, films, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from muon_rl.recipes.ppo import PPO, HeadOptimizer, PPOOptimizers
from tensordict.nn import TensorDictSequential
from torchrl.objectives import ClipPPOLoss

from muon_rl.cli import main
from muon_rl.envs import Snake
from muon_rl.modules import ConvolutionActorCritic, TransformerActorCritic

OPTIONS = (
    "--env.num_envs=8", "--env.max_steps=20", "--data.steps_per_rollout=64", "--data.epochs=2",
    "--data.minibatches=2", "--data.total_frames=192", "--data.eval_every=128",
    "--data.eval_episodes=6", "--model.policy.d_model=16", "--model.policy.num_layers=1",
    "--trainer.enable_progress_bar=false",
)  # fmt: skip
ROLLOUTS = (64, 128, 192)


def fit(name, *options):
    main(["fit", f"--config={name}", *OPTIONS, *options])


def transitions(agent):
    """Return 128 of them, with advantages and targets at random."""
    with torch.no_grad():
        steps = (
            Snake(6, 6, num_envs=16)
            .make(seed=0)
            .rollout(8, agent.policy, break_when_any_done=False)
        )
    rows = steps.reshape(-1)
    rows["advantage"], rows["value_target"] = torch.randn(128, 1), torch.randn(128, 1)
    rows["action_log_prob"] += 0.3 * torch.randn(128)  # as of another policy: ratios on both sides
    return rows


@pytest.mark.parametrize("anneal", [True, False], ids=["annealed", "constant"])
@pytest.mark.parametrize("case", ["muon", "adam"])
def test_each_rollout_has_its_metrics_and_rates_once(case, anneal, workspace):
    fit(f"ppo_snake_{case}_small", f"--model.anneal_lr={str(anneal).lower()}")
    falling = [1.0, 2 / 3, 1 / 3] if anneal else [1.0] * 3
    rates = {"learning_rate": 0.02 if case == "muon" else 1e-3}
    if case == "muon":
        rates["aux_learning_rate"] = 1e-3
    for name, rate in rates.items():
        points = workspace.history(f"train/{name}")
        assert [frames for frames, _ in points] == list(ROLLOUTS)
        assert [value for _, value in points] == pytest.approx([rate * share for share in falling])
    (record,) = workspace.records
    assert ("train/aux_learning_rate" in record.data.metrics) == (case == "muon")
    for name in (
        "loss_objective", "loss_critic", "loss_entropy", "entropy", "kl_approx", "clip_fraction",
        "explained_variance", "episode_return", "episode_length", "episode_score",
    ):  # fmt: skip
        assert [frames for frames, _ in workspace.history(f"train/{name}")] == list(ROLLOUTS), name
    for name in ("frames_per_second", "optimizer_share"):  # of whole rounds
        points = workspace.history(f"train/{name}")
        assert [frames for frames, _ in points] == list(ROLLOUTS[1:]), name
        assert all(value > 0 for _, value in points)


def test_the_sampled_policy_and_the_greedy_one_are_evaluated_and_filmed(workspace):
    fit("ppo_snake_muon_small")
    (record,) = workspace.records
    for name in ("return", "length", "score", "greedy_return", "greedy_length", "greedy_score"):
        assert [frames for frames, _ in workspace.history(f"eval/{name}")] == [128, 192], name
    films = workspace.client.list_artifacts(record.info.run_id, "films")
    assert [Path(film.path).name for film in films] == ["000000000128.gif", "000000000192.gif"]
    path = workspace.client.download_artifacts(record.info.run_id, films[0].path)
    assert Path(path).read_bytes()[:6] == b"GIF89a"


def test_the_greedy_policy_alone_is_evaluated_where_nothing_is_drawn(workspace):
    fit("ppo_snake_muon_small", "--data.eval_sampled=false", "--data.total_frames=64")
    (record,) = workspace.records
    assert "eval/return" in record.data.metrics
    assert not [name for name in record.data.metrics if name.startswith("eval/greedy")]


def test_a_sampled_evaluation_plays_other_games_than_a_greedy_one(workspace):
    """Else the two sets of metrics would be one."""
    fit("ppo_snake_muon_small", "--data.eval_episodes=32")
    (record,) = workspace.records
    metrics = record.data.metrics
    assert metrics["eval/length"] != metrics["eval/greedy_length"]


def test_a_resumed_run_makes_the_rollouts_and_updates_of_one_that_never_stopped(workspace):
    options = ("--model.anneal_lr=false", "--data.eval_every=1000")
    fit("ppo_snake_muon_small", *options, "--method_name=whole")
    fit("ppo_snake_muon_small", *options, "--method_name=parts", "--data.total_frames=128")
    fit("ppo_snake_muon_small", *options, "--method_name=parts", "--ckpt_path=last")
    whole, parts = (
        torch.load(sorted(workspace.folder.glob(f"checkpoints/{name}/*/*/last.ckpt"))[-1])
        for name in ("whole", "parts")
    )
    assert whole["muon_rl"]["frames"] == parts["muon_rl"]["frames"] == 192
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name


@pytest.mark.parametrize("policy", [TransformerActorCritic, ConvolutionActorCritic])
def test_an_update_passes_the_trunk_once_and_changes_every_parameter(policy):
    torch.manual_seed(0)
    agent = PPO(Snake(6, 6, num_envs=16), policy=policy)
    passes = []
    agent.policy.trunk.register_forward_hook(lambda *_: passes.append(1))
    rows = transitions(agent)
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    optimizer = agent.build_optimizer()
    passes.clear()
    out = agent.loss(rows)
    assert len(passes) == 1
    sum(term for name, term in out.items() if name.startswith("loss_")).backward()
    optimizer.step()
    after = list(agent.policy.parameters())
    assert all(not torch.equal(b, a) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("clip", "entropy", "value"), [(0.2, 0.01, 0.5), (0.1, 0.03, 0.7)], ids=["default", "given"]
)
def test_a_step_trains_as_torchrls_own_loss_with_two_passes_does(clip, entropy, value):
    """The lean form is a matter of speed alone."""
    torch.manual_seed(0)
    given = {"clip": clip, "entropy_coef": entropy, "value_coef": value}
    agent = PPO(Snake(6, 6), **({} if clip == 0.2 else given))
    rows = transitions(agent).exclude("embed")
    before = set(rows.keys(True, True))
    parts = agent.policy.module
    actor = type(agent.policy.actor)(parts[0], *agent.policy.actor.module)
    stock = ClipPPOLoss(
        actor, TensorDictSequential(parts[0], parts[1]), clip_epsilon=clip,
        entropy_coeff=entropy, critic_coeff=value,
        loss_critic_type="smooth_l1", normalize_advantage=True,
    )  # fmt: skip
    theirs, ours = stock(rows.copy()), agent.loss(rows)
    assert set(rows.keys(True, True)) == before
    assert 0.1 < ours["clip_fraction"] < 0.9
    for name in ("loss_objective", "loss_critic", "loss_entropy", "clip_fraction"):
        torch.testing.assert_close(ours[name], theirs[name])


def test_discount_decay_and_bound_are_those_of_the_config():
    for given, expected in (({}, (0.99, 0.95, 0.5)), (
        {"gamma": 0.9, "lmbda": 0.8, "max_grad_norm": 2.0}, (0.9, 0.8, 2.0)
    )):  # fmt: skip
        agent = PPO(Snake(6, 6), **given)
        estimator = agent.loss.value_estimator
        found = (estimator.gamma.item(), estimator.lmbda.item(), agent.max_grad_norm)
        assert found == pytest.approx(expected)


def test_heads_are_left_to_adam_unless_muon_is_to_take_the_last_layer():
    env = Snake(6, 6)
    heads = [HeadOptimizer(case="muon"), HeadOptimizer(case="muon")]
    with pytest.raises(ValueError, match="Muon finds no matrix to take in 'actor'"):
        PPO(env, optimizer=PPOOptimizers(actor=heads[0], critic=heads[1]))
    for head in heads:
        head.muon.apply_last_layer = True
    agent = PPO(env, optimizer=PPOOptimizers(actor=heads[0], critic=heads[1]))
    groups = {group["name"] for group in agent.build_optimizer().param_groups}
    assert {"actor/muon", "critic/muon", "trunk/muon", "trunk/aux"} <= groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "model.clip must be above 0, but is 0"),
        ({"gamma": 1.5}, r"model.gamma must be in \[0, 1\], but is 1.5"),
        ({"lmbda": -0.1}, r"model.lmbda must be in \[0, 1\], but is -0.1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PPO(Snake(6, 6), **options)
