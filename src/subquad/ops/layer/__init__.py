"""The short steps between a model's products: convolution, norms, gates, and the loss.

Each takes longer to read and to write than to compute, so that on a GPU each is one kernel, and so
is its backward pass, which computes again what it needs: nothing is saved but the arguments.

Legend: B batch, T tokens, D channels, N sequences, H heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# By name: the package's own ``torch`` module takes the name ``torch`` here once it is imported.
from torch import _C, Tensor, float32, int64
from torch import dtype as Dtype

from subquad.ops import checks
from subquad.ops.backend import Backend, Request, choose, signature, without_autocast
from subquad.ops.layer.activation import ACTIVATIONS
from subquad.ops.layer.triton.gate import verify

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "gated",
    "gated_rms_norm",
    "l2_norm",
    "request",
    "short_conv",
    "softplus_decay",
    "token_losses",
]


def _always(request: Request) -> tuple[bool, str]:
    return True, "takes everything"


def _backends(part: str) -> tuple[Backend, ...]:
    return (
        Backend("triton", verify, f"subquad.ops.layer.triton.op:{part}"),
        Backend("torch", _always, f"subquad.ops.layer.torch:{part}"),
        Backend("reference", _always, f"subquad.ops.layer.reference:{part}"),
    )


PARTS = ("short_conv", "l2_norm", "gated_rms_norm", "gated", "softplus_decay", "token_losses")
FORMS = {part: _backends(part) for part in PARTS}
BACKENDS = FORMS["short_conv"]  # of them all, for explain()

MOST_KNOWN = 512
_known: dict[tuple[Any, ...], Any] = {}  # what runs a call whose arguments were right before


def request(
    *,
    D: int,
    part: str = "short_conv",
    size: int = 4,
    groups: int = 1,
    device: str = "cpu",
    dtype: Dtype = float32,
    transformed: bool = False,
) -> Request:
    """The :class:`~subquad.ops.backend.Request` of a step.

    Args:
        D: channels, of the last axis.
        part: one of ``PARTS``.
        size: of the convolution's kernel; groups: of a norm.
        transformed: whether one of ``torch.func``'s transforms (vmap, jvp) is around the call.
    """
    checks.one_of("part", part, PARTS)
    sizes = {"D": D, "size": size, "groups": groups}
    traits = {f"part:{part}"} | ({"transformed"} if transformed else set())
    return Request(device, dtype, sizes, frozenset(traits))


def _implementation(
    part: str,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    backend: str | None,
    check: Callable[[], Mapping[str, int]],
) -> Any:
    """What runs a step; ``check`` looks at the arguments and gives the request's sizes."""
    x = tensors[0]
    assert x is not None
    transformed = _C._are_functorch_transforms_active()
    known = signature(*tensors)
    key = (part, backend, transformed, options, known)
    run = known and _known.get(key)
    if not run:
        checks.same_dtype({"x": x})
        about: dict[str, Any] = {"device": x.device.type, "dtype": x.dtype, **check()}
        asked = request(part=part, transformed=transformed, **about)
        run = choose("layer", FORMS[part], asked, backend).load()
        if known:
            if len(_known) >= MOST_KNOWN:
                _known.clear()
            _known[key] = run
    return run


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """Causal convolution of every channel for itself, then an activation.

    ``y[t] = act(b + sum_j w[:, j] x[t - size + 1 + j])``, accumulated in at least float32 by the
    kernels.

    Args:
        x: ``[B,T,D]``.
        weight: ``[D,size]``; bias: ``[D]``.
        past: ``[N,size-1,D]``, the inputs before each sequence; zeros where None.
        cu_seqlens: int32 ``[N+1]``, the boundaries of packed sequences (B must be 1).
        activation: a key of ``ACTIVATIONS``; None is "identity".
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``[B,T,D]`` in the dtype of x. Differentiable in all float arguments; once by the kernels.

    Raises:
        ValueError: for shapes, boundaries or an activation that do not fit.
    """
    activation = activation or "identity"

    def check() -> dict[str, int]:
        checks.one_of("activation", activation, ACTIVATIONS)
        sizes = checks.shapes({"x": (x, "B T D"), "weight": (weight, "D size")})
        checks.positive("size of weight", sizes["size"])
        checks.cu_seqlens(cu_seqlens, B=sizes["B"], T=sizes["T"])
        N = sizes["B"] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if bias is not None:
            checks.shape("bias", bias, (sizes["D"],))
        if past is not None:
            checks.shape("past", past, (N, sizes["size"] - 1, sizes["D"]))
        return {"D": sizes["D"], "size": sizes["size"]}

    tensors = (x, weight, bias, past, cu_seqlens)
    run = _implementation("short_conv", tensors, (activation,), backend, check)
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, B=x.shape[0], T=x.shape[1])
    with without_autocast(x.device.type):
        return run(*tensors, activation)


