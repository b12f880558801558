"""One token of a whole gated (delta) layer in one launch, the state updated in place.

    convolve q, k, v (silu) -> normalise q and k -> gate -> forget, write, read -> norm and out gate

A program owns one head and BV of its values, so the state is read once and written once: the floor
of decoding. Without a host decision on the way, a CUDA graph may capture it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import checks
from subquad.ops.kernel import Launch, dense, on_device
from subquad.ops.operation import operation
from subquad.ops.recurrence.triton import configs
from subquad.ops.recurrence.triton.parts import CHANNEL, HEAD, kernel

SIGMOID, SILU = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _convolve(X, PAST, WEIGHT, NEXT, row, D, channel, ok, write, WINDOW: tl.constexpr):
    """silu of the causal convolution at one token; ``write`` moves the window on."""
    x = tl.load(X + row * D + channel, mask=ok, other=0.0).to(tl.float32)
    past = PAST + row * (WINDOW - 1) * D + channel
    to = NEXT + row * (WINDOW - 1) * D + channel
    mine = ok & (channel < tl.where(write, D, 0))
    y = x * tl.load(WEIGHT + channel * WINDOW + WINDOW - 1, mask=ok, other=0.0).to(tl.float32)
    for n in tl.static_range(WINDOW - 1):
        old = tl.load(past + n * D, mask=ok, other=0.0)
        y += old.to(tl.float32) * tl.load(WEIGHT + channel * WINDOW + n, mask=ok, other=0.0).to(
            tl.float32
        )
        if n > 0:
            tl.store(to + (n - 1) * D, old, mask=mine)
    tl.store(to + (WINDOW - 2) * D, x.to(NEXT.dtype.element_ty), mask=mine)
    return y * tl.sigmoid(y)


@kernel
def decode(
    Q, K_, V_, QPAST, KPAST, VPAST, QW, KW, VW, QNEXT, KNEXT, VNEXT,
    DECAY_IN, A_LOG, DT_BIAS, BETA, S_, GATE, NORM, Y,
    scale, beta_scale, l2_eps, norm_eps, H, HQ, HK,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (V + BV - 1) // BV
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    h = tl.program_id(1)
    hq, hk = h * HQ // H, h * HK // H
    c = tl.arange(0, BK)
    r = block * BV + tl.arange(0, BV)
    # The state first: its loads are the long ones, and nothing below waits for them until used.
    at = ((row * H + h) * K + c[:, None]) * V + r[None, :]
    ok = (c[:, None] < K) & (r[None, :] < V)
    S = tl.load(S_ + at, mask=ok, other=0.0)

    leads = block == 0
    q = _convolve(
        Q, QPAST, QW, QNEXT, row, HQ * K, hq * K + c, c < K, leads & (h % (H // HQ) == 0), WINDOW
    )
    k = _convolve(
        K_, KPAST, KW, KNEXT, row, HK * K, hk * K + c, c < K, leads & (h % (H // HK) == 0), WINDOW
    )
    v = _convolve(V_, VPAST, VW, VNEXT, row, H * V, h * V + r, r < V, block >= 0, WINDOW)
    q *= tl.rsqrt(tl.sum(q * q, axis=0) + l2_eps)
    k *= tl.rsqrt(tl.sum(k * k, axis=0) + l2_eps)

    rate = tl.exp(tl.load(A_LOG + h).to(tl.float32))
    if DECAY == CHANNEL:
        x = tl.load(DECAY_IN + (row * H + h) * K + c, mask=c < K, other=0.0).to(tl.float32)
        x += tl.load(DT_BIAS + h * K + c, mask=c < K, other=0.0).to(tl.float32)
    else:
        x = tl.load(DECAY_IN + row * H + h).to(tl.float32) + tl.load(DT_BIAS + h).to(tl.float32)
    softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
    factor = tl.exp(-rate * softplus)
    S *= factor[:, None] if DECAY == CHANNEL else factor
    if DELTA:
        beta = tl.sigmoid(tl.load(BETA + row * H + h).to(tl.float32)) * beta_scale
        v = beta * (v - tl.sum(S * k[:, None], axis=0))
    S += k[:, None] * v[None, :]
    tl.store(S_ + at, S, mask=ok)
    y = tl.sum(S * q[:, None], axis=0) * scale

    if ACTIVATION > 0:
        y *= tl.rsqrt(tl.sum(y * y, axis=0) / V + norm_eps)
        y *= tl.load(NORM + r, mask=r < V, other=0.0).to(tl.float32)
        gate = tl.load(GATE + (row * H + h) * V + r, mask=r < V, other=0.0).to(tl.float32)
        y *= tl.sigmoid(gate)
        if ACTIVATION == SILU:
            y *= gate
    tl.store(Y + (row * H + h) * V + r, y.to(Y.dtype.element_ty), mask=r < V)


def fits_gate(K: int, V: int) -> bool:
    """Whether a program can hold a whole head, as the norm over its values needs."""
    return configs.width(K) * configs.width(V) <= 32768


def decode_layer(
    q: Tensor, k: Tensor, v: Tensor, *, pasts: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor], decay: Tensor, A_log: Tensor, dt_bias: Tensor,
    beta: Tensor | None, state: Tensor, gate: Tensor | None = None, norm: Tensor | None = None,
    activation: str = "silu", scale: float | None = None, beta_scale: float = 1.0,
    l2_eps: float = 1e-6, norm_eps: float = 1e-5,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Decode one token of a Gated DeltaNet or KDA layer between its projections.

    Args:
        q: ``[B,HQ,K]``, k: ``[B,HK,K]``, v: ``[B,H,V]``, as the projections give them.
        pasts: the last inputs of the three short convolutions, ``[B,size-1,channels]`` each.
        weights: their weights ``[channels,size]``.
        decay: the raw gate ``[B,H]`` or, per channel, ``[B,H,K]``; the log decay is
            ``-exp(A_log) softplus(decay + dt_bias)``.
        A_log: ``[H]``; dt_bias: ``[H]`` or ``[H K]``.
        beta: the raw write strength ``[B,H]``, used as ``beta_scale sigmoid(beta)``; None writes
            plainly.
        state: float32 ``[B,H,K,V]``, contiguous, **updated in place**.
        gate: ``[B,H,V]`` and norm ``[V]``: the output is ``rms_norm(o) norm act(gate)``; o itself
            where both are None.
        activation: of the gate, "silu" or "sigmoid".

    Returns:
        ``y [B,H,V]`` in the dtype of v, and the convolutions' new pasts.

    Raises:
        ValueError: for shapes that do not fit, a state that is not contiguous float32, or K V above
            32768 with a gate.
    """
    B, H, V = v.shape
    HQ, HK, K = q.shape[1], k.shape[1], q.shape[2]
    size = weights[0].shape[1]
    checks.heads({"q": HQ, "k": HK, "v": H})
    checks.shape("state", state, (B, H, K, V))
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state must be contiguous float32, got {state.dtype}, {state.stride()}")
    checks.one_of("activation", activation, ("silu", "sigmoid"))
    for name, x, past, weight in zip("qkv", (q, k, v), pasts, weights, strict=True):
        channels = x.shape[1] * x.shape[2]
        checks.shape(f"pasts ({name})", past, (B, size - 1, channels))
        checks.shape(f"weights ({name})", weight, (channels, size))
    channel = decay.dim() == 3
    checks.shape("decay", decay, (B, H, K) if channel else (B, H))
    checks.shape("dt_bias", dt_bias, (H * K,) if channel else (H,))
    if gate is not None and not fits_gate(K, V):
        raise ValueError(f"gate needs K V <= 32768, got K={K}, V={V}")
    y, *nexts = _decode(
        q, k, v, *pasts, *weights, decay, A_log, dt_bias, beta, state, gate, norm,
        activation, K**-0.5 if scale is None else scale, beta_scale, l2_eps, norm_eps,
    )  # fmt: skip
    return y, tuple(nexts)


