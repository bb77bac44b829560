"""What is no world model, or lacks a key of one, is refused when a loss is made of it."""

from __future__ import annotations

import pytest
import torch
from made_up import Table, small_model
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor

from muon_rl.modules import MuesliPolicy
from muon_rl.objectives import DynamicsLoss, MuesliModelLoss, OneStepLookahead

LOSSES = [DynamicsLoss, MuesliModelLoss]
MAKERS = [*LOSSES, OneStepLookahead]


def lack(model, part: str, key) -> None:
    """Let a part write a key of another name."""
    module = getattr(model, part)
    module.out_keys = ["other" if k == key else k for k in module.out_keys]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("representation", "hidden_state"),
        ("dynamics", ("next", "hidden_state")),
        ("dynamics", "reward_pred"),
        ("prediction", "value_pred"),
    ],
)
@pytest.mark.parametrize("wrap", [False, True])
def test_a_key_that_a_part_does_not_write_is_named(make, part, key, wrap):
    model = small_model()
    given = MuesliPolicy(model) if wrap else model
    lack(model, part, key)
    with pytest.raises(ValueError) as error:
        make(given)
    said = str(error.value)
    assert f"{make.__name__} reads {key!r} from the world model's {part}, which writes" in said
    assert f"A WorldModel writes it: use one, or add {key!r} to the out_keys of that {part}" in said


@pytest.mark.parametrize(("kind", "key"), [("one-hot", "logits"), ("box", "loc"), ("box", "scale")])
def test_the_policy_is_asked_for_where_it_is_read(kind, key):
    model = small_model(kind)
    lack(model, "prediction", key)
    for make in LOSSES:
        with pytest.raises(ValueError, match=f"reads '{key}' from the world model's prediction"):
            make(model)
    OneStepLookahead(model)


@pytest.mark.parametrize("make", MAKERS)
def test_a_policy_without_a_world_model_is_refused_with_the_keys(make):
    actor = ProbabilisticActor(
        TensorDictModule(nn.Linear(4, 3), ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    with pytest.raises(ValueError) as error:
        make(actor)
    said = str(error.value)
    for word in (
        make.__name__,
        "'hidden_state', 'value_pred', 'reward_pred', 'logits', 'loc', 'scale'",
        "lacks representation, dynamics, prediction, specs, and writes ['logits', 'action']",
        f"act with MuesliPolicy(WorldModel(...)), and give it to {make.__name__} too",
    ):
        assert word in said


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_no_world_model_is_of_the_wrong_type(make):
    message = "Linear lacks representation, dynamics, prediction, specs"
    with pytest.raises(TypeError, match=f"{make.__name__} needs a world model .*{message}"):
        make(nn.Linear(2, 2))
    model = Table(2, 2)
    del model.specs
    with pytest.raises(TypeError, match="Table lacks specs"):
        make(model)
