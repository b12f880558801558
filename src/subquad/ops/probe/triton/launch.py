"""From tensors to launches: the probe's forward and backward pass over its kernels."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops.kernel import met, on_device, rehearse
from subquad.ops.probe.spans import queries_of
from subquad.ops.probe.triton import backward as grads
from subquad.ops.probe.triton.forward import probe_forward
from subquad.ops.sizes import processors

LOG2E = 1.4426950408889634

FEW = 8  # queries, whose keys are shared out among programs
PART = 256  # keys of a part at least

# (BM, BN, warps, stages) by kernel, bytes of an element and head dim up to; see docs/log.md.
CONFIGS = {
    ("few", 2, 64): (16, 64, 4, 2),
    ("few", 2, 128): (16, 64, 4, 2),
    ("few", 4, 64): (16, 32, 4, 2),
    ("few", 4, 128): (16, 32, 4, 2),
    ("forward", 2, 64): (128, 64, 8, 3),
    ("forward", 2, 128): (128, 64, 8, 2),
    ("forward", 4, 64): (64, 32, 4, 2),
    ("forward", 4, 128): (64, 32, 8, 1),
    ("grad_q", 2, 64): (64, 64, 4, 2),
    ("grad_q", 2, 128): (64, 64, 8, 2),
    ("grad_q", 4, 64): (64, 32, 4, 1),
    ("grad_q", 4, 128): (32, 32, 4, 1),
    ("grad_kv", 2, 64): (64, 64, 4, 2),
    ("grad_kv", 2, 128): (64, 64, 8, 1),
    ("grad_kv", 4, 64): (32, 64, 4, 1),
    ("grad_kv", 4, 128): (32, 32, 4, 1),
}
_forced: dict[str, tuple[int, int, int, int]] = {}


@contextmanager
def forced(configs: dict[str, tuple[int, int, int, int]]):
    """Run the named kernels with these configurations inside the block, in the whole process (the
    backward pass has a thread of its own)."""
    global _forced
    before, _forced = _forced, configs
    try:
        yield
    finally:
        _forced = before


def _config(kernel: str, q: Tensor, v: Tensor) -> tuple[dict[str, int], dict[str, Any]]:
    """The tile and the launch options."""
    width = 64 if max(q.shape[3], v.shape[3]) <= 64 else 128
    BM, BN, warps, stages = _forced.get(kernel) or CONFIGS[kernel, q.itemsize, width]
    return {"BM": BM, "BN": BN}, {"num_warps": warps, "num_stages": stages}


def _dims(q: Tensor, v: Tensor) -> dict[str, Any]:
    K, V = q.shape[3], v.shape[3]
    return {
        "K": K, "V": V, "BK": max(16, triton.next_power_of_2(K)),
        "BV": max(16, triton.next_power_of_2(V)),
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, lo: Tensor, hi: Tensor, scale: float,
    saves: bool, peak: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`subquad.ops.probe.chunk.forward`."""
    q, k, v, r = (_dense_last(x) for x in (q, k, v, r))
    (B, T, H, K), S = q.shape, k.shape[1]
    if saves and not met(("probe", T > FEW, peak, K, v.shape[3], q.dtype, q.device)):
        inputs = q, k, v, r, lo, hi

        def rehearsal() -> None:
            o, mean, lse, drift, _ = forward(*inputs, scale, saves, peak)
            backward(o, lse, *inputs, o, mean, lse, drift, scale)

        rehearse(rehearsal)
    if T > FEW or saves or peak:
        kernel = "forward" if T > FEW else "few"
        return _forward(kernel, q, k, v, r, lo, hi, scale, saves, peak, 1)
    # Few queries alone would leave the GPU idle: each part of the keys has a program.
    wanted = triton.cdiv(2 * processors(q.device), B * H)
    parts = max(1, min(triton.next_power_of_2(wanted), triton.cdiv(S, PART), 64))
    edges = torch.arange(parts + 1, device=lo.device, dtype=lo.dtype) * triton.cdiv(S, parts)
    first, last = edges[:-1, None], edges[1:, None]
    lo, hi = (x.expand(B, -1)[:, None].clamp(first, last).flatten(0, 1) for x in (lo, hi))
    found = _forward("few", q, k, v, r, lo, hi, scale, True, False, parts)
    o, lse, drift = _joined(*(x.unflatten(0, (B, parts)) for x in found[:4]))
    return o.to(v.dtype), found[1].new_empty(0), lse, drift, found[4]