@operation("recurrence_decode", mutates=("state",))
def _decode(
    q: Tensor, k: Tensor, v: Tensor, q_past: Tensor, k_past: Tensor, v_past: Tensor,
    q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, decay: Tensor, A_log: Tensor,
    dt_bias: Tensor, beta: Tensor | None, state: Tensor, gate: Tensor | None, norm: Tensor | None,
    activation: str, scale: float, beta_scale: float, l2_eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if state.data_ptr() % 16:
        raise ValueError(f"state must start at a multiple of 16 bytes, got {state.data_ptr()}")
    pasts = q_past, k_past, v_past
    sizes = *v.shape, q.shape[1], k.shape[1], q.shape[2], q_weight.shape[1]
    kind = decay.dim() == 3, beta is not None, None if gate is None else activation
    numbers = scale, beta_scale, l2_eps, norm_eps
    y, nexts = v.new_empty(v.shape), [p.new_empty(p.shape) for p in pasts]
    before = q, k, v, *pasts, q_weight, k_weight, v_weight
    rest = [
        None if t is None else dense(t) for t in (decay, A_log, dt_bias, beta, state, gate, norm)
    ]
    with on_device(v):
        launch = _bound(sizes, kind, numbers, v.device, configs.forcings())
        launch(*map(dense, before), *nexts, *rest, y)
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return y, nexts[0], nexts[1], nexts[2]


@lru_cache(maxsize=256)
def _bound(sizes, kind, numbers, device: torch.device, _forcings: int) -> Launch:
    B, H, V, HQ, HK, K, window = sizes
    channel, delta, activation = kind
    name = "channel" if channel else "head"
    c = configs.config("decode", configs.arch(device), name, delta, K, V, 4)
    if activation is not None and c["BV"] != configs.width(V):
        c = configs.decoding(K, configs.width(V))
    return decode.bind(
        (B * triton.cdiv(V, c["BV"]), H), *numbers, H, HQ, HK,
        K=K, V=V, BK=configs.width(K), WINDOW=window,
        DECAY=CHANNEL.value if channel else HEAD.value, DELTA=delta,
        ACTIVATION={None: 0, "sigmoid": 1, "silu": 2}[activation], **c,
    )  # fmt: skip


@_decode.fake
def _(q, k, v, q_past, k_past, v_past, *_):
    return v.new_empty(v.shape), *(p.new_empty(p.shape) for p in (q_past, k_past, v_past))
