"""Mixed attention on a GPU: kernels, torch form and causal softmax, behind a correctness gate.

python benchmarks/kernel_attention.py [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from subquad.bench.kernel_attention import LIMITS, Case, errors
from subquad.ops.backend import backend
from subquad.ops.kernel_attention import Near, mixed_attention

OUT = Path(__file__).parent / "results" / "kernel_attention.json"
SHAPE = {"B": 1, "H": 16, "G": 4, "K": 64, "V": 64, "F": 128, "window": 64}


def milliseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """The median of the GPU's own times."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def gate() -> dict[str, float]:
    """Largest relative error of the kernels at small shapes; stops where one is too large."""
    found = {}
    for layout in ("sliding", "terraced"):
        for dtype in LIMITS:
            case = Case(layout=layout, dtype=dtype, T=333, window=64, K=64, V=64, F=128)
            found[case.name] = worst = max(errors(case, "cuda").values())
            if not worst <= LIMITS[dtype]:
                raise SystemExit(f"{case.name}: error {worst:.2g} is above {LIMITS[dtype]}")
    return found


def row(T: int, layout: str | None, name: str) -> dict[str, Any]:
    """Forward alone, and forward with backward, in bfloat16."""
    s, cuda = SHAPE, {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(s["B"], T, s["H"], s["K"], **cuda)
    k, v = (torch.randn(s["B"], T, s["G"], s["K"], **cuda) for _ in range(2))
    phi_q, phi_k = (torch.randn(s["B"], T, s["H"], s["F"], device="cuda") for _ in range(2))
    phi = [t.softmax(-1).requires_grad_() for t in (phi_q, phi_k)]
    inputs = [t.requires_grad_() for t in (q, k, v)]

    def mixed():
        assert layout is not None
        with backend(name):
            return mixed_attention(*inputs, *phi, near=Near(s["window"], layout))[0]

    def softmax():
        return F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in inputs), is_causal=True, enable_gqa=True
        )

    run = softmax if layout is None else mixed
    learned = inputs if layout is None else [*inputs, *phi]

    def both():
        torch.autograd.grad(run().float().sum(), learned)

    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        forward = milliseconds(run)
    whole = milliseconds(both)
    peak = torch.cuda.max_memory_allocated() / 2**20
    what = {"T": T, "layout": layout or "all keys", "by": name}
    return {**what, "forward_ms": forward, "forward_backward_ms": whole, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    rows, checked = [], gate()
    for T in (2048, 8192, 32768, 65536):
        for layout, name in (
            ("sliding", "triton"), ("terraced", "triton"), ("sliding", "torch"),
            ("terraced", "torch"), (None, "sdpa"),
        ):  # fmt: skip
            try:
                rows.append(row(T, layout, name))
            except torch.OutOfMemoryError:
                rows.append({"T": T, "layout": layout or "all keys", "by": name, "memory": "out"})
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
            write(out, checked, rows)


def write(out: Path, checked: dict[str, float], rows: list[dict[str, Any]]) -> None:
    found = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16",
        "shape": SHAPE, "errors": checked, "rows": rows,
    }  # fmt: skip
    aside = out.with_suffix(".tmp")
    aside.write_text(json.dumps(found, indent=1) + "\n")
    aside.rename(out)


if __name__ == "__main__":
    main()
