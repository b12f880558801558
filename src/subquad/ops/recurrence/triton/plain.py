"""Launches of the recurrence without the delta rule, decays per head or none (:mod:`states`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.kernel import Launch
from subquad.ops.recurrence.triton import configs
from subquad.ops.recurrence.triton.gradients import gradients
from subquad.ops.recurrence.triton.layout import (
    C,
    Plan,
    bound,
    cdiv,
    described,
    states_of,
)
from subquad.ops.recurrence.triton.states import decays, join, states
from subquad.ops.sizes import processors
from subquad.ops.tape import empty


@bound
def _decays(p: Plan) -> Launch:
    HD = p.heads["HD"]
    BH = min(16, configs.width(HD))
    return decays.bind(
        (p.chunks, cdiv(HD, BH)), p.T, HD, C=C, BH=BH, PACKED=p.packed, num_warps=4
    )  # fmt: skip


def tiles(p: Plan, output: bool) -> dict[str, int]:
    """The configuration of a pass: with outputs a program has all key channels, and reads further
    ahead if it has a multiprocessor ``alone``."""
    if not output:
        return {n: x for n, x in p.config("states").items() if n != "fill"}
    c = {"BK": min(64 if p.exact else 128, configs.key_width(p.K)), **p.config("outputs")}
    alone = c.pop("alone", c["num_stages"])
    if p.segments * cdiv(p.V, c["BV"]) * p.H <= processors(p.device):
        c["num_stages"] = alone
    return c


@bound
def _states(
    p: Plan, scale: float, init: str, keep: bool, output: bool, split: bool, back: bool
) -> Launch:
    """``init``: "", "given" or "carried"."""
    c, H = tiles(p, output), p.heads
    columns = 1 if output else cdiv(p.K, c["BK"])
    heads = (p.H, H["HQ"], H["HQ"]) if back else (H["HV"], H["HK"], H["HQ"])
    early = output and p.bulk and c["BK"] >= p.K and c["num_stages"] == 2
    return states.bind(
        (p.segments * cdiv(p.V, c["BV"]) * columns, p.H), scale, p.T, p.size, p.H,
        *heads, H["HD"], K=p.K, V=p.V, C=C, DECAY=p.decay == "head", PACKED=p.packed,
        HAS_INIT=bool(init), CARRIED=init == "carried", KEEP=keep, OUTPUT=output,
        FINE=p.dtype == torch.bfloat16, SPLIT=split, BACK=back, BULK=p.bulk, EARLY=early,
        PRECISION=p.precision, **c,
    )  # fmt: skip


@bound
def _join(p: Plan, init: bool, back: bool) -> Launch:
    c = p.config("combine")
    return join.bind(
        (p.N * cdiv(p.V, c["BV"]), p.H), p.T, p.size, p.H, K=p.K, V=p.V, BK=configs.width(p.K),
        PACKED=p.packed, HAS_INIT=init, BACK=back, **c,
    )  # fmt: skip


@bound
def _gradients(p: Plan, scale: float) -> Launch:
    o = p.config("gradients")
    return gradients.bind(
        ((p.parts + cdiv(p.V, o["BV"])) * p.H * p.chunks,), scale, p.T, p.B * p.T * p.H,
        *p.pick("H", "HQ", "HK", "HV", "HD").values(), K=p.K, V=p.V, C=C,
        DECAY=p.decay == "head", PACKED=p.packed, BULK=p.bulk, PRECISION=p.precision, **o,
    )  # fmt: skip


def run_states(
    p: Plan, scale: float, kind: str, x, y, q, G, init, table, HS, O, local, link, last, back=False
) -> None:
    """One :func:`states.states`; the outputs that are given are written."""
    keep, output = HS is not None, O is not None
    if p.bulk:
        c = tiles(p, output)
        y, x = described(p, c["BV"], y, x, width=c["BK"])
        HS = states_of(p, c["BV"], c["BK"], HS) if keep else None
        if output:
            q, O = described(p, c["BV"], q, O, width=c["BK"])
    _states(p, scale, kind, keep, output, local is not None, back)(
        x, y, q, G, init, table, HS, O, local, link, last
    )


def summed(p: Plan, decay, table) -> Tensor | None:
    """What :func:`states.decays` writes."""
    if decay is None:
        return None
    G = empty(decay, p.chunks, p.heads["HD"], C)
    _decays(p)(decay, table, G)
    return G


def _segments(p: Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what each segment adds to the state, and for its decay."""
    local = empty(like, p.segments, p.H, p.V, p.K, dtype=torch.float32)
    return local, empty(like, p.segments, p.H, dtype=torch.float32)


def forward(
    p: Plan, q, k, v, decay, state, table, first, chunk_table, scale: float, o, final, kept
) -> None:
    """Write o, the final state, and of a split sequence the states before its segments."""
    G = summed(p, decay, chunk_table)
    kind, init = ("", None) if state is None else ("given", state)
    if p.split:
        starts = kept["starts"]
        local, link = _segments(p, v)
        run_states(p, scale, "", v, k, None, G, None, table, None, None, local, link, None)
        _join(p, state is not None, False)(local, link, state, first, starts)
        kind, init = "carried", starts
    run_states(p, scale, kind, v, k, q, G, init, table, None, o, None, None, final)


def backward(
    p: Plan, do, dfinal, q, k, v, decay, state, table, first, chunk_table, scale: float, kept
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay (of each block of key channels), beta (None) and state."""
    G = summed(p, decay, chunk_table)
    before = empty(v, p.chunks, p.H, p.V, p.K)
    after = empty(v, *before.shape)
    dstate = empty(v, p.N, p.H, p.K, p.V, dtype=torch.float32)
    kind, init = ("", None) if state is None else ("given", state)
    if p.split:
        kind, init = "carried", kept["starts"]
    run_states(p, scale, kind, v, k, None, G, init, table, before, None, None, None, None)
    kind, ends = ("", None) if dfinal is None else ("given", dfinal)
    if p.split:
        local, link = _segments(p, v)
        ends = empty(v, *local.shape, dtype=torch.float32)
        run_states(
            p, scale, "", do, q, None, G, None, table, None, None, local, link, None, back=True
        )
        _join(p, dfinal is not None, True)(local, link, dfinal, first, ends)
        kind = "carried"
    run_states(
        p, scale, kind, do, q, None, G, ends, table, after, None, None, None, dstate, back=True
    )
    dq, dk = empty(q, p.B, p.T, p.H, p.K), empty(q, p.B, p.T, p.H, p.K)
    dv = empty(v, p.B, p.T, p.H, p.V)
    parts = (p.parts,) if p.parts > 1 else ()
    dg = None if decay is None else empty(q, *parts, p.B, p.T, p.H, dtype=torch.float32)
    read: list[Any] = [q, k, v, do]
    states_read: list[Any] = [before, after]
    if p.bulk:
        c = p.config("gradients")
        states_read = [states_of(p, c["BV"], c["BK"], t) for t in states_read]
        read = [described(p, w, t)[0] for t, w in zip(read, [c["BK"]] * 2 + [c["BV"]] * 2)]
    _gradients(p, scale)(q, k, v, do, *states_read, G, chunk_table, *read, dq, dk, dv, dg)
    return dq, dk, dv, dg, None, None if state is None else dstate
