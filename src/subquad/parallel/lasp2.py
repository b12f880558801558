"""LASP-2: a linear recurrence over a split sequence, through one gather of its states.

A rank's tokens map the state before them to the one after them,

    S_after = P S_before + M                P none, a gate or a matrix;  M the state from zero

so every rank gathers all maps ``(P, M)``, whose size does not depend on T, folds those of the ranks
before it, and runs its own tokens from there. Of the delta rule, whose P is a product of matrices,
a rank runs its tokens once, from ``[0 | I]`` with values ``[v | 0]``: that gives what its queries
read of the tokens here, and of whatever state may come. Gradients return through the gather as one
sum a rank (reduce-scatter), and through the fold.

Sources: Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
arXiv 2502.07563, algorithms 2 and 4 and the hybrid form (section 3.4); the serial exchange, Sun et
al., "Linear Attention Sequence Parallelism", arXiv 2404.02882. Gates that depend on the data and
the delta rule are this library's, by the same fold.

Legend: B batch, C tokens of a rank, H heads, K key dim, V value dim, W ranks, N sequences, b rows
of the state that crosses a border (B, or 1 of packed sequences).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad import mask as masks
from subquad.mask import Mask
from subquad.ops import checks
from subquad.ops.attention import attention
from subquad.ops.backend import without_autocast
from subquad.ops.layout import expand_heads
from subquad.ops.recurrence import recurrence
from subquad.ops.scan import scan
from subquad.parallel.collectives import gather, tie
from subquad.parallel.cut import Cut
from subquad.parallel.mesh import Split, place

# Widest values that the recurrence's kernels take; beyond, the delta rule's map is a run apart.
WIDEST = 256


@dataclass(frozen=True)
class Affine:
    """``S -> P S + M``, what a run of tokens does to a state: every linear recurrence's monoid.

    Attributes:
        M: ``[b,H,K,V]``.
        P: None (nothing is forgotten), log gates ``[b,H]`` or ``[b,H,K]``, or matrices
            ``[b,H,K,K]``.
    """

    M: Tensor
    P: Tensor | None = None

    def __call__(self, S: Tensor) -> Tensor:
        return self._times(S) + self.M

    def after(self, first: Affine) -> Affine:
        """The map of the tokens of ``first`` and then these."""
        M = self(first.M)
        if self.P is None or first.P is None:
            return Affine(M, first.P if self.P is None else self.P)
        return Affine(M, self.P @ first.P if self.P.dim() == 4 else self.P + first.P)

    def _times(self, S: Tensor) -> Tensor:
        if self.P is None:
            return S
        if self.P.dim() == 4:
            return self.P @ S
        gate = self.P.exp()
        return S * (gate[..., None] if gate.dim() == 3 else gate[..., None, None])

    def pack(self) -> Tensor:
        """One flat tensor to send."""
        parts = [self.M] if self.P is None else [self.M, self.P]
        return torch.cat([t.reshape(-1) for t in parts])

    def unpack(self, flat: Tensor) -> Affine:
        """Another map of the same shapes, from what its rank packed."""
        M = flat[: self.M.numel()].view_as(self.M)
        return Affine(M, None if self.P is None else flat[self.M.numel() :].view_as(self.P))


def fold(maps: Sequence[Affine], cut: Cut, rank: int) -> Tensor:
    """The state before the tokens of ``rank``, from the maps of the ranks before it.

    What came before a sequence's start is no concern of its: such a rank's M is all there is.
    """
    S = torch.zeros_like(maps[0].M)
    for done, piece in zip(maps[:rank], cut.pieces):
        S = done(S) if piece.whole else done.M
    return S


def lasp2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    backend: str | None = None,
    mesh: Any = None,
) -> tuple[Tensor, Tensor]:
    """The (gated) linear recurrence, plain or with the delta rule, over a split sequence.

    Args:
        q: ``[B,C,H,K]``, this rank's tokens; so k, v, beta and a decay with a time axis.
        decay, beta, scale, form, backend: as in :func:`subquad.ops.recurrence.recurrence`.
        state: ``[N,H,K,V]`` before the whole sequences, the same on every rank.
        cu_seqlens: int32 ``[N+1]``, the boundaries among all W C tokens, the same on every rank.
        mesh: one-dimensional mesh or process group; the one that is set where None.

    Returns:
        ``o [B,C,H,V]`` of this rank's tokens, and the state ``[N,H,K,V]`` after the whole sequences
        on every rank (of no sequence under ``sequence(mesh, states=False)``).

    Raises:
        ValueError: for arguments that do not fit, or that differ in shape between ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    B, C, _, K = _check(q, k, v, cu_seqlens, here)
    scale = K**-0.5 if scale is None else scale
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
    inputs = _Inputs(q, k, v, decay, beta, {"scale": scale, "form": form, "backend": backend})
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


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, here: Split) -> torch.Size:
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
        own = Affine(_repeated(own.M, H), None if own.P is None else _repeated(own.P, H))
    if before is not None:
        own = Affine(own(before), own.P)
    gate = None
    if x.decay is not None and x.decay.dim() == 1:  # all ranks know it: it need not travel
        gate = cut.C * _repeated(x.decay.to(wide)[None], own.M.shape[1])
        own = Affine(own.M)
    maps, head = _carried(own, cut, gate)
    head = _repeated(head, H)
    o, last = x.run(cut.initial(state, head, head), cut.cu)
    return _finish(o, last, head, state, maps, cut)


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
        maps, S = _carried(own, cut)
        return _finish(o, last, S, state, maps, cut)
    eye = torch.eye(K, dtype=wide, device=zero.device).expand(B, H, K, K)
    nothing = x.v.new_zeros(*x.v.shape[:3], K)
    if mine.whole and V + K <= WIDEST:
        both, last = x.run(torch.cat([zero, eye], -1), None, torch.cat([x.v, nothing], -1))
        o, reads = both.split([V, K], -1)
        last, P = last.split([V, K], -1)
    else:
        o, last = x.run(cut.initial(state, zero, zero), cut.cu)
        reads, P = x.run(eye, None, nothing, size)
    maps, S = _carried(Affine(last[-B:], P), cut)
    carried = torch.einsum("bthk,bhkv->bthv", reads, S.to(reads.dtype))
    o = o + carried if size == o.shape[1] else torch.cat([o[:, :size] + carried, o[:, size:]], 1)
    last = torch.cat([last[:B] + P @ S, last[B:]])
    return _finish(o, last, S, state, maps, cut)


