"""Sequences split over processes: what the ranks find is in `parallel_checks.py`; here, what needs
none."""

import json
import os
import subprocess
import sys
import time
from functools import reduce
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from subquad import mask as masks
from subquad.ops.attention import attention, merge
from subquad.ops.recurrence import recurrence
from subquad.parallel.lasp2 import written
from subquad.parallel.maps import Affine
from subquad.parallel.ring_attention import LAYOUTS, layout_index, schedule

HERE = Path(__file__).parent


def ranks(folder: Path, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "parallel_ranks.py"), str(folder), *arguments]
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, timeout=timeout, capture_output=True, text=True)


@pytest.mark.slow
def test_on_four_ranks(tmp_path):
    """One start for all checks: outputs, gradients, states, packing, traffic, mixers, models."""
    done = ranks(tmp_path)
    found = [json.loads((tmp_path / f"results.{rank}.json").read_text()) for rank in range(4)]
    errors = {f"{name} on rank {r}": e for r, each in enumerate(found) for name, e in each.items()}
    failed = [f"{name}\n{error}" for name, error in errors.items() if error]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
    assert len(found[0]) > 20


def test_a_rank_that_dies_ends_the_others(tmp_path):
    start = time.monotonic()
    ranks(tmp_path, "die", timeout=60)
    assert time.monotonic() - start < 30
    for rank in (0, 2):
        said = json.loads((tmp_path / f"die.{rank}.json").read_text())
        for op, message in said.items():
            assert f"rank {rank} of 3 was left alone in {op}" in message, said
        assert said


# --- LASP-2's map -------------------------------------------------------------------------------


def maps(P, W=4):
    shape = {None: None, "head": (2, 3), "channel": (2, 3, 4), "matrix": (2, 3, 4, 4)}[P]
    for _ in range(W):
        drawn = None if shape is None else torch.randn(shape, dtype=torch.float64)
        if P in ("head", "channel"):
            drawn = -drawn.abs()
        yield Affine(torch.randn(2, 3, 4, 5, dtype=torch.float64), drawn)


@pytest.mark.parametrize("P", [None, "head", "channel", "matrix"])
def test_maps_compose(P):
    """The monoid: one map after another is their product, however it is bracketed."""
    each = list(maps(P))
    S = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    by_turns = reduce(lambda state, then: then(state), each, S)
    joined = reduce(lambda first, then: then.after(first), each)
    torch.testing.assert_close(joined(S), by_turns)
    halves = each[1].after(each[0]), each[3].after(each[2])
    torch.testing.assert_close(halves[1].after(halves[0])(S), by_turns)
    torch.testing.assert_close(joined.unpack(joined.pack())(S), by_turns)


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("constant", [False, True])
def test_explicit_backward(W, constant):
    """LASP-2's formulas, rank by rank in float64, are autograd's through the whole."""
    B, T, H, K, V = 2, 16, 2, 3, 5
    C = T // W
    drawn = lambda d: torch.randn(B, T, H, d, dtype=torch.float64)  # noqa: E731
    q, k, v, do = drawn(K), drawn(K), drawn(V), drawn(V)
    rate = -torch.tensor([0.3, 0.05], dtype=torch.float64) * constant
    inputs = [t.requires_grad_() for t in (q, k, v)]
    o, _ = recurrence(q, k, v, decay=rate, scale=1.0)
    want = torch.autograd.grad(o, inputs, do)
    with torch.no_grad():
        i = torch.arange(C)
        down = (rate[:, None] * (C - 1 - i)).exp().T[None, :, :, None]  # lambda^(C-1-i)
        up = (rate[:, None] * (i + 1)).exp().T[None, :, :, None]  # lambda^(i+1)
        gaps = (rate[:, None, None] * (i[:, None] - i)).exp().tril()
        whole = (C * rate).exp()[:, None, None]
        cut = lambda t: t.split(C, 1)  # noqa: E731
        parts = list(zip(cut(q), cut(k), cut(v), cut(do)))
        M = [torch.einsum("bthk,bthv->bhkv", k * down, v) for _, k, v, _ in parts]
        E = [torch.einsum("bthk,bthv->bhkv", q * up, do) for q, _, _, do in parts]
        zero = torch.zeros_like(M[0])
        S = list(accumulate(M[:-1], lambda s, m: whole * s + m, initial=zero))
        D = list(accumulate(E[:0:-1], lambda d, e: whole * d + e, initial=zero))[::-1]
        got = []
        for (q, k, v, do), s, d in zip(parts, S, D):
            near = torch.einsum("bthv,bshv->bhts", do, v) * gaps
            mixed = torch.einsum("bthk,bshk->bhts", q, k) * gaps
            dq = torch.einsum("bhts,bshk->bthk", near, k)
            dk = torch.einsum("bhts,bthk->bshk", near, q)
            dv = torch.einsum("bhts,bthv->bshv", mixed, do)
            got.append((
                dq + up * torch.einsum("bthv,bhkv->bthk", do, s),
                dk + down * torch.einsum("bthv,bhkv->bthk", v, d),
                dv + down * torch.einsum("bthk,bhkv->bthv", k, d),
            ))  # fmt: skip
        for w, g in zip(want, zip(*got)):
            torch.testing.assert_close(torch.cat(g, 1), w, rtol=1e-12, atol=1e-12)


