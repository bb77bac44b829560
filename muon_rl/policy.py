"""A trained policy from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from tensordict.nn import TensorDictModuleBase

from muon_rl.agent import Agent
from muon_rl.callbacks import policy_average
from muon_rl.cli import ConfigError, recipes, runs
from muon_rl.cli.parser import RecipeParser
from muon_rl.envs import EnvFactory


def load_policy(path: str | Path, *, averaged: bool = True) -> TensorDictModuleBase:
    """Load the policy of a checkpoint that ``muon-rl fit`` saved.

    The checkpoint holds its recipe as text, and is read without running code from it; classes of
    your own that the recipe names must be importable.

    Args:
        path: of the checkpoint: ``best.ckpt`` or ``last.ckpt``.
        averaged: whether to load the average over the updates where the run kept one
            (``policy_average.enabled``): it is what was evaluated. Else the policy as it trained.

    Returns:
        A TensorDictModule in evaluation mode that reads ``observation`` ``(*batch, …)`` and writes
        ``action``. Under ``set_exploration_type(ExplorationType.DETERMINISTIC)`` it acts as in
        evaluation, else it samples.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of ``muon-rl fit``, or does not fit its recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    recipes.import_pages()
    try:
        checkpoint = runs.load_checkpoint(path)
        recipe = yaml.safe_load(checkpoint["muon_rl"]["config"])
        parser = RecipeParser()
        parser.add_subclass_arguments(EnvFactory, "env")
        parser.add_lightning_class_args(Agent, "model", subclass_mode=True)
        parser.link_arguments("env", "model.init_args.env", apply_on="instantiate")
        config = parser.parse_object({key: recipe[key] for key in ("env", "model")})
        with torch.random.fork_rng():
            agent = parser.instantiate_classes(config).model
        runs.check_fit(checkpoint, agent.state_dict(), path)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    agent.load_state_dict(checkpoint["state_dict"])
    average = policy_average.averaged(checkpoint)
    if averaged and average:
        policy_average.put(average, agent.policy)
    return agent.policy.eval()