def _carried(own: Affine, cut: Cut, gate: Tensor | None = None) -> tuple[list[Affine], Tensor]:
    """Every rank's map, and the state that this rank's first sequence brings along; ``gate`` is the
    maps' P where it is the same everywhere."""
    everyone = gather(own.pack(), cut.here, "lasp2")
    maps = [own.unpack(flat) for flat in everyone]
    if gate is not None:
        maps = [Affine(each.M, gate) for each in maps]
    S = fold(maps, cut, cut.here.rank)
    # Connected on every rank, also where the sum is empty: all must come to the backward pass.
    return maps, tie(S, everyone)


def _finish(
    o: Tensor, last: Tensor, S: Tensor, state: Tensor | None, maps: list[Affine], cut: Cut
) -> tuple[Tensor, Tensor]:
    if not cut.mine.continues:
        o = tie(o, S)
    if not cut.here.states:
        return o, last[:0]
    if cut.packed:
        return o, cut.final(last, state)
    return o, _repeated(fold(maps, cut, cut.here.size), last.shape[1])


def _repeated(t: Tensor, heads: int) -> Tensor:
    """``t [b,h,...]`` with so many heads; consecutive ones share."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def lasp2_scan(
    x: Tensor,
    decay: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    mesh: Any = None,
) -> tuple[Tensor, Tensor]:
    """The element-wise scan over a split sequence: a state of one number a channel.

    Args:
        x, decay: ``[B,C,D]``, this rank's tokens, as in :func:`subquad.ops.scan.scan`.
        state: ``[N,D]`` before the whole sequences; cu_seqlens: int32 ``[N+1]`` of all tokens.
        mesh: one-dimensional mesh or process group; the one that is set where None.

    Returns:
        ``h [B,C,D]``, and ``[N,D]`` after the whole sequences, on every rank.

    Raises:
        ValueError: for arguments that do not fit, or that differ in shape between ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    checks.shapes({"x": (x, "B T D"), "decay": (decay, "B T D")})
    B, C, D = x.shape
    checks.cu_seqlens(cu_seqlens, B=B, T=C * here.size)
    here.agree("lasp2_scan", x=x, decay=decay, state=state, cu_seqlens=cu_seqlens)
    cut = Cut(cu_seqlens, C, here)
    if state is not None:
        checks.shape("state", state, (B if cu_seqlens is None else len(cut.bounds) - 1, D))
    with without_autocast(x.device.type):
        zero = x.new_zeros(B, D, dtype=torch.promote_types(x.dtype, torch.float32))
        h, last = scan(x, decay, state=cut.initial(state, zero, zero), cu_seqlens=cut.cu)
        gates = decay[:, : cut.head].to(zero.dtype).cumsum(1)
        flat = torch.cat([last[-B:].reshape(-1), gates[:, -1].reshape(-1)])
        real = torch.view_as_real(flat) if flat.is_complex() else flat
        everyone = gather(real, here, "lasp2_scan")
        flats = torch.view_as_complex(everyone) if flat.is_complex() else everyone
        maps = [f.view(2, B, D) for f in flats]

        def before(rank: int) -> Tensor:
            S = torch.zeros_like(zero)
            for (M, P), piece in zip(maps[:rank], cut.pieces):
                S = P.exp() * S + M if piece.whole else M
            return S

        S = before(here.rank)
        if cut.mine.continues:
            n = cut.head
            first = h[:, :n] + (gates.exp() * S[:, None]).to(h.dtype)
            h = torch.cat([first, h[:, n:]], 1)
            last = torch.cat([last[:B] + gates[:, -1].exp() * S, last[B:]])
        h = tie(h, everyone)
        if not here.states:
            return h, last[:0]
        return h, cut.final(last, state) if cut.packed else before(here.size)


def gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    offset: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    mesh: Any = None,
) -> Any:
    """LASP-2H's softmax layers: keys and values are gathered, this rank's queries see them all.

    Args:
        q: ``[B,C,H,K]``; k: ``[B,C,G,K]``; v: ``[B,C,G,V]``, this rank's tokens.
        mask: any mask over the whole sequence; None keeps everything.
        cu_seqlens: int32 ``[N+1]``, the boundaries among all W C tokens.
        scale, return_lse, backend: as in :func:`subquad.ops.attention.attention`.
        offset: None or 0, the whole sequence's queries stand at its keys.
        mesh: one-dimensional mesh or process group; the one that is set where None.

    Returns:
        ``o [B,C,H,V]`` of this rank's tokens (and ``lse [B,C,H]``).

    Raises:
        ValueError: for arguments that do not fit, or that differ in shape between ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    B, C = check_attention(q, k, v, mask, offset, cu_seqlens, here, "gather")
    if cu_seqlens is not None:
        mask = masks.packed(mask, cu_seqlens)
    sizes = [k.shape[3], v.shape[3]]
    everyone = gather(torch.cat([k, v], -1), here, "gather")
    k, v = everyone.transpose(0, 1).reshape(B, -1, k.shape[2], sum(sizes)).split(sizes, -1)
    options: dict[str, Any] = {"return_lse": return_lse, "backend": backend}
    return attention(q, k, v, mask, scale=scale, offset=here.rank * C, **options)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    offset: int | None,
    cu_seqlens: Tensor | None,
    here: Split,
    op: str,
) -> tuple[int, int]:
    """B and C, once the arguments are known to fit, here and on all ranks."""
    checks.shapes({"q": (q, "B T H K"), "k": (k, "B T G K"), "v": (v, "B T G V")})
    checks.same_dtype({"q": q, "k": k, "v": v})
    checks.divides("heads of k", k.shape[2], "heads of q", q.shape[2])
    checks.cu_seqlens(cu_seqlens, B=q.shape[0], T=q.shape[1] * here.size)
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(f"mask must be a Mask or None, got {type(mask).__name__}")
    if offset not in (None, 0):
        raise ValueError(f"offset must be None where the sequence is split, got {offset}")
    if q.shape[1] < 1:
        raise ValueError("every rank must hold a token, got T=0")
    here.agree(op, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    return q.shape[0], q.shape[1]
