"""The order of losses: each reads after it was written, or is told what is missing."""

from __future__ import annotations

import pytest
import torch
from made_up_losses import CMPO, RIGHT, Alone, Dynamics, Fake, fakes, td
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from muon_rl.objectives.sequence import LossSequence


@pytest.mark.parametrize("order", [RIGHT, ["dynamics", "cmpo", "muesli_model"]])
def test_the_right_orders_run(order):
    sequence = LossSequence(fakes(*order))
    out = sequence(td(5))
    assert set(out.keys()) == {"loss_cmpo", "loss_dynamics", "loss_model"} == set(sequence.out_keys)
    assert sequence.in_keys == ["observation"]
    assert all(value.requires_grad for value in out.values())


@pytest.mark.parametrize(
    ("order", "key", "first"),
    [
        (["muesli_model", "cmpo", "dynamics"], r"\('cmpo', 'log_prob'\)", "cmpo"),
        (["dynamics", "muesli_model", "cmpo"], r"\('cmpo', 'log_prob'\)", "cmpo"),
        (["cmpo", "muesli_model", "dynamics"], r"\('unroll', 'logits'\)", "dynamics"),
    ],
)
def test_each_wrong_order_is_refused(order, key, first):
    message = rf"'muesli_model' reads {key}, which '{first}' .* writes later: move {first} before"
    with pytest.raises(ValueError, match=message):
        LossSequence(fakes(*order))


@pytest.mark.parametrize(
    ("order", "key", "producer"),
    [
        (["dynamics", "muesli_model"], r"\('cmpo', 'log_prob'\)", "CMPOLoss"),
        (["cmpo", "muesli_model"], r"\('unroll', 'logits'\)", "DynamicsLoss"),
    ],
)
def test_a_missing_producer_is_named(order, key, producer):
    message = (
        rf"{key}, which no loss .* writes\. {producer} writes it: put one before muesli_model\.$"
    )
    with pytest.raises(ValueError, match=message):
        LossSequence(fakes(*order))


def test_a_producer_that_is_off_is_named():
    message = r"'cmpo' \(CMPO\) writes, but that is off: switch cmpo on, or muesli_model off"
    with pytest.raises(ValueError, match=message):
        LossSequence(fakes(*RIGHT), enabled={"cmpo": False})
    sequence = LossSequence(fakes(*RIGHT))
    with pytest.raises(ValueError, match=message):
        sequence.switch(cmpo=False)
    assert sequence.enabled == dict.fromkeys(RIGHT, True)
    sequence.switch(cmpo=False, muesli_model=False)
    assert set(sequence(td(5)).keys()) == {"loss_dynamics"} == set(sequence.out_keys)
    sequence.switch(cmpo=True, muesli_model=True)
    assert len(sequence(td(5)).keys()) == 3
    sequence.enabled["cmpo"] = False
    assert sequence.enabled["cmpo"]


def test_a_loss_that_can_unroll_for_itself_stands_after_an_unroll_or_without_one():
    losses = {"cmpo": CMPO(), "muesli_model": Alone()}
    sequence = LossSequence(losses)
    assert sequence.in_keys == ["observation", "reward"]
    assert sequence.out_keys == ["loss_cmpo", "loss_model", "entropy"]
    after = {**losses, "dynamics": Dynamics()}
    with pytest.raises(ValueError, match=r"'logits'.* move dynamics before muesli_model"):
        LossSequence(after)
    assert LossSequence(after, enabled={"dynamics": False}).in_keys == ["observation", "reward"]
    before = LossSequence({"dynamics": Dynamics(), **losses})
    assert before.in_keys == ["observation"]
    assert before.out_keys == ["loss_dynamics", "loss_cmpo", "loss_model"]
    before.switch(dynamics=False)
    assert before.in_keys == ["observation", "reward"]
    # What comes from without counts too, and is read from there.
    read, returned = before.keys_after([("unroll", "logits")])
    assert read == ["observation", ("unroll", "logits")]
    assert returned == ["loss_cmpo", "loss_model"]
    # A name that is not returned is none that two could have.
    metric = Fake("other", metrics=["entropy"])
    LossSequence({"dynamics": Dynamics(), **losses, "other": metric})
    with pytest.raises(ValueError, match="Both 'muesli_model' and 'other' return 'entropy'"):
        LossSequence({**losses, "other": metric})


