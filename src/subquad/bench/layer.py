"""The layer's short steps against their definitions in float64: cases for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.ops import layer

# Largest error allowed, ``|out - ref| / |ref|``; half precision rounds each result once.
LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}

Step = Callable[..., Tensor]  # of the inputs, in order


@dataclass(frozen=True)
class Case:
    """One call: a step with its inputs' shapes; of the convolution ``shape`` is ``[B,T,D]``, and
    ``packed`` the lengths of packed sequences, ``gaps`` whether x is part of a wider tensor."""

    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    size: int = 4
    bias: bool = False
    past: bool = False
    packed: tuple[int, ...] = ()
    gate: bool = True
    gate_first: bool = False
    groups: int = 1
    gaps: bool = False

    @property
    def name(self) -> str:
        others = [
            f"{n}={x}" for n, x in vars(self).items()
            if n not in ("part", "shape", "dtype") and x != getattr(Case, n)
        ]  # fmt: skip
        shape = "x".join(map(str, self.shape))
        return " ".join([self.part, shape, str(self.dtype).removeprefix("torch."), *others])

    def draw(self, device: str) -> list[Tensor | None]:
        """Random inputs, None for those that are left out; floats want gradients."""

        def new(*shape: int, scale: float = 1.0, shift: float = 0.0, wide: bool = False) -> Tensor:
            dtype = torch.float32 if wide else self.dtype
            more = (*shape[:-1], 2 * shape[-1]) if self.gaps and shape == self.shape else shape
            made = (torch.randn(more, device=device) * scale + shift).to(dtype)
            return made[..., : shape[-1]].requires_grad_()

        D = self.shape[-1]
        if self.part == "softplus_decay":  # of 3 axes one number a head, of 4 one a channel
            axes = self.shape[2:]
            heads = (axes[0], *(1,) * (len(axes) - 1))
            x = new(*self.shape, scale=4, shift=-3)
            return [x, new(*heads, wide=True), new(*axes, wide=True)]
        x = new(*self.shape)
        if self.part == "short_conv":
            N = len(self.packed) or self.shape[0]
            cu = torch.tensor([0, *self.packed], device=device).cumsum(0, dtype=torch.int32)
            return [
                x, new(D, self.size, scale=self.size**-0.5), new(D) if self.bias else None,
                new(N, self.size - 1, D) if self.past else None, cu if self.packed else None,
            ]  # fmt: skip
        if self.part == "gated_rms_norm":
            return [x, new(*self.shape) if self.gate else None, new(D)]
        if self.part == "gated":
            return [x, new(*self.shape)]
        if self.part == "token_losses":
            labels = torch.randint(D, self.shape[:1], device=device)
            return [x, labels.where(labels % 5 != 0, -100)]
        return [x]

    def step(self, backend: str | None = None) -> Step:
        """The call, as a function of its inputs."""
        if self.part == "short_conv":

            def convolve(x, weight, bias, past, cu_seqlens):
                return layer.short_conv(
                    x, weight, bias, past=past, cu_seqlens=cu_seqlens,
                    activation=self.activation, backend=backend,
                )  # fmt: skip

            return convolve
        options: dict[str, Any] = {"backend": backend}
        if self.part in ("gated_rms_norm", "gated"):
            options["activation"] = self.activation
        if self.part == "gated_rms_norm":
            options |= {"gate_first": self.gate_first, "groups": self.groups}
        return partial(getattr(layer, self.part), **options)


def run(step: Step, inputs: list[Tensor | None], g: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of all float inputs, against a random one of the output."""
    y = step(*inputs)
    learned = [t for t in inputs if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, learned, torch.ones_like(y) if g is None else g)]


def errors(case: Case, device: str, backend: str | None = "triton") -> dict[str, float]:
    """Relative errors of the output and of each gradient against the definition in float64."""
    torch.manual_seed(0)
    inputs = case.draw(device)
    wide = [
        t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_()
        for t in inputs
    ]
    g = torch.randn_like(case.step(backend)(*inputs))
    want = run(case.step("torch"), wide, g.double())
    got = run(case.step(backend), inputs, g)
    names = ["y", *(f"d{n}" for n, t in enumerate(inputs) if t is not None and t.requires_grad)]
    return {
        name: float((a.double() - b).norm() / (b.norm() or 1.0))
        for name, a, b in zip(names, got, want, strict=True)
    }
