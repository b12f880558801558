"""The kernels of attention and selection: on a CUDA GPU, or on the CPU in Triton's interpreter."""

import os
import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from subquad import mask
from subquad.mask.algebra import Band
from subquad.ops import kernel
from subquad.ops.attention import attention
from subquad.ops.attention.triton import index, lists
from subquad.ops.select import block_mass, window_mass

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CUDA and os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a CUDA GPU, or TRITON_INTERPRET=1",
    ),
]
# In the interpreter a program takes a tenth of a second: few of them, in float32.
LONG = 300 if CUDA else 100
TOKENS = 200 if CUDA else 12
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def rising(count, shape):
    """Random lists of up to shape[-1] of count numbers, rising, -1 at the end."""
    drawn = torch.randint(0, count + 1, shape).sort(-1)[0]
    twice = torch.zeros_like(drawn, dtype=torch.bool)
    twice[..., 1:] = drawn[..., 1:] == drawn[..., :-1]
    drawn = drawn.masked_fill(twice, count).sort(-1)[0]
    return torch.where(drawn == count, -1, drawn).int()


def check(m, dtype, B=1, T=LONG, S=None, H=2, G=1, K=16, V=16, grad=True, **options):
    """o, lse and the gradients through both against the definition in float64."""
    torch.manual_seed(0)
    S = T if S is None else S
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V)
    q, k, v = (torch.randn(s, device=DEVICE).to(dtype).requires_grad_(grad) for s in shapes)
    got = attention(q, k, v, m, return_lse=True, backend="triton", **options)
    exact = [x.detach().double().requires_grad_(grad) for x in (q, k, v)]
    want = attention(*exact, m, return_lse=True, backend="reference", **options)
    pairs = list(zip(("o", "lse"), got, want, strict=True))
    if grad:
        weights = [torch.randn_like(x) for x in want]

        def total(out):
            o, lse = out
            lse = lse.masked_fill(lse == -torch.inf, 0)
            return (o * weights[0].to(o.dtype)).sum() + (lse * weights[1].to(lse.dtype)).sum()

        gradients = (
            torch.autograd.grad(total(got), (q, k, v)),
            torch.autograd.grad(total(want), exact),
        )
        pairs += list(zip(("dq", "dk", "dv"), *gradients, strict=True))
    for name, a, b in pairs:
        assert torch.equal(a == -torch.inf, b == -torch.inf), name
        a, b = (x.detach().double().nan_to_num(nan=1e9, neginf=0.0) for x in (a, b))
        error = float((a - b).norm() / b.norm().clamp_min(1e-6))
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"


def listed(index):
    return index.to(DEVICE)


