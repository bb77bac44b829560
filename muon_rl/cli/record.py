"""What a run leaves beside its metrics: config, versions, commit and seed."""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback

from muon_rl import __version__
from muon_rl.cli.commit import git_commit
from muon_rl.passwords import without_passwords
from muon_rl.tracking import MLflow

PACKAGES = (
    "muon-rl", "torch", "torchrl", "tensordict", "lightning", "jsonargparse", "dm_control",
    "mujoco", "gymnasium", "mlflow", "numpy",
)  # fmt: skip


class RunRecord(Callback):
    """Logs the resolved config to every logger, and puts it into every checkpoint.

    Args:
        config: the resolved config, as YAML.
        resumed_from: frames of the checkpoint that the run goes on from, if it does.
    """

    def __init__(self, config: str, resumed_from: int | None = None) -> None:
        self.config = config
        self.resumed_from = resumed_from

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log parameters, config, versions and the optimizer's table, which is shown as well."""
        if not trainer.is_global_zero:
            return
        optimizer = pl_module.optimizers(use_pl_optimizer=False).explanation()
        print(f"{optimizer}\n", flush=True)
        params = flatten(yaml.safe_load(self.config))
        for logger in trainer.loggers:
            logger.log_hyperparams(params)
            if isinstance(logger, MLflow):
                self._log_files(logger, optimizer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put in what is needed to load the policy alone, and to go on in the same run."""
        runs = [logger.run_id for logger in trainer.loggers if isinstance(logger, MLflow)]
        checkpoint["muon_rl"] = {
            "version": __version__,
            "config": self.config,
            "frames": trainer.datamodule.frames,
            "mlflow_run_id": runs[0] if runs else None,
        }

    def _log_files(self, logger: MLflow, optimizer: str) -> None:
        suffix = "" if self.resumed_from is None else f"_resumed_at_{self.resumed_from}"
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (
                (f"config{suffix}.yaml", without_passwords(self.config)),
                (f"versions{suffix}.yaml", yaml.safe_dump(versions())),
                (f"optimizer{suffix}.txt", optimizer),
            ):
                path = Path(folder) / name
                path.write_text(text)
                logger.experiment.log_artifact(logger.run_id, str(path))


def tags(*, task: str, method: str, algorithm: str, optimizer: str, seed: int) -> dict[str, str]:
    """Return the tags that a run is found by.

    Args:
        task: the environment's name.
        method: the method's name.
        algorithm: the model's class.
        optimizer: the case of each network.
        seed: of the run.
    """
    return {
        "task": task,
        "method": method,
        "algorithm": algorithm,
        "optimizer": optimizer,
        "seed": str(seed),
        **{f"version/{name}": number for name, number in versions().items()},
        **git_commit(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as dotted keys, ``init_args`` left out of them.

    Args:
        config: nested dicts.
        prefix: of the keys.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            flat |= flatten(value, name)
        else:
            flat[name] = value
    return flat
