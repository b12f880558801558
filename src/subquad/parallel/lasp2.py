"""LASP-2: a linear recurrence over a split sequence, through one gather of its states.

A rank's tokens map the state before them to the one after them,

    S_after = P S_before + M                P none, a gate or a matrix;  M the state from zero

so every rank gathers all maps ``(P, M)``, whose size does not depend on T, folds those of the ranks
before it, and runs its own tokens from there. Of the delta rule, whose P is a product of matrices,
a rank runs its tokens once, from ``[0 | I]`` with values ``[v | 0]``: that gives what its queries
read of the tokens here, and of whatever state may come. Gradients return through the gather as one
sum a rank (reduce-scatter), and through the fold.

Sources: Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
arXiv 2502.07563, algorithms 2 and 4; the serial exchange, Sun et al., "Linear Attention Sequence
Parallelism", arXiv 2404.02882, section 3. Gates that depend on the data and
the delta rule are this library's, by the same fold.

Legend: B batch, C tokens of a rank, H heads, K key dim, V value dim, W ranks, N sequences, b rows
of the state that crosses a border (B, or 1 of packed sequences).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops import checks
from subquad.ops.backend import without_autocast
from subquad.ops.layout import expand_heads
from subquad.ops.recurrence import recurrence
from subquad.parallel.collectives import gather, tie, total
from subquad.parallel.cut import Cut
from subquad.parallel.maps import Affine, fold, handed_on, repeated
from subquad.parallel.mesh import Split, place

# Widest values that the recurrence's kernels take; beyond, the delta rule's map is a run apart.
WIDEST = 256
# A gate below exp(RESET) forgets all there is: minus infinity, whose differences are no numbers, is
# raised to it, and a state that is no more passes no gradient.
RESET = -60.0


def lasp2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    exchange: str = "gather",
    mesh: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The (gated) linear recurrence, plain or with the delta rule, over a split sequence.

    Args:
        q: ``[B,C,H,K]``, this rank's tokens; so k, v, beta and a decay with a time axis.
        decay, beta: as in :func:`subquad.ops.recurrence.recurrence`; a decay of minus infinity
            resets the state, as at the first token of a document.
        state: ``[N,H,K,V]`` before the whole sequences, the same on every rank.
        cu_seqlens: int32 ``[N+1]``, the boundaries among all W C tokens, the same on every rank.
        exchange: "gather" (LASP-2), or "serial": each rank waits for the state of the one before
            (LASP, its predecessor, to compare with).
        mesh: one-dimensional mesh or process group; the one that is set where None.
        **options: scale, form, backend of that operation.

    Returns:
        ``o [B,C,H,V]`` of this rank's tokens, and the state ``[N,H,K,V]`` after the whole sequences
        on every rank (of no sequence under ``sequence(mesh, states=False)``).

    Raises:
        ValueError: for arguments that do not fit, or that differ in shape between ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    checks.one_of("exchange", exchange, ("gather", "serial"))
    B, C, _, K = check_recurrence(q, k, v, cu_seqlens, here)
    here.agree("lasp2", q=q, k=k, v=v, decay=decay, beta=beta, state=state, cu_seqlens=cu_seqlens)
    cut = Cut(cu_seqlens, C, here)
    counts = [t.shape[2] for t in (q, k, v, beta) if t is not None]
    if decay is not None:
        counts.append(decay.shape[0] if decay.dim() == 1 else decay.shape[2])
    H, N = max(counts), B if cu_seqlens is None else len(cut.bounds) - 1
    wide = torch.promote_types(v.dtype, torch.float32)
    if state is not None:
        checks.shape("state", state, (N, H, K, v.shape[3]))
        state = state.to(wide)
    decay = None if decay is None else decay.clamp_min(RESET)
    inputs = _Inputs(q, k, v, decay, beta, options, exchange == "serial")
    with without_autocast(q.device.type):
        if beta is None:
            return _plain(inputs, state, cut, wide, H)
        return _delta(inputs, state, cut, wide, H)


@dataclass(frozen=True)
class _Inputs:
    """A rank's tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    options: dict[str, Any]
    serial: bool

    def run(self, state: Tensor | None, cu: Tensor | None, v: Tensor | None = None, stop=None):
        """The operation of one device over the first ``stop`` tokens."""
        at = slice(stop)
        decay = self.decay if self.decay is None or self.decay.dim() == 1 else self.decay[:, at]
        return recurrence(
            self.q[:, at],
            self.k[:, at],
            (self.v if v is None else v)[:, at],
            decay=decay,
            beta=None if self.beta is None else self.beta[:, at],
            state=state,
            cu_seqlens=cu,
            **self.options,
        )


def check_recurrence(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, here: Split
) -> torch.Size:
    checks.shapes({"q": (q, "B T Hq K"), "k": (k, "B T Hk K"), "v": (v, "B T Hv V")})
    checks.same_dtype({"q": q, "k": k, "v": v})
    checks.cu_seqlens(cu_seqlens, B=q.shape[0], T=q.shape[1] * here.size)
    if q.shape[1] < 1:
        raise ValueError("every rank must hold a token, got T=0")
    return q.shape


