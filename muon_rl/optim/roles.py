"""What a parameter is: first, hidden or last layer, embedding, norm, bias; and its batch dims."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torchrl.modules import BatchRenorm1d
from torchrl.modules.tensordict_module import rnn
from torchrl.objectives import LossModule

from muon_rl.optim.dataflow import Flow

Role = Literal["first", "hidden", "last", "embedding", "norm", "bias", "other"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, BatchRenorm1d, _WeightNorm)
_GATES = {
    **dict.fromkeys((nn.GRU, nn.GRUCell, rnn.GRU, rnn.GRUCell), 3),
    **dict.fromkeys((nn.LSTM, nn.LSTMCell, rnn.LSTM, rnn.LSTMCell), 4),
    **dict.fromkeys((nn.RNN, nn.RNNCell), 1),
}
_LAYERS = (nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention, *_GATES)
# How torchrl modules that hold stacked parameters beside an emptied network call the two.
_EMPTIED = {"params": "_empty_net", "params_td": "module"}


@dataclass(frozen=True)
class ParameterRole:
    """What one parameter is in its network.

    Args:
        role: for the weights of layers ``last`` if no other layer is downstream on the path from
            input to output, ``first`` if none is upstream, else ``hidden``; ``embedding``,
            ``norm``, ``bias``; ``other`` for what no known layer owns, such as a learned
            temperature.
        batch_dims: number of leading dims that stack copies of the network (1 for TorchRL's
            critics), 0 for an ordinary module.
        splits: number of matrices along the rows: 3 for fused query, key, value and for a GRU's
            gates, 4 for an LSTM's.
    """

    role: Role
    batch_dims: int = 0
    splits: int = 1


@dataclass(frozen=True)
class _Place:
    """Where a parameter stands: its network's attribute, the layer or other module that owns it.

    A parameter that several networks share has a place in each.
    """

    tensor: Tensor
    network: str
    owner: nn.Module | None
    local_name: str
    batch_dims: int
    flow: Flow

    @property
    def identity(self) -> tuple[int, ...]:
        """Tell which parameter this is, also where a loss holds a detached or expanded alias."""
        if is_lazy(self.tensor) or not self.tensor.data_ptr():
            return (id(self.tensor),)
        return (self.tensor.data_ptr(), *self.tensor.shape[self.batch_dims :])


def _weight_splits(owner: nn.Module | None, local_name: str) -> int | None:
    """Return into how many matrices a layer's weight falls; ``None`` if it is no matrix layer's."""
    if isinstance(owner, nn.MultiheadAttention):
        return {"in_proj_weight": 3}.get(local_name, 1 if local_name.endswith("weight") else None)
    for kind, gates in _GATES.items():
        if isinstance(owner, kind) and local_name.startswith("weight"):
            # An LSTM's projection of its hidden state, weight_hr, is one matrix.
            return 1 if local_name.startswith("weight_hr") else gates
    if isinstance(owner, (nn.Linear, nn.Bilinear, _ConvNd)):
        # torchrl's NoisyLinear keeps its mean in weight_mu, torch's older hooks what they normalise
        # in weight_orig and weight_v.
        return 1 if local_name in ("weight", "weight_mu", "weight_orig", "weight_v") else None
    return None


def network_of(attribute: str) -> str:
    """Return a network's name in a config: ``qvalue_network`` -> ``critic``.

    Args:
        attribute: the name under which a module or a TorchRL loss holds the network.
    """
    name = attribute.removesuffix("_network")
    return {"qvalue": "critic", "value": "critic", "log_alpha": "alpha"}.get(name, name)


def network_roles(module: nn.Module) -> dict[str, dict[str, ParameterRole]]:
    """Return the parameters' roles by network, for a module whose children are networks.

    A part that networks share is a network of its own, ``trunk``; roles in it follow the path on
    into the networks.

    Args:
        module: a TorchRL ``LossModule``, or any holder of networks as its direct children.

    Raises:
        ValueError: if a lazy layer has no shape yet.
    """
    networks: dict[str, dict[str, ParameterRole]] = {}
    for name, (network, role) in _described(module).items():
        networks.setdefault(network, {})[name] = role
    return networks


def parameter_roles(module: nn.Module) -> dict[str, ParameterRole]:
    """Return the role of every parameter, found from the module that owns it, never from its shape.

    A layer is ``last`` if no other layer is downstream of it on the path from input to output, and
    else ``first`` if none is upstream: parallel heads are all ``last``, parallel inputs all
    ``first``. A TorchRL loss and a holder of networks without a ``forward`` hold several networks,
    each with a path of its own; any other module is one network.

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
    return {name: role for name, (_, role) in _described(module).items()}


