"""The grid transformer: attention, positions, patches, readouts, dropout, options."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchrl.data import Unbounded

from muon_rl.modules import GridTransformer
from muon_rl.modules.attention import Block, SelfAttention, sinusoidal_positions
from muon_rl.modules.boards import BoardLayout, Patches

READOUTS = ["head", "token", "mean"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens(height, width) -> Unbounded:
    return Unbounded((height, width), dtype=torch.uint8)


def boards(number, height, width) -> torch.Tensor:
    """Return boards of random kinds with one head each."""
    board = torch.randint(0, 6, (number, height * width), dtype=torch.uint8)
    return board.scatter(1, torch.randint(height * width, (number, 1)), 6).unflatten(
        1, (height, -1)
    )


def transformer(spec, **options) -> GridTransformer:
    """Return a small network in double precision."""
    return GridTransformer(spec, **{"d_model": 16, "num_heads": 2, **options}).double()


def rows_of(network, board) -> torch.Tensor:
    """Return all rows behind the last norm, each block computed as a whole."""
    x = network.project(network.patches(board)[0]) + network.positions
    if network.token is not None:
        x = torch.cat([network.token.expand(len(x), 1, -1), x], 1)
    for block in network.blocks:
        x = block(x)
    return network.norm(x)


# ---------------------------------------------------------------------------- attention, positions


@pytest.mark.parametrize(("heads", "queries"), [(1, 5), (2, 5), (4, 1)])
def test_attention_is_the_softmax_of_the_scaled_scores(heads, queries):
    attention = SelfAttention(8, heads).double()
    asking, asked = torch.randn(3, queries, 8).double(), torch.randn(3, 5, 8).double()
    joined = torch.zeros(3, queries, 8, dtype=torch.double)
    for head in range(heads):
        part = slice(head * 8 // heads, (head + 1) * 8 // heads)
        q, k, v = (
            (x @ layer.weight.T + (0 if layer.bias is None else layer.bias))[..., part]
            for layer, x in (
                (attention.query, asking), (attention.key, asked), (attention.value, asked)
            )
        )  # fmt: skip
        scores = torch.einsum("nqd,nrd->nqr", q, k) / math.sqrt(8 / heads)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        joined[..., part] = torch.einsum("nqr,nrd->nqd", weights, v)
    expected = joined @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(asking, asked), expected)


def test_a_block_for_one_row_gives_the_row_that_it_gives_with_all():
    block, x = Block(8, 2).double(), torch.randn(4, 5, 8).double()
    only = torch.tensor([0, 4, 2, 2])
    whole = block(x)
    assert block(x, only).shape == (4, 1, 8)
    torch.testing.assert_close(block(x, only)[:, 0], whole[range(4), only])


@pytest.mark.parametrize("only", [None, torch.tensor([1])], ids=["all", "one"])
def test_a_block_s_gradient_is_that_of_finite_differences(only):
    block, x = Block(4, 2).double(), torch.randn(1, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: block(y, only), x)


def test_a_block_is_pre_norm_and_four_times_as_wide_between():
    block, x = Block(8, 2), torch.randn(4, 5, 8)
    normed = nn.functional.layer_norm(x, (8,))
    y = x + block.attention(normed, normed)
    inner, outer = block.feedforward[0], block.feedforward[2]
    assert inner.weight.shape == (32, 8)
    z = inner(nn.functional.layer_norm(y, (8,)))
    gelu = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    torch.testing.assert_close(block(x), y + outer(gelu))


@pytest.mark.parametrize(("rows", "columns", "width"), [(3, 5, 8), (1, 4, 4), (10, 10, 64)])
def test_sinusoidal_positions_follow_the_formula_in_rows_and_columns(rows, columns, width):
    table, half = sinusoidal_positions(rows, columns, width), width // 2
    assert table.shape == (rows * columns, width)
    for row in range(rows):
        for column in range(columns):
            for at, t in ((0, row), (half, column)):
                for i in range(half // 2):
                    angle = t / 10_000 ** (2 * i / half)
                    pair = table[row * columns + column, at + 2 * i : at + 2 * i + 2]
                    assert pair.tolist() == pytest.approx(
                        [math.sin(angle), math.cos(angle)], abs=1e-6
                    )


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_both_kinds_of_positions_begin_at_one_scale(positions):
    network = transformer(tokens(10, 10), d_model=64, positions=positions, readout="token")
    assert network.positions.square().mean().item() == pytest.approx(0.5, rel=0.15)
    assert network.token.square().mean().item() == pytest.approx(0.5, rel=0.5)
    kept = "positions" in network.state_dict()
    assert kept == (positions == "learned")  # the others follow from the sizes


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_cells_permuted_together_with_their_positions_leave_the_output(positions):
    network = transformer(tokens(3, 4), readout="mean", patch=1, positions=positions)
    board = boards(5, 3, 4)
    order = torch.randperm(12)
    shuffled = board.flatten(1)[:, order].view_as(board)
    before, moved = network(board), network(shuffled)
    assert (before - moved).abs().max() > 1e-3
    network.positions.data = network.positions.data[order]
    torch.testing.assert_close(network(shuffled), before)


# ------------------------------------------------------------------------------- patches, readouts


@pytest.mark.parametrize(
    ("height", "width", "patch", "expected"),
    [(6, 8, None, 2), (10, 10, None, 2), (5, 6, None, 1), (6, 7, None, 1), (6, 9, 3, 3)],
)
def test_patches_are_two_cells_wide_on_even_boards_and_hold_their_cells(
    height, width, patch, expected
):
    network = transformer(tokens(height, width), patch=patch)
    board, table = boards(3, height, width), network.patches.cells.weight
    features, head = network.patches(board)
    edge, columns = expected, width // expected
    assert features.shape == (3, height * width // edge**2, 16 * edge**2)
    for n in range(3):
        for p in range(features.shape[1]):
            top, left = p // columns * edge, p % columns * edge
            cells = board[n, top : top + edge, left : left + edge].flatten()
            torch.testing.assert_close(features[n, p], table[cells.long()].flatten())
            assert (head[n] == p) == (6 in cells)


def test_patches_of_planes_hold_the_planes_of_each_cell():
    planes = torch.rand(3, 5, 4, 6)
    planes[:, 0] = 0
    planes[range(3), 0, [0, 3, 2], [5, 0, 3]] = 0.5
    patches = Patches(BoardLayout.of(Unbounded((5, 4, 6))), 2, cell_width=99)
    features, head = patches(planes)
    assert features.shape == (3, 6, 20)
    for p in range(6):
        top, left = p // 3 * 2, p % 3 * 2
        cells = planes[:, :, top : top + 2, left : left + 2]
        torch.testing.assert_close(features[:, p], cells.movedim(1, -1).flatten(1))
    assert head.tolist() == [2, 3, 4]


@pytest.mark.parametrize("kind", ["tokens", "planes"])
@pytest.mark.parametrize("readout", READOUTS)
def test_each_readout_is_the_row_that_it_names(readout, kind):
    board = boards(6, 4, 6)
    rows, columns = (board == 6).nonzero()[:, 1:].unbind(-1)
    patch_of_head = rows // 2 * 3 + columns // 2
    spec = tokens(4, 6)
    if kind == "planes":
        board = (board[:, None] == torch.tensor([6, 2, 1, 0]).view(-1, 1, 1)).double()
        spec = Unbounded((4, 4, 6))
    network = transformer(spec, readout=readout)
    every = rows_of(network, board)
    assert every.shape == (6, 7 if readout == "token" else 6, 16)
    expected = {
        "head": every[range(6), patch_of_head],
        "token": every[:, 0],
        "mean": every.sum(1) / every.shape[1],
    }[readout]
    torch.testing.assert_close(network(board), expected)


def test_without_attention_the_head_s_readout_sees_the_head_s_patch_alone():
    network = transformer(tokens(4, 4), num_layers=1)
    nn.init.zeros_(network.blocks[0].attention.out.weight)
    board = torch.zeros(1, 4, 4, dtype=torch.uint8)
    board[0, 1, 2] = 6
    seen = []
    for row in range(4):
        for column in range(4):
            changed = board.clone()
            changed[0, row, column] += 1
            seen.append(bool((network(changed) - network(board)).abs().max() > 1e-6))
    # The head's own cell is no head any more, then: the first patch is read.
    assert [at for at, change in enumerate(seen) if change] == [2, 3, 6, 7]


def test_a_board_without_a_head_is_read_at_its_first_patch():
    network = transformer(tokens(4, 4))
    board = torch.randint(0, 6, (3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(network(board), rows_of(network, board)[:, 0])


# ------------------------------------------------------------------------------- dropout, options


def test_dropout_is_on_where_a_loss_is_trained_and_nowhere_else():
    network, board = transformer(tokens(4, 4), dropout=0.5), boards(8, 4, 4)
    trained = network(board)
    assert not torch.equal(trained, network(board))
    with torch.no_grad():
        acted = network(board)
    evaluated = network.eval()(board)
    torch.testing.assert_close(acted, evaluated, rtol=0, atol=0)
    assert not torch.equal(acted, trained)
    plain = transformer(tokens(4, 4))
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(plain(board), evaluated, rtol=0, atol=0)


@pytest.mark.parametrize("branch", ["attention.out", "feedforward.2"])
def test_each_branch_of_a_block_has_dropout(branch):
    block, x = Block(8, 2, dropout=0.5), torch.randn(1, 2000, 8)
    other = {"attention.out": "feedforward.2", "feedforward.2": "attention.out"}[branch]
    for layer in (block.get_submodule(branch), block.get_submodule(other)):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.ones_(block.get_submodule(branch).bias)
    added = block(x) - x
    assert ((added.abs() < 1e-5) | ((added - 2).abs() < 1e-5)).all()
    assert added.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("readout", READOUTS)
def test_everything_follows_to_another_device(readout, positions):
    network = GridTransformer(tokens(4, 4), readout=readout, positions=positions).to("meta")
    assert network(boards(3, 4, 4).to("meta")).device.type == "meta"


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("batch", [(), (4,), (4, 3), (0,)], ids=str)
@pytest.mark.parametrize("kind", ["tokens", "planes"])
def test_batch_dims_are_those_of_the_boards(batch, kind, readout):
    if kind == "tokens":
        board, spec = torch.randint(0, 7, (*batch, 4, 6), dtype=torch.uint8), tokens(4, 6)
    else:
        board, spec = torch.randn(*batch, 4, 4, 6, dtype=torch.double), Unbounded((4, 4, 6))
    network = transformer(spec, readout=readout)
    out = network(board)
    assert out.shape == (*batch, 16)
    flat = board.reshape(-1, *spec.shape)
    one_by_one = [network(one) for one in flat]
    for one, expected in zip(out.reshape(-1, 16), one_by_one, strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("init", ["default", "orthogonal"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("readout", READOUTS)
def test_a_gradient_reaches_every_parameter(readout, positions, init):
    network = transformer(tokens(4, 4), readout=readout, positions=positions, init=init)
    network(boards(32, 4, 4)).square().mul(torch.randn(16)).sum().backward()
    names = [name for name, p in network.named_parameters() if not p.grad.abs().max() > 1e-12]
    assert names == []


def test_orthogonal_weights_have_the_gain_of_what_follows_and_no_bias():
    network = transformer(tokens(4, 4), init="orthogonal")
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight if layer.in_features >= layer.out_features else layer.weight.T
            gain = 2.0 if name.endswith("feedforward.0") else 1.0
            eye = gain * torch.eye(len(weight), dtype=torch.double)
            torch.testing.assert_close(weight @ weight.T, eye, atol=1e-6, rtol=0)
            assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("readout", READOUTS)
def test_it_compiles_as_one_graph_with_its_gradient(readout):
    network, board = transformer(tokens(4, 4), readout=readout, dropout=0.1), boards(8, 4, 4)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(board), network(board))
    network.eval()
    expected = torch.autograd.grad(network(board)[:, 0].sum(), network.project.weight)
    gradient = torch.autograd.grad(compiled(board)[:, 0].sum(), network.project.weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            tokens(4, 4),
            {"readout": "max"},
            "readout must be .* head, token, mean, but is 'max'",
        ),
        (tokens(4, 4), {"positions": "rotary"}, "positions must be one of learned, sinusoidal"),
        (tokens(4, 4), {"init": "xavier"}, "init must be one of default, orthogonal"),
        (tokens(4, 4), {"d_model": 18, "positions": "sinusoidal"}, "in multiples of 4, not 18"),
        (tokens(4, 4), {"num_heads": 3}, "num_heads must divide d_model, but is 3 for 16"),
        (tokens(4, 4), {"num_heads": 0}, "num_heads must divide d_model, but is 0"),
        (tokens(4, 4), {"num_layers": 0}, "num_layers=0"),
        (tokens(4, 4), {"d_model": 0}, "d_model=0"),
        (tokens(4, 4), {"cell_width": 0}, "cell_width=0"),
        (tokens(4, 4), {"dropout": 1.0}, r"dropout=1\.0"),
        (tokens(4, 6), {"patch": 4}, "patch must divide .* but is 4 on 4 x 6"),
        (tokens(4, 4), {"patch": 0}, "but is 0 on 4 x 4"),
        (Unbounded((3, 4, 4)), {}, r"four planes .* has 3 planes: take readout='token'"),
        (Unbounded((7, 4, 4), dtype=torch.uint8), {}, r"torch\.uint8 of shape \(7, 4, 4\)"),
        (Unbounded((4, 4)), {}, r"torch\.float32 of shape \(4, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(spec, options, message):
    with pytest.raises(ValueError, match=message):
        transformer(spec, **options)
