"""The parser of a recipe: fixed top-level keys, errors of one line."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from muon_rl.callbacks import Checkpoints, EffectiveRank, LossHealth, PolicyAverage
from muon_rl.cli import ConfigError
from muon_rl.cli.errors import explain
from muon_rl.envs import EnvFactory

MatmulPrecision = Literal["highest", "high", "medium"]


class RecipeParser(LightningArgumentParser):
    """Lightning's parser with the keys of a recipe."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # argparse would otherwise take --trainer.max_epoch for max_epochs, and optimizer.cas for
        # case; the parsers of a recipe's classes are of this kind too.
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise what was wrong, told in a line or two.

        Args:
            message: jsonargparse's, which may nest several.
            ex: the exception behind it.

        Raises:
            ConfigError: always.
        """
        keys = {part for action in self._actions for part in action.dest.split(".")}
        raise ConfigError(explain(message, keys))

    def add_recipe_arguments(self) -> None:
        """Add the keys beside ``data``, ``model`` and ``trainer``, and the links between them."""
        self.add_subclass_arguments(EnvFactory, "env", help="Makes the environments.")
        self.add_lightning_class_args(Checkpoints, "checkpoint")
        self.add_lightning_class_args(EffectiveRank, "effective_rank")
        self.add_lightning_class_args(LossHealth, "loss_health")
        self.add_lightning_class_args(PolicyAverage, "policy_average")
        self.add_argument(
            "--method_name",
            type=str | None,
            help="Name of the method: it names the run and its checkpoint folder. ${key} in it is "
            "the config's value, as in sac_${model.optimizer.actor.case}. Left out, it is made of "
            "the model's class and the task.",
        )
        self.add_argument(
            "--matmul_precision",
            type=MatmulPrecision,
            default="highest",
            help="torch.set_float32_matmul_precision: on some processors a lower one doubles the "
            "speed of matrix products.",
        )
        self.add_argument(
            "--compile_optimizer",
            type=bool,
            default=False,
            help="Whether torch.compile takes the optimizer's step: 15 to 30 seconds at first, "
            "then steps on many small matrices are shorter.",
        )
        self.link_arguments("env", "data.init_args.env", apply_on="instantiate")
        self.link_arguments("env", "model.init_args.env", apply_on="instantiate")
