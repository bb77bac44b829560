"""Where runs are kept, and which checkpoint ``last`` and ``best`` mean."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from muon_rl.cli import ConfigError
from muon_rl.cli.record import flatten


def seed_folder(folder: str, method_name: str, seed: int) -> Path:
    """Return the folder of all runs of a method and seed.

    Args:
        folder: of all checkpoints.
        method_name: of the runs.
        seed: of the runs.
    """
    return Path(folder) / method_name / f"seed_{seed}"


def new_folder(folder: str, method_name: str, seed: int) -> Path:
    """Return a folder for a new run that no other run has: ``<method>/seed_<seed>/<time>``.

    Args:
        folder: of all checkpoints.
        method_name: of the run.
        seed: of the run.
    """
    parent = seed_folder(folder, method_name, seed)
    name = time.strftime("%Y%m%d-%H%M%S")
    run, number = parent / name, 1
    while True:
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1
            run = parent / f"{name}-{number}"


def find_checkpoint(ckpt_path: str, folder: str, method_name: str, seed: int) -> Path:
    """Return the file that ``--ckpt_path`` means.

    Args:
        ckpt_path: a file, or ``last`` or ``best`` of the newest run of this method and seed.
        folder: of all checkpoints.
        method_name: of the run.
        seed: of the run.

    Raises:
        ConfigError: if there is none.
    """
    if ckpt_path not in ("last", "best"):
        if not Path(ckpt_path).is_file():
            raise ConfigError(f"There is no checkpoint {ckpt_path}: give a file, last or best.")
        return Path(ckpt_path)
    parent = seed_folder(folder, method_name, seed)
    # Names begin with the time, and the newest run that saved anything is meant.
    found = sorted(parent.glob(f"*/{ckpt_path}.ckpt"), key=lambda path: path.parent.name)
    if not found:
        others = sorted({path.parent.parent for path in Path(folder).glob("*/*/*/*.ckpt")})
        there = ", ".join(map(str, others)) if others else f"nothing in {folder}/"
        raise ConfigError(
            f"There is no {ckpt_path} checkpoint in {parent}/, the folder of this method_name and "
            f"seed_everything; there is {there}."
        )
    return found[-1]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and numbers, running no code from it.

    Args:
        path: of a checkpoint that ``muon-rl fit`` saved.

    Raises:
        ConfigError: if it is none, or broken.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:
        # torch's own words advise to convert the file, or to trust it.
        reason = (
            "it is damaged, or holds more than tensors, numbers and text"
            if isinstance(error, pickle.UnpicklingError)
            else "torch.save did not write it as it does now, or part of it is missing"
        )
        raise ConfigError(f"{path} cannot be read as a checkpoint: {reason}.") from error
    keys = set(checkpoint) if isinstance(checkpoint, dict) else set()
    if not {"muon_rl", "state_dict"} <= keys:
        raise ConfigError(f"{path} was not saved by muon-rl fit: it holds no recipe.")
    return checkpoint


def check_fit(checkpoint: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    """Raise if a checkpoint's tensors do not have the model's names and shapes.

    Args:
        checkpoint: as :func:`load_checkpoint` returns it.
        state: the model's ``state_dict``.
        path: of the checkpoint, for the message.

    Raises:
        ConfigError: naming the first tensor that differs.
    """
    saved = checkpoint["state_dict"]
    for name in [*state, *saved]:
        shapes = [
            tuple(tensors[name].shape) if name in tensors else "missing"
            for tensors in (saved, state)
        ]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{path} does not fit this config: {name} is {shapes[0]} in the checkpoint and "
                f"{shapes[1]} in the model. Use the env and model settings that it was saved with."
            )


def check_optimizer(checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise if a config's optimizer is not the one that a resumed run goes on with.

    Args:
        checkpoint: as :func:`load_checkpoint` returns it.
        optimizer: the config's, with its scheduler; the checkpoint's settings would silently win
            over its own.

    Raises:
        ConfigError: naming the first group and setting that differ.
    """
    saved = checkpoint["optimizer_states"][0]["param_groups"]
    ours = optimizer.param_groups
    names = [[group["name"] for group in groups] for groups in (saved, ours)]
    if names[0] != names[1]:
        raise ConfigError(
            f"The checkpoint's optimizer has the groups {', '.join(names[0])}, this config's "
            f"{', '.join(names[1])}: a resumed run keeps its optimizer."
        )
    for before, now in zip(saved, ours, strict=True):
        for option, value in now.items():
            if option not in before:  # saved before there was such an option
                continue
            old = before[option]
            if option == "lr":
                # A schedule moves lr; initial_lr is what the config said.
                old, value = (group.get("initial_lr", group["lr"]) for group in (before, now))
            if option not in moving(now) and old != value:
                raise ConfigError(
                    f"{option} of {now['name']} is {old} in the checkpoint and {value} in this "
                    "config: a resumed run keeps its optimizer; begin a fresh one to change it."
                )


def moving(group: dict[str, Any]) -> set[str]:
    """Return the options of an optimizer's group that training itself changes.

    Args:
        group: with its scheduler, if it has one: OneCycleLR and CyclicLR move the momentum too.
    """
    cycled = {"momentum", "betas"} if "base_momentum" in group else set()
    return {"params", "momentum_step", "step"} | cycled


def check_kept(checkpoint: dict[str, Any], config: str) -> None:
    """Raise if a config's task, schedule of rates or average is not the resumed run's.

    Args:
        checkpoint: as :func:`load_checkpoint` returns it.
        config: the resolved config, as YAML. The checkpoint's schedule would win over its own, and
            one run would have the curve of two.

    Raises:
        ConfigError: naming the first key that differs.
    """
    texts = (checkpoint["muon_rl"]["config"], config)
    before, now = (_kept(yaml.safe_load(text)) for text in texts)
    for key, value in now.items():
        # Saved before there was such a key, a config lacks it.
        if (kept := before.get(key, value)) != value:
            raise ConfigError(
                f"{key} is {kept} in the checkpoint and {value} in this config: a resumed run "
                "keeps it. Set it back, or begin a fresh run to change it."
            )


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a config a resumed run keeps, by key."""
    model = config["model"].get("init_args") or {}
    average = config.get("policy_average") or {"enabled": False}
    task = flatten(config["env"], "env")
    return {
        # As many games as there are now begin anew.
        **{key: value for key, value in task.items() if not key.endswith(".num_envs")},
        **({"model.gamma": model["gamma"]} if "gamma" in model else {}),
        "model.anneal_lr": model.get("anneal_lr", False),
        "policy_average.enabled": average["enabled"],
        **({"policy_average.decay": average["decay"]} if average["enabled"] else {}),
    }
