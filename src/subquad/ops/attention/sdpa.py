"""PyTorch's own fused attention, where the mask is dense: the vendor's kernels on a GPU."""

from __future__ import annotations

from torch import Tensor, float32
from torch.nn.functional import scaled_dot_product_attention

from subquad.mask import Mask
from subquad.ops.layout import repeat_heads


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, scale: float, offset: int
) -> tuple[Tensor, None]:
    """Dense or square causal attention; no lse."""
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.is_cuda and q.dtype == float32:
        # The only fused kernel of float32 takes no grouped heads: plain softmax would run instead.
        k, v, grouped = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2]), False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = mask is not None and q.shape[2] > 1
    o = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2), None
