"""What a parameter is: first, hidden or last layer, embedding, norm, bias; and its batch dims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tensordict.nn import TensorDictParams
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torchrl.modules.tensordict_module import rnn
from torchrl.objectives import LossModule

Role = Literal["first", "hidden", "last", "embedding", "norm", "bias", "other"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_GATES = {
    **dict.fromkeys((nn.GRU, nn.GRUCell, rnn.GRU, rnn.GRUCell), 3),
    **dict.fromkeys((nn.LSTM, nn.LSTMCell, rnn.LSTM, rnn.LSTMCell), 4),
    **dict.fromkeys((nn.RNN, nn.RNNCell), 1),
}


@dataclass(frozen=True)
class ParameterRole:
    """What one parameter is in its network.

    Args:
        role: ``first``, ``hidden`` or ``last`` for the weights of layers, in the order of the path
            from input to output; ``embedding``, ``norm``, ``bias``; ``other`` for what no known
            layer owns, such as a learned temperature.
        batch_dims: number of leading dims that stack copies of the network (1 for TorchRL's
            critics), 0 for an ordinary module.
        splits: number of matrices along the rows: 3 for fused query, key, value and for a GRU's
            gates, 4 for an LSTM's.
    """

    role: Role
    batch_dims: int = 0
    splits: int = 1


@dataclass
class _Leaf:
    """A parameter's place: its name, its network, the module that owns it and its name there.

    A network may be made of several stems, as a critic of a Q-network and a value network: each
    has a first and a last layer.
    """

    name: str
    stem: str
    owner: nn.Module | None
    local_name: str
    batch_dims: int


def _weight_splits(owner: nn.Module | None, local_name: str) -> int | None:
    """Return into how many matrices a layer's weight falls; ``None`` if it is no matrix layer's."""
    if isinstance(owner, nn.MultiheadAttention):
        return {"in_proj_weight": 3}.get(local_name, 1 if local_name.endswith("weight") else None)
    for kind, gates in _GATES.items():
        if isinstance(owner, kind) and local_name.startswith("weight"):
            # An LSTM's projection of its hidden state, weight_hr, is one matrix.
            return 1 if local_name.startswith("weight_hr") else gates
    if isinstance(owner, (nn.Linear, nn.Bilinear, _ConvNd)):
        # torchrl's NoisyLinear keeps its mean in weight_mu.
        return 1 if local_name in ("weight", "weight_mu") else None
    return None


def _owner(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """Follow a path of attribute names from ``module`` to the module that owns its last one."""
    for part in path[:-1]:
        module = module._modules.get(part)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def _leaves(module: nn.Module) -> Iterator[_Leaf]:
    """Yield every named parameter, looking through TorchRL's functional networks."""
    # A LossModule keeps <network>'s parameters in <network>_params, and the module itself,
    # emptied, outside its registered children.
    functional = {
        prefix: child
        for prefix, child in module.named_modules()
        if isinstance(child, TensorDictParams)
    }
    for name, _ in module.named_parameters():
        prefix = max((p for p in functional if name.startswith(p + ".")), key=len, default=None)
        if prefix is None:
            path = tuple(name.split("."))
            owner = _owner(module, path)
            # A loss's own parameter, such as log_alpha, is a network by itself.
            network = path[-1] if isinstance(owner, LossModule) else path[0]
            yield _Leaf(name, network, owner, path[-1], 0)
            continue
        holder, _, attribute = prefix.rpartition(".")
        network = attribute.removesuffix("_params")
        functional_module = module.get_submodule(holder).__dict__.get(network)
        path = tuple(name.removeprefix(prefix + ".").split("."))
        owner = _owner(functional_module, path) if functional_module is not None else None
        yield _Leaf(name, network, owner, path[-1], functional[prefix].batch_dims)


def network_of(attribute: str) -> str:
    """Return a network's name in a config: ``qvalue_network`` -> ``critic``.

    Args:
        attribute: the name under which a module or a TorchRL loss holds the network.
    """
    name = attribute.removesuffix("_network")
    return {"qvalue": "critic", "value": "critic", "log_alpha": "alpha"}.get(name, name)


def network_roles(module: nn.Module) -> dict[str, dict[str, ParameterRole]]:
    """Return the parameters' roles by network, for a module whose children are networks.

    Args:
        module: a TorchRL ``LossModule``, or any holder of networks as its direct children.

    Raises:
        ValueError: if a lazy layer has no shape yet.
    """
    stems: dict[str, list[_Leaf]] = {}
    for leaf in _leaves(module):
        stems.setdefault(leaf.stem, []).append(leaf)
    networks: dict[str, dict[str, ParameterRole]] = {}
    for stem, leaves in stems.items():
        networks.setdefault(network_of(stem), {}).update(_roles(leaves))
    return networks


def parameter_roles(module: nn.Module) -> dict[str, ParameterRole]:
    """Return the role of every parameter, found from the module that owns it, never from its shape.

    The first matrix layer of a network is ``first`` and the last one ``last``; a network with one
    layer has only a ``last``. A TorchRL loss holds several networks, any other module is one.

    Args:
        module: any ``nn.Module``, or a TorchRL ``LossModule``, whose stacked networks
            (``(Q, out, in)`` weights, ``(Q, out)`` biases) are looked up in the module they
            came from.

    Returns:
        A role for each name of ``module.named_parameters()``, in that order.

    Raises:
        ValueError: if a lazy layer has not seen data yet, so that its parameters have no shape.

    Example:
        >>> from torch import nn
        >>> roles = parameter_roles(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)))
        >>> {name: role.role for name, role in roles.items()}
        {'0.weight': 'first', '0.bias': 'bias', '2.weight': 'last', '2.bias': 'bias'}
    """
    if any(isinstance(child, LossModule) for child in module.modules()):
        networks = network_roles(module)
        by_name = {name: role for roles in networks.values() for name, role in roles.items()}
        return {name: by_name[name] for name, _ in module.named_parameters()}
    return _roles(list(_leaves(module)))


def _roles(leaves: list[_Leaf]) -> dict[str, ParameterRole]:
    """Return the roles of one network's parameters, given in the order from input to output."""
    roles: dict[str, ParameterRole] = {}
    layers: dict[int, list[str]] = {}
    for leaf in leaves:
        if isinstance(leaf.owner, LazyModuleMixin) and leaf.owner.has_uninitialized_params():
            raise ValueError(
                f"{leaf.name!r} belongs to a lazy {type(leaf.owner).__name__} without a shape yet: "
                "pass one batch through the network first."
            )
        splits = _weight_splits(leaf.owner, leaf.local_name)
        if splits is not None:
            roles[leaf.name] = ParameterRole("hidden", leaf.batch_dims, splits)
            layers.setdefault(id(leaf.owner), []).append(leaf.name)
        elif isinstance(leaf.owner, _EMBEDDINGS):
            roles[leaf.name] = ParameterRole("embedding", leaf.batch_dims)
        elif isinstance(leaf.owner, _NORMS):
            roles[leaf.name] = ParameterRole("norm", leaf.batch_dims)
        elif "bias" in leaf.local_name:
            roles[leaf.name] = ParameterRole("bias", leaf.batch_dims)
        else:
            roles[leaf.name] = ParameterRole("other", leaf.batch_dims)

    ordered = list(layers.values())
    for name in ordered[0] if ordered else ():
        roles[name] = replace(roles[name], role="first")
    for name in ordered[-1] if ordered else ():
        roles[name] = replace(roles[name], role="last")
    return roles
