"""The gated (delta) linear recurrence: one operation for a dozen systems.

    S <- diag(exp(decay)) S                       forget
    S <- S + beta k (v - S^T k)^T                 write: the delta rule (with beta), or
    S <- S + k v^T                                write: plain (without)
    o  = scale * S^T q                            read, after the write

Legend: B batch, T tokens, H heads, K key dim, V value dim, N sequences.
"""

from __future__ import annotations

from typing import Any, Literal

# By name: the package's own ``torch`` module takes the name ``torch`` here once it is imported.
from torch import Tensor, float32, is_grad_enabled
from torch import dtype as Dtype

from subquad.ops import checks
from subquad.ops.backend import Backend, Request, choose, signature, without_autocast
from subquad.ops.recurrence.linear import linear_attention
from subquad.ops.recurrence.triton.gate import verify

__all__ = ["BACKENDS", "linear_attention", "recurrence", "request"]

Form = Literal["auto", "parallel", "chunk", "recurrent"]
FORMS = ("auto", "parallel", "chunk", "recurrent")


def _always(request: Request) -> tuple[bool, str]:
    return True, "takes everything"


BACKENDS = (
    Backend("triton", verify, "subquad.ops.recurrence.triton.op:recurrence"),
    Backend("torch", _always, "subquad.ops.recurrence.torch:recurrence"),
    Backend("reference", _always, "subquad.ops.recurrence.reference:recurrence"),
)


MOST_KNOWN = 512
_known: dict[tuple[Any, ...], Any] = {}  # what runs a call whose arguments were right before


def request(
    *,
    T: int,
    H: int,
    K: int,
    V: int | None = None,
    B: int = 1,
    device: str = "cpu",
    dtype: Dtype = float32,
    decay: Literal["none", "head", "channel"] = "none",
    delta: bool = False,
    grad: bool = False,
    packed: bool = False,
    state: bool = False,
    form: Form = "auto",
) -> Request:
    """The recurrence's :class:`~subquad.ops.backend.Request` for a shape."""
    flags = {"delta": delta, "grad": grad, "packed": packed, "state": state}
    traits = {name for name, on in flags.items() if on} | {f"decay:{decay}", f"form:{form}"}
    return Request(device, dtype, {"B": B, "T": T, "H": H, "K": K, "V": V or K}, frozenset(traits))


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: Form = "auto",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the gated (delta) linear recurrence over a sequence.

    Heads are grouped by count: H is the largest head count among the inputs, every other count
    divides it, and consecutive heads share (grouped values: v, decay and beta have H heads while
    q and k have fewer; grouped queries: q has H).

    Args:
        q: ``[B,T,H,K]``; k: ``[B,T,H,K]``; v: ``[B,T,H,V]``, float, one dtype.
        decay: log of the forget gate, <= 0: None, per head ``[H]`` (constant over time) or
            ``[B,T,H]``, or per key channel ``[B,T,H,K]``.
        beta: ``[B,T,H]``, the delta rule's write strength; None writes plainly.
        scale: multiplies the read; K**-0.5 where None.
        state: ``[N,H,K,V]`` before the first token (N = B, or the number of packed sequences);
            zero where None.
        cu_seqlens: int32 ``[N+1]``, the boundaries of packed sequences (B must be 1).
        form: "parallel" (quadratic), "chunk" (linear, trains), "recurrent" (token by token), or
            "auto" (recurrent for one token, else chunk).
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``o [B,T,H,V]`` in the dtype of v, and the state ``[N,H,K,V]`` after the last token, float32
        (float64 for float64 inputs). Both are differentiable, also with respect to ``state``.

    Raises:
        ValueError: for shapes, head counts, dtypes or boundaries that do not fit, and for a decay
            that is NaN or positive.
    """
    known = signature(q, k, v, decay, beta, state, cu_seqlens)
    run = known and _known.get((form, backend, known))
    if not run:
        run = _implementation(q, k, v, decay, beta, state, cu_seqlens, form, backend)
        if known:
            if len(_known) >= MOST_KNOWN:
                _known.clear()
            _known[form, backend, known] = run
    if decay is not None:
        checks.log_gate(decay)
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, B=q.shape[0], T=q.shape[1])
    with without_autocast(q.device.type):
        return run(
            q,
            k,
            v,
            decay=decay,
            beta=beta,
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            state=state,
            cu_seqlens=cu_seqlens,
            form=form,
        )


def _implementation(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None,
    state: Tensor | None, cu_seqlens: Tensor | None, form: Form, backend: str | None,
) -> Any:  # fmt: skip
    """What runs a call, once its arguments are right."""
    checks.one_of("form", form, FORMS)
    checks.shapes({"q": (q, "B T Hq K"), "k": (k, "B T Hk K"), "v": (v, "B T Hv V")})
    checks.same_dtype({"q": q, "k": k, "v": v})
    B, T, _, K = q.shape
    counts = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    if decay is not None:
        checks.decay(decay, B=B, T=T, K=K)
        counts["decay"] = decay.shape[0] if decay.dim() == 1 else decay.shape[2]
    if beta is not None:
        checks.shapes({"q": (q, "B T Hq K"), "beta": (beta, "B T H")})
        counts["beta"] = beta.shape[2]
    H = checks.heads(counts)
    checks.cu_seqlens(cu_seqlens, B=B, T=T)
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if state is not None:
        checks.shape("state", state, (N, H, K, v.shape[3]))

    traits: dict[str, Any] = {
        "decay": "none" if decay is None else "channel" if decay.dim() == 4 else "head",
        "delta": beta is not None,
        "grad": is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (q, k, v, decay, beta, state)),
        "packed": cu_seqlens is not None,
        "state": state is not None,
    }
    asked = request(
        B=B, T=T, H=H, K=K, V=v.shape[3], device=q.device.type, dtype=q.dtype, form=form, **traits
    )
    return choose("recurrence", BACKENDS, asked, backend).load()
