"""The equalities that every mixer must keep, written once. A system joins with one row."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import Tensor

import subquad
from subquad import State
from subquad.ops.backend import interpreted


@dataclass(frozen=True)
class Row:
    """One mixer under test.

    Attributes:
        key: in the catalogue.
        options: of the mixer, small (dim is C).
        name: of the row, where a mixer has several.
        causal: whether the future must not matter.
        packs: whether it takes cu_seqlens.
        grid: of the image or volume that the mixer sees instead of a text, or None.
        golden: the mixer's parameter names to the golden file's (a value may be a function of all
            golden tensors); "foreign" for its ``w.*`` through the mixer's ``translate``; a function
            that checks all golden tensors itself, where they are of an operation and not of a
            layer; None without golden vectors.
    """

    key: str
    options: Mapping[str, Any]
    name: str = ""
    causal: bool = True
    packs: bool = True
    grid: tuple[int, ...] | None = None
    golden: Mapping[str, Any] | Literal["foreign"] | Callable[..., None] | None = None
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def id(self) -> str:
        return f"{self.key}-{self.name}" if self.name else self.key

    def build(self, dtype: torch.dtype = torch.float64):
        torch.manual_seed(0)
        mixer = subquad.create_mixer(self.key, **self.options).to(dtype)
        # Zero and one are too kind an initialisation: a term multiplied by them hides.
        with torch.no_grad():
            for p in mixer.parameters():
                p.add_(0.1 * torch.randn_like(p))
        if self.grid is not None:
            mixer.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {"grid": self.grid, **kwargs}), with_kwargs=True
            )
        return mixer

    def x(self, B: int = 2, T: int = 21, dtype: torch.dtype = torch.float64) -> Tensor:
        torch.manual_seed(1)
        T = T if self.grid is None else prod(self.grid)
        return torch.randn(B, T, self.options["dim"], dtype=dtype)


def in_the_interpreter(tests: str | Path, *options: str) -> None:
    """Run a file of tests under Triton's interpreter: Triton reads the variable when it is
    imported, so they have a process of their own, in which one at least must pass."""
    if interpreted():
        pytest.skip("these are the tests")
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout, done.stdout[-4000:]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def close_states(a: State, b: State, tolerance: float = 1e-9) -> None:
    assert set(a.tensors) == set(b.tensors)
    close(a.seen, b.seen)
    for name in a.tensors:
        close(a[name], b[name], tolerance)


@contextmanager
def poisoned():
    """Fresh memory holds NaN inside the block, so a read of what nobody wrote shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def check_split(row: Row) -> None:
    """Whole = split in parts with the state carried, one part a single token."""
    mixer, x = row.build(), row.x()
    whole, last = mixer(x)
    parts, state = [], None
    for part in x.split([13, 1, 7], 1):
        y, state = mixer(part, state=state)
        parts.append(y)
    close(torch.cat(parts, 1), whole)
    close_states(state, last)


def check_decode(row: Row) -> None:
    """Prefill then decode, token by token = the full forward."""
    mixer, x = row.build(), row.x(T=12)
    whole, _ = mixer(x)
    y, state = mixer(x[:, :5])
    for t in range(5, 12):
        close(y[:, -1], whole[:, t - 1])
        y, state = mixer(x[:, t : t + 1], state=state)
    close(y[:, -1], whole[:, -1])


def check_left_padding(row: Row) -> None:
    """Left padding changes nothing, nor does what stands in it, also when decoding goes on."""
    mixer, x = row.build(), row.x(B=1, T=11)
    more = row.x(B=1, T=3)
    alone, state = mixer(x)
    alone_more, _ = mixer(more, state=state)
    junk = torch.full((1, 6, x.shape[2]), 1e3, dtype=x.dtype)
    batch = torch.cat([torch.cat([junk, x], 1), row.x(B=1, T=17)])
    padding = torch.zeros(2, 17, dtype=torch.bool)
    padding[0, :6] = True
    y, state = mixer(batch, padding=padding)
    close(y[:1, 6:], alone)
    y, _ = mixer(more.expand(2, -1, -1), state=state)
    close(y[:1], alone_more)
    assert state.seen.tolist() == [11, 17]


def check_packed(row: Row) -> None:
    """Packed = looped, with an empty sequence and one of a single token, the state carried."""
    mixer, x = row.build(), row.x(B=1, T=21)
    cu = torch.tensor([0, 9, 9, 10, 21], dtype=torch.int32)
    y, state = mixer(x, cu_seqlens=cu)
    more = row.x(B=1, T=8)
    y2, _ = mixer(more, state=state, cu_seqlens=torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32))
    bounds = cu.tolist()
    for n, (a, b) in enumerate(pairwise(bounds)):
        past = None
        if b > a:
            alone, past = mixer(x[:, a:b])
            close(y[:, a:b], alone)
        alone, _ = mixer(more[:, 2 * n : 2 * n + 2], state=past)
        close(y2[:, 2 * n : 2 * n + 2], alone)


