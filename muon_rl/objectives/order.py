"""Whether losses that are called one after the other find what they read."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.objectives import LossModule

from muon_rl.objectives.model_parts import MODEL_KEYS

PRODUCERS = {"cmpo": "CMPOLoss", "unroll": "DynamicsLoss", "prior": "OneStepLookahead"}


def check_order(
    losses: Mapping[str, LossModule],
    enabled: Mapping[str, bool],
    policy: TensorDictModuleBase | None = None,
) -> None:
    """Raise if a loss that is on would not find in the data what another is to write there.

    Args:
        losses: by name, in the order of their calls.
        enabled: which of them are on.
        policy: what acts, beside the networks of the losses.

    Raises:
        ValueError: naming the key, who produces it and where to put that; or a term or metric that
            two losses return.
    """
    names = list(losses)
    written = {name: written_by(loss) for name, loss in losses.items()}
    terms: dict[NestedKey, str] = {}
    on = {name: loss for name, loss in losses.items() if enabled[name]}
    before: set[NestedKey] = set()
    ever: set[NestedKey] = set().union(*written.values())
    for name, loss in on.items():
        required, returned = keys_after(loss, before)
        for key in returned:
            if key in terms:
                raise ValueError(twice(key, terms[key], name))
            terms[key] = name
        before |= written[name]
        # What a later loss writes it might have read, and now makes for itself.
        for key in dict.fromkeys([*required, *keys_after(loss, ever)[0]]):
            producers = [other for other in names if other != name and key in written[other]]
            able = [other for other in producers if other in on]
            if any(names.index(other) < names.index(name) for other in able):
                continue
            if able:
                raise ValueError(
                    f"{name!r} reads {key!r}, which {able[0]!r} ({_kind(losses[able[0]])}) "
                    f"writes later: move {able[0]} before {name}."
                )
            if key not in required:
                continue
            if producers:
                raise ValueError(
                    f"{name!r} reads {key!r}, which {producers[0]!r} "
                    f"({_kind(losses[producers[0]])}) writes, but that is off: switch "
                    f"{producers[0]} on, or {name} off."
                )
            if key not in written[name]:
                _check_outside(name, key, on, policy)


def _check_outside(
    name: str, key: NestedKey, on: Mapping[str, LossModule], policy: TensorDictModuleBase | None
) -> None:
    """Raise if a key that no loss writes is not one that the data hold."""
    named = _name(on[name], key)
    role = named[0] if isinstance(named, tuple) else named
    if role in PRODUCERS:
        others = {other: written_by(loss) for other, loss in on.items() if other != name}
        if key[0] == "next":
            now = unravel_key(key[1:])
            for other in (other for other in others if now in others[other]):
                raise ValueError(
                    f"{name!r} reads {key!r}, but {other!r} ({_kind(on[other])}) writes {now!r} "
                    f"alone: build {other} with next_targets=True, or what reads it with False."
                )
        alike = (
            f" {other!r} writes {their!r}: if that is it, rename one by set_keys()."
            for other, keys in others.items()
            for their in keys
            if (their[0] == "next") == (key[0] == "next") and _name(on[other], their) == named
        )
        raise ValueError(
            f"{name!r} reads {key!r}, which no loss of the sequence writes. {PRODUCERS[role]} "
            f"writes it: put one before {name}.{next(alike, '')}"
        )
    if key not in MODEL_KEYS:
        return
    networks = [network for loss in on.values() for network in _networks(loss)]
    if policy is not None:
        networks.append(policy)
    if networks and not any(key in network.out_keys for network in networks):
        raise ValueError(
            f"{name!r} reads {key!r}, which neither a loss nor the policy writes. A world model "
            "does: collect with a policy that holds one, such as MuesliPolicy(WorldModel(...)), "
            f"and give it here as policy=, so that it writes before {name} reads."
        )


def keys_after(
    loss: LossModule, written: Collection[NestedKey]
) -> tuple[list[NestedKey], list[NestedKey]]:
    """Return what a loss must find in the data, and what it returns, after other losses.

    Args:
        loss: whose own ``keys_after`` says so, if what it finds decides that; else ``in_keys`` and
            ``out_keys`` do.
        written: what the losses before it wrote.
    """
    own = getattr(loss, "keys_after", None)
    reads, returns = (loss.in_keys, loss.out_keys) if own is None else own(written)
    return [unravel_key(key) for key in reads], list(returns)


def written_by(loss: LossModule) -> set[NestedKey]:
    """Return what a loss may write into the data."""
    return {unravel_key(key) for key in getattr(loss, "written_keys", ())}


def _kind(loss: LossModule) -> str:
    return type(loss).__name__


def _name(loss: LossModule, key: NestedKey) -> NestedKey:
    """Return what a key was called at first, by its name in ``set_keys``; else the key itself."""
    bare = key[1:] if isinstance(key, tuple) and key[0] == "next" else key
    bare = unravel_key(bare)
    for name, named in vars(loss.tensor_keys).items():
        if named is not None and not isinstance(named, list) and unravel_key(named) == bare:
            return tuple(name.split("_", 1))
    return bare


def _networks(loss: LossModule) -> list[TensorDictModuleBase]:
    """Return a loss's networks: functional ones are no submodules."""
    held = [*vars(loss).values(), *loss._modules.values()]
    return [network for network in held if isinstance(network, TensorDictModuleBase)]


def twice(key: NestedKey, first: str, second: str) -> str:
    """Return what to say of a name that two losses return."""
    return (
        f"Both {first!r} and {second!r} return {key!r}: a name can stand for one of them. Switch "
        "one off, or train them apart."
    )