def test_targets_of_the_next_state_that_are_not_written_are_missed():
    ahead = ("next", "cmpo", "log_prob")
    losses = {"cmpo": CMPO(next_targets=False), "reader": Fake("reader", reads=[ahead])}
    message = (
        r"'reader' reads \('next', 'cmpo', 'log_prob'\), but 'cmpo' \(CMPO\) writes "
        r"\('cmpo', 'log_prob'\) alone: build cmpo with next_targets=True"
    )
    with pytest.raises(ValueError, match=message):
        LossSequence(losses)
    with pytest.raises(ValueError, match=r"no loss of the sequence writes\. CMPOLoss writes it"):
        LossSequence(losses, enabled={"cmpo": False})
    with pytest.raises(ValueError, match=r"no loss of the sequence writes\. CMPOLoss writes it"):
        LossSequence({"dynamics": Dynamics(), "reader": losses["reader"]})
    LossSequence({**losses, "cmpo": CMPO()})
    LossSequence({**losses, "reader": Fake("reader", reads=["cmpo_log_prob"])})


def test_renamed_keys_count():
    losses = fakes(*RIGHT)
    losses["cmpo"].set_keys(cmpo_log_prob=("my", "target"))
    message = (
        r"CMPOLoss writes it: put one before muesli_model\. 'cmpo' writes \('my', 'target'\): if "
        r"that is it, rename one by set_keys\(\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        LossSequence(losses)
    losses["muesli_model"].set_keys(cmpo_log_prob=("my", "target"))
    sequence = LossSequence(losses)
    data = td(5)
    sequence(data)
    assert data.get(("my", "target"), None) is not None
    assert data.get("cmpo", None) is None
    with pytest.raises(ValueError, match=r"reads \('my', 'target'\).*move cmpo before"):
        LossSequence({name: losses[name] for name in reversed(losses)})
    sequence.set_keys(cmpo_log_prob=("yours", "target"))
    assert {loss.tensor_keys.cmpo_log_prob for loss in losses.values()} == {("yours", "target")}
    losses["cmpo"].set_keys(cmpo_log_prob="lost")
    with pytest.raises(ValueError, match="no loss of the sequence writes"):
        sequence.check()
    losses["muesli_model"].set_keys(cmpo_log_prob="lost")
    sequence.set_keys(unroll_logits=("mine", "logits"))  # which cmpo has not
    assert losses["dynamics"].tensor_keys.unroll_logits == ("mine", "logits")
    with pytest.raises(ValueError, match="nonsense is not an accepted tensordict key of any"):
        sequence.set_keys(nonsense="a")


def test_the_key_to_be_renamed_is_that_of_the_same_thing():
    """Not another that is of CMPO too, nor a second of that name."""
    losses = {"one": CMPO(), "other": CMPO(), "reader": Fake("reader", reads=["cmpo_log_prob"])}
    losses["one"].writes = [("cmpo", "action"), "cmpo_log_prob", ("cmpo", "weight")]
    losses["other"].out_keys = ["loss_other"]
    for name in ("one", "other"):
        losses[name].set_keys(cmpo_log_prob=("my", name))
    message = r"put one before reader\. 'one' writes \('my', 'one'\): .* by set_keys\(\)\.$"
    with pytest.raises(ValueError, match=message) as error:
        LossSequence(losses)
    assert str(error.value).count("if that is it") == 1


def test_a_new_name_that_one_does_not_know_is_refused_at_once():
    reader = Fake("reader", reads=[("cmpo", "log_prob")])
    sequence = LossSequence({"cmpo": CMPO(), "reader": reader})
    with pytest.raises(
        ValueError, match=r"'reader' reads \('cmpo', 'log_prob'\).*'cmpo' writes 'x'"
    ):
        sequence.set_keys(cmpo_log_prob="x")


def test_a_key_is_known_by_its_name_in_set_keys_or_by_its_first_word():
    producer = "DynamicsLoss writes it: put one before reader"
    with pytest.raises(ValueError, match=producer):
        LossSequence({"reader": Fake("reader", reads=[("unroll", "value")])})
    for key in ("target", ("next", "target")):
        reader = Fake("reader", reads=[key])
        LossSequence({"reader": reader})  # the data may hold it
        reader.set_keys(cmpo_log_prob="target")
        with pytest.raises(ValueError, match="CMPOLoss writes it: put one before reader"):
            LossSequence({"reader": reader})
    LossSequence({"reader": Fake("reader", reads=["first"])})


def test_keys_may_be_nested_in_any_way():
    reader = Fake("reader", reads=[("next", ("cmpo", "log_prob"))])
    assert LossSequence({"cmpo": CMPO(), "reader": reader}).in_keys == ["observation"]
    writer = Fake("writer", writes=[("next", ("my", "key"))])
    reader = Fake("reader", reads=[("next", "my", "key")])
    assert LossSequence({"writer": writer, "reader": reader}).in_keys == ["observation"]


def test_what_a_loss_writes_anew_it_may_read_from_the_data():
    itself = Fake("itself", reads=["cmpo_log_prob"], writes=["cmpo_log_prob"])
    assert LossSequence({"itself": itself}).in_keys == ["observation", ("cmpo", "log_prob")]
    # Of the same role, but it is another's to write it.
    other = Fake("other", reads=["cmpo_log_prob"], writes=[("cmpo", "mine")])
    with pytest.raises(ValueError, match=r"CMPOLoss writes it: put one before other\.$"):
        LossSequence({"other": other})


def test_what_a_sequence_writes_is_what_the_losses_that_are_on_write():
    sequence = LossSequence(fakes("cmpo", "dynamics"))
    cmpo = [("cmpo", "log_prob"), ("next", "cmpo", "log_prob")]
    assert sequence.written_keys == [*cmpo, ("unroll", "logits")]
    sequence.switch(dynamics=False)
    assert sequence.written_keys == cmpo


def test_what_the_data_hold_are_the_in_keys():
    reader = Fake("reader", reads=["reward", "cmpo_log_prob", ("next", "cmpo", "log_prob")])
    sequence = LossSequence({"cmpo": CMPO(), "reader": reader})
    assert sequence.in_keys == ["observation", "reward"]
    sequence.switch(reader=False)
    assert sequence.in_keys == ["observation"]


@pytest.mark.parametrize("key", ["hidden_state", "value_pred", "logits", "scale", "reward_pred"])
def test_a_policy_that_lacks_a_key_of_the_world_model_is_refused(key):
    actor = TensorDictModule(nn.Linear(4, 2), ["observation"], ["action"])
    losses = {"reader": Fake("reader", reads=[key])}
    with pytest.raises(
        ValueError, match=rf"'reader' reads '{key}'.*WorldModel.*before reader reads"
    ):
        LossSequence(losses, policy=actor)
    able = TensorDictModule(nn.Linear(4, 2), ["observation"], [key])
    assert key in LossSequence(losses, policy=able).in_keys
    LossSequence(losses)  # by whom the data were made is not known
    losses["reader"].__dict__["actor_network"] = actor
    with pytest.raises(ValueError, match="neither a loss nor the policy writes"):
        LossSequence(losses)
    LossSequence(losses, policy=able)
    del losses["reader"].__dict__["actor_network"]
    losses["reader"].network = actor
    with pytest.raises(ValueError, match="neither a loss nor the policy writes"):
        LossSequence(losses)
    writer = Fake("writer", writes=[key])
    LossSequence({"writer": writer, **losses})


def test_two_of_one_name_are_refused():
    with pytest.raises(ValueError, match="Both 'one' and 'two' return 'loss_same'"):
        LossSequence({"one": Fake("same"), "two": Fake("same")})
    pair = {"one": Fake("a", metrics=["entropy"]), "two": Fake("b", metrics=["entropy"])}
    with pytest.raises(ValueError, match="Both 'one' and 'two' return 'entropy'"):
        LossSequence(pair)
    sequence = LossSequence(pair, enabled={"two": False})
    with pytest.raises(ValueError, match="'entropy'"):
        sequence.switch(two=True)
    pair["two"].out_keys = ["loss_b"]  # as TorchRL's PPO, which does not say all
    sequence.switch(two=True)
    pair["two"].forward = lambda tensordict: TensorDict(entropy=torch.zeros(()))
    with pytest.raises(ValueError, match="Both 'one' and 'two' return 'entropy'"):
        sequence(td(2))


def test_mistakes_in_names_are_refused():
    with pytest.raises(ValueError, match="at least one loss, but has none"):
        LossSequence({})
    with pytest.raises(ValueError, match="No loss is named cmop; there are cmpo, dynamics"):
        LossSequence(fakes("cmpo", "dynamics"), enabled={"cmop": False})
    with pytest.raises(ValueError, match="all are off"):
        LossSequence(fakes("cmpo"), enabled={"cmpo": False})
    with pytest.raises(TypeError, match="'net' is a Linear"):
        LossSequence({"net": nn.Linear(2, 2)})
