"""Actor and critic of a board: keys, masks, Muon's roles, the small convolutional network."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictSequential
from torch.nn import functional as F
from torchrl.data import Binary, Bounded, Categorical, MultiOneHot, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import ClipPPOLoss

from muon_rl.envs import Snake
from muon_rl.modules import ConvolutionActorCritic, GridConvolution, TransformerActorCritic
from muon_rl.optim import build_optimizer, parameter_roles
from muon_rl.specs import Specs

TOKENS, PLANES = Unbounded((6, 6), dtype=torch.uint8), Unbounded((4, 6, 6))
KINDS = [TransformerActorCritic, ConvolutionActorCritic]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def boards(*batch: int) -> TensorDict:
    tokens = torch.randint(0, 7, (*batch, 6, 6), dtype=torch.uint8)
    return TensorDict(observation=tokens, batch_size=batch)


def make(kind, spec=TOKENS, action=None, **options):
    return kind(Specs(spec, action or Categorical(4), action_mask=Binary(4)), **options)


# ------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("spec", [TOKENS, PLANES], ids=["tokens", "planes"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_one_pass_gives_value_and_action_of_every_board(kind, batch, spec):
    policy = make(kind, spec)
    data = boards(*batch)
    if spec is PLANES:
        data["observation"] = torch.rand(*batch, 4, 6, 6)
    out = policy(data)
    assert out["embed"].shape == (*batch, policy.trunk.module.out_features)
    assert out["state_value"].shape == (*batch, 1)
    assert out["logits"].shape == (*batch, 4)
    assert out["action"].shape == out["action_log_prob"].shape == batch
    log_prob = out["logits"].log_softmax(-1).take_along_dim(out["action"].unsqueeze(-1), -1)
    torch.testing.assert_close(out["action_log_prob"], log_prob.squeeze(-1))


@pytest.mark.parametrize(
    ("kind", "options"), [(TransformerActorCritic, {"readout": "token"}), (KINDS[1], {})]
)
def test_channels_in_the_last_dim_are_planes_and_not_rows(kind, options):
    spec = Snake(4, 6, observation="rgb3").specs.observation
    with pytest.raises(
        ValueError, match=r"4 planes of 6 x 3 .* 3 planes of 4 x 6, .* set channels_l"
    ):
        make(kind, spec, **options)
    last = make(kind, spec, channels_last=True, **options)
    first = make(kind, Unbounded((3, 4, 6)), **options)
    first.load_state_dict(last.state_dict())
    grids = torch.rand(2, 5, 4, 6, 3)
    expected = first.trunk.module(grids.movedim(-1, -3))
    torch.testing.assert_close(last.trunk.module(grids), expected)
    narrow = make(kind, Unbounded((4, 6, 3)), channels_last=False, **options)
    assert narrow.trunk.module(torch.rand(5, 4, 6, 3)).shape == (
        5,
        narrow.trunk.module.out_features,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_critic_and_actor_are_the_parts_of_the_whole(kind):
    policy = make(kind).double()
    whole = policy(boards(5))
    embed = policy.trunk(boards(5).update(whole.select("observation"))).select("embed")
    assert list(embed.keys()) == ["embed"]
    assert policy.critic(embed.copy()).keys() == {"embed", "state_value"}
    torch.testing.assert_close(policy.critic(embed.copy())["state_value"], whole["state_value"])
    actor = policy.actor
    assert actor.in_keys == ["embed"]
    torch.testing.assert_close(actor.get_dist(embed).logits, whole["logits"].log_softmax(-1))
    parts = [*policy.trunk.parameters(), *policy.critic.parameters(), *actor.parameters()]
    assert {id(p) for p in parts} == {id(p) for p in policy.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_are_layers_with_gelu_between(kind):
    policy = make(kind, head_hidden=[8])
    out = policy(boards(5))
    for key, head in (("state_value", policy.critic), ("logits", policy.module[2])):
        first, _, last = head.module
        torch.testing.assert_close(out[key], last(F.gelu(first(out["embed"]))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_policy_is_near_uniform(kind):
    logits = make(kind)(boards(64))["logits"]
    assert 1e-5 < (logits.softmax(-1) - 0.25).abs().max() < 0.02


@pytest.mark.parametrize("init", ["default", "orthogonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_network_is_equal_bit_by_bit(kind, init, tmp_path):
    policy, other = make(kind, init=init, head_hidden=[8]), make(kind, head_hidden=[8])
    data = boards(5)
    before = policy.trunk(data.copy())["embed"]
    assert not torch.equal(other.trunk(data.copy())["embed"], before)
    torch.save(policy.state_dict(), tmp_path / "policy.pt")
    other.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected, got = policy(data.copy()), other(data.copy())
    assert set(got.keys()) == set(expected.keys())
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_compiles_as_one_graph(kind):
    policy = make(kind, masked=True)
    data = boards(5).set("action_mask", torch.ones(5, 4, dtype=torch.bool))
    compiled = torch.compile(policy.trunk, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data.copy())["embed"], policy.trunk(data.copy())["embed"])


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_the_environment_does_not_write_is_refused(kind):
    with pytest.raises(ValueError, match=r"needs an action_mask, but the environment writes none"):
        kind(Snake(6, 6).specs, masked=True)
    kind(Snake(6, 6, action_mask=True).specs, masked=True)
    kind(Snake(6, 6, action_mask=True).specs, masked=False)


@pytest.mark.parametrize("one_hot", [False, True], ids=["index", "one_hot"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_policy_takes_legal_actions_by_their_share(kind, one_hot):
    policy = make(kind, action=OneHot(4) if one_hot else None, masked=True)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
    data = boards(3).set("action_mask", mask)
    policy.module[2].module[-1].weight.data.mul_(500)  # far from uniform
    dist = policy.get_dist(data.copy())
    logits = policy(data.copy())["logits"]
    shares = logits.exp() * mask / (logits.exp() * mask).sum(-1, keepdim=True)
    many = data.expand(4000, 3).clone()
    with set_exploration_type(ExplorationType.RANDOM):
        actions = policy(many)["action"]
    counts = actions if one_hot else F.one_hot(actions, 4)
    assert not counts.sum(0)[~mask].any()
    torch.testing.assert_close(counts.float().mean(0), shares, atol=0.04, rtol=0)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1)
    torch.testing.assert_close(dist.entropy(), entropy, atol=1e-5, rtol=1e-4)
    with set_exploration_type(ExplorationType.RANDOM):
        log_prob = policy(data)["action_log_prob"]
    chosen = data["action"].argmax(-1) if one_hot else data["action"]
    torch.testing.assert_close(log_prob, shares[range(3), chosen].log())
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        best = policy(data)["action"]
    best = best.argmax(-1) if one_hot else best
    assert torch.equal(best, logits.masked_fill(~mask, -math.inf).argmax(-1))


def test_a_masked_policy_trains_under_ppo_without_nan():
    policy = make(TransformerActorCritic, masked=True)
    mask = torch.rand(64, 4) < 0.6
    mask[:, 0] |= ~mask.any(-1)
    batch = policy(boards(64).set("action_mask", mask)).detach()
    batch.update({"advantage": torch.randn(64, 1), "value_target": torch.randn(64, 1)})
    loss = ClipPPOLoss(policy.actor, policy.critic)
    policy.trunk(batch)
    terms = loss(batch)
    total = sum(value for key, value in terms.items() if key.startswith("loss_"))
    total.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("action", "name"),
    [
        (Bounded(-1, 1, 3), "Bounded"),
        (MultiOneHot([2, 2]), "MultiOneHot"),
        (Categorical(4, shape=(2,)), r"Categorical of shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_actions_that_are_not_one_of_a_list_are_refused(kind, action, name):
    with pytest.raises(ValueError, match=rf"Categorical \(shape \(\)\) or OneHot.* {name}"):
        make(kind, action=action)


# ----------------------------------------------------------------------------------- Muon's roles

NORMS = ("norm.weight", "norm.bias")
BLOCK = {
    **{f"{part}_{name}": "norm" for part in ("attention", "feedforward") for name in NORMS},
    **{f"attention.{part}.weight": "hidden" for part in ("query", "key", "value", "out")},
    **{f"attention.{part}.bias": "bias" for part in ("query", "value", "out")},
    **{f"feedforward.{layer}.weight": "hidden" for layer in (0, 2)},
    **{f"feedforward.{layer}.bias": "bias" for layer in (0, 2)},
}
TRANSFORMER = {
    "positions": "other",
    "token": "other",
    "patches.cells.weight": "embedding",
    "project.weight": "first",
    "project.bias": "bias",
    **{f"blocks.{block}.{name}": role for block in (0, 1) for name, role in BLOCK.items()},
    **dict.fromkeys(NORMS, "norm"),
}
CONVOLUTION = {
    "cells.weight": "embedding",
    "convolutions.layers.0.weight": "first",
    "convolutions.layers.0.bias": "bias",
    "convolutions.layers.2.weight": "hidden",
    "convolutions.layers.2.bias": "bias",
    "layer.weight": "hidden",
    "layer.bias": "bias",
}
NETWORKS = [
    (TransformerActorCritic, {"readout": "token"}, TRANSFORMER),
    (ConvolutionActorCritic, {}, CONVOLUTION),
]


class TrunkOnce(ClipPPOLoss):
    """PPO's loss on the heads, behind one pass through the trunk; the path is the policy's."""

    def __init__(self, policy) -> None:
        super().__init__(policy.actor, policy.critic)
        self.trunk_network = policy

    def forward(self, tensordict):
        return super().forward(self.trunk_network.trunk(tensordict.copy()))


def stock(policy) -> ClipPPOLoss:
    """Return PPO's loss with a pass through the trunk for each of policy and value."""
    actor = ProbabilisticTensorDictSequential(policy.trunk, *policy.module[2:])
    return ClipPPOLoss(actor, TensorDictSequential(policy.trunk, policy.critic))


