"""Checks of arguments: each raises a ValueError that names the argument, its value and what is
allowed, before any work. Checks that must read a tensor's values are skipped while compiling and
on accelerators (where reading would stop the stream) unless SUBQUAD_CHECK=1."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def readable(t: Tensor) -> bool:
    """Whether a check may read the values of ``t``."""
    if torch.compiler.is_compiling() or t.device.type == "meta" or t.numel() == 0:
        return False
    return t.device.type == "cpu" or os.environ.get("SUBQUAD_CHECK") == "1"


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed])
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{hint}")


def positive(name: str, value: Any, *, zero: bool = False) -> None:
    kind = "non-negative" if zero else "positive"
    if isinstance(value, bool) or not isinstance(value, int) or value < (0 if zero else 1):
        raise ValueError(f"{name} must be a {kind} int, got {value!r}")


def divides(name: str, value: int, whole: str, of: int) -> None:
    if value < 1 or of % value:
        raise ValueError(f"{name} must divide {whole}={of}, got {value}")


def device(value: str) -> None:
    """Refuse what is neither the CPU nor a GPU that is there."""
    one_of("device", value.partition(":")[0], ("cpu", "cuda"))
    if value.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu' here, got {value!r} and no GPU is to be seen")


def shape(name: str, t: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(t.shape) != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(t.shape)}")


def shapes(tensors: Mapping[str, tuple[Tensor, str]]) -> dict[str, int]:
    """Each tensor against its axes (``"B T H K"``): equal letters must be equal sizes."""
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, (t, axes) in tensors.items():
        letters = axes.split()
        if t.dim() != len(letters):
            raise ValueError(f"{name} must be [{','.join(letters)}], got shape {list(t.shape)}")
        for letter, size in zip(letters, t.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} must have {letter}={sizes[letter]} as {first[letter]} has, "
                    f"got shape {list(t.shape)} for [{','.join(letters)}]"
                )
            first.setdefault(letter, name)
    return sizes


def same_dtype(tensors: Mapping[str, Tensor]) -> None:
    dtypes = {name: t.dtype for name, t in tensors.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{', '.join(dtypes)} must share one dtype, got {dtypes}")
    name, dtype = next(iter(dtypes.items()))
    if not dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {dtype}")


def grouped(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """The sizes of q ``[B,T,H,K]``, k ``[B,S,G,K]``, v ``[B,S,G,V]``: one dtype, G divides H."""
    sizes = shapes({"q": (q, "B T H K"), "k": (k, "B S G K"), "v": (v, "B S G V")})
    same_dtype({"q": q, "k": k, "v": v})
    divides("heads of k", sizes["G"], "heads of q", sizes["H"])
    return sizes


def heads(counts: Mapping[str, int]) -> int:
    """The largest head count, which every other must divide."""
    most = max(counts.values())
    for name, count in counts.items():
        if count < 1 or most % count:
            raise ValueError(
                f"heads of {name} must divide the largest head count {most}, "
                f"got {count} (all: {dict(counts)})"
            )
    return most


def decay(t: Tensor, *, B: int, T: int, K: int) -> None:
    ok = t.dim() == 1 or (t.dim() in (3, 4) and t.shape[:2] == (B, T))
    if not ok or (t.dim() == 4 and t.shape[3] != K):
        raise ValueError(
            f"decay must be [H], [B,T,H] or [B,T,H,K] with B={B}, T={T}, K={K}, "
            f"got shape {list(t.shape)}"
        )


def log_gate(t: Tensor) -> None:
    """The values of a :func:`decay`."""
    if not readable(t):
        return
    most = float(t.detach().amax())
    if not most <= 0:
        found = "NaN" if most != most else f"a maximum of {most:.4g}"
        raise ValueError(f"decay must be a log gate, <= 0 everywhere, got {found}")


def cu_seqlens(cu: Tensor | None, *, B: int, T: int) -> None:
    if cu is None:
        return
    if not isinstance(cu, Tensor):
        raise ValueError(f"cu_seqlens must be int32 [N+1], got {type(cu).__name__}")
    if B != 1:
        raise ValueError(f"packed sequences need a batch of 1, got B={B}")
    if cu.dim() != 1 or cu.numel() < 2 or cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 [N+1], got {cu.dtype} of shape {list(cu.shape)}"
        )
    if readable(cu):
        bounds = cu.tolist()
        if bounds[0] != 0 or bounds[-1] != T or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens must rise from 0 to T={T} without falling, got {bounds}")
