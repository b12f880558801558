"""Normalised linear attention: the recurrence without a gate, and its denominator.

Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", arXiv 2006.16236, equations
8 to 12, 16 to 20.

    causal:      S_t = S_{t-1} + k_t v_t^T;  z_t = z_{t-1} + k_t
    otherwise:   S = sum_i k_i v_i^T;        z = sum_i k_i
    o_t = S^T q_t / (z . q_t + eps)

The key sum z is a column of the state like any other: a value that is always one. So both forms
carry ``[S | z]`` through one product, in float32 at least.

Legend: B batch, T tokens, H heads, K key dim, V value dim, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import without_autocast
from subquad.ops.layout import expand_heads


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    backend: str | None = None,
    recurrence: Callable[..., tuple[Tensor, Tensor]] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Normalised linear attention over q and k that a feature map has already been applied to.

    Heads are grouped by count, as in :func:`~subquad.ops.recurrence.recurrence`. Padding must be
    zero in k (after the feature map): then it adds nothing to S nor to z.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,T,H,K]``; v: ``[B,T,H,V]``, float, one dtype. The feature map
            should be positive, else the denominator may vanish.
        causal: whether token t sees the tokens up to t, or all of its sequence.
        eps: added to the denominator.
        scale: multiplies q; it cancels but for eps.
        state: ``(S [N,H,K,V], z [N,H,K])`` before the first token, as a call returned them.
        cu_seqlens: int32 ``[N+1]``, the boundaries of packed sequences (B must be 1).
        form: as in :func:`~subquad.ops.recurrence.recurrence`; of the causal case.
        backend: run this implementation of the recurrence; None lets the verifiers choose.
        recurrence: runs in place of the operation, over tokens that lie on several devices (T are
            then those of this one, ``cu_seqlens`` speaks of all); total: sums their states.

    Returns:
        ``o [B,T,H,V]`` in the dtype of v, and the state ``(S, z)`` after the last token, float32
        (float64 for float64 inputs). All are differentiable, also with respect to ``state``.

    Raises:
        ValueError: for shapes, head counts, dtypes or boundaries that do not fit.
    """
    from subquad.ops import recurrence as own

    if recurrence is not None and not causal and cu_seqlens is not None:
        raise ValueError("cu_seqlens must be None where a text is split and causal is False")

    checks.shapes({"q": (q, "B T Hq K"), "k": (k, "B T Hk K"), "v": (v, "B T Hv V")})
    checks.same_dtype({"q": q, "k": k, "v": v})
    B, T, _, K = q.shape
    V = v.shape[3]
    H = checks.heads({"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]})
    if total is None:
        checks.cu_seqlens(cu_seqlens, B=B, T=T)
    joined = None
    if state is not None:
        N = B if cu_seqlens is None else cu_seqlens.numel() - 1
        checks.shape("state[0]", state[0], (N, H, K, V))
        checks.shape("state[1]", state[1], (N, H, K))
        joined = torch.cat([state[0], state[1].to(state[0].dtype)[..., None]], -1)
    one = F.pad(v, (0, 1), value=1.0)
    if causal:
        both, last = (recurrence or own.recurrence)(
            q,
            k,
            one,
            scale=scale,
            state=joined,
            cu_seqlens=cu_seqlens,
            form=form,  # type: ignore[arg-type]
            backend=backend,
        )
    else:
        with without_autocast(q.device.type):
            both, last = _bidirectional(q, k, one, scale, joined, cu_seqlens, total)
    o = (both[..., :V] / (both[..., V:] + eps)).to(v.dtype)
    return o, (last[..., :V], last[..., V])


def _bidirectional(q, k, v, scale, state, cu_seqlens, total) -> tuple[Tensor, Tensor]:
    """Every token reads the sum over its whole sequence."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, _, _ = expand_heads(q.to(wide), k.to(wide), v.to(wide), None, None)
    if cu_seqlens is None:
        S = torch.einsum("bthk,bthv->bhkv", k, v)
        S = S if total is None else total(S)
        S = S if state is None else S + state.to(wide)
        return scale * torch.einsum("bthk,bhkv->bthv", q, S), S
    lengths = cu_seqlens.diff().tolist()
    parts = zip(k[0].split(lengths), v[0].split(lengths), strict=True)
    S = torch.stack([torch.einsum("thk,thv->hkv", k, v) for k, v in parts])
    S = S if state is None else S + state.to(wide)
    reads = [torch.einsum("thk,hkv->thv", q, s) for q, s in zip(q[0].split(lengths), S)]
    return scale * torch.cat(reads)[None], S
