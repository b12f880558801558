"""Fast weights that are trained while reading: a small network M(z; W) in each head.

    u_t = grad_W |M(k_t; W) - v_t|^2        at the weights of the last chunk's end
    S_t = eta_t S_{t-1} - theta_t u_t       momentum
    W_t = (1 - alpha_t) W_{t-1} + S_t       forgetting
    y_t = M(q_t; W_t)

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", arXiv 2501.00663,
section 3. Legend: B batch, T tokens, H heads, d width, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Literal

from torch import Tensor, float32, int64, promote_types, zeros
from torch import dtype as Dtype

from subquad.ops import checks
from subquad.ops.backend import Backend, Request, choose, without_autocast
from subquad.ops.memory.chunk import slab_width
from subquad.ops.memory.net import read as read_net
from subquad.ops.memory.rows import Rows
from subquad.ops.memory.state import MemoryState, start

__all__ = ["BACKENDS", "MemoryState", "Rows", "begin", "memory", "read", "request"]


def _always(request: Request) -> tuple[bool, str]:
    return True, "takes everything"


BACKENDS = (
    Backend("torch", _always, "subquad.ops.memory.chunk:memory"),
    Backend("reference", _always, "subquad.ops.memory.reference:memory"),
)


def request(
    *,
    T: int,
    H: int,
    K: int,
    B: int = 1,
    device: str = "cpu",
    dtype: Dtype = float32,
    packed: bool = False,
    state: bool = False,
) -> Request:
    """The memory's :class:`~subquad.ops.backend.Request` for a shape (K is the width of a head)."""
    flags = {"packed": packed, "state": state}
    traits = frozenset(name for name, on in flags.items() if on)
    return Request(device, dtype, {"B": B, "T": T, "H": H, "K": K}, traits)


def memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    *,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    chunk: int | None = 16,
    step: int = 1,
    when: Literal["after", "before"] = "after",
    gain_lr: float = 1.0,
    state: MemoryState | None = None,
    padding: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MemoryState]:
    """Read a sequence and train the memory on it, one gradient a token.

    Everything is differentiable, through the inner gradients too: with respect to q, k, v, the
    gates, the first weights and the state.

    Args:
        q: ``[B,T,H,d]``; k: ``[B,T,H,d]``; v: ``[B,T,H,d]``, float, one dtype.
        weights: the network's first weights: layers ``[H,d,e] ... [H,e,d]`` with gelu between, and
            as a last tensor ``[H,d]`` the gain (less 1) of a layer norm, with which the network is
            ``z + norm(layers(z))``; without it the layers alone.
        lr: ``[B,T,H]``, theta.
        momentum: ``[B,T,H]``, log eta <= 0 (-inf for none).
        decay: ``[B,T,H]``, log (1 - alpha) <= 0 (-inf forgets everything, 0 nothing).
        chunk: tokens whose gradients are taken at the same weights, those at the end of the chunk
            before; 1 is the recurrence to the letter, None takes all at the first weights.
        step: tokens whose gradients make one step of S and W, by the gates of the last of them;
            divides ``chunk``.
        when: read ``W_t`` ("after" the token is written) or ``W_{t-1}`` ("before").
        gain_lr: multiplies the gain's steps. What the gain weighs is of norm sqrt(d) where a key is
            of norm 1, so at 1 its steps are up to d times as steep as those of a matrix, and
            alike tokens of a chunk can make it grow from chunk to chunk without end.
        state: as the last call returned it; ``begin(weights)`` where None.
        padding: bool ``[B,T]``, True at padding, on either side of a row's tokens: it changes
            neither W nor S.
        cu_seqlens: int32 ``[N+1]``, the boundaries of packed sequences (B must be 1).
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``y [B,T,H,d]`` in the dtype of v (anything at the padding), and the state, in float32 at
        least.

    Raises:
        ValueError: for shapes, dtypes and boundaries that do not fit, gates that are no logs of
            something in 0..1, a step that does not divide the chunk, and a negative ``gain_lr``.
    """
    sizes = checks.shapes({"q": (q, "B T H d"), "k": (k, "B T H d"), "v": (v, "B T H d")})
    checks.same_dtype({"q": q, "k": k, "v": v})
    B, T, H = sizes["B"], sizes["T"], sizes["H"]
    for name, gate in {"lr": lr, "momentum": momentum, "decay": decay}.items():
        checks.shape(name, gate, (B, T, H))
        if name != "lr" and checks.readable(gate) and not bool(gate.amax() <= 0):
            raise ValueError(f"{name} must be a log gate, <= 0, got {float(gate.amax()):.4g}")
    _check_weights(weights, H, sizes["d"])
    checks.positive("step", step)
    if chunk is not None:
        checks.positive("chunk", chunk)
        checks.divides("step", step, "chunk", chunk)
    checks.one_of("when", when, ("after", "before"))
    if not 0 <= gain_lr < inf:
        raise ValueError(f"gain_lr must be finite and not negative, got {gain_lr}")
    checks.cu_seqlens(cu_seqlens, B=B, T=T)
    if padding is not None:
        checks.shape("padding", padding, (B, T))
        if cu_seqlens is not None:
            raise ValueError("padding and cu_seqlens exclude each other, got both")
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    begins = state is None
    if state is None:
        state = begin(weights, N, chunk=chunk, step=step)
    _check_state(state, weights, N, chunk, step)
    asked = request(
        B=B, T=T, H=H, K=sizes["d"], device=q.device.type, dtype=q.dtype,
        packed=cu_seqlens is not None, state=not begins,
    )  # fmt: skip
    chosen = choose("memory", BACKENDS, asked, backend)
    rows = Rows(
        T, state.tokens, padding=padding, cu_seqlens=cu_seqlens, begins=begins,
        period=slab_width(chunk),
    )  # fmt: skip
    if T == 0 or rows.real.shape[1] == 0:
        return v, state
    wide = promote_types(v.dtype, float32)
    laid = [rows.lay(t).transpose(1, 2).to(wide) for t in (q, k, v, lr, momentum, decay)]
    fresh = {"fresh": rows.plain and begins} if chosen.name == "torch" else {}
    with without_autocast(q.device.type):
        y, state = chosen.load()(
            *laid, rows.real, _to(state, wide), chunk=chunk, step=step, after=when == "after",
            gain_lr=gain_lr, **fresh,
        )  # fmt: skip
    return rows.back(y.transpose(1, 2)).to(v.dtype), state


