"""From one config a network to one optimizer with named groups."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from muon_rl.optim.config import MomentumSchedule, OptimizerConfig
from muon_rl.optim.muon import Muon
from muon_rl.optim.roles import ParameterRole, network_roles


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
            f"it has {', '.join(roles) or 'none'}, its children's names."
        )
    if missing := sorted(set(roles) - set(networks)):
        raise ValueError(
            f"No optimizer config for the trainable network(s) {', '.join(missing)} of "
            f"{type(loss).__name__}: pass one for each."
        )
    groups: list[dict[str, Any]] = []
    reasons: dict[Any, tuple[str, str]] = {}
    for network, given in networks.items():
        config = OptimizerConfig.parse(given, network=network)
        groups += _groups(network, config, roles[network], parameters)
        for name, role in roles[network].items():
            reasons[parameters[name]] = (role.role, _choice(config, name, role)[1])
    optimizer = Muon(groups, on_nonfinite=on_nonfinite)
    optimizer.reasons = reasons
    return optimizer


def _groups(
    network: str,
    config: OptimizerConfig,
    roles: dict[str, ParameterRole],
    parameters: dict[str, nn.Parameter],
) -> list[dict[str, Any]]:
    """Return the groups of one network."""
    schedule = _schedule(config.momentum_schedule)
    adam: dict[str, Any] = {
        "betas": tuple(config.betas),
        "eps": config.eps,
        "fused": _fuses(parameters, roles),
        **schedule,
    }
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
    chosen = [name for name, role in roles.items() if _choice(config, name, role)[0]]
    if not chosen:
        raise ValueError(
            f"Muon finds no matrix to take in {network!r}: its parameters are "
            + ", ".join(f"{name} ({role.role})" for name, role in roles.items())
            + f". Set {network}.case to adamw or adam, or widen apply_first_layer, "
            "apply_last_layer or include."
        )
    muon = config.muon
    groups: list[dict[str, Any]] = [
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
            "batch_dims": _one_or_all([roles[name].batch_dims for name in chosen]),
            "splits": _one_or_all([roles[name].splits for name in chosen]),
            **schedule,
        }
    ]
    rest = [(name, p) for name, p in everything if name not in set(chosen)]
    if rest and config.aux is None:
        raise ValueError(
            f"Muon does not take {', '.join(name for name, _ in rest)} in {network!r}, and "
            f"{network}.aux is none: set it to adamw or adam, or freeze what is not to be trained."
        )
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


def _choice(config: OptimizerConfig, name: str, role: ParameterRole) -> tuple[bool, str]:
    """Tell whether Muon takes a parameter, and why."""
    if config.case != "muon":
        return False, f"case {config.case}"
    for option, takes in (("exclude", False), ("include", True)):
        for pattern in getattr(config.muon, option):
            if fnmatchcase(name, pattern):
                return takes, f"{option} {pattern!r}"
    if role.role in ("first", "last"):
        option = f"apply_{role.role}_layer"
        takes = getattr(config.muon, option)
        return takes, f"{option} is {str(takes).lower()}"
    if role.role == "hidden":
        return True, "matrix of a hidden layer"
    return False, "no known layer owns it" if role.role == "other" else f"no matrix: {role.role}"


def _schedule(schedule: MomentumSchedule) -> dict[str, int]:
    """Return a momentum schedule as a group holds it."""
    if not schedule.enabled:
        return {}
    return {
        "momentum_start_step": schedule.start_step,
        "momentum_warmup_steps": schedule.warmup_steps,
    }


def _one_or_all(values: list[int]) -> int | list[int]:
    """Return one number where all are equal: a sharded optimizer may then split the group."""
    return values[0] if len(set(values)) == 1 else values


def _fuses(parameters: dict[str, nn.Parameter], names: Any) -> bool:
    """Tell whether torch's fused Adam takes all of these parameters."""
    return all(
        parameters[name].device.type in ("cpu", "cuda") and parameters[name].is_floating_point()
        for name in names
    )
