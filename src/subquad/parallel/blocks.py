"""One block of a ring: the part of a softmax over it, and its gradients from the lse of the whole.

On GPUs dense and causal blocks in half precision are the vendor's flash kernels; everything else is
the library's own attention, whose backward pass takes o and lse as arguments for this use.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from subquad import mask as masks
from subquad.mask import Mask
from subquad.ops.attention import BACKENDS, request
from subquad.ops.backend import choose

Part = tuple[Tensor, Tensor]


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float, backend: str | None
) -> Part:
    """``o [B,T,H,V]`` and ``lse [B,T,H]`` over the keys of the block."""
    if flash(q, k, v, mask, backend):
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, mask is not None, scale=scale
        )
        return o.transpose(1, 2), lse.transpose(1, 2)
    run = _module(q, k, v, mask, backend)
    return run.forward(q, k, v, mask or masks.full(), scale, 0)


def backward(
    rows: list[Any],
    keys: Part,
    mask: Mask | None,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of dq ``[B,T,H,K]``, and dk, dv of its keys.

    Args:
        rows: do, dlse (or None), q, o, lse of the queries; keys: k, v.
    """
    (do, dlse, q, o, lse), (k, v) = rows, keys
    if flash(q, k, v, mask, backend) and dlse is None:
        return _flash_backward(do, q, k, v, o, lse, mask is not None, scale)
    run = _module(q, k, v, mask, backend)
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return run.backward(do, dlse, q, k, v, o, lse, mask or masks.full(), scale, 0)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, backend: str | None) -> bool:
    """Whether the vendor's kernel takes the block."""
    K, V = q.shape[3], v.shape[3]
    fits = (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and K == V
        and K % 8 == 0
        and K <= 256
        and (mask is None or mask == masks.causal())
    )
    if not fits:
        return False
    asked = request(
        T=q.shape[1], S=k.shape[1], H=q.shape[2], K=K, device="cuda", dtype=q.dtype, mask=mask,
        offset=0,
    )  # fmt: skip
    return choose("attention", BACKENDS, asked, backend).name == "sdpa"


def _flash_backward(do, q, k, v, o, lse, causal: bool, scale: float):
    T, S = q.shape[1], k.shape[1]
    G, r = k.shape[2], q.shape[2] // k.shape[2]
    if r > 1:  # the kernel's gradients are a query head's each
        k, v = (x.repeat_interleave(r, 2) for x in (k, v))
    heads_first = [x.transpose(1, 2) for x in (do, q, k, v, o, lse)]
    heads_first[5] = heads_first[5].contiguous()
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *heads_first, None, None, T, S, 0.0, causal, seed, unused, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    if r > 1:
        dk, dv = (x.unflatten(2, (G, r)).sum(3, dtype=torch.float32) for x in (dk, dv))
    return dq, dk, dv


def _module(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, backend: str | None) -> Any:
    """The module of the implementation that gives lse, by the verifiers."""
    asked = request(
        B=q.shape[0], T=max(q.shape[1], 9), S=k.shape[1], H=q.shape[2], G=k.shape[2],
        K=q.shape[3], V=v.shape[3], device=q.device.type, dtype=q.dtype, mask=mask, offset=0,
        grad=True, lse=True,
    )  # fmt: skip
    name = None if backend == "sdpa" else backend
    name = "torch" if name == "reference" else name  # the definition has no backward of its own
    chosen = choose("attention", BACKENDS, asked, name)
    return import_module(chosen.home.partition(":")[0])
