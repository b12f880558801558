import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import masks
from subquad import mask

BATCHED = torch.tensor([[0, 0, 1, 1, 1, -1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1, -1]])


def expand(tiles: mask.Tiles) -> torch.Tensor:
    """The tiles as a dense mask ``[B,H,T,S]``."""
    (B, H), n = tiles.planes, tiles.block
    out = torch.zeros(B, H, tiles.rows * n, tiles.columns * n, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for r in range(tiles.rows):
                columns, patterns = tiles.row(r, int(tiles.plane[b, h]))
                assert columns.tolist() == sorted(set(columns.tolist()))
                for c, p in zip(columns.tolist(), patterns.tolist(), strict=True):
                    kept = torch.ones(n, n, dtype=torch.bool) if p < 0 else tiles.patterns[p]
                    out[b, h, r * n : (r + 1) * n, c * n : (c + 1) * n] = kept
    assert not out[:, :, tiles.T :].any()
    assert not out[..., tiles.S :].any()
    return out[:, :, : tiles.T, : tiles.S]


def planes(m: mask.Mask, T: int, S: int, offset: int | None = None) -> torch.Tensor:
    dense = m.dense(T, S, offset)
    return dense if dense.dim() == 4 else dense[None, None]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_expression_means_what_it_says(data):
    S = data.draw(st.integers(1, 21))
    T = data.draw(st.integers(0, S))
    offset = data.draw(st.integers(0, S - T)) if data.draw(st.booleans()) else S - T
    m, meaning = data.draw(masks.expressions(S))
    try:
        m.check(T, S, offset)
    except ValueError:  # packed and documents know their one length
        offset, T = 0, S
    want = masks.dense(meaning, T, S, offset).view(T, S)
    assert torch.equal(m.dense(T, S, offset), want)
    block = data.draw(st.integers(1, 9))
    tiles = m.tiles(T, S, block, offset)
    assert torch.equal(expand(tiles)[0, 0], want)
    assert tiles.area == m.area(T, S, offset) == int(want.sum())
    full = tiles.pattern < 0
    assert int(full.sum()) == sum(
        bool(want[r : r + block, c : c + block].all())
        for r in range(0, T - block + 1, block)
        for c in range(0, S - block + 1, block)
    ), "every full tile is found to be full"
    assert tiles.bits.unique(dim=0).shape == tiles.bits.shape, "the patterns are distinct"
    if T:
        low, high = m.key_range(offset, offset + T - 1, S)
        assert not want[:, :low].any()
        assert not want[:, high:].any()


@pytest.mark.parametrize(
    "m",
    [
        mask.documents(BATCHED) & mask.causal(),
        mask.documents(BATCHED) | mask.sinks(1),
        mask.per_head([mask.causal(), mask.window(2), mask.causal(), ~mask.causal()]),
        mask.per_head([mask.documents(BATCHED), mask.window(2)]) & ~mask.sinks(1),
        mask.blocks(torch.tensor([[[0, 2], [1, -1], [2, -1]], [[0, 1], [-1, -1], [0, 2]]]), 3),
        mask.blocks(masks.rising(3, (2, 2, 9, 2)), 3, rows=1) & mask.causal(),
        mask.spans(torch.tensor([[[0, 4], [1, -1], [5, 8]]] * 2), masks.rising(9, (2, 3, 2)), 3),
    ],
)
@pytest.mark.parametrize("block", [2, 4, 16])
def test_planes_of_batch_and_heads(m, block):
    want = planes(m, 9, 9)
    assert want.shape[:2] == m.planes
    assert torch.equal(expand(m.tiles(9, 9, block)), want)
    assert m.area(9, 9) == int(want.sum())


def test_masks_are_values():
    a = mask.causal() & (mask.window(3) | mask.sinks(2))
    b = mask.causal() & (mask.window(3) | mask.sinks(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a.tiles(40, 40, 8) is b.tiles(40, 40, 8), "cached by value"
    ids = torch.tensor([0, 0, 1])
    one = mask.documents(ids)
    assert one == mask.documents([0, 0, 1])
    assert one != mask.documents([0, 1, 1])
    ids[1] = 1
    assert one == mask.documents([0, 0, 1]), "a later write does not reach it"
    assert mask.causal() & mask.window(4) == mask.window(4) & mask.causal()
    with pytest.raises(AttributeError):
        a.parts = ()


def test_show(capsys):
    m = mask.causal() & (mask.window(1) | mask.sinks(1))
    assert m.show(4) == "█   \n██  \n███ \n█ ██"
    assert capsys.readouterr().out == "█   \n██  \n███ \n█ ██\n"
    large = mask.causal().show(1000).split("\n")
    assert len(large) == 63
    assert large[0] == "▒" + " " * 62
    assert large[-1][:62] == "█" * 62
    two = mask.per_head([mask.full(), mask.causal()])
    assert two.show(2) == "█▒\n██"
    pyplot = pytest.importorskip("matplotlib.figure")
    ax = pyplot.Figure().add_subplot()
    assert m.show(300, ax=ax) is ax
    assert len(ax.images) == 1
    with pytest.raises(ValueError, match="length 5"):
        mask.documents([0, 1]).show(5)


def test_tiles_of_a_window_are_found_quickly_and_without_the_square():
    """131,072 tokens: the dense mask would be 17 GB."""
    m = mask.causal() & mask.window(1023)
    m.tiles(4096, 4096, 128)
    times = []
    for extra in range(3):
        start = time.process_time()
        tiles = (m & mask.window(1023 + extra)).tiles(131072 - extra, 131072, 128)
        times.append(time.process_time() - start)
    assert min(times) < 0.05
    tiles = m.tiles(131072, 131072, 128)
    assert len(tiles.bits) == 2, "the diagonal and the far edge"
    assert tiles.area == 131072 * 1024 - 1024 * 1023 // 2


def test_documents_far_apart_cost_nothing():
    ids = torch.arange(131072) // 1000
    tiles = (mask.documents(ids) & mask.causal()).tiles(131072, 131072, 128)
    assert tiles.area == 131 * 1000 * 1001 // 2 + 72 * 73 // 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mask.window(-1), "left must be a non-negative int, got -1"),
        (lambda: mask.window(1, -2), "right must be"),
        (lambda: mask.sinks(1.5), "n must be"),
        (lambda: mask.strided(0), "stride must be a positive int"),
        (lambda: mask.strided(2, 3), "width must be at most stride=2"),
        (lambda: mask.documents(torch.zeros(2)), "ids must be int"),
        (lambda: mask.documents([0, 1]).dense(3, 3), "length 3, got 2"),
        (lambda: mask.packed(None, [0, 4, 2]), "rise from 0"),
        (lambda: mask.packed(mask.causal(), [0, 4]).dense(5, 5), "end at 4"),
        (lambda: mask.blocks(torch.zeros(2, 2), 4), "index must be int"),
        (lambda: mask.blocks(torch.tensor([[-2]]), 4), "index must be >= -1"),
        (lambda: mask.blocks(torch.tensor([[1, 0]]), 4), "must rise by 1"),
        (lambda: mask.blocks(torch.tensor([[1, 1]]), 4), "must rise by 1"),
        (lambda: mask.blocks(torch.tensor([[-1, 1]]), 4), "-1 at the end"),
        (lambda: mask.spans(torch.tensor([[0, 3]]), torch.tensor([[9]]), 4), "must rise by 4"),
        (lambda: mask.spans(torch.tensor([[0]]), torch.tensor([[1], [2]]), 4), "columns must be"),
        (lambda: mask.blocks(torch.tensor([[3], [3]]), 4).tiles(4, 8, 4), "-1..1 for S=8, got 3"),
        (lambda: mask.blocks(torch.tensor([[0]]), 4).tiles(8, 8, 4), "must have 2 rows"),
        (lambda: mask.per_head([]), "masks must be"),
        (lambda: mask.causal().tiles(4, 4, 0), "block must be a positive int"),
        (lambda: mask.causal().dense(-1, 4), "T must be"),
        (
            lambda: (mask.documents(BATCHED) & mask.documents(BATCHED.repeat(2, 1))).dense(9, 9),
            "agree on batch and heads",
        ),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
    with pytest.raises(TypeError):
        mask.causal() & True
