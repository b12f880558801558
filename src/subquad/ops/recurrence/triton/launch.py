"""From tensors to launches: the recurrence's forward and backward pass over its kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.ops import kernel
from subquad.ops.kernel import Launch
from subquad.ops.recurrence.triton import configs, plain
from subquad.ops.recurrence.triton.grads import grads, score_grads
from subquad.ops.recurrence.triton.layout import (
    NAMES,
    C,
    Plan,
    bound,
    cdiv,
    described,
    keeps,
    link_rows,
    plan,
    states_of,
    tables,
)  # fmt: skip
from subquad.ops.recurrence.triton.ready import Ready, blocks, gate_rows, prepared, read
from subquad.ops.recurrence.triton.scan import combine, scan
from subquad.ops.recurrence.triton.scan_back import scan_back
from subquad.ops.recurrence.triton.step import step
from subquad.ops.tape import empty, pieces

SCANNED = ("O", "D", "HS", "FINAL", "LOCAL", "TOTAL")  # what scan may write


@bound
def _scan(p: Plan, scale: float, init: bool, outs: tuple[str, ...]) -> Launch:
    c, split = p.scan_keep if "HS" in outs else p.scan, "LOCAL" in outs
    blocks = cdiv(p.V, c["BV"])
    if split and p.delta:
        blocks += cdiv(p.K, c["BV"])
    return scan.bind(
        (p.segments * blocks, p.H), scale, p.T, p.size, **p.pick("H", "HQ", "HK", "HV"),
        **p.switches(
            C=C, HAS_INIT=init, OUTPUT="O" in outs, KEEP="HS" in outs, END="FINAL" in outs,
            SPLIT=split, BULK=p.described(c), FINE=p.fine and "HS" not in outs,
            PRECISION=p.precision,
        ),
        **{"BK": configs.key_width(p.K), **c},
    )  # fmt: skip


def run_scan(p: Plan, q, k, v, ready: Ready, init, scale, table, **outs) -> None:
    """One :func:`scan.scan`; the outputs that are given are written."""
    A, AL, P, BS, *gated, GS, _ = ready
    BD = GD = None
    c = p.scan_keep if "HS" in outs else p.scan
    if p.described(c):
        q, k, v = read(p, c, q, k, v)
        tile = c.get("BK", p.K)
        # The outputs of one tile of keys go by pointers: 29 us of 293 less on an H200, while with
        # more tiles no registers are left for pointers.
        for n in ("D", "O") if tile < p.K else ("D",):
            if outs.get(n) is not None:
                (outs[n],) = described(p, c["BV"], outs[n])
        if "HS" in outs:
            outs["HS"] = states_of(p, c["BV"], tile, outs["HS"])
        A, AL, P, BD, GD, *gated = blocks(tile, A, AL, P, BS, gate_rows(p, GS), *gated)
    _scan(p, scale, init is not None, (*outs,))(
        q, k, v, A, AL, P, BS, BD, *gated, GS, GD, init, table,
        *[outs.get(n) for n in SCANNED],
    )  # fmt: skip


@bound
def _combine(p: Plan, init: bool, rows: tuple[int, int, int], back: bool) -> Launch:
    c, (local, links, link) = p.config("combine"), rows
    return combine.bind(
        (p.N * cdiv(p.V, c["BV"]), p.H), p.T, p.size, p.H,
        **p.switches(
            BK=configs.key_width(p.K) if p.K <= 128 else 64, LOCAL_ROWS=local, LINK_ROWS=links,
            LINK_ROW=link, HAS_INIT=init, BACK=back, PRECISION="tf32x3",
        ),
        **c,
    )  # fmt: skip


def forward(
    q, k, v, decay, beta, state, cu, *, scale: float, trains: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state, and the bytes that the backward pass takes over (:func:`keeps`); where
    ``trains`` says that it will come, they hold what it would else prepare again."""
    p = plan(q, k, v, decay, beta, cu)
    if not met(p, state is None, trains):
        inputs = (q, k, v, decay, beta, state, cu)

        def rehearsal() -> None:
            o, _, kept = forward(*inputs, scale=scale, trains=trains)
            if trains:
                backward(o, None, *inputs, kept, scale=scale)

        kernel.rehearse(rehearsal)
    o, final, kept = repeated(
        p, _forward, (scale, trains), q, k, v, decay, beta, state, *tables(p, cu)
    )
    return o, final, kept


