"""Attention through feature maps, with softmax over some tokens beside it.

    a_ij = w exp(scale q_i . k_j - m_i)   for the near keys j, m_i their largest scaled score
    b_ij = phi(q_i) . phi(k_j)            for all earlier ones
    o_i  = sum_j (a_ij + b_ij) v_j / (sum_j (a_ij + b_ij) + eps)

The denominator is shared; the exact part is shifted by its own maximum, the linear part is not.
Source: Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models", arXiv 2410.10254,
section 3.2.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim,
L keys with features, F features, N packed sequences.
"""

from __future__ import annotations

from dataclasses import replace

# Not `import torch`: the submodule of that name takes its place in this package once it is loaded.
from torch import Tensor, float32, is_grad_enabled
from torch import dtype as DType

from subquad.ops import checks
from subquad.ops.backend import Backend, Request, choose, crowded, without_autocast
from subquad.ops.kernel_attention.bidirectional import bidirectional
from subquad.ops.kernel_attention.landmarks import landmark_attention
from subquad.ops.kernel_attention.near import How, Near
from subquad.ops.recurrence.triton.gate import WIDEST, verify

__all__ = [
    "BACKENDS",
    "How",
    "Near",
    "bidirectional",
    "landmark_attention",
    "mixed_attention",
    "request",
    "window_sums",
]


def _always(request: Request) -> tuple[bool, str]:
    return True, "takes everything"


def _kernels(request: Request) -> tuple[bool, str]:
    ok, why = verify(replace(request, traits=frozenset()))
    if not ok or (why := crowded(request)):
        return False, why
    if request.sizes["F"] > WIDEST or request.sizes["V"] >= WIDEST:
        return False, f"takes F up to {WIDEST} and V below, not F={request.sizes['F']}"
    if "chosen" in request.traits:
        return False, "sees no chosen tokens"
    return True, "fused kernels of the near keys, the recurrence's for the rest"


BACKENDS = (
    Backend("triton", _kernels, "subquad.ops.kernel_attention.triton.op:mixed_attention"),
    Backend("torch", _always, "subquad.ops.kernel_attention.torch:mixed_attention"),
    Backend("reference", _always, "subquad.ops.kernel_attention.reference:mixed_attention"),
)


