"""Softmax attention over a mask: (o, lse), and the merge of parts.

    o_i = sum_j P_ij v_j,   P_ij = exp(scale q_i . k_j - lse_i) over the keys j that i sees
    lse_i = log sum_j exp(scale q_i . k_j)

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim,
N packed sequences.
"""

from __future__ import annotations

from typing import Literal, overload

# Not `import torch`: the submodule of that name takes its place in this package once it is loaded.
from torch import Tensor, float32, is_grad_enabled
from torch import dtype as DType

from subquad import mask as masks
from subquad.mask import Mask
from subquad.ops import checks
from subquad.ops.attention.combine import merge
from subquad.ops.backend import Backend, Request, choose, crowded, unfit

__all__ = ["BACKENDS", "attention", "merge", "request"]


def _sdpa(request: Request) -> tuple[bool, str]:
    if "lse" in request.traits:
        return False, "does not return lse"
    if request.sizes["S"] == 0:
        return False, "no key to see"
    if "mask:none" in request.traits:
        return True, "everything is visible"
    if {"mask:causal", "square"} <= request.traits:
        return True, "dense causal"
    return False, "a sparse mask would be a dense tensor to it"


def _triton(request: Request) -> tuple[bool, str]:
    sizes = request.sizes
    if why := unfit(request) or crowded(request):
        return False, why
    widest = 128 if request.dtype == float32 else 256
    if max(sizes["K"], sizes["V"]) > widest:
        return False, f"head dims up to {widest} in {request.dtype}"
    if 0 in sizes.values():
        return False, "nothing to compute"
    if sizes["T"] <= FEW and "mask:chosen" not in request.traits:
        return False, "a few queries over a mask need no tiles"
    return True, "block-sparse kernels"


def _torch(request: Request) -> tuple[bool, str]:
    return True, "takes every mask, on every device"


FEW = 8  # up to this many queries are one product with the keys they may see

BACKENDS = (
    Backend("sdpa", _sdpa, "subquad.ops.attention.sdpa:attention"),
    Backend("triton", _triton, "subquad.ops.attention.triton.op:attention"),
    Backend("torch", _torch, "subquad.ops.attention.torch:attention"),
    Backend("reference", _torch, "subquad.ops.attention.reference:attention"),
)


def _kind(mask: Mask | None) -> str:
    if mask is None or mask == masks.full():
        return "none"
    if mask == masks.causal():
        return "causal"
    return "chosen" if masks.choice(mask) else "sparse"


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
    dtype: DType = float32,
    mask: Mask | None = None,
    offset: int | None = None,
    grad: bool = False,
    lse: bool = False,
) -> Request:
    """Attention's :class:`~subquad.ops.backend.Request` for a shape and a mask."""
    S = T if S is None else S
    traits = {name for name, on in {"grad": grad, "lse": lse}.items() if on}
    square = T == S and offset in (None, 0)
    last = T == 1 and offset in (None, S - 1)
    kind = _kind(mask)
    traits.add("mask:none" if kind == "causal" and last else f"mask:{kind}")
    if square:
        traits.add("square")
    sizes = {"B": B, "T": T, "S": S, "H": H, "G": G or H, "K": K, "V": V or K}
    return Request(device, dtype, sizes, frozenset(traits))


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = ...,
    *,
    scale: float | None = ...,
    offset: int | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = ...,
    *,
    scale: float | None = ...,
    offset: int | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that ``mask`` keeps; time and memory follow its area.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``, float, one dtype; G divides H and
            query head h reads key head ``h // (H // G)``.
        mask: a :class:`~subquad.mask.Mask`; None keeps everything.
        scale: multiplies the scores; K**-0.5 where None.
        offset: the key position of query 0; S - T where None (the queries are the last tokens).
        cu_seqlens: int32 ``[N+1]``, the boundaries of packed sequences (B = 1, T = S): the mask
            holds inside each, at positions counted from its start.
        return_lse: return ``lse`` too, so that parts can be merged.
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``o [B,T,H,V]`` in the dtype of v; with ``return_lse`` also ``lse [B,T,H]``, natural log,
        float32 (float64 for float64 inputs). A row that sees no key has o = 0 and lse = -inf.
        Differentiable in q, k and v, through both.

    Raises:
        ValueError: for shapes, head counts, dtypes or boundaries that do not fit, and for a mask
            made for other lengths.
    """
    sizes = checks.grouped(q, k, v)
    B, T, S, H, G, K, V = (sizes[name] for name in "BTSHGKV")
    checks.cu_seqlens(cu_seqlens, B=B, T=T)
    if cu_seqlens is not None:
        if S != T or offset not in (None, 0):
            raise ValueError(f"cu_seqlens needs S=T={T} and no offset, got S={S}, offset={offset}")
        mask = masks.packed(mask, cu_seqlens)
    if mask is not None:
        if not isinstance(mask, Mask):
            raise ValueError(f"mask must be a Mask or None, got {type(mask).__name__}")
        batch, heads = mask.planes
        if batch not in (1, B) or H % heads:
            raise ValueError(f"mask is for {batch} rows and {heads} heads, q has B={B}, H={H}")
        mask.check(T, S, offset)
        mask = None if mask == masks.full() else mask
    grad = is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    asked = request(
        B=B, T=T, S=S, H=H, G=G, K=K, V=V, device=q.device.type, dtype=q.dtype,
        mask=mask, offset=offset, grad=grad, lse=return_lse,
    )  # fmt: skip
    run = choose("attention", BACKENDS, asked, backend).load()
    o, lse = run(
        q,
        k,
        v,
        mask=mask,
        scale=K**-0.5 if scale is None else scale,
        offset=S - T if offset is None else offset,
    )
    return (o, lse) if return_lse else o