def _described(root: nn.Module) -> dict[str, tuple[str, ParameterRole]]:
    """Return the network and the role of every named parameter, in order."""
    places = dict(_places(root))
    listed = {name: places[name] for name, _ in root.named_parameters()}
    same: dict[Any, list[_Place]] = {}
    for place in places.values():
        same.setdefault(place.identity, []).append(place)
    # A network that lists no parameter is another name of one that does.
    networks = {network_of(place.network) for place in listed.values()}
    sharers = {
        name: networks & {network_of(other.network) for other in same[place.identity]}
        for name, place in listed.items()
    }
    # A network that is shared as a whole keeps its name.
    divided = {
        network_of(listed[name].network) for name, users in sharers.items() if len(users) == 1
    }
    described = {}
    for name, place in listed.items():
        home = network_of(place.network)
        network = "trunk" if len(sharers[name]) > 1 and home in divided else home
        described[name] = (network, _role(name, place, same[place.identity]))
    return described


def _role(name: str, place: _Place, same: list[_Place]) -> ParameterRole:
    """Return the role of a parameter, given all its places."""
    owner, local_name = place.owner, place.local_name
    if isinstance(owner, LazyModuleMixin) and owner.has_uninitialized_params():
        raise ValueError(
            f"{name!r} belongs to a lazy {type(owner).__name__} without a shape yet: "
            "pass one batch through the network first."
        )
    if (splits := _weight_splits(owner, local_name)) is not None:
        upstream, downstream = map(
            any, zip(*(at.flow.around(at.owner) for at in same), strict=True)
        )
        role: Role = "last" if not downstream else "hidden" if upstream else "first"
        return ParameterRole(role, place.batch_dims, splits)
    if isinstance(owner, _EMBEDDINGS):
        role = "embedding"
    elif isinstance(owner, _NORMS) or local_name == "weight_g":
        role = "norm"
    else:
        role = "bias" if "bias" in local_name else "other"
    return ParameterRole(role, place.batch_dims)


def _places(root: nn.Module) -> Iterator[tuple[str, _Place]]:
    """Yield every place of every parameter, by its name there."""
    flows = {root: Flow(_networks(root), _LAYERS)}
    for prefix, part in root.named_modules(remove_duplicate=False):
        held: dict[Any, Any] = part._parameters
        if isinstance(part, TensorDictParams):
            # Also the detached tensors that stand for what another network of a loss lists.
            held = dict(part.items(True, True))
        for key, tensor in held.items():
            if tensor is None:
                continue
            inside = key if isinstance(key, tuple) else (key,)
            path = (*filter(None, prefix.split(".")), *inside)
            stack = part.get(inside[:-1]) if inside[1:] else part
            batch_dims = stack.batch_dims if isinstance(part, TensorDictParams) else 0
            network, owners, flow = _follow(root, path, flows)
            owner, local_name = owners[-1], path[-1]
            if isinstance(owner, ParametrizationList) and local_name.startswith("original"):
                # As in layer.parametrizations.weight.original
                if isinstance(owner[0], _WeightNorm) and local_name == "original0":
                    owner = owner[0]
                elif tensor.shape[batch_dims:] == deepcopy(owner)().shape:
                    owner, local_name = owners[-3], path[-2]
            yield ".".join(path), _Place(tensor, network, owner, local_name, batch_dims, flow)


def _follow(
    root: nn.Module, path: tuple[str, ...], flows: dict[nn.Module, Flow]
) -> tuple[str, list[Any], Flow]:
    """Return a parameter's network, the modules on the path to it, and the network's flow."""
    network, owners, flow = path[0], [root], flows[root]
    for name in path[:-1]:
        holder = owners[-1]
        if isinstance(holder, LossModule):
            network = name
        module = holder._modules.get(name)
        if isinstance(module, TensorDictParams):
            # A LossModule keeps <network>'s parameters in <network>_params, and the module itself
            # outside its registered children.
            module = vars(holder).get(name.removesuffix("_params"))
            if isinstance(module, nn.Module):
                network = name.removesuffix("_params")
                if module not in flows:
                    flows[module] = Flow([module], _LAYERS)
                flow = flows[module]
            else:
                module = holder._modules.get(_EMPTIED.get(name, ""))
        if module is None:
            return network.removesuffix("_params"), [None], flow
        owners.append(module)
    return path[-1] if isinstance(owners[-1], LossModule) else network, owners, flow


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what is traced by itself: a loss's own ``forward`` is no path from input to output."""
    if not any(isinstance(part, LossModule) for part in module.modules()):
        yield module
    else:
        for child in module.children():
            yield from _networks(child)
