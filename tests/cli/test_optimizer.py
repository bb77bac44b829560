"""What the command line says about the optimizer shows in the run: in groups, rates and momenta."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path

import pytest
import torch

from muon_rl.optim import Muon

LAYERS = {
    ("actor", "first"): "actor_network_params.module.0.module.0.0.weight",
    ("actor", "last"): "actor_network_params.module.0.module.0.4.weight",
    ("critic", "first"): "qvalue_network_params.module.0.weight",
    ("critic", "last"): "qvalue_network_params.module.4.weight",
}


@pytest.fixture
def fit(workspace):
    """Return a function that trains for 60 updates and returns the run's MLflow record."""

    def run(*options):
        workspace.fit("--data.total_frames=220", *options)
        (record,) = workspace.records
        return record

    return run


def table(workspace, record):
    """Return the table that the run logged."""
    path = workspace.client.download_artifacts(record.info.run_id, "optimizer.txt")
    return Path(path).read_text()


def groups(workspace, record):
    """Return the group of each parameter, from the table that the run logged."""
    rows = [line.split() for line in table(workspace, record).splitlines()[1:]]
    # The shape has spaces: name first, and the group is what holds a slash.
    return {row[0]: next(cell for cell in row if "/" in cell) for row in rows}


def test_a_fit_shows_the_table_of_groups_once_and_logs_it(workspace, fit, capsys):
    record = fit()
    shown = capsys.readouterr().out
    logged = table(workspace, record)
    assert shown.count(logged) == 1
    assert "apply_last_layer is false" in logged


@pytest.mark.parametrize(
    "choice",
    [
        {("actor", "first"): False, ("actor", "last"): False,
         ("critic", "first"): True, ("critic", "last"): True},
        {("actor", "first"): True, ("actor", "last"): True,
         ("critic", "first"): False, ("critic", "last"): True},
    ],
    ids=["critic", "actor"],
)  # fmt: skip
def test_first_and_last_layer_are_chosen_from_the_command_line(workspace, fit, choice):
    record = fit(*(
        f"--model.optimizer.{network}.muon.apply_{layer}_layer={str(takes).lower()}"
        for (network, layer), takes in choice.items()
    ))  # fmt: skip
    found = groups(workspace, record)
    for (network, layer), takes in choice.items():
        option = f"model.optimizer.{network}.muon.apply_{layer}_layer"
        assert record.data.params[option] == str(takes)
        part = "muon" if takes else "aux"
        assert found[LAYERS[network, layer]] == f"{network}/{part}"


def test_a_late_momentum_of_one_network_is_logged_as_it_is_applied(workspace, fit):
    schedule = "--model.optimizer.critic.momentum_schedule"
    record = fit(f"{schedule}.enabled=true", f"{schedule}.start_step=25",
                 f"{schedule}.warmup_steps=10")  # fmt: skip
    assert record.data.params["model.optimizer.critic.momentum_schedule.start_step"] == "25"
    # Logged in the 10th, 20th, … update; the first has the number 0.
    late = [0.0, 0.0, 4 / 10, 1.0, 1.0, 1.0]
    for group, own in (("critic/muon", 0.95), ("critic/aux", 0.9)):
        values = [value for _, value in workspace.history(f"train/momentum/{group}")]
        assert values == pytest.approx([own * share for share in late])
    for group, own in (("actor/muon", 0.95), ("actor/aux", 0.9)):
        assert {value for _, value in workspace.history(f"train/momentum/{group}")} == {own}


def test_both_rates_are_annealed_and_logged_as_they_are_applied(workspace, fit):
    record = fit("--model.anneal_lr=true", "--model.optimizer.actor.muon.lr=0.03")
    assert record.data.params["model.anneal_lr"] == "True"
    shares = [1 - update / 60 for update in (9, 19, 29, 39, 49, 59)]
    for name, rate in (
        ("learning_rate", 0.03),
        ("aux_learning_rate", 3e-4),
        ("learning_rate/critic", 0.02),
        ("aux_learning_rate/critic", 3e-4),
        ("learning_rate/alpha", 3e-4),
    ):
        values = [value for _, value in workspace.history(f"train/{name}")]
        assert values == pytest.approx([rate * share for share in shares])


def test_without_muon_the_learning_rate_is_adams_and_there_is_no_auxiliary_one(workspace, fit):
    fit("--model.optimizer.actor.case=adamw", "--model.optimizer.actor.lr=0.001")
    assert {value for _, value in workspace.history("train/learning_rate")} == {1e-3}
    assert workspace.history("train/aux_learning_rate") == []
    assert {value for _, value in workspace.history("train/aux_learning_rate/critic")} == {3e-4}


def test_a_run_with_everything_set_keeps_its_settings_in_the_checkpoint(workspace, fit):
    fit(
        "--model.anneal_lr=true", "--model.max_grad_norm=1.0",
        "--model.optimizer.critic.muon.coefficients=polar_express",
        "--model.optimizer.critic.muon.adjust_lr=match_rms_adamw",
        "--model.optimizer.critic.muon.nesterov=false",
        "--model.optimizer.critic.muon.weight_decay=0.1",
        "--model.optimizer.critic.aux=adam", "--model.optimizer.critic.aux_lr=2e-4",
    )  # fmt: skip
    checkpoint = torch.load(workspace.checkpoint(), weights_only=True)
    by_name = {g["name"]: g for g in checkpoint["optimizer_states"][0]["param_groups"]}
    critic = by_name["critic/muon"]
    assert critic["coefficients"] == "polar_express"
    assert critic["adjust_lr"] == "match_rms_adamw"
    assert (critic["nesterov"], critic["weight_decay"]) == (False, 0.1)
    assert by_name["critic/aux"]["algorithm"] == "adam"
    assert by_name["critic/aux"]["initial_lr"] == 2e-4


def test_a_compiled_optimizer_trains_as_one_that_is_not(workspace, monkeypatch):
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph.forward(*args)

    # Traced, but not turned into C++, which takes long.
    monkeypatch.setattr(Muon, "compile", partialmethod(Muon.compile, backend=backend))
    histories = []
    for compiled in ("true", "false"):
        workspace.fit(
            "--data.total_frames=220", "--trainer.log_every_n_steps=10",
            f"--compile_optimizer={compiled}", f"--method_name=compiled_{compiled}",
        )  # fmt: skip
        assert len(calls) == 59  # of 60 updates; the first makes the state
        run = workspace.records[0]  # the newest
        assert run.data.params["compile_optimizer"] == compiled.capitalize()
        metric = workspace.client.get_metric_history(run.info.run_id, "train/loss_qvalue")
        histories.append([(point.step, point.value) for point in metric])
    ours, reference = (torch.tensor(history) for history in histories)
    assert len(ours) == 6
    torch.testing.assert_close(ours, reference, rtol=2e-2, atol=0)
