"""Mixed attention's kernels against its definition in float64: cases for tests and benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from subquad.ops.backend import backend
from subquad.ops.kernel_attention import Near, mixed_attention

# Largest error allowed, relative to the largest entry. bfloat16 rounds the features once.
LIMITS = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One shape; ``packed`` are the lengths of packed sequences, ``past`` the tokens before the
    queries that are still there, ``late`` whether rows begin at different columns."""

    T: int = 150
    B: int = 2
    H: int = 4
    G: int = 2
    K: int = 32
    V: int = 32
    F: int = 32
    window: int = 40
    layout: str = "sliding"
    dtype: torch.dtype = torch.float32
    packed: tuple[int, ...] = ()
    past: int = 0
    late: bool = False

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        parts = [self.layout, kind, f"T{self.T}", f"w{self.window}", f"K{self.K}", f"V{self.V}"]
        return "-".join([*parts, *(n for n in ("packed", "past", "late") if getattr(self, n))])

    def tensors(self, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """q, k, v, phi_q, phi_k and weight, rounded to the dtype; the rest of the call."""
        generator = torch.Generator().manual_seed(0)
        S, B = self.T + self.past, 1 if self.packed else self.B
        shapes = {
            "q": (B, self.T, self.H, self.K), "k": (B, S, self.G, self.K),
            "v": (B, S, self.G, self.V), "phi_q": (B, self.T, self.H, self.F),
            "phi_k": (B, S, self.H, self.F),
        }  # fmt: skip
        made = {n: torch.randn(s, generator=generator).to(self.dtype) for n, s in shapes.items()}
        for name in ("phi_q", "phi_k"):
            made[name] = made[name].float().softmax(-1).to(self.dtype)
        made["weight"] = torch.linspace(0.1, 0.9, self.H)
        rest: dict[str, Any] = {"near": Near(self.window, self.layout)}
        if self.packed:
            bounds = torch.tensor([0, *self.packed]).cumsum(0).to(torch.int32)
            rest["cu_seqlens"] = bounds.to(device)
        elif self.late:
            rest["starts"] = (torch.arange(B) * 17 - 9).to(device)
        N = len(self.packed) or B
        if self.past:
            shape = N, self.H, self.F, self.V
            rest["state"] = tuple(
                torch.rand(s, generator=generator).to(device) for s in (shape, shape[:3])
            )
            rest["starts"] = torch.full((B,), -self.past, device=device)
        return {n: t.to(device) for n, t in made.items()}, rest


def results(case: Case, device: str, name: str | None, wide: bool = False) -> dict[str, Tensor]:
    """Output, state and all gradients."""
    inputs, rest = case.tensors(device)
    inputs = {n: (t.double() if wide else t).requires_grad_() for n, t in inputs.items()}
    past = rest.pop("state", None)
    if past is not None:
        past = tuple(t.double() if wide else t for t in past)
    with backend(name):
        o, (S, z) = mixed_attention(**cast(Any, inputs), **rest, state=past)
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(o.shape, generator=generator).to(device)
        loss = (o.double() * weights).sum() + S.double().sin().sum() + z.double().sin().sum()
        gradients = torch.autograd.grad(loss, list(inputs.values()))
    grads = {f"d{n}": g for n, g in zip(inputs, gradients, strict=True)}
    return {"o": o.detach(), "S": S.detach(), "z": z.detach(), **grads}


def errors(case: Case, device: str, name: str = "triton") -> dict[str, float]:
    """Largest differences from the definition in float64, relative to its largest entry."""
    want, got = results(case, device, "reference", wide=True), results(case, device, name)
    found = {}
    for key, right in want.items():
        apart, size = float((got[key].double() - right).abs().max()), float(right.abs().max())
        size = size if size > 1e-3 else 1.0  # what should vanish has no size of its own
        found[key] = apart / size if math.isfinite(apart) else math.inf
    return found