def test_what_a_run_writes_is_its_final_state():
    k, v = torch.randn(2, 70, 2, 4), torch.randn(2, 70, 2, 3)
    for decay in (None, -torch.rand(2), -torch.rand(2, 70, 2), -torch.rand(2, 70, 2, 4)):
        M, _ = written(k, v, decay, 0, torch.float64)
        double = [None if t is None else t.double() for t in (k, k, v, decay)]
        _, want = recurrence(*double[:3], decay=double[3])
        torch.testing.assert_close(M, want, rtol=1e-6, atol=1e-6)


# --- the ring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("W", [1, 2, 3, 4])
def test_layouts_hold_every_token_once(layout, W):
    index = layout_index(24, W, layout)
    assert index.shape == (W, 24 // W)
    assert index.flatten().sort().values.tolist() == list(range(24))
    with pytest.raises(ValueError, match="tokens must be a multiple of"):
        layout_index(25, 2, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_of_the_ranks(layout):
    """Zigzag is equal, striped within 1 + W/T, contiguous 2 W / (W + 1) of the mean."""
    W, C = 4, 16
    pairs = [
        sum(w.pairs(C) for s in range(W) for w in schedule(r, s, C, layout, True)) for r in range(W)
    ]
    T = W * C
    assert sum(pairs) == T * (T + 1) // 2
    most = max(pairs) / (sum(pairs) / W)
    if layout == "zigzag":
        assert len(set(pairs)) == 1
    elif layout == "striped":
        assert most <= 1 + W / T * 1.5
    else:
        assert most == pytest.approx(2 * W / (W + 1), rel=0.1)
    packed = [
        sum(w.pairs(C) for s in range(W) for w in schedule(r, s, C, "zigzag", True, [0, 9, 40, T]))
        for r in range(W)
    ]
    assert sum(packed) == sum(n * (n + 1) // 2 for n in (9, 31, 24))


def test_merging_in_any_order():
    q, k, v = (torch.randn(2, 12, 2, 4, dtype=torch.float64) for _ in range(3))
    parts = [attention(q, k[:, s], v[:, s], return_lse=True)
             for s in (slice(0, 3), slice(3, 4), slice(4, 12))]  # fmt: skip
    nothing = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    want = attention(q, k, v, return_lse=True)
    for order in ([0, 1, 2], [2, 0, 1]):
        got = merge([nothing, *(parts[i] for i in order), nothing])
        torch.testing.assert_close(got, want)
    blocked = attention(q, k, v, masks.causal(), return_lse=True)
    assert torch.isfinite(merge([nothing, blocked])[0]).all()