def _joined(o: Tensor, mean: Tensor, lse: Tensor, drift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of the keys ``[B,parts,...]`` as one: with shares a of the softmax's mass,
    ``o = sum_p a_p (o_p + (drift - drift_p) mean_p)``, ``drift = sum_p a_p drift_p``."""
    whole = lse.logsumexp(1)
    share = (lse - whole.masked_fill(whole == -torch.inf, 0)[:, None]).exp()
    joined = (share * drift).sum(1)
    lean = share * (joined[:, None] - drift)
    o = (share[..., None] * o.float() + lean[..., None] * mean.float()).sum(1)
    return o, whole, joined


def _forward(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, r: Tensor, lo: Tensor, hi: Tensor, scale: float,
    saves: bool, peak: bool, parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One launch; with ``parts``, all results and the planes have as many rows for each of q's, the
    o and mean of parts in float32."""
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    rows = B * parts
    o = v.new_empty(rows, T, H, v.shape[3], dtype=v.dtype if parts == 1 else torch.float32)
    mean = torch.empty_like(o) if saves else v.new_empty(0)
    lse, drift = (q.new_empty(rows, T, H, dtype=torch.float32) for _ in "12")
    top = lo.new_empty((rows, T, H) if peak else 0)
    tile, options = _config(kernel, q, v)
    with on_device(q):
        probe_forward.launch(
            (triton.cdiv(T, tile["BM"]), rows * H),
            (q, k, v, r, lo, hi, o, mean, lse, drift, top),
            scale * LOG2E, T, S, H, G, _step(lo), parts,
            *[s for x in (q, k, v, r) for s in x.stride()[:3]],
            **_dims(q, v), **tile, SAVES=saves, PEAK=peak, **options,
        )  # fmt: skip
    return o, mean, lse, drift, top


def backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, r: Tensor, lo: Tensor, hi: Tensor,
    o: Tensor, mean: Tensor, lse: Tensor, drift: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`subquad.ops.probe.chunk.backward`."""
    q, k, v, r, do = (_dense_last(x) for x in (q, k, v, r, do))
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    lse2, delta, pull = (torch.empty_like(lse) for _ in "123")
    dims = _dims(q, v)
    dq, dk, dv, dr = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, r))
    strides = [s for x in (q, k, v, r, do) for s in x.stride()[:3]]
    sizes = scale, T, S, H, G, _step(lo)
    by_row = lse2, drift, delta, pull
    with on_device(q):
        grads.probe_rows.launch(
            (triton.cdiv(B * T * H, 64),),
            (o, mean, do, lse, dlse.contiguous(), lse2, delta, pull), B * T * H, T, H,
            *do.stride()[:3], V=dims["V"], BV=dims["BV"], BM=64, num_warps=4,
        )  # fmt: skip
        tile, options = _config("grad_q", q, v)
        grads.probe_grad_q.launch(
            (triton.cdiv(T, tile["BM"]), B * H),
            (q, k, v, r, do, lo, hi, *by_row, dq, dr), *sizes, *strides,
            **dims, **tile, **options,
        )  # fmt: skip
        tile, options = _config("grad_kv", q, v)
        first, last = queries_of(lo, hi, S, tile["BN"])
        grads.probe_grad_kv.launch(
            (first.shape[1], B * G),
            (q, k, v, r, do, lo, hi, first, last, *by_row, dk, dv), *sizes, first.shape[1],
            _step(first), *strides, **dims, **tile, **options,
        )  # fmt: skip
    return dq, dk, dv, dr


def _step(planes: Tensor) -> int:
    """From one row's plane to the next, 0 where all rows share one."""
    return 0 if len(planes) == 1 else planes.stride(0)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
