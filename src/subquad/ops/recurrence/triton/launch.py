"""From tensors to launches: the recurrence's forward and backward pass over its kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from subquad.ops.recurrence.triton import compiling, configs
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


@dataclass(frozen=True)
class Plan:
    """How one call is laid out: its sizes, its segments and its chunks."""

    B: int
    T: int
    H: int
    K: int
    V: int
    N: int
    decay: str
    delta: bool
    dtype: torch.dtype
    device: torch.device
    size: int  # tokens of a segment
    segments: int
    chunks: int
    table: Tensor | None = None
    chunk_table: Tensor | None = None
    first: Tensor | None = None

    @property
    def split(self) -> bool:
        return self.segments > self.N

    @property
    def fuse(self) -> bool:
        """Whether the passes compute the scores themselves: short sequences in one launch."""
        short = self.T <= SHORT or self.decay == "none"
        return short and self.decay != "channel" and not self.delta

    @cached_property
    def form(self) -> tuple:
        """What decides which kernels a call compiles, beside the inputs that are None."""
        return (
            self.K, self.V, self.decay, self.delta, self.dtype, self.device, self.table is None,
            self.split, self.fuse,
        )  # fmt: skip

    @property
    def precision(self) -> str:
        return "tf32x3" if self.dtype == torch.float32 else "tf32"

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
            "PACKED": self.table is not None, **more,
        }  # fmt: skip


@dataclass(frozen=True)
class Ready:
    """What :mod:`prepare` wrote, under its names; None where not needed."""

    A: Tensor | None = None
    M: Tensor | None = None
    P: Tensor | None = None
    W: Tensor | None = None
    QG: Tensor | None = None
    KG: Tensor | None = None
    GS: Tensor | None = None
    flag: Tensor | None = None


def plan(
    q: Tensor, k: Tensor, v: Tensor, decay, beta, cu, *, whole: bool = False, tables: bool = True
) -> Plan:
    """The layout of one call; the backward pass finds the same one again.

    A sequence is split where its heads and value blocks alone would leave the GPU idle, never if
    ``whole``. ``tables`` makes those of packed sequences.
    """
    B, T = q.shape[:2]
    K, V = int(q.shape[3]), int(v.shape[3])  # the kernels' constants, also while compiling
    H = max(t.shape[2] for t in (q, k, v, decay, beta) if t is not None)
    name = "none" if decay is None else "channel" if decay.dim() == 4 else "head"
    N = B if cu is None else cu.shape[0] - 1
    size = cdiv(T, C) * C
    if not whole:
        arch, shape = configs.arch(q.device), (name, beta is not None, K, V, q.dtype.itemsize)
        programs = N * H * cdiv(V, configs.config("scan", arch, *shape)["BV"])
        fill = configs.config("scan_split", arch, *shape)["fill"]
        size = segment_length(T, programs, configs.processors(q.device), fill)
    make = _plan if all(type(n) is int for n in (B, T, H, N, size)) else _plan.__wrapped__
    p = make(B, T, H, K, V, N, name, beta is not None, q.dtype, q.device, size, cu is not None)
    if cu is None or not tables:
        return p
    table, first = slots(cu, p.size, p.segments)
    return replace(p, table=table, first=first, chunk_table=slots(cu, C, p.chunks)[0])


@lru_cache(maxsize=256)
def _plan(B, T, H, K, V, N, decay, delta, dtype, device, size, packed) -> Plan:
    segments, chunks = B * cdiv(T, size), B * cdiv(T, C)
    if packed:
        segments, chunks = N + T // size, N + T // C
    return Plan(B, T, H, K, V, N, decay, delta, dtype, device, size, segments, chunks)


def segment_length(T: int, programs: int, processors: int, fill: int) -> int:
    """Tokens of a segment: all where ``programs`` fill the GPU, else so that each multiprocessor
    gets up to ``fill`` of them, but not under 1024, where the extra pass costs more than it gives.
    """
    parts = 1
    if programs * 4 < processors * 3:
        parts = min(fill * processors // programs, max(1, T // 1024))
    return cdiv(cdiv(T, parts), C) * C


def counts(p: Plan, q, k, v, decay, beta) -> dict:
    """Head counts of the inputs as the kernels' arguments."""
    d = p.H if decay is None else decay.shape[2]
    b = p.H if beta is None else beta.shape[2]
    return {"H": p.H, "HQ": q.shape[2], "HK": k.shape[2], "HV": v.shape[2], "HD": d, "HB": b}


