"""Encoders of vectors and grids, the LSTM, and scalars as two-hot categories."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F
from torchrl.data import Binary, Bounded, Unbounded
from torchrl.modules import set_recurrent_mode

from muon_rl.modules import GridEncoder, SignedHyperbolicTwoHot, representation

GRID = (2, 6, 7)  # channels, height, width


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def encoded(spec, observation, **options):
    torch.manual_seed(0)
    network = representation(spec, 8, hidden=[12], **options)
    batch = observation.shape[: observation.ndim - len(spec.shape)]
    return network(TensorDict(observation=observation, batch_size=batch))["hidden_state"]


def test_channels_last_is_the_same_grid_turned():
    grid = torch.randn(5, *GRID)
    options = {"encoder": "conv", "channels": [3, 5]}
    first = encoded(Unbounded(GRID), grid, **options)
    turned = grid.movedim(-3, -1).contiguous()
    last = encoded(Unbounded((6, 7, 2)), turned, channels_last=True, **options)
    torch.testing.assert_close(first, last)


@pytest.mark.parametrize("batch", [(), (4,), (4, 3), (0,)], ids=str)
def test_a_grid_s_features_are_those_of_plain_convolutions(batch):
    encoder = GridEncoder(GRID, [3, 5], kernel=2, stride=2)
    grid = torch.randn(*batch, *GRID)
    first, second = (layer for layer in encoder.layers if isinstance(layer, nn.Conv2d))
    flat = grid.reshape(math.prod(batch), *GRID)
    for layer in (first, second):
        flat = F.conv2d(flat, layer.weight, layer.bias, stride=2).relu()
    assert encoder.out_features == 5 * 1 * 1
    torch.testing.assert_close(encoder(grid), flat.reshape(*batch, 5))


@pytest.mark.parametrize("encoder", ["mlp", "conv"])
def test_booleans_and_bytes_are_the_floats_that_they_stand_for(encoder):
    shape = GRID if encoder == "conv" else (9,)
    cells = torch.rand(5, *shape) < 0.5
    floats = encoded(Unbounded(shape), cells.float(), encoder=encoder)
    for spec, observation in (
        (Binary(shape=shape, dtype=torch.bool), cells),
        (Bounded(0, 1, shape, dtype=torch.uint8), cells.byte()),
        (Bounded(0, 255, shape, dtype=torch.uint8), 255 * cells.byte()),
        (Unbounded(shape, dtype=torch.uint8), 255 * cells.byte()),
        (Unbounded(shape, dtype=torch.float64), cells.double()),
    ):
        torch.testing.assert_close(encoded(spec, observation, encoder=encoder), floats)


@pytest.mark.parametrize("lstm", [False, True], ids=["", "lstm"])
def test_what_leaves_the_encoder_is_normalised(lstm):
    data = TensorDict(
        observation=torch.randn(64, 4), is_init=torch.zeros(64, 1).bool(), batch_size=64
    )
    state = {
        kind: representation(Unbounded(4), 8, latent_norm=kind, lstm=lstm)(data)["hidden_state"]
        for kind in ("minmax", "layernorm", "none")
    }
    assert (state["minmax"].amin(-1) == 0).all() and (state["minmax"].amax(-1) == 1).all()
    torch.testing.assert_close(state["layernorm"].mean(-1), torch.zeros(64), atol=1e-5, rtol=0)
    assert state["none"].amin() < 0


def test_an_orthogonal_convolution_has_orthogonal_kernels_with_the_gain_of_relu():
    encoder = GridEncoder(GRID, [3, 5], init="orthogonal")
    for layer in (encoder.layers[0], encoder.layers[2]):
        kernels = layer.weight.flatten(1)
        torch.testing.assert_close(kernels @ kernels.T, 2 * torch.eye(len(kernels)))
        assert not layer.bias.any()


def test_the_lstm_steps_as_it_runs_over_the_trajectory_and_forgets_at_a_start():
    network = representation(Unbounded(4), 8, hidden=[12], lstm=True)
    start = torch.zeros(2, 6, 1, dtype=torch.bool)
    start[:, 0] = start[1, 3] = True
    data = TensorDict(observation=torch.randn(2, 6, 4), is_init=start, batch_size=[2, 6])
    with set_recurrent_mode(True):
        along = network(data.clone())["hidden_state"]
        fresh = network(data[1:, 3:].clone())["hidden_state"]
    states = {f"recurrent_state_{name}": torch.zeros(2, 1, 8) for name in "hc"}
    for t in range(6):
        out = network(data[:, t].clone().update(states))
        torch.testing.assert_close(out["hidden_state"], along[:, t])
        states = {key: out["next", key] for key in states}
    torch.testing.assert_close(along[1:, 3:], fresh)
    changed = data.clone()
    changed["observation"][:, 0] += 1
    with set_recurrent_mode(True):
        moved = (network(changed)["hidden_state"] - along).abs().amax(-1) > 1e-6
    assert moved.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (Unbounded(GRID), {}, r"encoder='mlp' needs a vector .* takes encoder='conv'"),
        (Unbounded(4), {"encoder": "conv"}, r"needs channels and a grid .* shape is \(4,\)"),
        (Unbounded(GRID), {"encoder": "conv", "channels": []}, r"channels is \[\]"),
        (Unbounded(GRID), {"encoder": "conv", "channels": [4] * 3}, "leave nothing of a grid"),
        (Unbounded(GRID), {"encoder": "conv", "activation": "sine"}, "activation must be one of"),
        (Unbounded(4), {"encoder": "cnn"}, "encoder must be one of mlp, conv, but is 'cnn'"),
    ],
)
def test_what_does_not_fit_is_refused(spec, options, message):
    with pytest.raises(ValueError, match=message):
        representation(spec, **options)


# ---------------------------------------------------------------------------------------- two-hot


def test_logits_decode_to_the_closed_form():
    code = SignedHyperbolicTwoHot().double()
    logits = 3 * torch.randn(50, 4, 61, dtype=torch.float64)
    weights = np.exp(logits.numpy())
    mean = (weights * np.linspace(-30, 30, 61)).sum(-1) / weights.sum(-1)
    eps = 1e-3
    root = (np.sqrt(1 + 4 * eps * (np.abs(mean) + 1 + eps)) - 1) / (2 * eps)
    expected = torch.from_numpy(np.sign(mean) * (root**2 - 1))
    torch.testing.assert_close(code.decode(logits), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(code(logits), code.decode(logits).unsqueeze(-1), rtol=0, atol=0)


def test_a_value_has_two_neighbouring_bins_and_comes_back_within_the_range():
    code = SignedHyperbolicTwoHot()
    values = torch.linspace(-904, 904, 997)
    probs = code.encode(values)
    torch.testing.assert_close(probs.sum(-1), torch.ones(997))
    assert ((probs > 0).sum(-1) <= 2).all()
    assert (probs.argmax(-1).diff() >= 0).all() and probs.argmax(-1).unique().numel() == 61
    torch.testing.assert_close(code.decode(probs.log()), values, rtol=2e-5, atol=2e-5)
    ends = code.decode(code.encode(torch.tensor([-1e6, 1e6])).log())
    torch.testing.assert_close(ends, torch.tensor([-904.7, 904.7]), rtol=0, atol=0.05)


def test_bins_are_interpolated_in_squashed_space():
    # h(3) = 2 - 1 + 0.003: between the bins at 1 and 2.
    probs = SignedHyperbolicTwoHot(5, 2.0).encode(torch.tensor(3.0))
    torch.testing.assert_close(probs, torch.tensor([0, 0, 0, 0.997, 0.003]))


@pytest.mark.parametrize("shape", [(7,), (7, 1)], ids=str)
def test_the_loss_is_the_cross_entropy_to_the_code(shape):
    code = SignedHyperbolicTwoHot(11)
    logits, target = torch.randn(7, 11), 20 * torch.randn(7)
    expected = -(code.encode(target) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(code.loss(logits, target.reshape(shape)), expected)


@pytest.mark.parametrize("options", [{"bins": 1}, {"limit": 0.0}], ids=str)
def test_a_code_without_a_range_is_refused(options):
    with pytest.raises(ValueError, match="bins >= 2 and limit > 0"):
        SignedHyperbolicTwoHot(**options)