def check_causal(row: Row) -> None:
    """The future does not matter, and its gradient is exactly zero."""
    mixer, x = row.build(), row.x(T=14).requires_grad_()
    y, _ = mixer(x)
    changed = x.detach().clone()
    changed[:, 9:] += 1.0
    close(mixer(changed)[0][:, :9], y[:, :9])
    (gradient,) = torch.autograd.grad(y[:, 8].square().sum(), x)
    assert gradient[:, 9:].abs().max() == 0
    assert gradient[:, 8].abs().max() > 0


def check_one_token(row: Row) -> None:
    """T = 1, and a first token alone = the first token of many."""
    mixer, x = row.build(), row.x(T=5)
    y, state = mixer(x[:, :1])
    assert y.shape == (2, 1, row.options["dim"])
    assert state.seen.tolist() == [1, 1]
    if row.causal:
        close(y, mixer(x)[0][:, :1])


def check_gradients(row: Row) -> None:
    """Every parameter has a finite gradient, and the one of x is right to finite differences."""
    mixer, x = row.build(), row.x(B=1, T=6).requires_grad_()
    y, _ = mixer(x)
    gradients = torch.autograd.grad(y.square().mean(), list(mixer.parameters()), allow_unused=True)
    for (name, _), g in zip(mixer.named_parameters(), gradients, strict=True):
        assert g is not None, f"{name} has no gradient"
        assert g.isfinite().all(), f"{name} has a gradient that is not finite"
    assert torch.autograd.gradcheck(
        lambda x: mixer(x)[0].sum(-1), (x,), fast_mode=True, atol=1e-6, rtol=1e-4
    )


def check_non_contiguous(row: Row) -> None:
    mixer, x = row.build(), row.x()
    strided = torch.stack([x, -x], -1)[..., 0]
    assert not strided.is_contiguous()
    close(mixer(strided)[0], mixer(x)[0])


def check_poisoned(row: Row) -> None:
    """No output depends on memory that nobody wrote."""
    mixer, x = row.build(), row.x()
    clean, _ = mixer(x)
    with poisoned():
        y, state = mixer(x)
        if row.grid is None:
            y1, _ = mixer(x[:, :1], state=state)
            assert y1.isfinite().all()
    close(y, clean)


def check_state_bytes(row: Row) -> None:
    """The formula counts the bytes that the state's tensors really take."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = row.build(dtype)
        for T in (1, 9, 40):
            _, state = mixer(row.x(B=1, T=T, dtype=dtype))
            held = sum(t.numel() * t.element_size() for t in state.tensors.values())
            assert mixer.state_bytes(T, dtype) == held, (T, dtype)


def check_half_precision(row: Row) -> None:
    """bfloat16 stays close to float32."""
    mixer, x = row.build(torch.float32), row.x(dtype=torch.float32)
    want = mixer(x)[0]
    got = mixer.to(torch.bfloat16)(x.bfloat16())[0]
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.05 * want.norm()


def check_autocast(row: Row) -> None:
    """Under autocast, as mixed precision trains: close to float32, weights and states wide."""
    mixer, x = row.build(torch.float32), row.x(dtype=torch.float32)
    want = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got, state = mixer(x)
        if row.grid is None:
            mixer(x[:, :1], state=state)
    assert (got.float() - want).norm() < 0.05 * want.norm()
    got.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def check_select(row: Row) -> None:
    """Beam search: rows of the state reordered = rows of the input reordered."""
    mixer, x = row.build(), row.x(B=3, T=7)
    _, state = mixer(x)
    rows = torch.tensor([2, 0, 0])
    y, _ = mixer(row.x(B=3, T=1), state=state.snapshot().select(rows))
    _, swapped = mixer(x[rows])
    close(y, mixer(row.x(B=3, T=1), state=swapped)[0])


def check_golden(row: Row, shared: Path) -> None:
    """The authors' own numbers, forward and the gradient of x."""
    from safetensors.torch import load_file

    path = shared / "golden" / f"{row.key}.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden vectors for {row.key}")
    golden = load_file(path)
    if callable(row.golden):
        row.golden(golden)
        return
    mixer = subquad.create_mixer(row.key, **row.options)
    prefix = row.name + "." if f"{row.name}.x" in golden else ""
    if row.golden == "foreign":
        w = prefix + "w."
        weights = mixer.translate({k[len(w) :]: t for k, t in golden.items() if k.startswith(w)})
    else:
        weights = {k: golden[v] if isinstance(v, str) else v(golden) for k, v in row.golden.items()}
    mixer.load_state_dict(weights)
    x = golden[prefix + "x"].clone().requires_grad_()
    grid = tuple(x.shape[1:-1])
    y, _ = mixer(x.flatten(1, -2), grid=grid if len(grid) > 1 else None)
    y = y.unflatten(1, grid)
    close(y, golden[prefix + "out"], 2e-4)
    y.square().mean().backward()
    close(x.grad, golden[prefix + "g.x"], 2e-4)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name != "check_golden"
}
# What an image does not have: a past, a token alone, sequences of other lengths.
TEXT_ONLY = (
    check_split, check_decode, check_left_padding, check_packed, check_causal, check_one_token,
    check_select,
)  # fmt: skip
