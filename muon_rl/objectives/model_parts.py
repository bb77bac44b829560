"""What a loss needs of a world model: three parts, and the keys that they write."""

from __future__ import annotations

from typing import Any

from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import Categorical, OneHot

PARTS = ("representation", "dynamics", "prediction")
MODEL_KEYS = ("hidden_state", "value_pred", "reward_pred", "logits", "loc", "scale")


def is_listed(model: Any) -> bool:
    """Return whether all actions of a model can be listed."""
    return isinstance(model.specs.action, (Categorical, OneHot))


def model_of(owner: str, world_model: nn.Module, *, policy: bool) -> Any:
    """Return the world model of a module, which is one or holds one, if it can be unrolled.

    Args:
        owner: whose model it is to be, for the error.
        world_model: :class:`~muon_rl.modules.WorldModel`, or
            :class:`~muon_rl.modules.MuesliPolicy`, or another with ``specs`` and TensorDictModules
            ``representation``, ``dynamics`` and ``prediction`` of the same keys.
        policy: whether the policy that it predicts is read too.

    Raises:
        TypeError: if it is no world model.
        ValueError: if a policy holds no world model, or a part does not write what is read of it;
            naming the key, who writes it, and where to put that.

    Example:
        >>> from torchrl.data import Unbounded
        >>> from muon_rl.modules import MuesliPolicy, WorldModel
        >>> from muon_rl.specs import Specs
        >>> model = WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16)
        >>> model_of("DynamicsLoss", MuesliPolicy(model), policy=True) is model
        True
    """
    model: Any = getattr(world_model, "world_model", world_model)
    wanted: dict[str, list[NestedKey]] = {
        "representation": ["hidden_state"],
        "dynamics": [("next", "hidden_state"), "reward_pred"],
        "prediction": ["value_pred"],
    }
    lacking = [part for part in (*PARTS, "specs") if not hasattr(model, part)]
    if lacking:
        kind = type(model).__name__
        if not isinstance(model, TensorDictModuleBase):
            raise TypeError(
                f"{owner} needs a world model with {', '.join((*PARTS, 'specs'))}, but {kind} "
                f"lacks {', '.join(lacking)}. Use muon_rl.modules.WorldModel, or a MuesliPolicy."
            )
        raise ValueError(
            f"{owner} reads {', '.join(map(repr, MODEL_KEYS))} (the last two in place of 'logits' "
            f"if actions are continuous) from a world model with {', '.join((*PARTS, 'specs'))}, "
            f"but {kind} lacks {', '.join(lacking)}, and writes {list(model.out_keys)}. A "
            "WorldModel writes them: act with MuesliPolicy(WorldModel(...)), and give it to "
            f"{owner} too."
        )
    if policy:
        wanted["prediction"] += ["logits"] if is_listed(model) else ["loc", "scale"]
    for part, keys in wanted.items():
        written = getattr(model, part).out_keys
        for key in keys:
            if key not in written:
                raise ValueError(
                    f"{owner} reads {key!r} from the world model's {part}, which writes only "
                    f"{written}. A WorldModel writes it: use one, or add {key!r} to the out_keys "
                    f"of that {part}."
                )
    return model
