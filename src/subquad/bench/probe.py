"""The probe under examination on one device: random cases, and errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.ops.probe import local_linear, probe

# Largest relative error (in norm) of outputs and gradients against float64.
LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LOCAL_LINEAR_LIMIT = 2e-3  # a solution of equations, in float32


@dataclass(frozen=True)
class Case:
    """One shape of the probe.

    Attributes:
        T, S: queries and keys (S is T where 0); H query heads, G key heads; K and V head dims.
        packed: lengths of the packed sequences (B is 1 and T their sum), or ().
        starts: padding on the left of each row, or ().
        local: local linear attention instead of a given r.
    """

    B: int = 1
    T: int = 200
    S: int = 0
    H: int = 2
    G: int = 1
    K: int = 64
    V: int = 64
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window: int | None = None
    packed: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    local: bool = False

    @property
    def name(self) -> str:
        sizes = " ".join(f"{n}{getattr(self, n)}" for n in "BTSHGKV" if getattr(self, n))
        flags = [n for n in ("window", "packed", "starts", "local") if getattr(self, n)]
        flags += [] if self.causal else ["all"]
        return " ".join([sizes, str(self.dtype).removeprefix("torch."), *flags])

    @property
    def limit(self) -> float:
        return LOCAL_LINEAR_LIMIT if self.local else LIMITS[self.dtype]

    def draw(self, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v and r (for ``local``, q and k of length about 1 and a ridge of 1)."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        B, T, H, K = self.B, self.T, self.H, self.K
        S = self.S or T
        tensors = {"q": normal(B, T, H, K), "k": normal(B, S, self.G, K)}
        tensors["v"] = normal(B, S, self.G, self.V)
        if self.local:
            tensors = {n: t if n == "v" else t * K**-0.5 for n, t in tensors.items()}
        else:
            tensors["r"] = normal(B, T, H, K) * K**-0.5
        return {n: t.to(self.dtype) for n, t in tensors.items()}

    def options(self, device: torch.device | str) -> dict[str, Any]:
        """What :meth:`draw` leaves out."""
        out: dict[str, Any] = {"causal": self.causal, "window": self.window}
        if self.packed:
            bounds = [0, *torch.tensor(self.packed).cumsum(0).tolist()]
            out["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        if self.starts:
            out["starts"] = torch.tensor(self.starts, device=device)
        return out

    @property
    def op(self) -> Callable[..., Tensor]:
        return local_linear if self.local else probe


def results(run: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """o and all gradients of ``run(**inputs)`` under a fixed random gradient of o."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    o = run(**leaves)
    generator = torch.Generator(o.device).manual_seed(1)
    do = torch.randn(o.shape, device=o.device, generator=generator).to(torch.bfloat16)
    grads = torch.autograd.grad(o, list(leaves.values()), do.to(o))
    return {"o": o.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def errors(case: Case, device: torch.device | str, backend: str = "triton") -> dict[str, float]:
    """Relative errors in norm of one implementation, forward and all gradients, against the blocked
    form in float64; infinite where something is not finite."""
    inputs, options = case.draw(device), case.options(device)
    got = results(lambda **x: case.op(**x, **options, backend=backend), inputs)
    wide = {n: t.double() for n, t in inputs.items()}
    want = results(lambda **x: case.op(**x, **options, backend="torch"), wide)
    out = {}
    for name, right in want.items():
        error = ((got[name].double() - right).norm() / right.norm().clamp_min(1e-30)).item()
        out[name] = error if error == error else float("inf")
    return out


def gate(case: Case, device: torch.device | str) -> float:
    """The largest error.

    Raises:
        ValueError: where it is over the limit.
    """
    found = errors(case, device)
    worst = max(found.values())
    if not worst <= case.limit:
        raise ValueError(f"{case.name} is wrong by {worst:.3g}, allowed {case.limit}: {found}")
    return worst
