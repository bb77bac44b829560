"""Method names that are made from the keys of their config."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from muon_rl.recipes.sac import SACOptimizers

from muon_rl.cli import ConfigError, main, names
from muon_rl.cli.record import flatten

CONFIG = {
    "env.domain": "cheetah", "model.optimizer.actor.case": "muon",
    "model.critic.hidden": [256, 256], "model.optimizer.actor.lr": 0.0003,
    "data.save_buffer": True, "model.max_grad_norm": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("plain", "plain"),
        ("SAC_${model.optimizer.actor.case}", "SAC_muon"),
        ("${env.domain}-${env.domain}", "cheetah-cheetah"),
        ("${env.init_args.domain}", "cheetah"),
        ("h${model.critic.hidden}", "h256-256"),
        ("lr${model.optimizer.actor.lr}", "lr0.0003"),
        ("${data.save_buffer}_${model.max_grad_norm}", "true_none"),
        ("five$ {env.domain}", "five$ {env.domain}"),
    ],
)
def test_keys_are_filled_in(template, name):
    assert names.fill(template, CONFIG) == name


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("SAC_${model.optimizer.actor.cas}", ["names model.optimizer.actor.cas", "Did you mean"]),
        ("${env}", ["names env"]),
        ("SAC_${env.domain", ["nothing closes"]),
    ],
)
def test_a_key_that_is_none_is_an_error(template, words):
    with pytest.raises(ConfigError) as error:
        names.fill(template, CONFIG)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a/b", "takes no slash"),
        ("..", "takes no slash"),
        (" ", "neither blanks at its ends"),
        ("sac ", "neither blanks at its ends"),
        ("a\x00b", "nor what cannot be printed"),
        ("x" * 201, "at most 200 bytes, but .* has 201"),
        ("é" * 101, "at most 200 bytes, but .* has 202"),
    ],
)
def test_a_name_that_no_folder_can_have_is_refused(name, words):
    with pytest.raises(ConfigError, match=words):
        names.check(name)


def test_the_longest_name_makes_a_folder(tmp_path):
    for name in ("x" * names.LONGEST, "a b-c_1.5"):
        names.check(name)
        (tmp_path / name).mkdir()
        assert (tmp_path / name).is_dir()


def test_a_run_and_its_folder_carry_the_filled_name(workspace):
    method = "SAC_${model.optimizer.actor.case}_${model.optimizer.critic.case}_${env.task}"
    options = (f"--method_name={method}", "--data.total_frames=120")
    workspace.fit(*options, "--model.optimizer.critic.case=adamw")
    (record,) = workspace.records
    assert record.data.tags["method"] == "SAC_muon_adamw_run"
    assert record.info.run_name == "SAC_muon_adamw_run_seed0"
    assert workspace.checkpoint().is_relative_to(
        workspace.folder / "checkpoints" / "SAC_muon_adamw_run" / "seed_0"
    )
    # The template stays in the config, so a resumed run finds its folder by the same words.
    workspace.fit(
        *options, "--model.optimizer.critic.case=adamw", "--data.total_frames=140",
        "--ckpt_path=last",
    )  # fmt: skip
    assert len(workspace.records) == 1


def test_a_wrong_key_shows_before_a_run_begins(workspace, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *workspace.options, "--method_name=SAC_${model.tua}"])
    assert "names model.tua" in capsys.readouterr().err
    assert not workspace.records


def test_a_recipe_without_an_optimizer_records_the_models_own(workspace):
    recipe = Path("plain.yaml")
    recipe.write_text(
        "env: {class_path: muon_rl.envs.DMControl, init_args: {domain: cartpole, task: swingup}}\n"
        "model: {class_path: muon_rl.recipes.sac.SAC}\n"
        "data: {class_path: muon_rl.recipes.sac.SACData, init_args: {total_frames: 120, "
        "init_random_frames: 100, batch_size: 16, eval_every: 120, eval_episodes: 1}}\n"
    )
    main(["fit", f"--config={recipe}", "--method_name=sac_${model.optimizer.alpha.case}"])
    (record,) = workspace.records
    assert record.data.tags["method"] == "sac_adam"
    fields = json.loads(json.dumps(asdict(SACOptimizers())))  # tuples as lists, as in a config
    own = flatten(fields, "model.optimizer")
    assert "model.optimizer.critic.muon.lr" in own
    logged = {key: record.data.params[key] for key in own}
    assert logged == {key: str(value) for key, value in own.items()}
