"""How one network is optimized: the settings that a recipe's YAML sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal


@dataclass
class MuonConfig:
    """Muon's own settings in a network's config.

    Args:
        lr: rate, spectral norm per update (start from 0.02; 0.01-0.05).
        momentum: share of the moving average kept, in [0, 1).
        nesterov: whether the update looks one step ahead.
        weight_decay: decoupled decay, per update and unit of rate.
        ns_steps: Newton-Schulz iterations.
        coefficients: quintic, cubic, polar_express, a triple or a list of triples.
        adjust_lr: original, match_rms_adamw or none.
        apply_first_layer: whether Muon takes the weights of the first layer.
        apply_last_layer: whether Muon takes the weights of the last layer (the heads).
        include: name patterns (`*0.weight`) of further matrices for Muon, whatever their role.
        exclude: name patterns of parameters that Muon must leave to the auxiliary part.
    """

    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    ns_steps: int = 5
    coefficients: str | list[float] | list[list[float]] = "quintic"
    adjust_lr: Literal["original", "match_rms_adamw", "none"] | None = "original"
    apply_first_layer: bool = True
    apply_last_layer: bool = False
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


@dataclass
class MomentumSchedule:
    """A momentum that begins late: 0 until ``start_step``, then the optimizer's own value.

    Args:
        enabled: whether there is one; without it the momentum is constant.
        start_step: optimizer steps (not frames) made with momentum 0.
        warmup_steps: optimizer steps after them in which it rises linearly to its own value.
    """

    enabled: bool = False
    start_step: int = 0
    warmup_steps: int = 0


@dataclass
class OptimizerConfig:
    """How one network is optimized.

    Args:
        case: muon (with an auxiliary part for what is no matrix), adamw or adam.
        lr: Adam's rate, of the whole network or of the auxiliary part.
        betas: Adam's decay rates of the first and second moment.
        eps: Adam's denominator term.
        weight_decay: decoupled decay, in case adamw only; the auxiliary part never decays.
        aux: adamw or adam, for what Muon does not take; with none, such a parameter is an error.
        aux_lr: rate of the auxiliary part; left out, it is `lr`.
        momentum_schedule: of Muon's momentum and of Adam's first beta.
        muon: Muon's own settings, in case muon.
    """

    case: Literal["muon", "adamw", "adam"] = "muon"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    aux: Literal["adamw", "adam", "none"] | None = "adamw"
    aux_lr: float | None = None
    momentum_schedule: MomentumSchedule = field(default_factory=MomentumSchedule)
    muon: MuonConfig = field(default_factory=MuonConfig)

    @classmethod
    def parse(cls, config: OptimizerConfig | Mapping[str, Any], *, network: str) -> OptimizerConfig:
        """Return a config from itself or from a nested dict.

        Args:
            config: a config, or a dict of its fields.
            network: the network it is for, named in errors.

        Raises:
            ValueError: for an unknown option or case.
        """
        if isinstance(config, Mapping):
            config = cls(**_checked(cls, config, where=network))
        if not isinstance(config, cls):
            raise TypeError(
                f"The optimizer of {network!r} must be an OptimizerConfig or a dict of its fields, "
                f"not {config!r}."
            )
        for part, kind in (("muon", MuonConfig), ("momentum_schedule", MomentumSchedule)):
            given: Any = getattr(config, part)
            if isinstance(given, Mapping):
                options = _checked(kind, given, where=f"{network}.{part}")
                given = kind(**options)
                config = replace(config, **{part: given})
            if not isinstance(given, kind):
                raise TypeError(
                    f"{network}.{part} must hold the settings of {kind.__name__}, but is {given!r}."
                )
        # A word too, since jsonargparse 4.53 hands a null of the command line on as "None".
        if config.aux == "none":
            config = replace(config, aux=None)
        if config.muon.adjust_lr == "none":
            config = replace(config, muon=replace(config.muon, adjust_lr=None))
        cases = ("muon", "adamw", "adam")
        for option, allowed in (("case", cases), ("aux", ("adamw", "adam", None))):
            if getattr(config, option) not in allowed:
                raise ValueError(
                    f"{network}.{option} must be one of {', '.join(map(str, allowed))}, "
                    f"but is {getattr(config, option)!r}."
                )
        return config


def _checked(kind: type, options: Mapping[str, Any], *, where: str) -> Mapping[str, Any]:
    """Return ``options`` if each is a field of the dataclass ``kind``."""
    allowed = [option.name for option in fields(kind)]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(
            f"Unknown option(s) {', '.join(unknown)} for {where}; allowed: {', '.join(allowed)}."
        )
    return options
