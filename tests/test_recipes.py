"""Every shipped recipe parses, builds its parts and explains itself."""

from __future__ import annotations

import pytest

from muon_rl.cli import main, recipes
from muon_rl.cli.recipe_cli import RecipeCLI
from muon_rl.cli.training import with_recipe_paths

NAMES = sorted(recipes.shipped())


def test_recipes_are_shipped():
    assert {"sac_cheetah", "sac_cheetah_adamw", "sac_cartpole_swingup"} <= set(NAMES)
    assert {"ppo_snake_adam", "ppo_snake_muon", "ppo_snake_muon_large"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_its_parts(name, workspace):
    cli = RecipeCLI(with_recipe_paths(["fit", f"--config={name}"]))
    groups = {group["name"] for group in cli.model.build_optimizer().param_groups}
    case = next((case for case in ("adamw", "adam") if case in name.split("_")), "muon")
    networks = {"ppo": ("trunk",), "sac": ("actor", "critic"), "muesli": ("actor",)}
    for network in networks[name.partition("_")[0]]:
        assert f"{network}/{case}" in groups
    assert cli.datamodule.total_updates > 0
    assert not workspace.records


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_for(name, capsys):
    first = recipes.shipped()[name].read_text().splitlines()[0]
    assert first.startswith("# ")
    main(["recipes"])
    assert f"{name} " in capsys.readouterr().out


def test_methods_have_names_of_their_own(workspace):
    methods = [RecipeCLI(["fit", "--config", recipes.find(name)]).method_name for name in NAMES]
    assert len(set(methods)) == len(methods)


@pytest.mark.parametrize("task", recipes.tasks())
def test_a_task_goes_on_top_of_a_recipe(task, workspace):
    main_config, other = recipes.find("sac_optimizer"), recipes.find(task)
    cli = RecipeCLI(["fit", f"--config={main_config}", f"--config={other}"])
    assert cli.env.task.replace("-", "_") == task
    assert cli.method_name == f"sac_{cli.env.domain}_actor_muon_critic_muon"
    assert cli.datamodule.steps_per_collection == 10  # the recipe's own, which no task sets


def test_help_lists_every_key_of_a_recipe_with_a_sentence(capsys):
    main(["fit", "--config", "sac_cheetah_adamw", "--help"])
    text = capsys.readouterr().out
    keys = ("env.domain", "data.total_frames", "model.gamma", "model.actor.hidden",
            "model.optimizer.critic.muon.momentum", "checkpoint.folder", "trainer.accelerator",
            "method_name", "ckpt_path")  # fmt: skip
    for key in keys:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"--{key}"))
        following = text[text.index(line) :].removeprefix(f"  --{key}").strip()
        assert following[0].isalpha(), f"{key} has no sentence"
    assert "[adamw]" in text  # the recipe's own value, not the default
    assert "Gym" not in text.partition("the run")[0]  # nor another class than the recipe's


def test_help_lists_the_keys_of_the_part_that_a_recipe_names(capsys):
    main(["fit", "--config", "ppo_snake_muon_small", "--help"])
    text = capsys.readouterr().out
    assert "--model.policy.num_layers" in text
    assert "[64]" in text.partition("--model.policy.d_model")[2].partition("--")[0]
    assert "--model.policy.encoder" not in text  # of the class that it is below
