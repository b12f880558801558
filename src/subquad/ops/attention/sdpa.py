"""PyTorch's own fused attention, where the mask is dense: the vendor's kernels on a GPU."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from subquad.mask import Mask


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, scale: float, offset: int
) -> tuple[Tensor, None]:
    """Dense or square causal attention; no lse."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = mask is not None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    o = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2), None
