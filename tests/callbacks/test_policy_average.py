"""The average of a policy: what it is of, who plays it, and that training does not see it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from muon_rl.recipes.muesli import Muesli, MuesliData

import muon_rl
from muon_rl.callbacks import PolicyAverage
from muon_rl.cli import main
from muon_rl.cli.recipe_cli import RecipeCLI
from muon_rl.cli.training import with_recipe_paths
from muon_rl.envs import Gym
from muon_rl.modules import WorldModel

AVERAGED = ("--policy_average.enabled=true", "--policy_average.decay=0.9")


def load(path):
    return torch.load(path, weights_only=True)


def copies(policy) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in policy.named_parameters()}


def equal(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


class Recorder(Callback):
    """Keeps the parameters after each update and what plays, and breaks the run if told to.

    Args:
        breaks: hook that raises, once there were 25 updates.
    """

    def __init__(self, breaks: str = ""):
        self.breaks, self.updates, self.played = breaks, [], []

    def on_train_batch_end(self, trainer, agent, *_):
        if len(self.updates) < trainer.global_step:
            self.updates.append(copies(agent.policy))
        self.break_in("training")

    def on_validation_batch_end(self, trainer, agent, *_):
        self.played.append((len(self.updates), copies(agent.policy)))
        self.break_in("evaluation")

    def break_in(self, place):
        if self.breaks == place and len(self.updates) >= 25:
            raise RuntimeError("the run broke")


def fit(average: PolicyAverage, recorder: Recorder, **options) -> Muesli:
    torch.manual_seed(0)
    widths = {key: [16] for key in ("hidden", "dynamics_hidden", "head_hidden")}
    agent = Muesli(Gym("CartPole-v1"), lambda specs: WorldModel(specs, latent=16, **widths))
    data = MuesliData(
        Gym("CartPole-v1"), total_frames=800, sequence_length=10, batch_size=4, buffer_size=400,
        steps_per_collection=40, updates_per_step=0.05, eval_episodes=1, eval_every=400,
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[recorder, average],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(agent, data)
    return agent


def expected(updates: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """Return the average as a sum of weighted updates, in double precision."""
    weights = [1.0]
    for n in range(2, len(updates) + 1):
        share = min(decay, (n - 1) / n)
        weights = [share * weight for weight in weights] + [1 - share]
    assert sum(weights) == pytest.approx(1.0)
    return {
        name: sum(w * x[name].double() for w, x in zip(weights, updates, strict=True))
        for name in updates[0]
    }


@pytest.mark.parametrize("decay", [0.0, 0.8, 0.999])
def test_it_is_the_average_of_the_parameters_after_each_update_and_plays_the_evaluations(decay):
    average, recorder = PolicyAverage(True, decay), Recorder()
    agent = fit(average, recorder)
    assert len(recorder.updates) == average.state_dict()["updates"] == 40
    assert [update for update, _ in recorder.played] == [20, 40]
    for update, played in recorder.played:
        for name, value in expected(recorder.updates[:update], decay).items():
            torch.testing.assert_close(played[name].double(), value, rtol=1e-5, atol=1e-6)
    # What trains is the policy that the last update left.
    assert equal(copies(agent.policy), recorder.updates[-1])
    if decay:
        assert not equal(recorder.played[-1][1], recorder.updates[-1])


def test_batches_whose_gradients_are_summed_up_count_once():
    average, recorder = PolicyAverage(True, 0.8), Recorder()
    agent = fit(average, recorder, accumulate_grad_batches=4)
    assert len(recorder.updates) == average.state_dict()["updates"] == 10
    for name, value in expected(recorder.updates, 0.8).items():
        close = average.state_dict()["average"][name].double()
        torch.testing.assert_close(close, value, rtol=1e-5, atol=1e-6)
    assert equal(copies(agent.policy), recorder.updates[-1])


@pytest.mark.parametrize("place", ["training", "evaluation"])
def test_a_run_that_breaks_leaves_the_trained_policy_in_place(place):
    recorder, after = Recorder(breaks=place), []

    class Late(PolicyAverage):  # what a checkpoint that is saved on an exception would hold
        def on_exception(self, trainer, agent, exception):
            super().on_exception(trainer, agent, exception)
            after.append(copies(agent.policy))

    with pytest.raises(RuntimeError, match="the run broke"):
        fit(Late(True, 0.8), recorder)
    assert equal(after[0], recorder.updates[-1])
    assert not equal(after[0], recorder.played[-1][1])


def test_a_checkpoint_within_an_evaluation_holds_the_trained_policy(tmp_path):
    class Saver(Recorder):
        def on_validation_batch_end(self, trainer, agent, *_):
            super().on_validation_batch_end(trainer, agent)
            trainer.save_checkpoint(tmp_path / "within.ckpt")
            assert equal(copies(agent.policy), self.played[-1][1])  # and the average plays on

    average, recorder = PolicyAverage(True, 0.8), Saver()
    agent = fit(average, recorder)
    state = load(tmp_path / "within.ckpt")["state_dict"]
    trained = recorder.updates[-1]
    assert equal({name: state[f"policy.{name}"] for name in trained}, trained)
    agent.load_state_dict(state)  # the loss's names of the same parameters as well
    assert equal(copies(agent.policy), trained)


def test_it_does_nothing_unless_it_is_enabled():
    average, recorder = PolicyAverage(), Recorder()
    fit(average, recorder)
    assert average.state_dict() == {"updates": 0, "average": {}}
    assert equal(recorder.played[-1][1], recorder.updates[-1])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_its_bounds_is_refused(decay):
    with pytest.raises(ValueError, match=r"policy_average.decay must be in \[0, 1\)"):
        PolicyAverage(decay=decay)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, empty_store, trained):
    """The run of ``trained`` with an average."""
    folder = tmp_path_factory.mktemp("averaged")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = type(trained)(folder)
        run.fit("--data.total_frames=400", *AVERAGED)
    return run


def test_training_is_the_same_without_it(averaged, trained):
    for metric in ("train/loss_qvalue", "train/loss_actor", "train/episode_return"):
        assert averaged.history(metric) == trained.history(metric)
    assert averaged.history("eval/return") != trained.history("eval/return")
    ours, theirs = load(averaged.checkpoint()), load(trained.checkpoint())
    assert equal(ours["state_dict"], theirs["state_dict"])
    assert ours["callbacks"]["PolicyAverage"]["updates"] == ours["global_step"]
    (record,) = averaged.records
    assert record.data.params["policy_average.decay"] == "0.9"


def test_load_policy_gives_the_average_that_was_evaluated(averaged):
    saved = load(averaged.checkpoint())
    policy = muon_rl.load_policy(averaged.checkpoint())
    assert equal(copies(policy), saved["callbacks"]["PolicyAverage"]["average"])
    trained_policy = muon_rl.load_policy(averaged.checkpoint(), averaged=False)
    names = copies(trained_policy)
    assert equal(names, {name: saved["state_dict"][f"policy.{name}"] for name in names})
    assert averaged.played() == pytest.approx(averaged.history("eval/return")[-1][1], rel=1e-5)


def test_validate_plays_the_average_whatever_the_config_says(averaged, workspace, capsys):
    arguments = ["validate", *workspace.options, f"--ckpt_path={averaged.checkpoint()}"]
    cli = RecipeCLI(with_recipe_paths(arguments))
    cli.run()
    assert "episodes on cheetah-run, played by its average" in capsys.readouterr().out
    returned = cli.trainer.callback_metrics["eval/return"].item()
    assert returned == pytest.approx(averaged.history("eval/return")[-1][1], rel=1e-6)


def test_a_resumed_average_equals_one_that_was_never_stopped(averaged, workspace):
    workspace.fit("--data.total_frames=300", *AVERAGED)
    workspace.fit("--data.total_frames=400", "--ckpt_path=last", *AVERAGED)
    ours, theirs = load(workspace.checkpoint()), load(averaged.checkpoint())
    assert equal(ours["state_dict"], theirs["state_dict"])
    ours, theirs = (x["callbacks"]["PolicyAverage"] for x in (ours, theirs))
    assert ours["updates"] == theirs["updates"]
    assert equal(ours["average"], theirs["average"])
    assert workspace.history("eval/return")[-1] == averaged.history("eval/return")[-1]


def test_a_resume_between_two_steps_counts_none_twice(workspace):
    options = (*AVERAGED, "--trainer.accumulate_grad_batches=4", "--data.eval_every=1000")
    workspace.fit("--data.total_frames=300", *options)
    workspace.fit("--data.total_frames=400", "--ckpt_path=last", *options)
    saved = load(workspace.checkpoint())
    assert saved["callbacks"]["PolicyAverage"]["updates"] == saved["global_step"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["policy_average.enabled is True", "False in this config", "keeps it. Set it back"]),
        ([AVERAGED[0]], ["policy_average.decay is 0.9", "0.999 in this config"]),
    ],
)
def test_a_resume_with_another_average_is_refused(options, parts, averaged, workspace, capsys):
    resumed = ("--data.total_frames=440", f"--ckpt_path={averaged.checkpoint()}")
    with pytest.raises(SystemExit):
        workspace.fit(*resumed, *options)
    told = capsys.readouterr().err
    for part in parts:
        assert part in told


def test_an_average_among_the_trainers_callbacks_takes_its_place(averaged, workspace):
    added = (
        "--trainer.callbacks+=muon_rl.callbacks.PolicyAverage",
        "--trainer.callbacks.enabled=true", "--trainer.callbacks.decay=0.9",
    )  # fmt: skip
    workspace.fit("--data.total_frames=400", *added)
    assert workspace.history("eval/return") == averaged.history("eval/return")
    main(["validate", *workspace.options, *added, f"--ckpt_path={workspace.checkpoint()}"])


def test_it_sees_an_update_before_any_other_callback_may_stop_the_run(workspace):
    added = "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"
    cli = RecipeCLI(with_recipe_paths(["fit", *workspace.options, *AVERAGED, added]))
    assert isinstance(cli.trainer.callbacks[0], PolicyAverage)