def begin(
    weights: Sequence[Tensor], sequences: int, *, chunk: int | None = 16, step: int = 1
) -> MemoryState:
    """The state of ``sequences`` sequences that have read nothing: W is ``weights [H,...]``."""
    tokens = zeros(sequences, dtype=int64, device=weights[0].device)
    wide = promote_types(weights[0].dtype, float32)
    return start([w.to(wide) for w in weights], tokens, chunk=chunk, step=step)


def read(q: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``M(q; W)`` without training: q ``[N,T,H,d]``, weights ``[N,H,...]`` (of a state) or
    ``[H,...]``; ``[N,T,H,d]`` in the dtype of q."""
    wide = promote_types(q.dtype, float32)
    with without_autocast(q.device.type):
        y = read_net([w.to(wide) for w in weights], q.to(wide).transpose(1, 2))
    return y.transpose(1, 2).to(q.dtype)


def _to(state: MemoryState, dtype: Dtype) -> MemoryState:
    weights, momentum, base, pending = (tuple(t.to(dtype) for t in g) for g in state[:4])
    return MemoryState(weights, momentum, base, pending, state.tokens)


def _check_weights(weights: Sequence[Tensor], H: int, d: int) -> None:
    """Layers that fit each other from d to d, then perhaps a gain."""
    shapes = [tuple(w.shape) for w in weights]
    layers = shapes[:-1] if shapes and len(shapes[-1]) == 2 else shapes
    fits = bool(layers) and all(len(s) == 3 and s[0] == H for s in layers)
    fits = fits and [s[1] for s in layers] == [d, *(s[2] for s in layers[:-1])]
    if not fits or layers[-1][2] != d or (len(layers) < len(shapes) and shapes[-1] != (H, d)):
        raise ValueError(
            f"weights must be layers [{H},{d},e] ... [{H},e,{d}] and perhaps a gain [{H},{d}], "
            f"got shapes {[list(s) for s in shapes]}"
        )


def _check_state(
    state: MemoryState, weights: Sequence[Tensor], N: int, chunk: int | None, step: int
) -> None:
    wanted = {"weights": True, "momentum": True, "base": chunk != 1, "pending": step > 1}
    checks.shape("state.tokens", state.tokens, (N,))
    for name, there in wanted.items():
        group = getattr(state, name)
        if len(group) != (len(weights) if there else 0):
            raise ValueError(
                f"state.{name} must hold {len(weights) if there else 0} tensors with "
                f"chunk={chunk}, step={step}, got {len(group)}"
            )
        for i, t in enumerate(group):
            checks.shape(f"state.{name}[{i}]", t, (N, *weights[i].shape))
