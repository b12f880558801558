"""From tensors to launches: mixed attention whose exact part runs on kernels.

Legend: R rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from subquad.ops.kernel import met, on_device, rehearse
from subquad.ops.kernel_attention.exact import Band
from subquad.ops.kernel_attention.near import How
from subquad.ops.kernel_attention.torch import mix
from subquad.ops.kernel_attention.triton import near as kernels
from subquad.ops.operation import operation

TILE = 64  # rows and columns; smaller ones are wrong in backward passes on Hopper
LEAST = 16  # features that a product of tensor cores takes at least


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, how: How
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    half = torch.bfloat16 if v.dtype == torch.bfloat16 else None
    return mix(q, k, v, phi_q, phi_k, how, _near, narrow=half)


def _near(
    q: Tensor, k: Tensor, v: Tensor, band: Band, *, scale: float, q_ids: Tensor, k_ids: Tensor,
    extra: None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert extra is None
    q_ids, k_ids = q_ids.to(torch.int32).contiguous(), k_ids.to(torch.int32).contiguous()
    sizes = [band.block, band.before, band.window]
    n, d, _, _ = near_sums(q, k, v, q_ids, k_ids, sizes, scale)
    return n, d[..., None]


def _launch(kernel, q, k, v, q_ids, k_ids, tensors, sizes, scale: float, over: int) -> None:
    (R, T, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    wide, forward = q.dtype == torch.float32, kernel is kernels.near_forward
    BK, BV = (max(LEAST, triton.next_power_of_2(n)) for n in (K, V))
    with on_device(q):
        kernel.launch(
            (triton.cdiv(over, TILE), R * H), (q, k, v, q_ids, k_ids, *tensors),
            scale, T, S, H, G, S - T, *sizes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *(0 if len(x) == 1 else x.stride(0) for x in (q_ids, k_ids)),
            K=K, V=V, BK=BK, BV=BV, BM=TILE, BN=TILE,
            PRECISION="tf32x3" if wide else "tf32", num_warps=4 if max(K, V) <= 64 else 8,
            num_stages=2 if forward else 1,
        )  # fmt: skip


@operation("near_sums")
def near_sums(
    q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor, k_ids: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """N ``[R,T,H,V]``, d, m and a ``[R,T,H]``; sizes: of :class:`Band`, block, before, window."""
    inputs = (q, k, v, q_ids, k_ids)
    trains = q.requires_grad or k.requires_grad or v.requires_grad
    if trains and not met(("near", q.dtype, q.shape[3], v.shape[3], q.device)):

        def rehearsal() -> None:
            n, d, top, arg = _forward(*inputs, sizes, scale)
            _backward(n, d, *inputs, n, d, top, arg, sizes, scale)

        rehearse(rehearsal)
    return _forward(*inputs, sizes, scale)


def _forward(q, k, v, q_ids, k_ids, sizes, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = q.shape[:3]
    n = q.new_empty(*rows, v.shape[3], dtype=torch.float32)
    d, top = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    arg = q.new_empty(rows, dtype=torch.int32)
    if n.numel():
        tensors = (n, d, top, arg)
        _launch(kernels.near_forward, q, k, v, q_ids, k_ids, tensors, sizes, scale, q.shape[1])
    return n, d, top, arg


@near_sums.fake
def _(q, k, v, q_ids, k_ids, sizes, scale):
    rows = q.shape[:3]
    d, top = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    arg = q.new_empty(rows, dtype=torch.int32)
    return q.new_empty(*rows, v.shape[3], dtype=torch.float32), d, top, arg


@operation("near_sums_backward")
def near_sums_backward(
    dn: Tensor, dd: Tensor, q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor, k_ids: Tensor,
    n: Tensor, d: Tensor, top: Tensor, arg: Tensor, sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(dn, dd, q, k, v, q_ids, k_ids, n, d, top, arg, sizes, scale)


def _backward(
    dn, dd, q, k, v, q_ids, k_ids, n, d, top, arg, sizes, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (R, T, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    dn, dd = dn.float().contiguous(), dd.float().contiguous()
    total = torch.linalg.vecdot(dn, n) + dd * d
    dq = torch.empty_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
    dk = q.new_empty(R, S, H, K, dtype=torch.float32)
    dv = q.new_empty(R, S, H, V, dtype=torch.float32)
    if dq.numel():
        shared = dn, dd, top, arg, total
        _launch(kernels.near_queries, q, k, v, q_ids, k_ids, (*shared, dq), sizes, scale, T)
        _launch(kernels.near_keys, q, k, v, q_ids, k_ids, (*shared, dk, dv), sizes, scale, S)
    if G != H:
        dk, dv = (x.unflatten(2, (G, H // G)).sum(3) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@near_sums_backward.fake
def _(dn, dd, q, k, v, q_ids, k_ids, n, d, top, arg, sizes, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    *tensors, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, dn, dd, _top, _arg):
    q, k, v, q_ids, k_ids, n, d, top, arg = ctx.saved_tensors
    got = near_sums_backward(dn, dd, q, k, v, q_ids, k_ids, n, d, top, arg, ctx.sizes, ctx.scale)
    return *got, None, None, None, None


near_sums.differentiable(_differentiate, _save)
near_sums_backward.without_derivative()
