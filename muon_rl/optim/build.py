"""From one config a network to one optimizer with named groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from muon_rl.optim.muon import Muon
from muon_rl.optim.roles import ParameterRole, network_roles


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
        adjust_lr: original, match_rms_adamw, or null for none.
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
    adjust_lr: Literal["original", "match_rms_adamw"] | None = "original"
    apply_first_layer: bool = True
    apply_last_layer: bool = False
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


@dataclass
class OptimizerConfig:
    """How one network is optimized.

    Args:
        case: muon (with an auxiliary part for what is no matrix), adamw or adam.
        lr: Adam's rate, of the whole network or of the auxiliary part.
        betas: Adam's decay rates of the first and second moment.
        eps: Adam's denominator term.
        weight_decay: decoupled decay, in case adamw only; the auxiliary part never decays.
        aux: adamw or adam, for what Muon does not take.
        aux_lr: rate of the auxiliary part; left out, it is `lr`.
        muon: Muon's own settings, in case muon.
    """

    case: Literal["muon", "adamw", "adam"] = "muon"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    aux: Literal["adamw", "adam"] = "adamw"
    aux_lr: float | None = None
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
        if isinstance(config.muon, Mapping):
            muon = _checked(MuonConfig, config.muon, where=f"{network}.muon")
            config = replace(config, muon=MuonConfig(**muon))
        if not isinstance(config.muon, MuonConfig):
            raise TypeError(f"{network}.muon must hold Muon's settings, but is {config.muon!r}.")
        for option, allowed in (("case", ("muon", "adamw", "adam")), ("aux", ("adamw", "adam"))):
            if getattr(config, option) not in allowed:
                raise ValueError(
                    f"{network}.{option} must be one of {', '.join(allowed)}, "
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


def build_optimizer(
    loss: nn.Module,
    *,
    on_nonfinite: str = "propagate",
    **networks: OptimizerConfig | Mapping[str, Any],
) -> Muon:
    """Build one optimizer for all networks of a loss, each by its own config.

    A network's groups are named ``<network>/muon`` and ``<network>/aux``, or ``<network>/adamw``,
    ``<network>/adam``; a group without parameters is left out.

    Args:
        loss: a TorchRL ``LossModule``, or any module whose children are networks. Networks are
            called ``actor`` (``actor_network``), ``critic`` (``qvalue_network``,
            ``critic_network``, ``value_network``), ``alpha`` (``log_alpha``), and any other by
            its attribute without ``_network``.
        on_nonfinite: ``"propagate"``, ``"raise"`` or ``"skip"``: see :class:`Muon`.
        **networks: an :class:`OptimizerConfig`, or a dict of its fields, for each network.
            ``alpha`` has Adam at 3e-4 unless set.

    Raises:
        ValueError: for a network that the loss lacks, a trainable one without a config, an unknown
            option, or a network in case muon without a matrix for it.

    Example:
        >>> from torch import nn
        >>> agent = nn.ModuleDict({"actor": nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))})
        >>> optimizer = build_optimizer(agent, actor={"case": "muon", "muon": {"lr": 0.03}})
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('actor/muon', 0.03), ('actor/aux', 0.0003)]
    """
    parameters = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    roles = {
        network: {name: role for name, role in members.items() if name in parameters}
        for network, members in network_roles(loss).items()
    }
    roles = {network: members for network, members in roles.items() if members}
    if "alpha" in roles:
        networks = {**networks, "alpha": networks.get("alpha", OptimizerConfig(case="adam"))}
    if unknown := sorted(set(networks) - set(roles)):
        raise ValueError(
            f"No trainable network named {', '.join(unknown)} in {type(loss).__name__}; "
            f"it has {', '.join(roles) or 'none'}."
        )
    if missing := sorted(set(roles) - set(networks)):
        raise ValueError(
            f"No optimizer config for the trainable network(s) {', '.join(missing)} of "
            f"{type(loss).__name__}: pass one for each."
        )
    groups: list[dict[str, Any]] = []
    for network, given in networks.items():
        config = OptimizerConfig.parse(given, network=network)
        groups += _groups(network, config, roles[network], parameters)
    return Muon(groups, on_nonfinite=on_nonfinite)


def _groups(
    network: str,
    config: OptimizerConfig,
    roles: dict[str, ParameterRole],
    parameters: dict[str, nn.Parameter],
) -> list[dict[str, Any]]:
    """Return the groups of one network."""
    adam = {"betas": tuple(config.betas), "eps": config.eps, "fused": _fuses(parameters, roles)}
    everything = [(name, parameters[name]) for name in roles]
    if config.case != "muon":
        decay = config.weight_decay if config.case == "adamw" else 0.0
        return [
            {
                "params": everything,
                "algorithm": config.case,
                "name": f"{network}/{config.case}",
                "lr": config.lr,
                "weight_decay": decay,
                **adam,
            }
        ]
    for pattern in [*config.muon.include, *config.muon.exclude]:
        if not any(fnmatchcase(name, pattern) for name in roles):
            raise ValueError(
                f"{pattern!r} in {network}.muon fits no parameter; there are {', '.join(roles)}."
            )
    chosen = [name for name, role in roles.items() if _takes(config.muon, name, role)]
    if not chosen:
        raise ValueError(
            f"Muon finds no matrix to take in {network!r}: its parameters are "
            + ", ".join(f"{name} ({role.role})" for name, role in roles.items())
            + f". Set {network}.case to adamw or adam, or widen apply_first_layer, "
            "apply_last_layer or include."
        )
    muon = config.muon
    groups = [
        {
            "params": [(name, parameters[name]) for name in chosen],
            "algorithm": "muon",
            "name": f"{network}/muon",
            "lr": muon.lr,
            "momentum": muon.momentum,
            "nesterov": muon.nesterov,
            "weight_decay": muon.weight_decay,
            "ns_steps": muon.ns_steps,
            "coefficients": muon.coefficients,
            "adjust_lr": muon.adjust_lr,
            "batch_dims": [roles[name].batch_dims for name in chosen],
            "splits": [roles[name].splits for name in chosen],
        }
    ]
    rest = [(name, p) for name, p in everything if name not in set(chosen)]
    if rest:
        groups.append(
            {
                "params": rest,
                "algorithm": config.aux,
                "name": f"{network}/aux",
                "lr": config.lr if config.aux_lr is None else config.aux_lr,
                "weight_decay": 0.0,
                **adam,
            }
        )
    return groups


def _takes(config: MuonConfig, name: str, role: ParameterRole) -> bool:
    """Tell whether Muon takes a parameter."""
    if any(fnmatchcase(name, pattern) for pattern in config.exclude):
        return False
    if any(fnmatchcase(name, pattern) for pattern in config.include):
        return True
    return {
        "first": config.apply_first_layer,
        "hidden": True,
        "last": config.apply_last_layer,
    }.get(role.role, False)


def _fuses(parameters: dict[str, nn.Parameter], names: Any) -> bool:
    """Tell whether torch's fused Adam takes all of these parameters."""
    return all(
        parameters[name].device.type in ("cpu", "cuda") and parameters[name].is_floating_point()
        for name in names
    )