def _plain(
    x: _Inputs, state: Tensor | None, cut: Cut, wide: torch.dtype, H: int
) -> tuple[Tensor, Tensor]:
    """Without the delta rule the map is one product, and the tokens are run once, from S_before."""
    before = None
    if state is not None and not cut.mine.whole:
        before = state if not cut.packed else state[cut.mine.last : cut.mine.last + 1]
    own = Affine(*checkpoint(written, x.k, x.v, x.decay, cut.tail, wide, use_reentrant=False))
    if state is not None:  # without one, heads that share k and v share a state
        own = Affine(repeated(own.M, H), None if own.P is None else repeated(own.P, H))
    if before is not None:
        own = Affine(own(before), own.P)
    gate = None
    if x.decay is not None and x.decay.dim() == 1:  # all ranks know it: it need not travel
        gate = cut.C * repeated(x.decay.to(wide)[None], own.M.shape[1])
        own = Affine(own.M)
    after, head = _carried(own, cut, x.serial, gate)
    head = repeated(head, H)
    o, last = x.run(cut.initial(state, head, head), cut.cu)
    return _finish(o, last, head, state, after, cut)


def written(
    k: Tensor, v: Tensor, decay: Tensor | None, start: int, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """What the tokens from ``start`` on leave in the state, ``[B,h,K,V]``, and their whole log
    gate, ``[B,h(,K)]``, of the h heads that k, v and the gate have.

    A token's own gate multiplies what came before it; those after it multiply what it wrote.
    """
    _, k, v, decay, _ = expand_heads(k, k, v, decay, None)
    k, v = k[:, start:].to(wide), v[:, start:].to(wide)
    if decay is None:
        return torch.einsum("bthk,bthv->bhkv", k, v), None
    decay = decay[:, start:].to(wide)
    # Summed from the end, so that the last tokens, which count, are exact.
    after = decay.flip(1).cumsum(1).flip(1)
    rest = torch.cat([after[:, 1:], torch.zeros_like(after[:, :1])], 1)
    gate = rest.exp() if rest.dim() == 4 else rest.exp()[..., None]
    return torch.einsum("bthk,bthv->bhkv", k * gate, v), after[:, 0]


def _delta(
    x: _Inputs, state: Tensor | None, cut: Cut, wide: torch.dtype, H: int
) -> tuple[Tensor, Tensor]:
    """With the delta rule the tokens are run once and what they read of S_before is added."""
    B, K, V = len(x.q), x.q.shape[3], x.v.shape[3]
    mine, size = cut.mine, cut.head
    zero = x.v.new_zeros(B, H, K, V, dtype=wide)
    if not mine.continues:
        o, last = x.run(cut.initial(state, zero, zero), cut.cu)
        own = Affine(last[-B:], zero.new_zeros(B, H, K, K))
        after, S = _carried(own, cut, x.serial)
        return _finish(o, last, S, state, after, cut)
    eye = torch.eye(K, dtype=wide, device=zero.device).expand(B, H, K, K)
    nothing = x.v.new_zeros(*x.v.shape[:3], K)
    if mine.whole and V + K <= WIDEST:
        both, last = x.run(torch.cat([zero, eye], -1), None, torch.cat([x.v, nothing], -1))
        o, reads = both.split([V, K], -1)
        last, P = last.split([V, K], -1)
    else:
        o, last = x.run(cut.initial(state, zero, zero), cut.cu)
        reads, P = x.run(eye, None, nothing, size)
    after, S = _carried(Affine(last[-B:], P), cut, x.serial)
    carried = torch.einsum("bthk,bhkv->bthv", reads, S.to(reads.dtype))
    o = o + carried if size == o.shape[1] else torch.cat([o[:, :size] + carried, o[:, size:]], 1)
    last = torch.cat([last[:B] + P @ S, last[B:]])
    return _finish(o, last, S, state, after, cut)


def _carried(
    own: Affine, cut: Cut, serial: bool, gate: Tensor | None = None
) -> tuple[Callable[[], Tensor], Tensor]:
    """How to find the state after all ranks, and the one that this rank's first sequence brings
    along; ``gate`` is the maps' P where it is the same everywhere."""
    here = cut.here
    if serial:
        own = own if gate is None else Affine(own.M, gate)
        S = handed_on(own, here, cut.mine.whole)

        def last() -> Tensor:
            if here.rank + 1 < here.size:
                return total(tie(torch.zeros_like(own.M), own.M), here)
            return total(own(S) if cut.mine.whole else own.M, here)

        return last, S
    everyone = gather(own.pack(), here, "lasp2")
    maps = [own.unpack(flat) for flat in everyone]
    if gate is not None:
        maps = [Affine(each.M, gate) for each in maps]
    # Connected on every rank, also where the sum is empty: all must come to the backward pass.
    return lambda: fold(maps, cut, here.size), tie(fold(maps, cut, here.rank), everyone)


def _finish(
    o: Tensor, last: Tensor, S: Tensor, state: Tensor | None, after: Callable[[], Tensor], cut: Cut
) -> tuple[Tensor, Tensor]:
    if not cut.mine.continues:
        o = tie(o, S)
    if not cut.here.states:
        return o, last[:0]
    if cut.packed:
        return o, cut.final(last, state)
    return o, repeated(after(), last.shape[1])
