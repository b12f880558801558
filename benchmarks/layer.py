"""The layer's short steps on a GPU: kernels, PyTorch's functions, and these compiled; whole models.

    python benchmarks/layer.py --out benchmarks/results/layer.json

Every step is checked against float64 first. Counted are microseconds of the GPU's kernels, forward
and backward, by the profiler, their share of a copy's bandwidth if each tensor is read or written
once (:mod:`subquad.ops.layer.cost`), and the bytes that autograd keeps besides the arguments. Then
a training step of the models of ``end_to_end.py``, with and without the kernels.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import end_to_end
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from subquad.bench.layer import LIMITS, Case, errors, run
from subquad.bench.results import machine, write_json
from subquad.ops import layer
from subquad.ops.layer import cost

TOKENS = (8, 4096)
BF16 = torch.bfloat16
CASES = {
    "convolution of 768": Case("short_conv", (*TOKENS, 768), BF16),
    "convolution of 1,536": Case("short_conv", (*TOKENS, 1536), BF16),
    "L2 norm, 6 heads of 128": Case("l2_norm", (*TOKENS, 6, 128), BF16),
    "gated norm, 6 heads of 256": Case("gated_rms_norm", (*TOKENS, 6, 256), BF16),
    "norm of 1,024": Case("gated_rms_norm", (*TOKENS, 1024), BF16, gate=False),
    "gated product of 2,752": Case("gated", (*TOKENS, 2752), BF16),
    "decay, 8 heads of 128": Case("softplus_decay", (*TOKENS, 8, 128), BF16),
    "loss, 524 rows of 32,000": Case("token_losses", (524, 32000), BF16),
}
FORMS = ("kernels", "torch", "compiled")
REPEATS = 10


def bytes_of(case: Case, backward: bool) -> int:
    """What a step must move, its parameters left out."""
    tokens, D = TOKENS[0] * TOKENS[1], math.prod(case.shape[2:])
    if case.part == "token_losses":
        return math.prod(case.shape) * case.dtype.itemsize * (1 + backward)
    if case.part == "softplus_decay":  # float32 comes out, and its gradient in
        return tokens * D * (2 + 4 + 2 * backward)
    if case.part == "short_conv":
        count = cost.short_conv(tokens=tokens, D=D, size=case.size, backward=backward)
    elif case.part == "gated":
        count = cost.gated(tokens=tokens, D=D, backward=backward)
    else:
        gate = case.part == "gated_rms_norm" and case.gate
        count = cost.norm(tokens=tokens, D=D, gate=gate, backward=backward)
    return count * case.dtype.itemsize


def microseconds(go: Callable[[], Any]) -> float:
    """Of all kernels that a call launches."""
    for _ in range(3):
        go()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(REPEATS):
            go()
        torch.cuda.synchronize()
    return sum(x.self_device_time_total for x in seen.key_averages()) / REPEATS


def kept(step: Callable[..., Tensor], inputs: list[Tensor | None]) -> int:
    """Bytes that autograd keeps besides the arguments."""
    given = {t.untyped_storage().data_ptr() for t in inputs if t is not None}
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = step(*inputs)
    del y
    return sum(found.values())


def timed(case: Case, form: str, copy: float) -> dict[str, Any]:
    inputs = case.draw("cuda")
    step = case.step("triton" if form == "kernels" else "torch")
    if form == "compiled":
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True)
    g = torch.randn_like(step(*inputs))
    with torch.no_grad():
        forward = microseconds(lambda: step(*inputs))
    backward = microseconds(lambda: run(step, inputs, g)) - forward
    return {
        "forward_us": forward, "backward_us": backward,
        "forward_share": bytes_of(case, False) / forward * 1e6 / copy,
        "backward_share": bytes_of(case, True) / backward * 1e6 / copy,
        "kept_bytes": kept(step, inputs),
    }  # fmt: skip


@contextmanager
def without(parts: tuple[str, ...]) -> Iterator[None]:
    """A block in which these steps run as PyTorch's functions."""
    before = dict(layer.FORMS)
    layer.FORMS.update({part: before[part][1:] for part in parts})
    layer._known.clear()
    try:
        yield
    finally:
        layer.FORMS.update(before)
        layer._known.clear()


def copying() -> float:
    """Bytes a second of a copy."""
    a = torch.empty(2**29, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    return 2 * a.numel() / microseconds(lambda: b.copy_(a)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layer.json"))
    parser.add_argument("--models", nargs="*", choices=end_to_end.MODELS,
                        default=list(end_to_end.MODELS))  # fmt: skip
    asked = parser.parse_args()
    data: dict[str, Any] = {"made": machine(), "errors": {}, "steps": {}, "models": {}}
    for name, case in CASES.items():
        small = replace(case, shape=(2, 333, *case.shape[2:]))
        data["errors"][name] = found = errors(small, "cuda")
        if not max(found.values()) <= LIMITS[case.dtype]:
            raise SystemExit(f"{name}: errors {found} are above {LIMITS[case.dtype]}")
    data["copy_bytes_per_s"] = copy = copying()
    print(data["made"], f"copy {copy / 1e12:.2f} TB/s", json.dumps(data["errors"]), flush=True)
    for name, case in CASES.items():
        for form in FORMS:
            data["steps"][f"{name}, {form}"] = found = timed(case, form, copy)
            print(f"{name}, {form}", {n: round(x, 3) for n, x in found.items()}, flush=True)
            write_json(asked.out, data)
    for name in asked.models:
        for label, parts in (("torch", layer.PARTS), ("kernels", ())):
            gc.collect()
            torch.cuda.empty_cache()
            with without(parts):
                found = end_to_end.training(name, 4096, 8, "cuda")
            data["models"][f"{name}, {label}"] = found
            print(name, label, found, flush=True)
            write_json(asked.out, data)


if __name__ == "__main__":
    main()