def pick(sizes: dict, *names: str) -> dict:
    return {n: sizes[n] for n in names}


def prepared(p: Plan, q, k, decay, beta, scale: float, sizes: dict, back: bool) -> Ready:
    """What :mod:`prepare` writes; without a launch where the passes need none of it."""
    if p.fuse:
        return Ready()
    channel, chunks = p.decay == "channel", (p.chunks, p.H)

    def new(wanted: bool, *shape: int, dtype: torch.dtype = q.dtype) -> Tensor | None:
        return q.new_empty(*chunks, *shape, dtype=dtype) if wanted else None

    c = {"JOINED": False, **p.config("prepare")}
    flag = new(channel, dtype=torch.int32)
    scratch = new(p.delta and not c["JOINED"], C, 16, dtype=torch.float32)
    width = 3 * (p.K if channel else C)
    out = Ready(
        A=new(True, C, C),
        M=new(p.delta, C, C),
        P=new(p.delta and back, C, C),
        W=new(p.delta, C, p.K),
        QG=new(channel, C, p.K),
        KG=new(channel, C, p.K),
        GS=new(p.decay != "none", width, dtype=torch.float32),
        flag=flag,
    )
    for strong in (False, True) if channel else (False,):
        prepare[chunks](
            q, k, decay, beta, p.chunk_table, flag, scratch,
            out.A, out.M, out.P if back else out.M, out.W, out.QG, out.KG, out.GS, scale, p.T, back,
            **pick(sizes, "H", "HQ", "HK", "HD", "HB"),
            K=p.K, C=C, DECAY=NAMES[p.decay], DELTA=p.delta, PACKED=p.table is not None,
            STRONG=strong, LIMIT=LIMITS[p.dtype], EXACT=p.dtype == torch.float32,
            PRECISION=p.precision, **c,
        )  # fmt: skip
    return out


def run_scan(p: Plan, q, k, v, decay, ready: Ready, init, scale, sizes, **outs) -> None:
    """One :func:`scan.scan`; the outputs that are given are written."""
    c = p.scan
    blocks = cdiv(p.V, c["BV"])
    split = outs.get("LOCAL") is not None
    if split and p.delta:
        blocks += cdiv(p.K, c["BV"])
    scan[(p.segments * blocks, p.H)](
        q, k, v, decay, ready.A, ready.M, ready.W, ready.QG, ready.KG, ready.GS, init, p.table,
        *(outs.get(n) for n in ("O", "D", "HS", "FINAL", "LOCAL", "TOTAL")),
        scale, p.T, p.size, **pick(sizes, "H", "HQ", "HK", "HV", "HD"),
        **p.switches(
            C=C, BK=configs.key_width(p.K), HAS_INIT=init is not None, OUTPUT="O" in outs,
            KEEP="HS" in outs, END="FINAL" in outs, SPLIT=split, FUSE=p.fuse,
            FINE=p.fuse and p.dtype == torch.bfloat16,
            PRECISION=p.precision,
        ),
        **c,
    )  # fmt: skip


