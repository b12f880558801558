"""From tensors to launches: the recurrence's forward and backward pass over its kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops import kernel
from subquad.ops.kernel import Launch
from subquad.ops.recurrence.triton import configs
from subquad.ops.recurrence.triton.grads import grads, score_grads
from subquad.ops.recurrence.triton.prepare import prepare
from subquad.ops.recurrence.triton.scan import combine, scan, scan_back
from subquad.ops.recurrence.triton.step import step

C = 64  # rows of a chunk
SHORT = 4096  # tokens up to which a launch weighs more than computing the scores twice
NAMES = {"none": 0, "head": 1, "channel": 2}
# exp(LIMIT) and its inverse times an input stay representable (see prepare.py).
LIMITS = {torch.float16: 6.0, torch.bfloat16: 80.0, torch.float32: 80.0}


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up (triton.cdiv costs microseconds on the host)."""
    return -(-a // b)


def slots(cu: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Cut packed sequences into segments of ``size`` tokens, without asking the device anything.

    Returns the table int32 ``[count,6]`` that ``parts.segment`` reads (first token, end, sequence,
    opens, closes, first chunk; the surplus rows are empty) and the first segment of each sequence,
    int32 ``[N+1]``. Every sequence has a segment, an empty one too.
    """
    cu = cu.long()
    lengths = cu.diff()
    parts = ((lengths + size - 1) // size).clamp_min(1)
    chunks = (lengths + C - 1) // C
    first = torch.cat([cu.new_zeros(1), parts.cumsum(0)])
    first_chunk = chunks.cumsum(0) - chunks
    slot = torch.arange(count, device=cu.device)
    which = torch.searchsorted(first[1:].contiguous(), slot, right=True).clamp_max(len(parts) - 1)
    part = slot - first[which]
    real = slot < first[-1]
    start = torch.where(real, cu[which] + part * size, cu[-1])
    end = torch.where(real, torch.minimum(start + size, cu[which + 1]), cu[-1])
    opens = real & (part == 0)
    closes = real & (part == parts[which] - 1)
    chunk = first_chunk[which] + part * (size // C if size % C == 0 else 0)
    columns = torch.stack([start, end, which, opens.long(), closes.long(), chunk], 1)
    return columns.int().contiguous(), first.int()


@dataclass(frozen=True, eq=False)
class Plan:
    """How calls of one shape are laid out: sizes, segments and chunks, head counts of the inputs as
    the kernels' arguments, and the launches made so far."""

    B: int
    T: int
    H: int
    K: int
    V: int
    N: int
    decay: str
    delta: bool
    packed: bool
    dtype: torch.dtype
    device: torch.device
    size: int  # tokens of a segment
    segments: int
    chunks: int
    heads: dict[str, int]
    launches: dict[Hashable, Launch] = field(default_factory=dict)
    met: set[Hashable] = field(default_factory=set)

    @property
    def split(self) -> bool:
        return self.segments > self.N

    @cached_property
    def fuse(self) -> bool:
        """Whether the passes compute the scores themselves: short sequences in one launch."""
        short = self.T <= SHORT or self.decay == "none"
        return short and self.decay != "channel" and not self.delta

    @cached_property
    def form(self) -> tuple:
        """What decides which kernels a call compiles, beside the inputs that are None."""
        return (
            self.K, self.V, self.decay, self.delta, self.dtype, self.device, self.packed,
            self.split, self.fuse,
        )  # fmt: skip

    @property
    def precision(self) -> str:
        return "tf32x3" if self.dtype == torch.float32 else "tf32"

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def config(self, kernel: str) -> configs.Config:
        return configs.config(
            kernel, configs.arch(self.device), self.decay, self.delta, self.K, self.V,
            self.dtype.itemsize,
        )  # fmt: skip

    @property
    def scan(self) -> configs.Config:
        c = self.config("scan_split" if self.split else "scan")
        return {n: x for n, x in c.items() if n != "fill"}

    def switches(self, **more) -> dict:
        return {
            "K": self.K, "V": self.V, "DECAY": NAMES[self.decay], "DELTA": self.delta,
            "PACKED": self.packed, **more,
        }  # fmt: skip

    def pick(self, *names: str) -> dict[str, int]:
        return {n: self.heads[n] for n in names}


class Tables(NamedTuple):
    """Where the segments and chunks of packed sequences lie (see :func:`slots`), or None."""

    segments: Tensor | None = None
    first: Tensor | None = None
    chunks: Tensor | None = None


class Ready(NamedTuple):
    """What :mod:`prepare` wrote, under its names; None where not needed."""

    A: Tensor | None = None
    M: Tensor | None = None
    P: Tensor | None = None
    W: Tensor | None = None
    QG: Tensor | None = None
    KG: Tensor | None = None
    GS: Tensor | None = None
    flag: Tensor | None = None


def plan(q: Tensor, k: Tensor, v: Tensor, decay, beta, cu, *, whole: bool = False) -> Plan:
    """The layout of one call; the backward pass finds the same one again."""
    return lay_out(*shapes(q, k, v, decay, beta, cu), whole, configs.forcings())


def shapes(q, k, v, decay, beta, cu) -> tuple:
    """The first arguments of :func:`lay_out`."""
    return (
        q.shape, k.shape[2], v.shape, None if decay is None else decay.shape,
        None if beta is None else beta.shape[2], None if cu is None else cu.shape[0] - 1,
        q.dtype, q.device,
    )  # fmt: skip


@lru_cache(maxsize=256)
def lay_out(q, k_heads, v, decay, beta_heads, sequences, dtype, device, whole, _=0) -> Plan:
    """The plan of calls of these shapes (None where an input is).

    A sequence is split where its heads and value blocks alone would leave the GPU idle, never if
    ``whole``. The last argument tells forced configurations apart.
    """
    B, T = q[:2]
    K, V = int(q[3]), int(v[3])  # the kernels' constants, also while compiling
    given = {"HQ": q[2], "HK": k_heads, "HV": v[2]}
    if decay is not None:
        given["HD"] = decay[2]
    if beta_heads is not None:
        given["HB"] = beta_heads
    H = max(given.values())
    name = "none" if decay is None else "channel" if len(decay) == 4 else "head"
    packed, delta = sequences is not None, beta_heads is not None
    N = sequences if packed else B
    size = cdiv(T, C) * C
    if not whole:
        arch, shape = configs.arch(device), (name, delta, K, V, dtype.itemsize)
        programs = N * H * cdiv(V, configs.config("scan", arch, *shape)["BV"])
        fill = configs.config("scan_split", arch, *shape)["fill"]
        size = segment_length(T, programs, configs.processors(device), fill)
    segments, chunks = B * cdiv(T, size), B * cdiv(T, C)
    if packed:
        segments, chunks = N + T // size, N + T // C
    return Plan(
        B, T, H, K, V, N, name, delta, packed, dtype, device, size, segments, chunks,
        {"H": H, "HD": H, "HB": H, **given},
    )  # fmt: skip


def segment_length(T: int, programs: int, processors: int, fill: int) -> int:
    """Tokens of a segment: all where ``programs`` fill the GPU, else so that each multiprocessor
    gets up to ``fill`` of them, but not under 1024, where the extra pass costs more than it gives.
    """
    parts = 1
    if programs * 4 < processors * 3:
        parts = min(fill * processors // programs, max(1, T // 1024))
    return cdiv(cdiv(T, parts), C) * C


def tables(p: Plan, cu: Tensor | None) -> Tables:
    if cu is None:
        return Tables()
    table, first = slots(cu, p.size, p.segments)
    return Tables(table, first, slots(cu, C, p.chunks)[0])


def bound(make: Callable[..., Launch]) -> Callable[..., Launch]:
    """The launch that ``make(plan, *switches)`` binds, made once for a plan and its switches."""

    def find(p: Plan, *switches: Hashable) -> Launch:
        found = p.launches.get((make, *switches))
        if found is None:
            found = p.launches[make, *switches] = make(p, *switches)
        return found

    return find


@bound
def _prepare(p: Plan, scale: float, back: bool, strong: bool) -> Launch:
    return prepare.bind(
        (p.chunks, p.H), scale, p.T, back, **p.pick("H", "HQ", "HK", "HD", "HB"),
        K=p.K, C=C, DECAY=NAMES[p.decay], DELTA=p.delta, PACKED=p.packed, STRONG=strong,
        LIMIT=LIMITS[p.dtype], EXACT=p.exact, PRECISION=p.precision,
        **{"JOINED": False, **p.config("prepare")},
    )  # fmt: skip


def prepared(p: Plan, q, k, decay, beta, scale: float, table, back: bool) -> Ready:
    """What :mod:`prepare` writes; without a launch where the passes need none of it."""
    if p.fuse:
        return Ready()
    channel, delta, chunks, float32 = p.decay == "channel", p.delta, (p.chunks, p.H), torch.float32
    joined = p.config("prepare").get("JOINED", False)

    def new(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return q.new_empty(*chunks, *shape, dtype=dtype)

    scratch = new(C, 16, dtype=float32) if delta and not joined else None
    M = new(C, C) if delta else None
    out = Ready(
        A=new(C, C),
        M=M,
        P=new(C, C) if delta and back else M,
        W=new(C, p.K) if delta else None,
        QG=new(C, p.K) if channel else None,
        KG=new(C, p.K) if channel else None,
        GS=None if p.decay == "none" else new(3 * (p.K if channel else C), dtype=float32),
        flag=new(dtype=torch.int32) if channel else None,
    )
    for strong in (False, True) if channel else (False,):
        _prepare(p, scale, back, strong)(
            q, k, decay, beta, table, out.flag, scratch, *out[:7]
        )  # fmt: skip
    return out


SCANNED = ("O", "D", "HS", "FINAL", "LOCAL", "TOTAL")  # what scan may write


@bound
def _scan(p: Plan, scale: float, init: bool, outs: tuple[str, ...]) -> Launch:
    c, split = p.scan, "LOCAL" in outs
    blocks = cdiv(p.V, c["BV"])
    if split and p.delta:
        blocks += cdiv(p.K, c["BV"])
    return scan.bind(
        (p.segments * blocks, p.H), scale, p.T, p.size, **p.pick("H", "HQ", "HK", "HV", "HD"),
        **p.switches(
            C=C, BK=configs.key_width(p.K), HAS_INIT=init, OUTPUT="O" in outs, KEEP="HS" in outs,
            END="FINAL" in outs, SPLIT=split, FUSE=p.fuse,
            FINE=p.fuse and p.dtype == torch.bfloat16, PRECISION=p.precision,
        ),
        **c,
    )  # fmt: skip


def run_scan(p: Plan, q, k, v, decay, ready: Ready, init, scale, table, **outs) -> None:
    """One :func:`scan.scan`; the outputs that are given are written."""
    _scan(p, scale, init is not None, (*outs,))(
        q, k, v, decay, ready.A, ready.M, ready.W, ready.QG, ready.KG, ready.GS, init, table,
        *[outs.get(n) for n in SCANNED],
    )  # fmt: skip


@bound
def _combine(p: Plan, init: bool, rows: tuple[int, int, int], back: bool) -> Launch:
    c, (local, links, link) = p.config("combine"), rows
    return combine.bind(
        (p.N * cdiv(p.V, c["BV"]), p.H), p.T, p.size, p.H,
        **p.switches(
            BK=configs.key_width(p.K), LOCAL_ROWS=local, LINK_ROWS=links, LINK_ROW=link,
            HAS_INIT=init, BACK=back, PRECISION="tf32x3",
        ),
        **c,
    )  # fmt: skip


def forward(
    q, k, v, decay, beta, state, cu, *, scale: float, trains: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, and for the backward pass of a split sequence the states before its
    segments and their transitions (empty where nothing is split). ``trains`` says that the backward
    pass will come, and only matters to what the first call compiles."""
    p = plan(q, k, v, decay, beta, cu)
    if not met(p, state is None, trains):
        inputs = (q, k, v, decay, beta, state, cu)

        def rehearsal() -> None:
            o, _, *kept = forward(*inputs, scale=scale)
            if trains:
                backward(o, None, *inputs, *kept, scale=scale)

        kernel.rehearse(rehearsal)
    table, first, chunk_table = tables(p, cu)
    o = v.new_empty(p.B, p.T, p.H, p.V)
    final = v.new_empty(p.N, p.H, p.K, p.V, dtype=torch.float32)
    args = (p, q, k, v, decay, prepared(p, q, k, decay, beta, scale, chunk_table, back=False))
    starts, link = carried(p, v)
    if p.split:
        rows, from_row = link_rows(p)
        local = link if p.delta else v.new_empty(p.segments, p.H, rows, p.K, dtype=torch.float32)
        run_scan(*args, state, scale, table, LOCAL=local, TOTAL=link)
        carry = _combine(p, state is not None, (rows, rows, from_row), False)
        carry(local, link, state, first, starts)
        state = starts
    run_scan(*args, state, scale, table, O=o, FINAL=final)
    return o, final, starts, link


def met(p: Plan, *kind: Hashable) -> bool:
    """Whether a call of this kind came before, with this plan or another of its form."""
    if kind in p.met:
        return True
    found = kernel.met((p.form, *kind))
    p.met.add(kind)
    return found


def carried(p: Plan, v: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for :func:`forward`'s last two results."""
    if not p.split:
        return v.new_empty(0, dtype=torch.float32), v.new_empty(0, dtype=torch.float32)
    starts = v.new_empty(p.segments, p.H, p.K, p.V, dtype=torch.float32)
    if p.delta:
        return starts, starts.new_empty(p.segments, p.H, link_rows(p)[0], p.K)
    return starts, starts.new_empty(p.segments, p.H, p.K if p.decay == "channel" else 1)


def link_rows(p: Plan) -> tuple[int, int]:
    """Rows of a segment's result, and the first of those that hold its transition."""
    block = p.scan["BV"]
    values = cdiv(p.V, block) * block
    return values + (cdiv(p.K, block) * block if p.delta else 0), values


def backward(
    do, dfinal, q, k, v, decay, beta, state, cu, starts, link, *, scale: float
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta (float32, or None) and state, each with all H heads."""
    p = plan(q, k, v, decay, beta, cu)
    if not met(p, state is None, dfinal is None, "backward"):
        inputs = (do, dfinal, q, k, v, decay, beta, state, cu, starts, link)
        kernel.rehearse(lambda: backward(*inputs, scale=scale))
    table, first, chunk_table = tables(p, cu)
    ready = prepared(p, q, k, decay, beta, scale, chunk_table, back=True)
    # The states before every chunk are computed again: storing them costs more than the pass.
    before = v.new_empty(p.chunks, p.H, p.V, p.K)
    new = v.new_empty(p.B, p.T, p.H, p.V) if p.delta else None
    init = starts if p.split else state
    run_scan(p, q, k, v, decay, ready, init, scale, table, HS=before, D=new)

    ends = dfinal
    if p.split:
        local = v.new_empty(p.segments, p.H, p.V, p.K, dtype=torch.float32)
        run_back(p, q, k, decay, do, ready, None, scale, table, LOCAL=local)
        ends = torch.empty_like(starts)
        rows, from_row = link_rows(p)
        carry = _combine(p, dfinal is not None, (p.V, rows, from_row), True)
        carry(local, link, dfinal, first, ends)
    after = torch.empty_like(before)
    through = v.new_empty(p.B, p.T, p.H, p.V)
    dstate = v.new_empty(p.N, p.H, p.K, p.V, dtype=torch.float32)
    run_back(
        p, q, k, decay, do, ready, ends, scale, table, OUT=through, HS=after, START=dstate
    )  # fmt: skip

    dq = q.new_empty(p.B, p.T, p.H, p.K)
    dk = torch.empty_like(dq)
    dv = torch.empty_like(through) if p.delta else through
    dg = db = None
    if p.decay != "none":
        shape = (p.B, p.T, p.H, p.K)[: decay.dim()]
        dg = q.new_empty(shape, dtype=torch.float32)
    if p.delta:
        db = q.new_empty(p.B, p.T, p.H, dtype=torch.float32)
    da = y = None
    if p.config("grads")["BK"] < p.K:
        da = v.new_empty(p.chunks, p.H, C, C)
        y = torch.empty_like(da) if p.delta else None
        _score_grads(p, scale)(
            v, decay, beta, do, new, through, ready.GS, chunk_table, da, y, dv, db
        )  # fmt: skip
    for strong in (False, True) if p.decay == "channel" else (False,):
        _grads(p, scale, strong)(
            q, k, v, decay, beta, do, new, through, before, after, da, y, ready.GS, ready.flag,
            chunk_table, dq, dk, dv, dg, db,
        )  # fmt: skip
    return dq, dk, dv, dg, db, dstate


@bound
def _score_grads(p: Plan, scale: float) -> Launch:
    return score_grads.bind(
        (p.chunks, p.H), scale, p.T, **p.pick("H", "HV", "HD", "HB"), V=p.V, C=C,
        DECAY=NAMES[p.decay], DELTA=p.delta, PACKED=p.packed, FUSE=p.fuse, PRECISION=p.precision,
        **p.config("score_grads"),
    )  # fmt: skip


@bound
def _grads(p: Plan, scale: float, strong: bool) -> Launch:
    return grads.bind(
        (p.chunks, p.H), scale, p.T, **p.heads,
        **p.switches(C=C, STRONG=strong, FUSE=p.fuse, EXACT=p.exact, PRECISION=p.precision),
        **p.config("grads"),
    )  # fmt: skip


@bound
def _scan_back(p: Plan, scale: float, init: bool, split: bool) -> Launch:
    c = p.config("scan_back")
    return scan_back.bind(
        (p.segments * cdiv(p.V, c["BV"]), p.H), scale, p.T, p.size,
        **p.pick("H", "HQ", "HK", "HD"),
        **p.switches(
            C=C, BK=configs.key_width(p.K), HAS_INIT=init, SPLIT=split, FUSE=p.fuse,
            PRECISION=p.precision,
        ),
        **c,
    )  # fmt: skip


def run_back(p: Plan, q, k, decay, do, ready: Ready, init, scale, table, **outs) -> None:
    """One :func:`scan.scan_back`; the outputs that are given are written."""
    _scan_back(p, scale, init is not None, "LOCAL" in outs)(
        q, k, decay, do, ready.A, ready.P, ready.W, ready.QG, ready.KG, ready.GS, init, table,
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