IDS = torch.tensor([[0] * 37 + [1] * 40 + [-1] * 5 + [2] * (LONG - 82), [0] * LONG])
STARTS = torch.tensor([[5, -1], [3, 70], [0, 100], [100, -1], [20, 90]])
COLUMNS = torch.tensor([[0, 1, 2], [67, -1, -1], [65, 99, -1], [-1, -1, -1], [3, 4, 5]])
ROWS = -(-LONG // 64)
CASES = {
    "window": (lambda: mask.causal() & mask.window(50), {}),
    "window, by the copy engine": (
        lambda: mask.causal() & mask.window(50),
        {"B": 2, "T": 128, "H": 1, "K": 32, "V": 32},
    ),
    "blocks, by the copy engine": (
        lambda: mask.blocks(listed(rising(ROWS, (ROWS, 2))), 64) & mask.causal(),
        {"K": 32, "V": 32},
    ),
    "spans, by the copy engine": (
        lambda: mask.spans(listed(STARTS[:ROWS]), listed(COLUMNS[:ROWS]), 64) & mask.causal(),
        {"K": 32, "V": 32},
    ),
    "thin window": (lambda: mask.causal() & mask.window(20), {"B": 2}),
    "full, odd dims": (mask.full, {"K": 24, "V": 40}),
    "sinks": (lambda: mask.causal() & (mask.window(30) | mask.sinks(4)), {"H": 4, "G": 2}),
    "strided": (lambda: mask.strided(7, 2) & mask.causal(), {}),
    "rows without keys": (lambda: mask.window(3) & ~mask.window(5) | mask.prefix(9), {}),
    "documents": (lambda: mask.documents(IDS) & mask.causal(), {"B": 2}),
    "per head": (lambda: mask.per_head([mask.window(5), mask.sinks(70)]), {}),
    "few queries, many keys": (mask.causal, {"T": 40, "S": LONG}),
    "many queries, few keys": (mask.causal, {"T": LONG, "S": 40}),
    "grid by tiles": (
        lambda: mask.neighborhood((11, 9), (5, 3), dilation=(1, 2), tile=(8, 8)),
        {"T": 2 * 2 * 64},
    ),
    "blocks": (lambda: mask.blocks(listed(rising(ROWS, (ROWS, 2))), 64) & mask.causal(), {}),
    "blocks of a group": (
        lambda: mask.blocks(listed(rising(ROWS, (2, ROWS, 2))), 64),
        {"H": 4, "G": 2},
    ),
    "blocks of a head": (
        lambda: mask.blocks(listed(rising(ROWS, (1, 2, ROWS, 2))), 64) & mask.causal(),
        {},
    ),
    "large blocks": (
        lambda: mask.blocks(listed(rising(-(-LONG // 128), (3, 2))), 128, 128) & mask.causal(),
        {},
    ),
    "small blocks": (
        lambda: mask.blocks(listed(rising(-(-LONG // 16), (ROWS * 4, 4))), 16) & mask.causal(),
        {},
    ),
    "blocks of a token": (
        lambda: mask.blocks(listed(rising(-(-TOKENS // 64), (TOKENS, 2))), 64, 1) & mask.causal(),
        {"T": TOKENS},
    ),
    "blocks of a token and a group": (
        lambda: (
            mask.blocks(listed(rising(-(-TOKENS // 64), (2, TOKENS, 2))), 64, 1) & mask.causal()
        ),
        {"T": TOKENS, "H": 6, "G": 2},
    ),
    "blocks of later tokens": (
        lambda: mask.blocks(listed(rising(2, (100, 2))), 64, 1) & mask.causal(),
        {"T": 6, "S": 100},
    ),
    "spans and columns": (
        lambda: mask.spans(listed(STARTS[:ROWS]), listed(COLUMNS[:ROWS]), 64) & mask.causal(),
        {},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype):
    make, shape = CASES[name]
    check(make(), dtype, **shape)


def expression(draw, depth=2):
    """A random mask over LONG tokens."""
    if depth and draw.random() < 0.7:
        a, b = expression(draw, depth - 1), expression(draw, depth - 1)
        return draw.choice([a & b, a | b, a & ~b])
    n = draw.randrange(LONG)
    ids = torch.tensor([draw.randrange(-1, 3) for _ in range(LONG)]).sort()[0]
    return draw.choice(
        [
            mask.causal(),
            mask.window(n, draw.randrange(9)),
            mask.sinks(n // 4),
            mask.prefix(n),
            mask.strided(n % 13 + 2, n % 2 + 1),
            mask.documents(ids),
            mask.packed(mask.causal(), [0, n // 2, n, LONG]),
        ]
    )


@pytest.mark.parametrize("seed", range(20 if CUDA else 3))
def test_random_expressions(seed):
    m = expression(random.Random(seed))
    for dtype in DTYPES:
        check(m, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype):
    cu = torch.tensor([0, 60, 60, 61, LONG], dtype=torch.int32, device=DEVICE)
    check(mask.causal() & mask.window(33), dtype, cu_seqlens=cu)


@pytest.mark.skipif(not CUDA, reason="long for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
def test_head_dims(width, dtype):
    if dtype == torch.float32 and width > 128:
        pytest.skip("in float32 the torch form takes these")
    check(mask.causal() & (mask.window(70) | mask.sinks(4)), dtype, K=width, V=width, H=4, G=2)
    index = listed(rising(5, (2, 5, 3)))
    check(mask.blocks(index, 64) & mask.causal(), dtype, K=width, V=width, H=4, G=2)
    index = listed(rising(5, (2, LONG, 3)))
    check(mask.blocks(index, 64, 1) & mask.causal(), dtype, K=width, V=width, H=8, G=2)


@pytest.mark.parametrize(
    ("low", "high", "S", "offset"),
    [(0, None, 100, 0), (None, 3, 150, 20), (-70, -66, 100, 0), (5, 64, 70, 30), (90, 200, 40, 50)],
)
def test_bands(low, high, S, offset):
    for dtype in DTYPES:
        check(Band(low, high), dtype, T=100, S=S, offset=offset)


def halves(T):
    """Documents that end off every tile."""
    return torch.arange(T) // 301


WHOLE_TILES = {
    "window": (lambda T: mask.causal() & mask.window(300), {"T": 2085}),
    "wide window, packed heads": (lambda T: mask.window(700, 90), {"T": 5000, "H": 6, "G": 2}),
    "causal": (lambda T: mask.causal(), {"T": 1000}),
    "causal, batch": (lambda T: mask.causal(), {"T": 512, "B": 2, "H": 4, "G": 2}),
    "full": (lambda T: mask.full(), {"T": 300, "S": 777}),
    "later queries": (lambda T: mask.causal(), {"T": 300, "S": 901}),
    "queries before all keys": (lambda T: mask.causal(), {"T": 901, "S": 300}),
    "blocks": (
        lambda T: mask.blocks(listed(rising(-(-T // 128), (-(-T // 128), 5))), 128) & mask.causal(),
        {"T": 2000},
    ),
    "blocks, more tiles than processors": (
        lambda T: mask.blocks(listed(rising(T // 128, (T // 128, 5))), 128) & mask.causal(),
        {"T": 2304, "H": 16, "G": 4},
    ),
    "blocks of a head, none causal": (
        lambda T: mask.blocks(listed(rising(T // 128, (1, 4, T // 128, 5))), 128),
        {"T": 1024, "H": 4, "G": 2, "B": 2},
    ),
    "documents": (lambda T: mask.documents(halves(T)) & mask.causal(), {"T": 1280, "B": 2}),
    "sinks": (lambda T: mask.causal() & (mask.window(400) | mask.sinks(4)), {"T": 1500}),
    "holes": (lambda T: mask.causal() & ~mask.window(9, 3), {"T": 700}),
}


@pytest.mark.skipif(not CUDA, reason="a GPU's own kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", WHOLE_TILES)
def test_whole_tiles(name, width, dtype):
    make, shape = WHOLE_TILES[name]
    check(make(shape["T"]), dtype, K=width, V=width, **shape)


@pytest.mark.skipif(not CUDA, reason="a GPU's own kernels")
def test_whole_tiles_are_the_same_twice():
    torch.manual_seed(0)
    shape = 1, 3000, 4, 128
    q, k, v = (torch.randn(shape, device=DEVICE).bfloat16().requires_grad_() for _ in range(3))
    m = mask.causal() & mask.window(500)
    found = []
    for _ in range(5):
        o = attention(q, k, v, m, backend="triton")
        found.append((o, *torch.autograd.grad(o, (q, k, v), torch.ones_like(o) * 0.1)))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


@pytest.mark.skipif(not CUDA, reason="a GPU's own kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_grouped_heads_are_fused(dtype):
    """PyTorch's kernels run, forward and backward, where its plain softmax is forbidden."""
    torch.manual_seed(0)
    shapes = (2, 300, 6, 64), (2, 300, 2, 64), (2, 300, 2, 64)
    inputs = [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused):
        o = attention(*inputs, mask.causal(), backend="sdpa")
        got = o, *torch.autograd.grad(o.sum(), inputs)
    o = attention(*exact, mask.causal(), backend="reference")
    for a, b in zip(got, (o, *torch.autograd.grad(o.sum(), exact)), strict=True):
        assert (a.double() - b).norm() < TOLERANCE[dtype] * b.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_split_over_keys(dtype):
    n = 40 if CUDA else 8
    index = torch.arange(n, dtype=torch.int32)[None].repeat(2, 1, 1)
    index[1, :, n // 3 :] = -1  # ragged over the heads
    m = mask.blocks(listed(index), 64, 64 * n) & mask.causal()
    check(m, dtype, T=1, S=64 * n - 5, H=4, G=2, grad=False)


def test_masses():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 70, h, 16, device=DEVICE) for h in (4, 2))
    for reduce in ("sum", "max"):
        got = block_mass(q, k, 16, rows=32, reduce=reduce)
        want = block_mass(q.double(), k.double(), 16, rows=32, reduce=reduce)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    fine, coarse = (torch.randn(1, n, 2, 16, device=DEVICE) for n in (16, 4))
    for by in (None, (coarse, 16, 16)):
        exact = None if by is None else (coarse.double(), 16, 16)
        got = window_mass(q, fine, 8, 4, by=by)
        want = window_mass(q.double(), fine.double(), 8, 4, by=exact)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_finds_the_lists_of_a_choice():
    m = mask.blocks(rising(4, (4, 3)), 64)
    device = torch.device(DEVICE)
    made = [index.of_choice(m, causal, 256, 0, device) for causal in (False, True, True)]
    assert made[1] is made[2]
    assert made[0] is not made[1]
    assert made[1].by_keys(4) is made[2].by_keys(4)
    again = mask.blocks(m.index.tensor, 64)
    assert again == m
    assert hash(again) == hash(m)


def test_a_rehearsal_keeps_no_lists(monkeypatch):
    """Its kernels are not launched, so what they should have written is made anew."""
    m = mask.blocks(rising(4, (4, 3)), 64)
    monkeypatch.setattr(kernel._rehearsal, "wanted", {})
    made = [index.of_choice(m, True, 256, 0, torch.device(DEVICE)) for _ in range(2)]
    assert made[0] is not made[1]
    assert made[0].by_keys(4) is not made[0].by_keys(4)


@pytest.mark.parametrize("most", [lists.MOST_RUNS, 3])
@pytest.mark.parametrize(
    ("planes", "R", "n", "blocks", "causal", "size", "per_row", "S"),
    [
        (1, 5, 3, 5, True, 64, 64, 300),
        (2, 7, 70, 9, False, 16, 64, 130),
        (3, 4, 1, 2, True, 64, 1, 128),
        (2, 12, 4, 3, True, 4, 1, 12),
    ],
)
def test_lists_of_a_choice(planes, R, n, blocks, causal, size, per_row, S, most, monkeypatch):
    """Each row's full blocks and others, and each block's rows, later ones first."""
    monkeypatch.setattr(lists, "MOST_RUNS", most)
    table = rising(blocks, (planes, R, n))
    rows = lists.of_table(table.to(DEVICE), causal, size, size, per_row, S)
    turned = lists.by_blocks(rows, R, blocks)
    seen = {(plane, e): ([], []) for plane in range(planes) for e in range(blocks)}
    for plane in range(planes):
        for r in range(R):
            entries = [e for e in table[plane, r].tolist() if e >= 0]
            end = min(S, r * per_row + 1) if causal else S
            full = sum(e * size + size <= end for e in entries)
            at = plane * R + r
            ends = [int(x[at]) - at * n for x in (rows.lo, rows.mid, rows.hi)]
            assert ends == [0, full, len(entries)]
            for i, e in enumerate(entries):
                seen[plane, e][i >= full].insert(0, r)
    for at, (full, others) in enumerate(seen.values()):
        lo, mid, hi = (int(x[at]) for x in (turned.lo, turned.mid, turned.hi))
        assert turned.entry[lo:mid].tolist() == full
        assert turned.entry[mid:hi].tolist() == others