@pytest.mark.parametrize(("kind", "options", "expected"), NETWORKS)
def test_every_parameter_has_its_role_and_is_one_matrix(kind, options, expected):
    roles = parameter_roles(make(kind, **options))
    heads = {f"module.{head}.module.0.{name}": role for head in (1, 2) for name, role in (
        ("weight", "last"), ("bias", "bias"))}  # fmt: skip
    expected = {f"module.0.module.{name}": role for name, role in expected.items()} | heads
    assert {name: role.role for name, role in roles.items()} == expected
    assert {(role.batch_dims, role.splits) for role in roles.values()} == {(0, 1)}


@pytest.mark.parametrize("spec", [TOKENS, PLANES], ids=["tokens", "planes"])
@pytest.mark.parametrize("hidden", [[], [8]], ids=["linear", "hidden"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_ends_of_the_heads_are_last_and_only_the_input_is_first(kind, hidden, spec):
    roles = parameter_roles(make(kind, spec, head_hidden=hidden))
    first = [name for name, role in roles.items() if role.role == "first"]
    last = [name for name, role in roles.items() if role.role == "last"]
    input_layer = "project" if kind is TransformerActorCritic else "convolutions.layers.0"
    end = 2 * len(hidden)
    assert first == [f"module.0.module.{input_layer}.weight"]
    assert last == [f"module.{head}.module.{end}.weight" for head in (1, 2)]


@pytest.mark.parametrize("make_loss", [stock, TrunkOnce])
@pytest.mark.parametrize("heads_too", [False, True])
@pytest.mark.parametrize(("kind", "options", "expected"), NETWORKS)
def test_muon_takes_the_matrices_of_the_trunk_and_the_heads_if_told(
    kind, options, expected, heads_too, make_loss, capsys
):
    loss = make_loss(make(kind, **options))
    head = {"muon": {"apply_last_layer": True}} if heads_too else {"case": "adamw"}
    build_optimizer(loss, trunk={}, actor=head, critic=head).explain()
    lines = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()[1:]]
    trunk = {
        name.partition("module.0.module.")[2]: (role, group)
        for name, _, role, group, _ in lines
        if group.startswith("trunk")
    }
    taken = ("first", "hidden")
    assert trunk == {
        name: (role, "trunk/muon" if role in taken else "trunk/aux")
        for name, role in expected.items()
    }
    others = sorted((role, group) for *_, role, group, _ in lines if not group.startswith("trunk"))
    assert others == sorted(
        (role, f"{network}/{('muon' if role == 'last' else 'aux') if heads_too else 'adamw'}")
        for network in ("actor", "critic")
        for role in ("last", "bias")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_through_the_trunk_has_the_gradients_of_two(kind):
    policy = make(kind, head_hidden=[8]).double()
    batch = policy(boards(32)).detach().exclude("embed", "logits", "state_value")
    batch.update({"advantage": torch.randn(32, 1), "value_target": torch.randn(32, 1)})
    gradients = []
    for make_loss in (stock, TrunkOnce):
        policy.zero_grad()
        terms = make_loss(policy)(batch.copy())
        sum(value for key, value in terms.items() if key.startswith("loss_")).backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


# ------------------------------------------------------------------------- the convolutional trunk


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("height", [2, 6])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_board_is_convolved_within_walls_and_keeps_its_size(kernel, height, batch):
    network = GridConvolution(
        Unbounded((height, 5), dtype=torch.uint8), features=9, channels=[3, 4], kernel=kernel
    ).double()
    board = torch.randint(0, 7, (*batch, height, 5), dtype=torch.uint8)
    flat, wide = board.reshape(-1, height, 5), kernel - 1
    walled = torch.full((len(flat), height + 2 * wide, 5 + 2 * wide), 7)
    walled[:, wide : wide + height, wide : wide + 5] = flat
    x = network.cells.weight[walled].movedim(-1, 1)
    first, second = network.convolutions.layers[0], network.convolutions.layers[2]
    for layer in (first, second):
        x = F.conv2d(x, layer.weight, layer.bias).relu()
    assert x.shape[1:] == (4, height, 5)
    expected = (x.flatten(1) @ network.layer.weight.T + network.layer.bias).relu()
    torch.testing.assert_close(network(board), expected.reshape(*batch, 9))


@pytest.mark.parametrize("spec", [TOKENS, PLANES], ids=["tokens", "planes"])
def test_the_convolutions_follow_to_another_device(spec):
    network = GridConvolution(spec).to("meta")
    assert network(torch.zeros(3, *spec.shape, dtype=spec.dtype, device="meta")).is_meta


def test_an_orthogonal_convolution_ends_in_a_layer_with_its_activation_s_gain():
    layer = GridConvolution(TOKENS, features=9, channels=[3], init="orthogonal").layer
    torch.testing.assert_close(layer.weight @ layer.weight.T, 2 * torch.eye(9))
    assert not layer.bias.any()


def test_planes_have_walls_of_zeros():
    network = GridConvolution(PLANES, channels=[3])
    planes = torch.rand(4, 4, 6, 6)
    layer = network.convolutions.layers[0]
    x = F.conv2d(planes, layer.weight, layer.bias, padding=1).relu()
    torch.testing.assert_close(network(planes), network.layer(x.flatten(1)).relu())


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (TOKENS, {"kernel": 2}, "kernel must be odd, but is 2"),
        (TOKENS, {"channels": []}, r"channels is \[\]"),
        (TOKENS, {"channels": [8, 0]}, r"channels=\[8, 0\]"),
        (TOKENS, {"features": 0}, "features=0"),
        (TOKENS, {"cell_width": 0}, "cell_width=0"),
        (TOKENS, {"activation": "sine"}, "activation must be one of"),
        (Unbounded(36), {}, r"torch\.float32 of shape \(36,\)"),
    ],
)
def test_what_does_not_fit_a_convolution_is_refused(spec, options, message):
    with pytest.raises(ValueError, match=message):
        GridConvolution(spec, **options)
