"""From a recipe to a run: parsing, making the parts, beginning or going on."""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from muon_rl.agent import Agent
from muon_rl.callbacks import (
    CompiledOptimizer,
    Film,
    FramesProgressBar,
    GracefulStop,
    PolicyAverage,
    policy_average,
)
from muon_rl.cli import ConfigError, checks, names, recipes, record, runs
from muon_rl.cli.errors import root_of
from muon_rl.cli.parser import RecipeParser
from muon_rl.data import AgentData
from muon_rl.tracking import MLflow

TRAINER_DEFAULTS = {
    "max_epochs": 1,  # the data module's stream is the whole run
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 100,
    "enable_model_summary": False,
    "logger": {"class_path": "muon_rl.tracking.MLflow"},
}


class RecipeCLI(LightningCLI):
    """Parses a recipe, makes its parts and runs them.

    Args:
        arguments: of the command line, the subcommand first.

    Raises:
        ConfigError: for a mistake in the config, before a run exists.
    """

    def __init__(self, arguments: list[str]) -> None:
        recipes.import_pages()
        self.stop = GracefulStop()
        self.checkpoint: dict[str, Any] | None = None
        self.checkpoint_path: Path | None = None
        sys.argv = sys.argv[:1]  # Lightning warns of arguments in both places
        super().__init__(
            Agent,
            AgentData,
            args=arguments,
            parser_class=RecipeParser,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
        )
        sys.argv += arguments  # DDP starts its other processes by them

    # -- parsing -------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and the arguments of theirs that a recipe gives otherwise."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
        }

    def add_arguments_to_parser(self, parser: RecipeParser) -> None:  # type: ignore[override]
        """Add the keys of a recipe."""
        parser.add_recipe_arguments()

    def _parse_ckpt_path(self) -> None:
        """Leave out Lightning's reading of hyperparameters: the command line is to win."""

    def _set_seed(self) -> None:
        """Seed everything, with a number that tells the run apart."""
        seed = self.settings.seed_everything
        if seed is False or (seed is not True and not 0 <= seed < 2**32):
            raise ConfigError(f"seed_everything must be from 0 to 2**32 - 1, but is {seed}.")
        super()._set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave running to :meth:`run`, so that a stopped run still has its parts at hand."""

    @property
    def settings(self) -> Any:
        """The subcommand's part of the config."""
        return self.config[self.subcommand]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings.seed_everything)

    # -- making the parts ----------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Check what needs no parts."""
        checks.check(self.settings)
        model = self.settings.model
        if model.init_args.get("optimizer") is None:
            # jsonargparse 4.53 puts in what the base class Agent has as a default: none.
            default = recipes.default_optimizer(model.class_path)
            for key, value in record.flatten(default, "optimizer").items():
                model.init_args[key] = value
        torch.set_float32_matmul_precision(self.settings.matmul_precision)
        if self.subcommand == "validate":
            # A look at a checkpoint is no run.
            self.settings.trainer.logger = False

    def instantiate_classes(self) -> None:
        """Make environment, data, model and trainer; a constructor's ValueError is a mistake."""
        try:
            super().instantiate_classes()
        except (ValueError, ConfigError, MisconfigurationException) as error:
            root = root_of(error)
            if isinstance(root, (ValueError, ConfigError, MisconfigurationException)):
                raise ConfigError(str(root)) from error
            raise root from None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the trainer for this run: its folder, its callbacks, its tracking."""
        self.env = self.config_init[self.subcommand].env
        self.checkpoints = self.config_init[self.subcommand].checkpoint
        self.method_name = self._method_name()
        names.check(self.method_name)
        trainer = dict(self.config_init[self.subcommand].trainer)
        optimizer = None
        if self.subcommand == "fit":
            optimizer = self.model.build_optimizer()
            self.model.build_scheduler(
                optimizer, self.datamodule, trainer["accumulate_grad_batches"]
            )
        self._find_checkpoint(optimizer)
        callbacks: list[Callback] = [*(trainer.pop("callbacks") or [])]
        config = self.config_init[self.subcommand]
        averages = config.policy_average.enabled or self.subcommand == "validate"
        if averages and not any(isinstance(given, PolicyAverage) for given in callbacks):
            # First, before any that may stop the run after an update.
            callbacks.insert(0, config.policy_average)
        if self.subcommand == "fit":
            callbacks += [self.checkpoints, self.stop, self._record(), Film()]
            if config.effective_rank.enabled:
                config.effective_rank.check(self.model.loss, self.datamodule)
                callbacks.append(config.effective_rank)
            if config.loss_health.enabled:
                callbacks.append(config.loss_health)
            if config.compile_optimizer:
                callbacks.append(CompiledOptimizer())
        # Lightning refuses enable_progress_bar=false beside a bar among the callbacks.
        if self.subcommand == "fit" and trainer["enable_progress_bar"] is not False:
            callbacks.append(FramesProgressBar())
        else:
            trainer["enable_progress_bar"] = False
        trainer["enable_checkpointing"] = self.subcommand == "fit"
        return L.Trainer(**trainer, callbacks=callbacks, **kwargs)

    def _method_name(self) -> str:
        """Return the method's name, its ``${key}`` filled in from the config."""
        template = self.settings.method_name or f"{type(self.model).__name__}_{self.env.task}"
        return names.fill(template, record.flatten(yaml.safe_load(self._config_text)))

    def _find_checkpoint(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Read the checkpoint that was asked for, and check that it fits, optimizer included."""
        ckpt_path = self.settings.ckpt_path
        if ckpt_path is None:
            if self.subcommand == "validate":
                raise ConfigError("validate needs --ckpt_path=best, last or a file.")
            return
        path = runs.find_checkpoint(
            str(ckpt_path), self.checkpoints.folder, self.method_name, self.seed
        )
        self.checkpoint = runs.load_checkpoint(path)
        self.checkpoint_path = path
        runs.check_fit(self.checkpoint, self.model.state_dict(), path)
        if optimizer is not None:
            runs.check_kept(self.checkpoint, self._config_text)
            runs.check_optimizer(self.checkpoint, optimizer)
            # Lightning keeps a data module's state under its class's name.
            state = self.checkpoint.get(type(self.datamodule).__qualname__, {})
            self.datamodule.check_contents(state.get("contents", {}))

    @cached_property
    def _config_text(self) -> str:
        """Return the resolved config as YAML."""
        parser = self._parser(self.subcommand)
        settings = self.settings.clone()
        settings.pop("config", None)
        settings.ckpt_path = None
        return parser.dump(settings, skip_unset=False, skip_validation=True)

    def _record(self) -> record.RunRecord:
        resumed_from = self.checkpoint["muon_rl"]["frames"] if self.checkpoint else None
        return record.RunRecord(self._config_text, resumed_from)

    # -- running -------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the subcommand."""
        if self.subcommand == "fit":
            self._fit()
        else:
            self._validate()

    def _fit(self) -> None:
        ckpt_path = None if self.checkpoint_path is None else str(self.checkpoint_path)
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, MLflow)]
        self._require_something_left(loggers)
        folder = self._folder()
        # Absolute: Lightning forgets the best checkpoint where the folder is written otherwise.
        self.checkpoints.dirpath = str(folder.resolve())
        for logger in loggers:
            self._begin(logger)
        self.checkpoint = None  # Lightning reads it again
        self.trainer.fit(
            self.model, datamodule=self.datamodule, ckpt_path=ckpt_path, weights_only=True
        )
        if self.trainer.is_global_zero:
            self._summarize(folder, loggers)

    def _validate(self) -> None:
        """Play one evaluation and print its means."""
        frames = self.checkpoint["muon_rl"]["frames"] if self.checkpoint else 0
        averaged = policy_average.averaged(self.checkpoint or {})
        self.checkpoint = None
        self.trainer.validate(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=str(self.checkpoint_path),
            verbose=False,
            weights_only=True,
        )
        print(f"{self.checkpoint_path} after {frames:,} frames,")
        player = ", played by its average over the updates" if averaged else ""
        print(f"mean of {self.datamodule.eval_episodes} episodes on {self.env.task}{player}:")
        for name, value in sorted(self.trainer.callback_metrics.items()):
            print(f"  {name:<12} {float(value):.1f}")

    def _require_something_left(self, loggers: list[MLflow]) -> None:
        """Raise if the checkpoint is of a run that has ended, with nothing left to train."""
        if self.checkpoint is None:
            return
        run = self.checkpoint["muon_rl"]
        updates = self.checkpoint[type(self.datamodule).__qualname__]["updates"]
        stopped = any(logger.is_unfinished(run["mlflow_run_id"]) for logger in loggers)
        if updates >= self.datamodule.total_updates and not stopped:
            raise ConfigError(
                f"{self.checkpoint_path} has all of its {run['frames']:,} frames already: raise "
                f"--data.total_frames (now {self.datamodule.total_frames:,}) to train further."
            )

    def _folder(self) -> Path:
        """Return the run's folder: the resumed one's if it lies among ours, else a new one."""
        path = self.checkpoint_path
        if path is not None:
            ours = runs.seed_folder(self.checkpoints.folder, self.method_name, self.seed)
            if path.resolve().parent.parent == ours.resolve():
                return path.parent
        return runs.new_folder(self.checkpoints.folder, self.method_name, self.seed)

    def _begin(self, logger: MLflow) -> None:
        """Name the run in MLflow, or go on in the checkpoint's."""
        cases = {
            name: config.case if hasattr(config, "case") else config["case"]
            for name, config in self.model.optimizer_configs.items()
        }
        logger.describe(
            experiment_name=self.env.task,
            run_name=f"{self.method_name}_seed{self.seed}",
            tags=record.tags(
                task=self.env.task,
                method=self.method_name,
                algorithm=type(self.model).__name__,
                optimizer=", ".join(f"{name}={case}" for name, case in cases.items()),
                seed=self.seed,
            ),
        )
        run_id = self.checkpoint["muon_rl"]["mlflow_run_id"] if self.checkpoint else None
        if run_id is not None:
            logger.resume(run_id)

    def _summarize(self, folder: Path, loggers: list[MLflow]) -> None:
        """Say where everything is."""
        returned = self.trainer.callback_metrics.get("eval/return")
        lines = [f"Trained {self.datamodule.frames:,} frames."]
        if returned is not None:
            best = self.checkpoints.best_model_score
            lines.append(f"  last return  {float(returned):.1f}")
            lines.append(f"  best return  {float(best if best is not None else returned):.1f}")
        if self.checkpoints.enabled:
            lines.append(f"  checkpoints  {folder}/ (best.ckpt, last.ckpt)")
        for logger in loggers:
            lines.append(f"  MLflow run   {logger.run_id} in {logger.tracking_uri}")
            lines.append(f"  to look      mlflow ui --backend-store-uri {logger.tracking_uri}")
        print("\n".join(lines))