def _forward(
    p: Plan, scale: float, trains: bool, q, k, v, decay, beta, state, table, first, chunk_table
) -> tuple[Tensor, Tensor, Tensor]:
    o = empty(v, p.B, p.T, p.H, p.V)
    final = empty(v, p.N, p.H, p.K, p.V, dtype=torch.float32)
    kept = empty(v, p.bytes(trains), dtype=torch.uint8)
    given = pieces(kept, keeps(p, trains))
    if p.plain:
        plain.forward(p, q, k, v, decay, state, table, first, chunk_table, scale, o, final, given)
        return o, final, kept
    ready = prepared(p, q, k, decay, beta, scale, chunk_table, p.fine, given)
    args = (p, q, k, v, ready)
    if p.split:
        starts, link = given["starts"], given["link"]
        rows, from_row = link_rows(p)
        local = link if p.delta else empty(v, p.segments, p.H, rows, p.K, dtype=torch.float32)
        run_scan(*args, state, scale, table, LOCAL=local, TOTAL=link)
        carry = _combine(p, state is not None, (rows, rows, from_row), False)
        carry(local, link, state, first, starts)
        state = starts
    run_scan(*args, state, scale, table, O=o, FINAL=final)
    return o, final, kept


def repeated(p: Plan, run: Callable[..., Any], kind: tuple[Any, ...], *inputs: Any) -> Any:
    """``run(p, *kind, *inputs)``, at the second call of its kind by what was recorded."""
    key = (run, kind, *[t is None for t in inputs])
    return kernel.repeated(p.repeats, key, partial(run, p, *kind), *inputs)


def met(p: Plan, *kind: Hashable) -> bool:
    """Whether a call of this kind came before, with this plan or another of its form."""
    if kind in p.met:
        return True
    found = kernel.met((p.form, *kind))
    p.met.add(kind)
    return found