def request(
    *,
    T: int,
    H: int,
    K: int,
    S: int | None = None,
    G: int | None = None,
    V: int | None = None,
    F: int | None = None,
    B: int = 1,
    window: int = 64,
    layout: str = "sliding",
    device: str = "cpu",
    dtype: DType = float32,
    grad: bool = False,
    packed: bool = False,
    state: bool = False,
    chosen: bool = False,
) -> Request:
    """Mixed attention's :class:`~subquad.ops.backend.Request` for a shape."""
    flags = {"grad": grad, "packed": packed, "state": state, "chosen": chosen}
    traits = {name for name, on in flags.items() if on} | {f"layout:{layout}"}
    sizes = {"B": B, "T": T, "S": T if S is None else S, "H": H, "G": G or H, "K": K, "V": V or K}
    sizes |= {"F": F or 2 * K, "window": window}
    return Request(device, dtype, sizes, frozenset(traits))


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    near: Near,
    scale: float | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    chosen: Tensor | None = None,
    per: int = 0,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
    seen: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Softmax over the near tokens and linear attention over all before, under one denominator.

    The queries are the last T of the S tokens. Tokens before the S columns are in ``state``; with a
    state, those columns that it covers already (by ``near.flushed``) count no second time.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``, float, one dtype; G divides H.
        phi_q: ``[B,T,H,F]``; phi_k: ``[B,L,H,F]``, features of the first L tokens,
            L >= S - near.window (those after are near to every query); L = S in packed sequences.
            Positive, or the denominator may vanish.
        near: which tokens are exact.
        scale: multiplies the exact scores; K**-0.5 where None.
        weight: ``[H]``, w; 1 where None.
        gate: ``[B,T,H,V]``, multiplies what is read of the linear part, not its denominator.
        chosen: bool ``[B,S,H]``, tokens that stay exact for all later queries, at most ``per`` of
            each block of ``near.window`` (terraced, and not packed); they enter no state.
        kept: keys ``[B,M,H,K]``, values ``[B,M,H,V]`` and bool ``[B,M]``, which of them are there:
            chosen tokens before the S columns, exact for all queries.
        state: ``(S [N,H,F,V], z [N,H,F])`` as a call returned it.
        starts: int ``[B]`` or ``[1]``, the column of each row's token 0: positive behind left
            padding, negative where the first tokens are no longer there; 0 where None.
        seen: int64 ``[B]``, the tokens before the call, which the state knows of; those before
            the last T columns where None.
        cu_seqlens: int32 ``[N+1]``, the boundaries of packed sequences (B = 1, T = S).
        eps: added to the denominator.
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``o [B,T,H,V]`` in the dtype of v, 0 at padding, and the state: the tokens that the last
        one no longer sees exactly, float32 (float64 for float64 inputs). Differentiable in all
        float arguments.

    Raises:
        ValueError: for shapes, head counts, dtypes or boundaries that do not fit.
    """
    sizes = checks.grouped(q, k, v)
    sizes |= checks.shapes(
        {"q": (q, "B T H K"), "phi_q": (phi_q, "B T H F"), "phi_k": (phi_k, "B L H F")}
    )
    B, T, S, H, G = (sizes[name] for name in "BTSHG")
    checks.cu_seqlens(cu_seqlens, B=B, T=T)
    if not isinstance(near, Near):
        raise ValueError(f"near must be a Near, got {type(near).__name__}")
    least = S if cu_seqlens is not None else max(S - near.window, 0)
    if T > S or not least <= sizes["L"] <= S:
        raise ValueError(f"T <= S={S} and phi_k's L in {least}..{S}, got T={T}, L={sizes['L']}")
    if cu_seqlens is not None and (T != S or starts is not None):
        raise ValueError(f"cu_seqlens needs T=S={S} and no starts, got T={T}, starts={starts}")
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = {"weight": (weight, (H,)), "gate": (gate, (B, T, H, sizes["V"]))}
    expected["chosen"] = (chosen, (B, S, H))
    if kept is not None:
        M = kept[0].shape[1]
        expected["kept[0]"] = kept[0], (B, M, H, sizes["K"])
        expected["kept[1]"] = kept[1], (B, M, H, sizes["V"])
        expected["kept[2]"] = kept[2], (B, M)
    if state is not None:
        expected["state[0]"] = state[0], (N, H, sizes["F"], sizes["V"])
        expected["state[1]"] = state[1], (N, H, sizes["F"])
    for name, (t, shape) in expected.items():
        if t is not None:
            checks.shape(name, t, shape)
    if starts is not None and starts.shape not in ((B,), (1,)):
        raise ValueError(f"starts must be [{B}] or [1], got {list(starts.shape)}")
    if chosen is not None and (not near.terraced or per < 1 or cu_seqlens is not None):
        raise ValueError(
            "chosen needs near='terraced', per >= 1 and no cu_seqlens, got "
            f"{near.layout!r}, per={per}, cu_seqlens={cu_seqlens}"
        )
    if kept is not None and chosen is None:
        raise ValueError("kept needs chosen beside it, got None")
    floats = (q, k, v, phi_q, phi_k, weight, gate, *(state or ()))
    how = How(
        near, sizes["K"] ** -0.5 if scale is None else scale, weight, gate, chosen, per, kept,
        state, starts, seen, cu_seqlens, eps,
    )  # fmt: skip
    asked = request(
        B=B, T=T, S=S, H=H, G=G, K=sizes["K"], V=sizes["V"], F=sizes["F"], window=near.window,
        layout=near.layout, device=q.device.type, dtype=q.dtype, packed=cu_seqlens is not None,
        grad=is_grad_enabled() and any(t is not None and t.requires_grad for t in floats),
        state=state is not None, chosen=chosen is not None,
    )  # fmt: skip
    run = choose("kernel_attention", BACKENDS, asked, backend).load()
    with without_autocast(q.device.type):
        return run(q, k, v, phi_q, phi_k, how)


def window_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float,
    starts: Tensor | None = None,
    seen: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``sum_j exp(scale q_i . k_j - m_i) [v_j; 1]`` over the last ``window`` tokens j <= i.

    What :func:`mixed_attention` adds to its linear part, for attention that adds another.

    Args:
        q: ``[B,T,H,K]``, the last T of the S tokens; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``.
        starts, seen, cu_seqlens: as there; ``seen`` where there is a past.

    Returns:
        ``[B,T,H,V+1]``, float32 (float64 for float64 inputs). Differentiable.
    """
    checks.grouped(q, k, v)
    from subquad.ops.kernel_attention.torch import near_window

    with without_autocast(q.device.type):
        return near_window(
            q, k, v, How(Near(window), scale, starts=starts, seen=seen, cu_seqlens=cu_seqlens)
        )