def run_combine(p: Plan, local, local_rows, link, link_rows, link_row, init, out, back) -> None:
    c = p.config("combine")
    combine[(p.N * cdiv(p.V, c["BV"]), p.H)](
        local, link, init, p.first, out, p.T, p.size, p.H,
        **p.switches(
            BK=configs.key_width(p.K), LOCAL_ROWS=local_rows, LINK_ROWS=link_rows,
            LINK_ROW=link_row, HAS_INIT=init is not None, BACK=back, PRECISION="tf32x3",
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
    if not compiling.met((p.form, state is None, trains)):
        inputs = (q, k, v, decay, beta, state, cu)

        def rehearsal() -> None:
            o, _, *kept = forward(*inputs, scale=scale)
            if trains:
                backward(o, None, *inputs, *kept, scale=scale)

        compiling.rehearse(rehearsal)
    sizes = counts(p, q, k, v, decay, beta)
    o = v.new_empty(p.B, p.T, p.H, p.V)
    final = v.new_empty(p.N, p.H, p.K, p.V, dtype=torch.float32)
    args = (p, q, k, v, decay, prepared(p, q, k, decay, beta, scale, sizes, back=False))
    starts, link = carried(p, v)
    if p.split:
        rows, from_row = link_rows(p)
        local = link if p.delta else v.new_empty(p.segments, p.H, rows, p.K, dtype=torch.float32)
        run_scan(*args, state, scale, sizes, LOCAL=local, TOTAL=link)
        run_combine(p, local, rows, link, rows, from_row, state, starts, back=False)
        state = starts
    run_scan(*args, state, scale, sizes, O=o, FINAL=final)
    return o, final, starts, link


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
    if not compiling.met((p.form, state is None, dfinal is None, "backward")):
        inputs = (do, dfinal, q, k, v, decay, beta, state, cu, starts, link)
        compiling.rehearse(lambda: backward(*inputs, scale=scale))
    sizes = counts(p, q, k, v, decay, beta)
    ready = prepared(p, q, k, decay, beta, scale, sizes, back=True)
    # The states before every chunk are computed again: storing them costs more than the pass.
    before = v.new_empty(p.chunks, p.H, p.V, p.K)
    new = v.new_empty(p.B, p.T, p.H, p.V) if p.delta else None
    init = starts if p.split else state
    run_scan(p, q, k, v, decay, ready, init, scale, sizes, HS=before, D=new)

    ends = dfinal
    if p.split:
        local = v.new_empty(p.segments, p.H, p.V, p.K, dtype=torch.float32)
        run_back(p, q, k, decay, do, ready, None, scale, sizes, LOCAL=local)
        ends = torch.empty_like(starts)
        rows, from_row = link_rows(p)
        run_combine(p, local, p.V, link, rows, from_row, dfinal, ends, back=True)
    after = torch.empty_like(before)
    through = v.new_empty(p.B, p.T, p.H, p.V)
    dstate = v.new_empty(p.N, p.H, p.K, p.V, dtype=torch.float32)
    run_back(
        p, q, k, decay, do, ready, ends, scale, sizes, OUT=through, HS=after, START=dstate
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
    c = p.config("grads")
    if c["BK"] < p.K:
        da = v.new_empty(p.chunks, p.H, C, C)
        y = torch.empty_like(da) if p.delta else None
        score_grads[(p.chunks, p.H)](
            v, decay, beta, do, new, through, ready.GS, p.chunk_table, da, y, dv, db, scale, p.T,
            **pick(sizes, "H", "HV", "HD", "HB"), V=p.V, C=C, DECAY=NAMES[p.decay],
            DELTA=p.delta, PACKED=p.table is not None, FUSE=p.fuse, PRECISION=p.precision,
            **p.config("score_grads"),
        )  # fmt: skip
    for strong in (False, True) if p.decay == "channel" else (False,):
        grads[(p.chunks, p.H)](
            q, k, v, decay, beta, do, new, through, before, after, da, y, ready.GS, ready.flag,
            p.chunk_table, dq, dk, dv, dg, db, scale, p.T, **sizes,
            **p.switches(
                C=C, STRONG=strong, FUSE=p.fuse, EXACT=p.dtype == torch.float32,
                PRECISION=p.precision,
            ),
            **c,
        )  # fmt: skip
    return dq, dk, dv, dg, db, dstate


def run_back(p: Plan, q, k, decay, do, ready: Ready, init, scale, sizes, **outs) -> None:
    """One :func:`scan.scan_back`; the outputs that are given are written."""
    c = p.config("scan_back")
    scan_back[(p.segments * cdiv(p.V, c["BV"]), p.H)](
        q, k, decay, do, ready.A, ready.P, ready.W, ready.QG, ready.KG, ready.GS, init, p.table,
        *(outs.get(n) for n in ("OUT", "HS", "START", "LOCAL")),
        scale, p.T, p.size, **pick(sizes, "H", "HQ", "HK", "HD"),
        **p.switches(
            C=C, BK=configs.key_width(p.K), HAS_INIT=init is not None, SPLIT="LOCAL" in outs,
            FUSE=p.fuse, PRECISION=p.precision,
        ),
        **c,
    )  # fmt: skip


def steps(q, k, v, decay, beta, state, cu, *, scale: float) -> tuple[Tensor, Tensor]:
    """The recurrent form, token by token, one launch."""
    p = plan(q, k, v, decay, beta, cu, whole=True)
    o = v.new_empty(p.B, p.T, p.H, p.V)
    final = v.new_empty(p.N, p.H, p.K, p.V, dtype=torch.float32)
    c = p.config("step")
    step[(p.N * cdiv(p.V, c["BV"]), p.H)](
        q, k, v, decay, beta, state, p.table, o, final, scale, p.T,
        **counts(p, q, k, v, decay, beta),
        **p.switches(BK=configs.width(p.K), HAS_INIT=state is not None), **c,
    )  # fmt: skip
    return o, final