def backward(
    do, dfinal, q, k, v, decay, beta, state, cu, kept, *, scale: float
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta (float32, or None) and state, each with all H heads."""
    p = plan(q, k, v, decay, beta, cu)
    if not met(p, state is None, dfinal is None, "backward"):
        inputs = (do, dfinal, q, k, v, decay, beta, state, cu, kept)
        kernel.rehearse(lambda: backward(*inputs, scale=scale))
    trained = kept.shape[0] == p.bytes(True)
    dq, dk, dv, dg, db, dstate = repeated(
        p, _backward, (scale, trained), do, dfinal, q, k, v, decay, beta, state, kept,
        *tables(p, cu),
    )  # fmt: skip
    if p.parts > 1:
        dg = dg if dg is None or p.decay == "channel" else dg.sum(0)
        db = None if db is None else db.sum(0)
    return dq, dk, dv, dg, db, dstate


def _backward(
    p: Plan, scale: float, trained: bool, do, dfinal, q, k, v, decay, beta, state, kept,
    table, first, chunk_table,
):  # fmt: skip
    given = pieces(kept, keeps(p, trained))
    if p.plain:
        return plain.backward(
            p, do, dfinal, q, k, v, decay, state, table, first, chunk_table, scale, given
        )
    if "A" in given:
        ready = Ready(**{n: t for n, t in given.items() if n in Ready._fields})
    else:
        ready = prepared(p, q, k, decay, beta, scale, chunk_table, False, {})
    starts, link = (given["starts"], given["link"]) if p.split else (None, None)
    # The states before every chunk are computed again: storing them costs more than the pass.
    before = empty(v, p.chunks, p.H, p.V, p.K)
    new = empty(v, p.B, p.T, p.H, p.V) if p.delta else None
    init = starts if p.split else state
    run_scan(p, q, k, v, ready, init, scale, table, HS=before, D=new)

    ends = dfinal
    if p.split:
        local = empty(v, p.segments, p.H, p.V, p.K, dtype=torch.float32)
        run_back(p, q, k, do, ready, None, scale, table, LOCAL=local)
        ends = empty(v, p.segments, p.H, p.K, p.V, dtype=torch.float32)
        rows, from_row = link_rows(p)
        carry = _combine(p, dfinal is not None, (p.V, rows, from_row), True)
        carry(local, link, dfinal, first, ends)
    after = empty(v, *before.shape)
    through = empty(v, p.B, p.T, p.H, p.V)
    dstate = empty(v, p.N, p.H, p.K, p.V, dtype=torch.float32)
    run_back(
        p, q, k, do, ready, ends, scale, table, OUT=through, HS=after, START=dstate
    )  # fmt: skip

    dq = empty(q, p.B, p.T, p.H, p.K)
    dk = empty(q, *dq.shape)
    dv = empty(v, *through.shape) if p.delta else through
    dg = db = None
    parts = (p.parts,) if p.parts > 1 else ()
    if p.decay == "channel":
        dg = empty(q, p.B, p.T, p.H, p.K, dtype=torch.float32)
    elif p.decay == "head":
        dg = empty(q, *parts, p.B, p.T, p.H, dtype=torch.float32)
    if p.delta:
        db = empty(q, *parts, p.B, p.T, p.H, dtype=torch.float32)
    da = y = None
    if not p.alone:
        da = empty(v, p.chunks, p.H, C, C)
        y = empty(v, *da.shape) if p.delta else None
        _score_grads(p, scale)(
            v, beta, do, new, through, ready.GS, chunk_table, da, y, dv, db
        )  # fmt: skip
    D, F, HS, DHS = new, through, before, after
    c = p.config("grads")
    if p.described(c):
        if new is None:
            do, v = described(p, c["BV"], do, v, width=c["BV"])
        else:
            do, D, F = described(p, c["BV"], do, new, through, width=c["BV"])
        HS, DHS = (states_of(p, c["BV"], c["BK"], t) for t in (HS, DHS))
    tensors = (
        q, k, v, decay, beta, do, D, through, F, HS, DHS, da, y, ready.GS, ready.FLAG,
        chunk_table, dq, dk, dv, dg, db,
    )  # fmt: skip
    _grads(p, scale, False)(*tensors)
    if ready.FLAG is not None:
        _grads(p, scale, True).where(ready.FLAG, *tensors)
    return dq, dk, dv, dg, db, None if state is None else dstate


@bound
def _score_grads(p: Plan, scale: float) -> Launch:
    return score_grads.bind(
        (p.chunks, p.H), scale, p.T, **p.pick("H", "HV", "HB"), V=p.V, C=C,
        DECAY=NAMES[p.decay], DELTA=p.delta, PACKED=p.packed, PRECISION=p.precision,
        **p.config("score_grads"),
    )  # fmt: skip


@bound
def _grads(p: Plan, scale: float, strong: bool) -> Launch:
    c = {"ALONE": p.alone, **p.config("grads")}
    bulk = p.described(c)
    if strong:  # as in _prepare
        c |= {"num_warps": 8, "num_stages": 1}
    return grads.bind(
        (p.chunks * p.H * p.parts,), scale, p.T, p.B * p.T * p.H,
        **p.heads,
        **p.switches(
            C=C, STRONG=strong, EXACT=p.exact, BULK=bulk, PRECISION=p.precision
        ),
        **c,
    )  # fmt: skip


@bound
def _scan_back(p: Plan, scale: float, init: bool, split: bool) -> Launch:
    c = p.config("scan_back")
    return scan_back.bind(
        (p.segments * cdiv(p.V, c["BV"]), p.H), scale, p.T, p.size,
        **p.pick("H", "HQ", "HK"),
        **p.switches(
            C=C, HAS_INIT=init, SPLIT=split, BULK=p.described(c),
            PRECISION=p.precision,
        ),
        **{"BK": configs.key_width(p.K), **c},
    )  # fmt: skip


def run_back(p: Plan, q, k, do, ready: Ready, init, scale, table, **outs) -> None:
    """One :func:`scan.scan_back`; the outputs that are given are written."""
    A, _, P, BS, *gated, GS, _ = ready
    BD = GD = None
    c = p.config("scan_back")
    if p.described(c):
        q, k, do = read(p, c, q, k, do)
        if "OUT" in outs and not (p.delta and p.decay == "channel"):
            (outs["OUT"],) = described(p, c["BV"], outs["OUT"])
            outs["HS"] = states_of(p, c["BV"], c.get("BK", p.K), outs["HS"])
        tile = c.get("BK", p.K)
        A, P, BD, GD, *gated = blocks(tile, A, P, BS, gate_rows(p, GS), *gated)
    _scan_back(p, scale, init is not None, "LOCAL" in outs)(
        q, k, do, A, P, BS, BD, *gated, GS, GD, init, table,
        *[outs.get(n) for n in ("OUT", "HS", "START", "LOCAL")],
    )  # fmt: skip


@bound
def _step(p: Plan, scale: float, init: bool) -> Launch:
    c = p.config("step")
    return step.bind(
        (p.N * cdiv(p.V, c["BV"]), p.H), scale, p.T, **p.heads,
        **p.switches(BK=configs.width(p.K), HAS_INIT=init), **c,
    )  # fmt: skip


def steps(q, k, v, decay, beta, state, cu, *, scale: float) -> tuple[Tensor, Tensor]:
    """The recurrent form, token by token, one launch."""
    p = plan(q, k, v, decay, beta, cu, whole=True)
    o = v.new_empty(p.B, p.T, p.H, p.V)
    final = v.new_empty(p.N, p.H, p.K, p.V, dtype=torch.float32)
    table = tables(p, cu).segments
    _step(p, scale, state is not None)(q, k, v, decay, beta, state, table, o, final)
    return o, final
