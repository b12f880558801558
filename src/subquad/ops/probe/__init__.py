"""Softmax attention with a covariance probe: one operation for softmax, Parallax and LLA.

    p_ij = softmax_j(scale q_i . k_j) over the visible keys j,   t_ij = r_i . k_j
    o_i = sum_j p_ij (1 + sum_l p_il t_il - t_ij) v_j  =  vbar_i - Cov_p(v, k)_i r_i

``r = 0`` is softmax attention, a learned r is Parallax, and
``r_i = (w_i Cov_p(k, k)_i + ridge I)^-1 w_i (kbar_i - q_i)`` is local linear attention
(:func:`local_linear`).

Sources: Zuo et al., "Parallax: Parameterized Local Linear Attention for Language Modeling", arXiv
2605.29157; Zuo et al., "Local Linear Attention: An Optimal Interpolation of Linear and Softmax
Attention For Test-Time Regression", arXiv 2510.01450.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import Backend, Request, choose, crowded, unfit, without_autocast
from subquad.ops.probe import node, solve
from subquad.ops.probe.spans import spans

__all__ = ["BACKENDS", "local_linear", "probe", "request"]

WIDEST = 128
STEPS = 16


def _triton(request: Request) -> tuple[bool, str]:
    sizes = request.sizes
    if why := unfit(request) or crowded(request):
        return False, why
    if max(sizes["K"], sizes["V"]) > WIDEST:
        return False, f"head dims up to {WIDEST}, not K={sizes['K']}, V={sizes['V']}"
    if 0 in sizes.values():
        return False, "nothing to compute"
    return True, "fused kernels"


def _always(request: Request) -> tuple[bool, str]:
    return True, "takes everything, on every device"


BACKENDS = (
    Backend("triton", _triton, "subquad.ops.probe.triton.launch:forward"),
    Backend("torch", _always, "subquad.ops.probe.chunk:forward"),
    Backend("reference", _always, "subquad.ops.probe.reference:probe"),
)


def request(
    *,
    T: int,
    H: int,
    K: int,
    S: int | None = None,
    G: int | None = None,
    V: int | None = None,
    B: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    packed: bool = False,
) -> Request:
    """The probe's :class:`~subquad.ops.backend.Request` for a shape."""
    flags = {"grad": grad, "packed": packed}
    sizes = {"B": B, "T": T, "S": T if S is None else S, "H": H, "G": G or H, "K": K, "V": V or K}
    return Request(device, dtype, sizes, frozenset(name for name, on in flags.items() if on))


def probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    offset: int | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention corrected along the covariance of keys and values.

    Args:
        q, r: ``[B,T,H,K]``; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``, float, one dtype; G divides H and
            query head h reads key head ``h // (H // G)``.
        scale: multiplies ``q . k`` alone; K**-0.5 where None. ``r . k`` is not scaled.
        causal: a query sees the keys up to its own place; all where False.
        window: keys that a query sees, the one at its place included; None for all.
        offset: the key place of query 0; S - T where None (the queries are the last tokens).
        starts: int ``[B]``, the first key that is there in each row (padding on the left).
        cu_seqlens: int32 ``[N+1]``, the boundaries of packed sequences (B = 1, T = S).
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``o [B,T,H,V]`` in the dtype of v; 0 where a query sees no key. Accumulated in float32
        (float64 for float64 inputs). Differentiable in q, k, v and r.

    Raises:
        ValueError: for shapes, head counts, dtypes or boundaries that do not fit, and for a
            window without causal.
    """
    checks.grouped(q, k, v)
    checks.shapes({"q": (q, "B T H K"), "r": (r, "B T H K")})
    checks.same_dtype({"q": q, "r": r})
    lo, hi = _visible(q, k, causal, window, offset, starts, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, r))
    chosen = _choose(q, k, v, grad, cu_seqlens, backend)
    with without_autocast(q.device.type):
        if chosen.name == "reference":
            return chosen.load()(q, k, v, r, lo=lo, hi=hi, scale=scale)
        home = chosen.home.partition(":")[0]
        return node.run(q, k, v, r, lo, hi, float(scale), grad, False, home)[0]


def local_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: Tensor | float = 1.0,
    steps: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    offset: int | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Local linear attention: a weighted ridge regression of values on keys at every query.

    ``o_i`` is b of ``min_(W,b) 1/2 sum_j w_ij |v_j - b - W (k_j - q_i)|^2 + ridge/2 |W|^2`` with
    ``w_ij = exp(scale q_i . k_j - m_i)`` and m_i the largest exponent: ``ridge`` is measured beside
    weights whose largest is 1. Towards an infinite ridge it is softmax attention, at ``scale=0``
    the ridge regression (with an intercept) of all that is visible.

    Args:
        q, k, v, causal, window, offset, starts, cu_seqlens, backend: as in :func:`probe`.
        ridge: a positive number, or ``[H]``, one a head.
        steps: of conjugate gradients; at most K are needed, ``min(K, 16)`` where None.
        scale: the inverse of the kernel's bandwidth; K**-0.5 where None.

    Returns:
        ``o [B,T,H,V]`` in the dtype of v, computed in float32 (float64 for float64 inputs).
        Differentiable in q, k, v and ridge. The reference solves exactly.

    Raises:
        ValueError: as :func:`probe`, and for a ridge that is not positive.
    """
    checks.grouped(q, k, v)
    H, K = q.shape[2:]
    steps = min(K, STEPS) if steps is None else steps
    checks.positive("steps", steps)
    dtype = torch.promote_types(v.dtype, torch.float32)
    ridge = torch.as_tensor(ridge, dtype=dtype, device=q.device).expand(H)
    if checks.readable(ridge) and not bool((ridge > 0).all()):
        raise ValueError(f"ridge must be positive, got {ridge.tolist()}")
    lo, hi = _visible(q, k, causal, window, offset, starts, cu_seqlens)
    scale = K**-0.5 if scale is None else scale
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, ridge))
    with without_autocast(q.device.type):
        wide = q.to(dtype), k.to(dtype), v.to(dtype)
        chosen = _choose(*wide, grad, cu_seqlens, backend)
        if chosen.name == "reference":
            from subquad.ops.probe import reference

            o = reference.local_linear(*wide, ridge=ridge, lo=lo, hi=hi, scale=scale)
            return o.to(v.dtype)
        home = chosen.home.partition(":")[0]
        setting = solve.Setting(lo, hi, float(scale), steps, home)
        r = solve.slope(wide[0], wide[1], ridge, setting)
        o = node.run(*wide, r, lo, hi, float(scale), grad, False, home)[0]
        return o.to(v.dtype)


def _visible(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    offset: int | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (B, T), S = q.shape[:2], k.shape[1]
    if S < 1:
        raise ValueError(f"k must hold a token at least, got shape {list(k.shape)}")
    checks.cu_seqlens(cu_seqlens, B=B, T=T)
    if cu_seqlens is not None and (S != T or offset not in (None, 0)):
        raise ValueError(f"cu_seqlens needs S=T={T} and no offset, got S={S}, offset={offset}")
    if window is not None:
        checks.positive("window", window)
        if not causal:
            raise ValueError(f"window needs causal=True, got window={window}, causal=False")
    if starts is not None:
        checks.shape("starts", starts, (B,))
    offset = S - T if offset is None else offset
    return spans(
        T, S, causal=causal, window=window, offset=offset, starts=starts, cu_seqlens=cu_seqlens,
        device=q.device,
    )  # fmt: skip


def _choose(
    q: Tensor, k: Tensor, v: Tensor, grad: bool, cu: Tensor | None, name: str | None
) -> Backend:
    (B, T, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    asked = request(
        B=B, T=T, S=S, H=H, G=G, K=K, V=V, device=q.device.type, dtype=q.dtype, grad=grad,
        packed=cu is not None,
    )  # fmt: skip
    return choose("probe", BACKENDS, asked, name)
