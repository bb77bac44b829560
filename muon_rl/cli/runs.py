"""Where runs are kept, and which checkpoint ``last`` and ``best`` mean."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from muon_rl.cli import ConfigError


def new_folder(folder: str, method_name: str, seed: int) -> Path:
    """Return a folder for a new run that no other run has: ``<method>/seed_<seed>/<time>``.

    Args:
        folder: of all checkpoints.
        method_name: of the run.
        seed: of the run.
    """
    parent = Path(folder) / method_name / f"seed_{seed}"
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
    parent = Path(folder) / method_name / f"seed_{seed}"
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
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} cannot be read as a checkpoint: {first_line}") from error
    if "muon_rl" not in checkpoint:
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
