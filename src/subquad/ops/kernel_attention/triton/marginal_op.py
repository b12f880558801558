"""From tensors to launches: linear attention by states of blocks, forward and backward.

Legend: B rows, T queries, S keys, H query heads, G key heads, r = H / G, K key dim, V value dim,
M blocks of queries, N of keys.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.kernel import met, on_device, rehearse
from subquad.ops.kernel_attention.triton import marginal as kernels

PHI = {"softmax": 0, "elu": 1, "relu": 2}
TILE = 64  # smaller ones are wrong in backward passes on Hopper
WIDEST = {2: 128 * 128, 4: 64 * 128}  # elements of a state, by the bytes of an input's: must fit


def fits(v: Tensor, K: int) -> bool:
    """Whether the kernels' tiles fit in a multiprocessor's shared memory."""
    sides = [max(16, triton.next_power_of_2(n)) for n in (K, v.shape[3])]
    return prod(sides) <= WIDEST.get(v.dtype.itemsize, 0)


def marginal(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor, size: int, rows: int, phi: str, eps: float
) -> Tensor:
    """As :func:`subquad.ops.kernel_attention.marginal.marginal`."""
    return _Node.apply(q, k, v, read, size, rows, phi, eps)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, read, size, rows, phi, eps):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        K, V, trains = q.shape[3], v.shape[3], any(ctx.needs_input_grad)
        given = read, size, rows, eps, _how(v, K, V, phi)
        if not met(("marginal", v.dtype, K, V, phi, trains, q.device)):

            def rehearsal() -> None:
                found = _forward(q, k, v, *given)
                if trains:
                    _backward(found[0], q, k, v, *found[1:], *given)

            rehearse(rehearsal)
        o, s, s_z = _forward(q, k, v, *given)
        ctx.save_for_backward(q, k, v, s, s_z, read)
        ctx.given = given[1:]
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return *_backward(do, *ctx.saved_tensors, *ctx.given), None, None, None, None, None


def _forward(q, k, v, read, size, rows, eps, how) -> tuple[Tensor, Tensor, Tensor]:
    """o, and for every block of queries the matrix and the vector that it reads."""
    (B, T, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    M, N = read.shape[2:]
    split = v.dtype != torch.float32
    h = _matrices((B, G, N), K, V, split, q.device)
    z = torch.empty(B, G, N, K, device=q.device)
    o = torch.empty(B, T, H, V, device=q.device)
    map_ = read.reshape(B, G, -1, N)
    with on_device(q):
        kernels.write_states.launch(
            (N, B * G), (k, v, h, z),
            S, H, G, N, size, N * K * V, *k.stride()[:3], *v.stride()[:3], SPLIT=split, **how,
        )  # fmt: skip
        s, s_z = _product(map_, h), map_.float() @ z
        kernels.read_states.launch(
            (M, B * H), (q, s, s_z, o), T, H, G, M, rows, 0, eps, *q.stride()[:3], **how
        )
    return o, s, s_z


def _backward(
    do, q, k, v, s, s_z, read, size, rows, eps, how
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    M, N = read.shape[2:]
    split = v.dtype != torch.float32
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    ds = _matrices((B, G, H // G * M), K, V, split, q.device)
    ds_z = torch.empty_like(s_z)
    back = read.reshape(B, G, -1, N).mT
    with on_device(q):
        kernels.read_backward.launch(
            (M, B * H), (q, s, s_z, do.float().contiguous(), dq, ds, ds_z),
            T, H, G, M, rows, H // G * M * K * V, eps, *q.stride()[:3], SPLIT=split, **how,
        )  # fmt: skip
        dh, dz = _product(back, ds), back.float() @ ds_z
        kernels.write_backward.launch(
            (N, B * G), (k, v, dh, dz, dk, dv),
            S, H, G, N, size, 0, *k.stride()[:3], *v.stride()[:3], **how,
        )  # fmt: skip
    return dq, dk, dv


def _how(v: Tensor, K: int, V: int, phi: str) -> dict[str, Any]:
    BK, BV = (max(16, triton.next_power_of_2(n)) for n in (K, V))
    return {
        "K": K, "V": V, "BK": BK, "BV": BV, "BT": TILE, "PHI": PHI[phi],
        "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",
        "num_warps": 4 if max(BK, BV) <= 64 else 8, "num_stages": 1,
    }  # fmt: skip


def _matrices(
    lead: tuple[int, int, int], K: int, V: int, split: bool, device: torch.device
) -> Tensor:
    """Room for ``[*lead,K,V]``, twice along the last of ``lead`` where split into halves."""
    B, G, n = lead
    dtype = torch.bfloat16 if split else torch.float32
    return torch.empty(B, G, 2 * n if split else n, K, V, dtype=dtype, device=device)


def _product(map_: Tensor, x: Tensor) -> Tensor:
    """bool ``[B,G,m,n]`` times matrices ``[B,G,n,K,V]``, float32; both halves at once."""
    B, G, m, n = map_.shape
    flat = x.view(B * G, x.shape[2], -1)
    map_ = map_.reshape(B * G, m, n)
    if x.dtype == torch.float32:
        out = map_.float() @ flat
    else:
        map_ = map_.to(x.dtype)
        map_ = torch.cat([map_, map_], 2)
        if x.is_cuda:
            out = torch.bmm(map_, flat, out_dtype=torch.float32)
        else:
            out = map_.float() @ flat.float()
    return out.view(B, G, m, *x.shape[3:])
