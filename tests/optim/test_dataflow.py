"""Which layer feeds which, on forwards of every kind, and that tracing leaves no trace."""

import copy
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, dispatch
from torch import nn
from torch.utils.checkpoint import checkpoint

from muon_rl.optim.dataflow import Flow

KINDS = (nn.Linear, nn.Conv2d, nn.GRUCell, nn.LSTM, nn.MultiheadAttention)
CHAIN = {"a": "first", "b": "hidden", "c": "last"}


def network(forward, **parts):
    """Build a module of parts, by default a chain of layers a, b, c, around a forward."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in (parts or abc()).items():
                setattr(self, name, part)
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("seen", torch.zeros(8))
            self.register_buffer("flag", torch.zeros((), dtype=torch.bool))
            self.calls = 0

    if forward is not None:
        Network.forward = forward
    return Network()


def abc():
    return {"a": nn.Linear(3, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 2)}


def roles(*networks):
    """Return the place of each layer on the path, by its name in the last network."""
    flow = Flow(networks, KINDS)
    places = {}
    for name, layer in networks[-1].named_modules():
        if isinstance(layer, KINDS):
            upstream, downstream = flow.around(layer)
            places[name] = "last" if not downstream else "hidden" if upstream else "first"
    return places


# -------------------------------------------------------------------------- paths of all shapes


def heads_before_trunk(self, x):
    h = self.trunk(x)
    return self.mean(h), self.log_std(h).clamp(-5, 2)


def test_heads_that_are_registered_before_the_trunk_are_both_last():
    net = network(
        heads_before_trunk,
        log_std=nn.Linear(8, 2),
        mean=nn.Linear(8, 2),
        trunk=nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
    )
    assert roles(net) == {
        "log_std": "last",
        "mean": "last",
        "trunk.0": "first",
        "trunk.2": "hidden",
    }


def test_parallel_input_layers_are_both_first():
    def forward(self, observation, action):
        return self.head(F.relu(self.observe(observation) + self.act(action)))

    net = network(forward, head=nn.Linear(8, 1), observe=nn.Linear(5, 8), act=nn.Linear(2, 8))
    assert roles(net) == {"head": "last", "observe": "first", "act": "first"}


def test_a_layer_that_takes_the_action_beside_features_is_hidden():
    def forward(self, observation, action):
        h = F.relu(self.a(observation))
        return self.c(F.relu(self.b(torch.cat([h, action], -1))))

    assert roles(network(forward)) == CHAIN


def test_twin_critics_in_one_module_have_a_first_and_a_last_layer_each():
    def forward(self, x):
        return torch.min(self.q1(x), self.q2(x))

    twins = {q: nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1)) for q in ("q1", "q2")}
    assert roles(network(forward, **twins)) == {
        "q1.0": "first",
        "q1.1": "last",
        "q2.0": "first",
        "q2.1": "last",
    }


def test_a_residual_block_passes_on_what_it_adds_to():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(F.relu(self.up(self.norm(x))))

    assert roles(nn.Sequential(Block(), Block())) == {
        "0.up": "first",
        "0.down": "hidden",
        "1.up": "hidden",
        "1.down": "last",
    }


def test_dense_skips_from_the_input_leave_one_first_layer():
    def forward(self, x):
        h = x
        for layer in self.layers:
            h = layer(h if h is x else torch.cat([h, x], -1))
        return h

    layers = nn.ModuleList([nn.Linear(3, 8), nn.Linear(11, 8), nn.Linear(11, 1)])
    assert list(roles(network(forward, layers=layers)).values()) == ["first", "hidden", "last"]


def test_experts_weighed_by_a_gate_are_all_first():
    def forward(self, x):
        gate = self.gate(x).softmax(-1)
        return self.head(sum(gate[..., i, None] * e(x) for i, e in enumerate(self.experts)))

    experts = nn.ModuleList([nn.Linear(3, 8), nn.Linear(3, 8)])
    net = network(forward, gate=nn.Linear(3, 2), experts=experts, head=nn.Linear(8, 2))
    assert roles(net) == {
        "gate": "first",
        "experts.0": "first",
        "experts.1": "first",
        "head": "last",
    }


def test_of_two_outputs_only_the_one_that_is_used_feeds_on():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.scale = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, h):
            return self.mean(h), self.scale(h)

    def forward(self, x):
        mean, scale = self.two(self.a(x))
        return self.c(mean), scale

    net = network(forward, a=nn.Linear(3, 8), two=Two(), c=nn.Linear(4, 2))
    assert roles(net) == {"a": "first", "two.mean": "hidden", "two.scale": "last", "c": "last"}


def test_shape_type_and_device_are_no_path():
    def forward(self, x):
        q = self.b(self.a(x))
        ones = x.new_ones(q.shape[0], 8).expand(*q.size())
        return q, self.c(ones.to(q.dtype).to(q.device))

    assert roles(network(forward)) == {"a": "first", "b": "last", "c": "last"}


def test_a_mask_that_goes_into_another_does_not_change():
    def forward(self, x):
        mask, better = x > 0, self.b(self.a(x)) > 0
        both, either = mask & better, mask | better
        return self.c(self.d(mask.float())), both, either

    net = network(forward, **abc(), d=nn.Linear(3, 8))
    assert roles(net) == {"a": "first", "b": "last", "c": "last", "d": "first"}


def test_attention_feeds_its_own_projection():
    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    assert roles(network(forward, attention=nn.MultiheadAttention(8, 2))) == {
        "attention": "first",
        "attention.out_proj": "last",
    }


def test_keys_and_queries_of_plain_layers_are_parallel():
    def forward(self, x):
        k = self.k(x)
        return self.out(F.scaled_dot_product_attention(self.q(x), k, k))

    net = network(forward, q=nn.Linear(3, 8), k=nn.Linear(3, 8), out=nn.Linear(8, 2))
    assert roles(net) == {"q": "first", "k": "first", "out": "last"}


def test_a_recurrent_cell_does_not_stand_behind_itself():
    def forward(self, x):
        h = torch.zeros(x.shape[0], 8, device=x.device)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            h = self.cell(x[:, t], h)
        return self.head(h)

    assert roles(network(forward, cell=nn.GRUCell(3, 8), head=nn.Linear(8, 2))) == {
        "cell": "first",
        "head": "last",
    }


def test_layers_that_run_in_turns_keep_the_order_of_the_first_turn():
    def forward(self, x):
        for _ in range(3):
            x = self.b(self.a(x))
        return x

    assert roles(network(forward, a=nn.Linear(3, 8), b=nn.Linear(8, 3))) == {
        "a": "first",
        "b": "last",
    }


def test_a_block_with_shared_weights_between_two_layers_is_hidden():
    def forward(self, x):
        return self.c(self.b(self.b(self.a(x))))

    assert roles(network(forward)) == CHAIN


def test_an_index_into_an_lstm_leads_on():
    def forward(self, x):
        out, (h, c) = self.b(self.a(x))
        return self.c(out), h, c

    parts = {"a": nn.Linear(3, 8), "b": nn.LSTM(8, 8), "c": nn.Linear(8, 2)}
    assert roles(network(forward, **parts)) == CHAIN


# ------------------------------------------------------------------- forwards that ask and count


def check_width(self, x):
    if x.shape[-1] != 3 or x.ndim > 4:
        raise ValueError("width")
    self.message = f"{x} {x.shape} {len(x)}"
    return self.c(self.b(self.a(x)))


def check_by_assert(self, x):
    assert x.ndim == 2 and x.shape[1] == 3
    return self.c(self.b(self.a(x)))


def branch(self, x):
    h = self.a(x)
    if x.mean() > 0:
        h = self.b(h)
    return self.c(h)


def optional_input(self, x, y=None):
    h = self.a(x)
    if y is not None:
        h = self.b(torch.cat([h, y], -1))
    return self.c(h)


def default_number(self, x, layers=2):
    for layer in (self.a, self.b)[:layers]:
        x = layer(x)
    return self.c(x)


def warn(self, x):
    warnings.warn("a token?", stacklevel=1)
    return self.c(self.b(self.a(x)))


def item_by_item(self, x):
    for layer, gain in zip((self.a, self.b), x.unbind(1), strict=False):
        x = layer(x) * gain
    return self.c(x)


def keyword_only(self, x, *, mask, dims=[0]):  # noqa: B006
    return self.c(self.b(self.a(x) * mask))


def any_number(self, *inputs, **options):
    x = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
    return self.c(self.b(self.a(x)))


def loop_on_values(self, x):
    while x.abs().max() > 1:
        x = x / 2
    return self.c(self.b(self.a(x)))


def endless_if_never_true(self, x):
    while not x.any():
        x = x + 1
    return self.c(self.b(self.a(x)))


def reshape(self, x):
    *batch, width = x.shape
    h = self.a(x.view(-1, width)).view(*batch, -1)
    h = h + torch.arange(x.shape[0], device=x.device) + torch.randn(x.size(0), 8)
    return self.c(self.b(h[:, : x.shape[1] // 2]).reshape(x.size(0), -1))


def unpack(self, x):
    value, gate = self.a(x).chunk(2, -1)
    return self.c(self.b(value * gate.sigmoid()))


def write_into(self, x):
    out = torch.zeros(x.shape[0], 3, 8)
    for t in range(x.shape[1]):
        out[:, t] = self.b(self.a(x[:, t]))
    return self.c(out)


def stack(self, x):
    return self.c(torch.stack([self.b(self.a(t)) for t in x.unbind(1)], 1))


def in_place(self, x):
    h = torch.zeros_like(x)
    h.copy_(self.a(x))
    h.relu_()
    h += 1
    return self.c(self.b(h))


def containers(self, x):
    out = {"h": self.a(x)}
    out.update(g=[self.b(out["h"])])
    return {"q": self.c(out["g"][0])}


def dict_input(self, observation):
    return self.c(self.b(torch.cat([self.a(observation["position"]), observation["goal"]], -1)))


def distribution(self, x):
    normal = torch.distributions.Normal(self.b(self.a(x)), 1.0)
    return self.c(normal.rsample()), normal


def contexts(self, x):
    with torch.no_grad(), torch.autocast("cpu"):
        h = self.a(x).detach()
    return self.c(checkpoint(self.b, h, use_reentrant=False))


def weight_without_the_layer(self, x):
    h = F.relu(F.linear(F.relu(self.a.forward(x)), self.b.weight, self.b.bias))
    return F.linear(h, self.c.weight)


def weights_from_outside(self, x):
    h = torch.func.functional_call(self.b, dict(self.b.named_parameters()), (self.a(x),))
    return self.c(h)


RUNS = [
    check_width, check_by_assert, branch, optional_input, default_number, warn, item_by_item,
    keyword_only, any_number,
    loop_on_values, endless_if_never_true, reshape, unpack, write_into, stack, in_place,
    containers, dict_input, distribution, contexts, weight_without_the_layer,
    weights_from_outside,
]  # fmt: skip


@pytest.mark.parametrize("forward", RUNS, ids=lambda forward: forward.__name__)
def test_a_forward_runs_on_tokens_whatever_the_order_of_its_layers(forward):
    # Registered backwards, so that a chain in the order of registration would be wrong.
    layers = dict(reversed(abc().items()))
    assert roles(network(forward, **layers)) == CHAIN


def test_a_head_for_another_method_stands_alone():
    def forward(self, x):
        return self.b(self.a(x))

    value = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    net = network(forward, a=nn.Linear(3, 8), b=nn.Linear(8, 2), value=value)
    assert roles(net) == {"a": "first", "b": "last", "value.0": "first", "value.1": "last"}


def either(self, x):
    return self.b(self.a(x)) if x.sum() > 0 else self.c(self.a(x))


def test_both_ways_of_a_decision_count():
    layers = {"b": nn.Linear(8, 2), "c": nn.Linear(8, 2), "a": nn.Linear(3, 8)}
    assert roles(network(either, **layers)) == {"b": "last", "c": "last", "a": "first"}
    assert roles(nn.Sequential(network(either, **layers), nn.Linear(2, 1))) == {
        "0.b": "hidden",
        "0.c": "hidden",
        "0.a": "first",
        "1": "last",
    }


@pytest.mark.parametrize(
    ("forward", "runs"),
    [(lambda self, x: self.b(self.a(x)), 1), (lambda self, x: self.a(x if x.any() else -x), 2)],
    ids=["no decision", "a decision"],
)
def test_a_forward_runs_again_only_for_a_decision(forward, runs):
    calls = []

    def counted(self, x):
        calls.append(x)
        return forward(self, x)

    roles(network(counted))
    assert len(calls) == 2 * runs  # with the arguments without a default, and with all


# ------------------------------------------------------------------- forwards that do not run


def untraceable(self, x):
    raise ValueError("only tensors")


def to_numpy(self, x):
    return self.b(torch.as_tensor(np.asarray(self.a(x))))


def write_into_a_constant(self, x):
    out = torch.zeros(3, 8)
    out[0] = self.b(self.a(x))
    return self.c(out)


@pytest.mark.parametrize("forward", [untraceable, to_numpy, write_into_a_constant])
def test_a_forward_that_does_not_run_is_a_chain_in_the_order_of_registration(forward):
    assert roles(network(forward)) == CHAIN


def test_a_layer_that_fits_neither_before_nor_beside_another_follows_it():
    # As behind a flattened image.
    net = network(untraceable, a=nn.Conv2d(3, 4, 2), b=nn.Linear(36, 8), c=nn.Linear(8, 2))
    assert roles(net) == CHAIN


def test_what_follows_parallel_layers_in_a_chain_follows_all_of_them():
    net = network(
        untraceable,
        trunk=nn.Linear(3, 8),
        one=nn.Linear(8, 2),
        other=nn.Linear(8, 2),
        head=nn.Linear(2, 1),
    )
    assert list(roles(net).values()) == ["first", "hidden", "hidden", "last"]


def test_a_list_of_blocks_in_a_forward_that_does_not_run_is_a_chain():
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3)) for _ in range(2)])
    net = network(untraceable, blocks=blocks, head=nn.Linear(3, 2))
    assert list(roles(net).values()) == ["first", "hidden", "hidden", "hidden", "last"]


def test_widths_tell_parallel_heads_where_a_forward_does_not_run():
    net = network(
        untraceable,
        trunk=nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8)),
        mean=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)),
        log_std=nn.Linear(8, 2),
        value=nn.Linear(8, 1),
    )
    assert roles(net) == {
        "trunk.0": "first",
        "trunk.2": "hidden",
        "mean.0": "hidden",
        "mean.1": "last",
        "log_std": "last",
        "value": "last",
    }


def test_square_layers_where_a_forward_does_not_run_stay_a_chain():
    layers = {name: nn.Linear(8, 8) for name in "abc"}
    assert roles(network(untraceable, **layers)) == CHAIN


def test_a_child_that_runs_is_traced_below_one_that_does_not():
    heads = network(
        heads_before_trunk, log_std=nn.Linear(8, 2), mean=nn.Linear(8, 2), trunk=nn.Linear(8, 8)
    )
    net = network(untraceable, a=nn.Linear(3, 8), heads=heads)
    assert roles(net) == {
        "a": "first",
        "heads.log_std": "last",
        "heads.mean": "last",
        "heads.trunk": "hidden",
    }


@pytest.mark.parametrize("forward", [None, max], ids=["none", "without a signature"])
def test_children_without_a_forward_to_run_are_found(forward):
    chain = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    net = network(None, one=chain, other=copy.deepcopy(chain))
    if forward is not None:
        net.forward = forward
    assert roles(net) == {"one.0": "first", "one.1": "last", "other.0": "first", "other.1": "last"}


def test_a_forward_that_says_it_is_not_implemented_is_none():
    def forward(self, x):
        raise NotImplementedError("use act()")

    assert roles(network(forward)) == {"a": "last", "b": "last", "c": "last"}


def test_a_forward_that_calls_what_is_not_implemented_is_a_chain_as_any_that_fails():
    def unfinished(x):
        raise NotImplementedError("on this kind of tensor")

    def forward(self, x):
        return unfinished(x)

    assert roles(network(forward)) == CHAIN


def test_lists_and_dicts_of_networks_are_parallel():
    chain = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    for holder in (nn.ModuleList([chain]), nn.ModuleDict({"0": chain})):
        net = nn.ModuleDict({"nets": holder, "other": nn.Linear(2, 2)})
        assert roles(net) == {"nets.0.0": "first", "nets.0.1": "last", "other": "last"}


def test_a_compiled_module_is_the_module_it_wraps():
    net = network(branch, **dict(reversed(abc().items())))
    compiled = torch.compile(net, backend="eager")
    assert {n.removeprefix("_orig_mod."): r for n, r in roles(compiled).items()} == CHAIN


# ------------------------------------------------------------------------------ tensordicts


def test_a_tensordict_sequence_follows_its_keys_not_its_order():
    net = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 8), in_keys=["observation"], out_keys=["h"]),
        TensorDictModule(nn.Linear(3, 8), in_keys=["observation"], out_keys=[("next", "h")]),
        TensorDictModule(nn.Linear(8, 2), in_keys=["h"], out_keys=["action"]),
        TensorDictModule(nn.Linear(8, 1), in_keys=[("next", "h")], out_keys=["value"]),
        TensorDictModule(nn.Linear(4, 1), in_keys=["goal"], out_keys=["bonus"]),
    )
    assert list(roles(net).values()) == ["first", "first", "last", "last", "last"]


def test_each_output_of_a_module_goes_to_its_own_key():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.mean = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, h):
            return self.mean(h), self.scale(h)

        def named(self, h):
            return {"scale": self.scale(h), "mean": self.mean(h)}

    for options in ({}, {"method": "named"}):
        net = TensorDictSequential(
            TensorDictModule(nn.Linear(3, 8), in_keys=["x"], out_keys=["h"]),
            TensorDictModule(Two(), in_keys={"h": "h"}, out_keys=["mean", "scale"], **options),
            TensorDictModule(nn.Linear(4, 2), in_keys=["mean"], out_keys=["y"]),
        )
        assert list(roles(net).values()) == ["first", "last", "hidden", "last"]


@pytest.mark.parametrize(
    "in_keys", [["h", "action"], {"action": "action", "h": "h"}], ids=["in order", "by name"]
)
def test_a_module_of_several_keys_gets_each_as_an_argument(in_keys):
    net = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 8), in_keys=["observation"], out_keys=["h"]),
        TensorDictModule(
            network(
                lambda self, h, action: self.head(self.state(h) + self.act(action)),
                head=nn.Linear(8, 1),
                state=nn.Linear(8, 8),
                act=nn.Linear(2, 8),
            ),
            in_keys=in_keys,
            out_keys=["value"],
        ),
    )
    assert list(roles(net).values()) == ["first", "last", "hidden", "first"]


class Custom(TensorDictModuleBase):
    """A tensordict module with a forward of its own, its value registered before its encoder."""

    def __init__(self, forward):
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["h", "value"]
        self.value, self.encoder = nn.Linear(8, 1), nn.Linear(3, 8)
        self._forward = forward

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict):
        return self._forward(self, tensordict)


def by_item(self, tensordict):
    tensordict["h"] = self.encoder(tensordict["observation"])
    tensordict["value"] = self.value(tensordict["h"])
    return tensordict


def by_method(self, tensordict):
    if "done" in tensordict.keys():  # noqa: SIM118
        tensordict = tensordict.exclude("done")
    tensordict = tensordict[tensordict["mask"]]
    out = tensordict.clone(False).set("h", self.encoder(tensordict.get("observation")))
    return out.update({"value": self.value(out.get("h").view(*tensordict.batch_size, -1))})


def by_nesting(self, tensordict):
    tensordict.set(("next", "h"), self.encoder(tensordict.get("observation")))
    tensordict["h"] = tensordict["next"]["h"]
    return {"h": tensordict["h"], "value": self.value(tensordict["h"])}


def by_another(self, tensordict):
    encode = TensorDictModule(self.encoder, in_keys=["observation"], out_keys=["h"])
    tensordict.update(encode(tensordict["observation"]))
    return tensordict.set("value", self.value(tensordict["h"]))


@pytest.mark.parametrize("forward", [by_item, by_method, by_nesting, by_another])
def test_a_tensordict_module_with_a_forward_of_its_own_reads_and_writes_keys(forward):
    head = TensorDictModule(nn.Linear(8, 2), in_keys=["h"], out_keys=["action"])
    assert roles(TensorDictSequential(Custom(forward), head)) == {
        "module.0.value": "last",
        "module.0.encoder": "first",
        "module.1.module": "last",
    }


def test_a_tensordict_module_whose_forward_does_not_run_feeds_all_its_keys():
    def forward(self, tensordict):
        raise ValueError("only tensordicts")

    before = TensorDictModule(nn.Linear(3, 3), in_keys=["x"], out_keys=["observation"])
    after = TensorDictModule(nn.Linear(1, 2), in_keys=["value"], out_keys=["action"])
    net = TensorDictSequential(before, Custom(forward), after)
    assert list(roles(net).values()) == ["first", "hidden", "hidden", "last"]


def test_tensordict_modules_in_one_whose_forward_does_not_run_follow_their_keys():
    class Failing(TensorDictModuleBase):
        def __init__(self):
            super().__init__()
            self.in_keys, self.out_keys = ["observation"], ["h", "value", "action"]
            self.encoder = TensorDictModule(nn.Linear(3, 8), ["observation"], ["h"])
            self.value = TensorDictModule(nn.Linear(8, 8), ["h"], ["value"])
            self.policy = TensorDictModule(nn.Linear(8, 2), ["h"], ["action"])

        def forward(self, tensordict):
            raise ValueError("only tensordicts")

    apart = TensorDictModule(nn.Linear(3, 8), in_keys=["goal"], out_keys=["bonus"])
    assert roles(TensorDictSequential(apart, Failing())) == {
        "module.0.module": "last",
        "module.1.encoder.module": "first",
        "module.1.value.module": "last",
        "module.1.policy.module": "last",
    }


def test_a_tensordict_module_that_takes_tensors_follows_where_they_come_from():
    actor = TensorDictModule(nn.Linear(8, 2), in_keys=["h"], out_keys=["action"])
    net = network(lambda self, x: self.actor(self.a(x)), actor=actor, a=nn.Linear(3, 8))
    assert roles(net) == {"actor.module": "last", "a": "first"}


def test_a_tensordict_module_within_a_plain_forward_takes_tensors_and_tensordicts():
    actor = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    parts = {"critic": nn.Linear(2, 1), "actor": actor}
    for forward in (
        lambda self, x: self.critic(self.actor(x)),
        lambda self, td: self.critic(self.actor(td)["action"]),
        lambda self, x: self.critic(self.actor(observation=x)),
    ):
        assert roles(network(forward, **parts)) == {"critic": "last", "actor.module": "first"}


# ------------------------------------------------------------------------------ it leaves no trace


def with_state(self, x):
    self.calls += 1
    self.count += 1
    self.count = self.count + 1
    self.seen.add_(1)
    self.seen[0] = 1
    self.flag |= True
    self.last = self.a(x)
    return self.c(self.b(self.last) + torch.randn(8))


def test_tracing_changes_neither_the_network_nor_the_seeds_nor_torch():
    net = network(with_state)
    tensors = copy.deepcopy(net.state_dict())
    attributes, seeds = dict(vars(net)), torch.get_rng_state()
    buffers, call = dict(net._buffers), nn.Module.__call__
    assert roles(net) == CHAIN
    assert vars(net) == attributes
    assert all(net._buffers[name] is buffer for name, buffer in buffers.items())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in tensors.items())
    assert torch.equal(torch.get_rng_state(), seeds)
    assert nn.Module.__call__ is call
    assert net(torch.ones(1, 3)).shape == (1, 2)


def test_a_forward_that_fails_leaves_torch_as_it_was():
    call = nn.Module.__call__
    roles(network(untraceable))
    assert nn.Module.__call__ is call


def test_other_threads_run_their_networks_meanwhile():
    outputs = []

    def forward(self, x):
        thread = threading.Thread(target=lambda: outputs.append(layer(torch.ones(1, 3))))
        thread.start()
        thread.join()
        return self.c(self.b(self.a(x)))

    layer = nn.Linear(3, 2)
    assert roles(network(forward)) == CHAIN
    assert torch.equal(outputs[0], layer(torch.ones(1, 3)))


def test_several_networks_are_one_graph_with_inputs_of_their_own():
    trunk = nn.Linear(3, 8)
    actor, critic = nn.Sequential(trunk, nn.Linear(8, 2)), nn.Sequential(nn.Linear(3, 3), trunk)
    assert roles(actor, critic) == {"0": "first", "1": "hidden"}
