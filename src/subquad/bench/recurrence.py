"""The recurrence under examination on one device: random cases, errors against float64, floors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.backend import backend
from subquad.ops.recurrence import cost, recurrence
from subquad.ops.recurrence.reference import recurrence as definition

# Largest relative error (in norm) of outputs and gradients against float64.
LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
FORMS = tuple((d, delta) for d in ("none", "head", "channel") for delta in (False, True))


@dataclass(frozen=True)
class Case:
    """One shape of the recurrence.

    Attributes:
        decay: "none", "head" or "channel"; delta: the delta rule.
        H: heads of v; ``groups`` of them share a head of q and k.
        packed: lengths of the packed sequences (B is 1 and T their sum), or ().
        state: whether an initial state is given.
        strong: whether log decays reach -9 a token and below.
    """

    decay: str
    delta: bool
    B: int = 1
    T: int = 200
    H: int = 2
    K: int = 64
    V: int = 64
    dtype: torch.dtype = torch.bfloat16
    groups: int = 1
    packed: tuple[int, ...] = ()
    state: bool = False
    strong: bool = False

    @property
    def name(self) -> str:
        rule = "delta" if self.delta else "plain"
        sizes = f"B{self.B} T{self.T} H{self.H} K{self.K} V{self.V}"
        flags = "".join(f" {n}" for n in ("packed", "state", "strong") if getattr(self, n)) + (
            f" groups{self.groups}" if self.groups > 1 else ""
        )
        return f"{self.decay} {rule} {sizes} {str(self.dtype).removeprefix('torch.')}{flags}"

    def draw(self, device: torch.device | str, seed: int = 0) -> dict[str, Tensor | None]:
        """Random inputs: unit keys, decays as trained models have them, betas in (0, 1)."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        B, T, H, K, V = self.B, self.T, self.H, self.K, self.V
        cu = None
        if self.packed:
            bounds = [0, *torch.tensor(self.packed).cumsum(0).tolist()]
            cu = torch.tensor(bounds, dtype=torch.int32, device=device)
        decay = None
        if self.decay != "none":
            shape = (B, T, H) if self.decay == "head" else (B, T, H, K)
            decay = F.logsigmoid(normal(*shape) + 3)
            if self.strong:
                decay = decay * torch.randint(1, 200, shape, device=device, generator=generator)
        return {
            "q": normal(B, T, H // self.groups, K).to(self.dtype),
            "k": F.normalize(normal(B, T, H // self.groups, K), dim=-1).to(self.dtype),
            "v": normal(B, T, H, V).to(self.dtype),
            "decay": decay,
            "beta": torch.sigmoid(normal(B, T, H)) if self.delta else None,
            "state": normal(len(self.packed) or B, H, K, V) if self.state else None,
            "cu_seqlens": cu,
        }

    def flops(self) -> int:
        return cost.flops(B=self.B, T=self.T, H=self.H, K=self.K, V=self.V, delta=self.delta)

    def floor(self, rate: float, bandwidth: float) -> float:
        """Seconds that the forward pass must take at ``rate`` FLOP/s and ``bandwidth`` bytes/s."""
        gates = {"none": 0, "head": 1, "channel": self.K}[self.decay] + self.delta
        moved = cost.bytes_moved(
            B=self.B, T=self.T, H=self.H, K=self.K, V=self.V, itemsize=self.dtype.itemsize,
            gates=gates,
        )  # fmt: skip
        return max(self.flops() / rate, moved / bandwidth)


def results(run: Any, inputs: Mapping[str, Tensor | None], seed: int = 1) -> dict[str, Tensor]:
    """Outputs and all gradients of ``run(**inputs)`` under fixed random output gradients."""
    leaves = {
        n: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for n, t in inputs.items()
    }
    o, last = run(**leaves)
    generator = torch.Generator(o.device).manual_seed(seed)
    do = torch.randn(o.shape, device=o.device, generator=generator).to(torch.bfloat16)
    dlast = torch.randn(last.shape, device=o.device, generator=generator)
    live = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad([o, last], list(live.values()), [do.to(o), dlast.to(last)])
    out = {"o": o.detach(), "last": last.detach()}
    return out | {f"d{n}": g for n, g in zip(live, grads, strict=True)}


def wide(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The inputs in float64."""
    return {
        n: t.double() if t is not None and t.is_floating_point() else t for n, t in inputs.items()
    }


def defined(case: Case, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What is right: the definition in float64, token by token."""

    def run(**leaves):
        return definition(**leaves, scale=case.K**-0.5)

    return results(run, wide(inputs))


def apart(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors in norm; infinite where something is not finite."""
    out = {}
    for name, right in want.items():
        error = ((got[name].double() - right).norm() / right.norm().clamp_min(1e-30)).item()
        out[name] = error if error == error else float("inf")
    return out


def errors(case: Case, device: torch.device | str, implementation: str = "triton"):
    """Errors of one implementation, forward and all gradients."""
    inputs = case.draw(device)
    with backend(implementation):
        got = results(recurrence, inputs)
    return apart(got, defined(case, inputs))


def gate(
    case: Case, device: torch.device | str, implementation: str = "triton", tokens: int = 333
) -> float:
    """The largest error of a short relative of ``case`` (its heads, widths, dtype and form).

    Raises:
        ValueError: where it is over the limit: what is wrong is neither timed nor used.
    """
    short = replace(case, B=min(case.B, 2), T=min(case.T, tokens), H=min(case.H, 4))
    found = errors(short, device, implementation)
    name, worst = max(found.items(), key=lambda item: item[1])
    if not worst <= LIMITS[case.dtype]:
        raise ValueError(f"{short.name}: {name} is off by {worst:.2g}, over {LIMITS[case.dtype]}")
    return worst


def decode_inputs(
    device: torch.device | str, *, B: int = 2, HQ: int = 1, H: int = 2, K: int = 24, V: int = 40,
    size: int = 4, channel: bool = False, gated: bool = True, dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """Random arguments of :func:`subquad.ops.recurrence.triton.decode.decode_layer`."""

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    heads = {"q": (HQ, K), "k": (HQ, K), "v": (H, V)}
    out: dict[str, Any] = {n: normal(B, *hd) for n, hd in heads.items()}
    channels = [h * d for h, d in heads.values()]
    out["pasts"] = tuple(normal(B, size - 1, c) for c in channels)
    out["weights"] = tuple(normal(c, size) for c in channels)
    out["decay"] = normal(B, H, K) if channel else normal(B, H)
    out["A_log"] = normal(H, dtype=torch.float32)
    out["dt_bias"] = normal(H * K if channel else H, dtype=torch.float32)
    out["beta"] = normal(B, H)
    out["state"] = normal(B, H, K, V, dtype=torch.float32)
    if gated:
        out |= {"gate": normal(B, H, V), "norm": normal(V)}
    return out


def decode_defined(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What is right of :func:`decode_inputs`: y and the state after, in float64."""
    x = {n: t.double() for n, t in inputs.items() if isinstance(t, Tensor)}
    convolved = []
    for name, past, weight in zip("qkv", inputs["pasts"], inputs["weights"], strict=True):
        rows = torch.cat([past.double(), x[name].flatten(1)[:, None]], 1)
        y = F.silu((rows.mT * weight.double()).sum(-1))
        convolved.append(y.view_as(x[name])[:, None])
    q, k, v = convolved
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    rate = x["A_log"].exp().view(-1, *[1] * (x["decay"].dim() - 2))
    decay = -rate * F.softplus(x["decay"] + x["dt_bias"].view(x["decay"].shape[1:]))
    o, last = definition(
        q, k, v, decay=decay[:, None], beta=x["beta"].sigmoid()[:, None],
        scale=q.shape[-1] ** -0.5, state=x["state"], cu_seqlens=None,
    )  # fmt: skip
    o = o[:, 0]
    if "gate" in x:
        o = F.rms_norm(o, o.shape[-1:], x["norm"], 1e-5) * F.silu(x["gate"])
    return o, last
