"""How a call of the recurrence is laid out: sizes, segments and chunks, by its shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from subquad.ops import kernel, tape
from subquad.ops.kernel import Launch
from subquad.ops.recurrence.triton import configs
from subquad.ops.sizes import processors

C = 64  # rows of a chunk
MANY = 8192  # chunks of a head of 128 channels from which on describing tensors pays (see bulk)
NAMES = {"none": 0, "head": 1, "channel": 2}


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


def goes_plain(decay: str, delta: bool) -> bool:
    """Whether nothing but the state goes from chunk to chunk (:mod:`states`)."""
    return not delta and decay != "channel"


@dataclass(frozen=True, eq=False)
class Plan:
    """How calls of one shape are laid out: sizes, segments and chunks, head counts of the inputs as
    the kernels' arguments, and the launches calls made so far."""

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
    repeats: dict[Hashable, tape.Repeat | None] = field(default_factory=dict)
    met: set[Hashable] = field(default_factory=set)

    @property
    def split(self) -> bool:
        return self.segments > self.N

    @cached_property
    def plain(self) -> bool:
        """See :func:`goes_plain`."""
        return goes_plain(self.decay, self.delta)

    @cached_property
    def fine(self) -> bool:
        """Whether the outputs' operands enter as two bfloat16 (see :mod:`scan`)."""
        return self.dtype == torch.bfloat16

    @cached_property
    def bulk(self) -> bool:
        """Whether tiles may go by the copy engine: whole chunks, full tiles, and so much work that
        describing tensors to it pays."""
        return (
            not self.packed and self.T % C == 0
            and self.K == self.V and self.K in (128, 256) and self.dtype != torch.float32
            and self.chunks * self.H * self.K * self.V >= MANY * 128 * 128
            and (not self.plain or self.config("outputs")["num_stages"] > 1)
            and configs.copy_engine(self.device)
        )  # fmt: skip

    def described(self, c: configs.Config) -> bool:
        """Whether a kernel of this configuration is given descriptors: one that reads ahead."""
        return self.bulk and c["num_stages"] > 1

    @cached_property
    def bulk_prepare(self) -> bool:
        """Whether prepare reads so: a tile of all channels, or several that are read ahead."""
        if not self.bulk:
            return False
        c = self.config("prepare")
        return c["BK"] >= self.K or c["num_stages"] > 1

    @cached_property
    def alone(self) -> bool:
        """Whether a chunk's gradients take one kernel, not two."""
        c = self.config("grads")
        return bool(c.get("ALONE", c["BK"] >= self.K))

    @cached_property
    def parts(self) -> int:
        """Programs of a chunk's gradients, each with its share of the key channels."""
        return cdiv(self.K, self.config("gradients" if self.plain else "grads")["BK"])

    @cached_property
    def form(self) -> tuple:
        """What decides which kernels a call compiles, beside the inputs that are None."""
        return (
            self.K, self.V, self.decay, self.delta, self.dtype, self.device, self.packed,
            self.split, self.bulk,
        )  # fmt: skip

    def bytes(self, trains: bool) -> int:
        """Memory for what a backward pass takes over."""
        return self.kept_in_training if trains else tape.size(keeps(self, False))

    @cached_property
    def kept_in_training(self) -> int:
        return tape.size(keeps(self, True))

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

    @property
    def scan_keep(self) -> configs.Config:
        """Of the pass that keeps what the gradients need; it has no outputs."""
        return self.config("scan_keep") or self.scan

    def switches(self, **more) -> dict:
        return {
            "K": self.K, "V": self.V, "DECAY": NAMES[self.decay], "DELTA": self.delta,
            "PACKED": self.packed, **more,
        }  # fmt: skip

    def pick(self, *names: str) -> dict[str, int]:
        return {n: self.heads[n] for n in names}


def link_rows(p: Plan) -> tuple[int, int]:
    """Rows of a segment's result, and the first of those that hold its transition."""
    block = p.scan["BV"]
    values = cdiv(p.V, block) * block
    return values + (cdiv(p.K, block) * block if p.delta else 0), values


def ready(p: Plan) -> tape.Shapes:
    """What :mod:`prepare` writes for either pass."""
    chunks, float32 = (p.chunks, p.H), torch.float32
    square, gated = ((*chunks, C, C), p.dtype), ((*chunks, C, p.K), p.dtype)
    found: tape.Shapes = {"A": square}
    if p.delta:
        found |= {"P": square, "BS": ((*chunks, C), float32)}
    if p.decay == "head":
        found["GS"] = ((*chunks, 3 * C), float32)
    if p.decay == "channel":
        found |= {"QG": gated, "KG": gated, "GS": ((*chunks, 3 * p.K + 4), float32)}
        found["FLAG"] = (chunks, torch.int32)
        if p.delta:
            found["KW"] = gated
    return found


def keeps(p: Plan, trains: bool) -> tape.Shapes:
    """What the backward pass takes over: for a split sequence the states before its segments and
    their transitions; if it ``trains`` what is :func:`ready`, too."""
    found: tape.Shapes = {}
    if p.split:
        float32, heads = torch.float32, (p.segments, p.H)
        rows = (link_rows(p)[0], p.K) if p.delta else (p.K if p.decay == "channel" else 1,)
        found["starts"] = (*heads, p.K, p.V), float32
        if not p.plain:
            found["link"] = (*heads, *rows), float32
    if trains and not p.plain:
        found |= ready(p)
    return found


def bound(make: Callable[..., Launch]) -> Callable[..., Launch]:
    """The launch that ``make(plan, *switches)`` binds, made once for a plan and its switches."""

    def find(p: Plan, *switches: Hashable) -> Launch:
        found = p.launches.get((make, *switches))
        if found is None:
            if len(p.launches) >= kernel.MOST_LAUNCHES:
                p.launches.clear()
            found = p.launches[make, *switches] = make(p, *switches)
        return found

    return find


def described(p: Plan, BV: int, *tensors: Tensor, width: int = 0) -> list[TensorDescriptor]:
    """Descriptors of chunks' rows, a head each: ``width`` (K) columns, of the last tensor BV."""
    kernel.ready_to_describe(p.device)
    widths = [width or p.K] * (len(tensors) - 1) + [BV]
    flat = [t.view(p.B * p.T, -1) for t in tensors]
    return [
        TensorDescriptor(f, list(f.shape), list(f.stride()), [C, w]) for f, w in zip(flat, widths)
    ]


def states_of(p: Plan, BV: int, BK: int, t: Tensor) -> TensorDescriptor:
    """A descriptor of chunks' states ``[chunks,H,V,K]``."""
    return TensorDescriptor(t.view(-1, p.K), [p.chunks * p.H * p.V, p.K], [p.K, 1], [BV, BK])


class Tables(NamedTuple):
    """Where the segments and chunks of packed sequences lie (see :func:`slots`), or None."""

    segments: Tensor | None = None
    first: Tensor | None = None
    chunks: Tensor | None = None


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
        if goes_plain(name, delta):
            c = configs.config("states", arch, *shape)
            programs, fill = N * H * cdiv(V, c["BV"]) * cdiv(K, c["BK"]), c["fill"]
        else:
            programs = N * H * cdiv(V, configs.config("scan", arch, *shape)["BV"])
            fill = configs.config("scan_split", arch, *shape)["fill"]
        size = segment_length(T, programs, processors(device), fill)
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