def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """``x / sqrt(sum x^2 + eps)`` over the last axis, in at least float32.

    Returns:
        a tensor like x. Differentiable, once by the kernels.
    """
    run = _implementation("l2_norm", (x,), (), backend, lambda: {"D": x.shape[-1]})
    with without_autocast(x.device.type):
        return run(x, eps)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    gate_first: bool = False,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """``x / sqrt(mean x^2 + eps) * weight * act(gate)`` over the last axis.

    Args:
        x: ``[...,D]``; gate: of its shape, or None; weight: ``[D]``.
        activation: of the gate, a key of ``ACTIVATIONS``.
        gate_first: the norm of ``x * act(gate)`` instead, as in Mamba-2.
        groups: equal parts of the last axis, each with a mean of its own.
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``[...,D]`` in the dtype that x and gate make together. Differentiable, once by the kernels.

    Raises:
        ValueError: for shapes, groups or an activation that do not fit.
    """

    def check() -> dict[str, int]:
        checks.one_of("activation", activation, ACTIVATIONS)
        D = x.shape[-1]
        checks.shape("weight", weight, (D,))
        checks.divides("groups", groups, "width", D)
        if gate is not None:
            checks.shape("gate", gate, tuple(x.shape))
        return {"D": D, "groups": groups}

    tensors, options = (x, gate, weight), (activation, groups)
    run = _implementation("gated_rms_norm", tensors, options, backend, check)
    with without_autocast(x.device.type):
        return run(x, gate, weight, eps, activation, gate_first, groups)


def gated(
    x: Tensor, gate: Tensor, *, activation: str = "silu", backend: str | None = None
) -> Tensor:
    """``x * act(gate)``, two tensors of one shape.

    Returns:
        a tensor of that shape, in the dtype that both make together. Differentiable, once by the
        kernels.

    Raises:
        ValueError: for shapes or an activation that do not fit.
    """

    def check() -> dict[str, int]:
        checks.one_of("activation", activation, ACTIVATIONS)
        checks.shape("gate", gate, tuple(x.shape))
        return {"D": x.shape[-1]}

    run = _implementation("gated", (x, gate), (activation,), backend, check)
    with without_autocast(x.device.type):
        return run(x, gate, activation)


def softplus_decay(
    x: Tensor, A_log: Tensor, dt_bias: Tensor, *, backend: str | None = None
) -> Tensor:
    """Log decay ``-exp(A_log) * softplus(x + dt_bias)``, <= 0.

    Args:
        x: ``[...,H]``, or ``[...,H,K]`` for decays per channel.
        A_log: ``[H]``, or ``[H,1]``; dt_bias: the last axes of x.
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        a tensor of the shape of x, at least float32. Differentiable, once by the kernels.

    Raises:
        ValueError: for shapes that do not fit.
    """

    def check() -> dict[str, int]:
        axes = dt_bias.dim()
        checks.shape("dt_bias", dt_bias, tuple(x.shape[x.dim() - axes :]))
        checks.shape("A_log", A_log, (*dt_bias.shape[:1], *(1,) * (axes - 1)))
        return {"D": dt_bias.numel()}

    run = _implementation("softplus_decay", (x, A_log, dt_bias), (), backend, check)
    with without_autocast(x.device.type):
        return run(x, A_log, dt_bias)


def token_losses(
    logits: Tensor, labels: Tensor, *, ignored: int = -100, backend: str | None = None
) -> Tensor:
    """The cross-entropy of every row, ``logsumexp(logits) - logits[label]``.

    Args:
        logits: ``[n,V]``; labels: int64 ``[n]``.
        ignored: a label whose row counts 0.
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``[n]``, at least float32. Differentiable in the logits, once by the kernels.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """

    def check() -> dict[str, int]:
        checks.shapes({"logits": (logits, "n V"), "labels": (labels, "n")})
        if labels.dtype != int64:
            raise ValueError(f"labels must be int64, got {labels.dtype}")
        return {"D": logits.shape[1]}

    run = _implementation("token_losses", (logits, labels), (), backend, check)
    with without_autocast(logits.device.type):
        return run(logits, labels, ignored)
