"""SLA on a GPU over the length, beside PyTorch's fused softmax, behind a correctness gate.

python benchmarks/sla.py [--out FILE] [--page]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.bench.measure import peak_memory
from subquad.bench.results import machine, write_json, write_section
from subquad.mixers.sla import SLA
from subquad.ops.attention.chosen_rows import chosen_rows
from subquad.ops.kernel_attention.marginal import marginal

PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"
OUT = Path(__file__).parent / "results" / "sla.json"
LENGTHS = (1024, 4096, 16384, 32768, 65536)
TOPKS = (0.05, 0.15)
HEADS, DIM = 16, 64
LIMIT = 2e-2  # relative error of bfloat16 against float64


def layer(topk: float, variant: str = "paper") -> SLA:
    torch.manual_seed(0)
    made = SLA(dim=HEADS * DIM, heads=HEADS, topk=topk, variant=variant)
    nn.init.normal_(made.linear_proj.weight, std=0.3)
    return made


def gate() -> dict[str, float]:
    """Relative errors of o, dq, dk and dv against float64 on the CPU, of the same chosen blocks."""
    found = {}
    for T, topk, variant in ((1000, 0.2, "paper"), (2048, 0.05, "paper"), (1000, 0.2, "main")):
        narrow, wide = layer(topk, variant).bfloat16(), layer(topk, variant).double()
        wide.load_state_dict(narrow.state_dict())
        q, k, v, do = (torch.randn(1, T, HEADS, DIM).bfloat16() for _ in range(4))
        index, rest = wide.choose(q.double(), k.double())
        results = []
        for made, device, dtype in (
            (narrow.cuda(), "cuda", torch.bfloat16),
            (wide, "cpu", torch.float64),
        ):
            chosen = index.to(device), rest.to(device)
            made.choose = lambda q, k, chosen=chosen: chosen  # type: ignore[method-assign]
            own = [t.to(device, dtype).requires_grad_() for t in (q, k, v)]
            o = made.attend(*own)
            o.backward(do.to(device, dtype))
            results.append([t.detach().cpu().double() for t in (o, *(t.grad for t in own))])
        for name, got, want in zip(("o", "dq", "dk", "dv"), *results, strict=True):
            error = ((got - want).norm() / want.norm()).item()
            found[f"T{T} topk{topk} {variant} {name}"] = error
            if not error <= LIMIT:
                raise SystemExit(f"T{T} topk{topk} {variant}: {name} is off by {error:.2g}")
    return found


def milliseconds(run: Callable[[], Any], seconds: float = 0.6) -> float:
    """The median of the GPU's own times."""
    for _ in range(3):
        run()
    times, start = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < seconds and len(times) < 30):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        run()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]


def both(attend: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, float]:
    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    def step() -> None:
        o = attend(*inputs)
        o.backward(torch.ones_like(o))
        for t in inputs:
            t.grad = None

    return {
        "forward": milliseconds(forward),
        "forward and backward": milliseconds(step),
        "peak, bytes": peak_memory(step, inputs[0].device),
    }


def rows(T: int) -> dict[str, dict[str, float]]:
    cuda = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    inputs = [torch.randn(1, T, HEADS, DIM, **cuda) for _ in range(3)]
    q, k, _ = inputs
    turned = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in inputs]
    out = {"sdpa": both(F.scaled_dot_product_attention, turned)}
    for topk in TOPKS:
        made = layer(topk).to(**{"device": "cuda", "dtype": torch.bfloat16})
        index, rest = made.choose(q, k)
        name = f"sla, topk {topk}"
        out[name] = both(made.attend, inputs)
        out[name]["choice"] = milliseconds(lambda: made.choose(q, k))  # noqa: B023
        out[name]["kept"] = made.pairs(T) / T**2
        exact = lambda q, k, v: chosen_rows(q, k, v, index, made.block)  # noqa: B023, E731
        linear = lambda q, k, v: marginal(q, k, v, rest, made.block)  # noqa: B023, E731
        out[f"{name}, softmax part"] = both(exact, inputs)
        out[f"{name}, linear part"] = both(linear, inputs)
    main = layer(TOPKS[0], "main").to(**{"device": "cuda", "dtype": torch.bfloat16})
    out[f"sla main, topk {TOPKS[0]}"] = both(main.attend, inputs)
    return out


def page(found: dict[str, Any]) -> None:
    made, shape = found["made"], found["shape"]
    worst = max(found["errors"].values())
    lines = [
        f"`python benchmarks/sla.py` on {made['device']}, torch {made['torch']}, Triton "
        f"{made['triton']}, {made['date']}: bfloat16, {shape['H']} heads of {shape['K']}, blocks "
        "of 64, one sequence, medians; SLA without its projections, the choice of blocks and W "
        f"included. Before timing, outputs and gradients lay within {worst:.1g} of float64.",
        "",
        "| tokens | | pairs kept | forward ms | SDPA / it | forward + backward ms | SDPA / it "
        "| peak GiB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for T, rows_ in found["rows"].items():
        base = rows_["sdpa"]
        whole = {name: row for name, row in rows_.items() if "part" not in name}
        for name, row in whole.items():
            ratios = [base[w] / row[w] for w in ("forward", "forward and backward")]
            kept = f"{row['kept']:.1%}" if "kept" in row else ""
            lines.append(
                f"| {int(T):,} | {name} | {kept} | {row['forward']:.3g} | {ratios[0]:.2f} | "
                f"{row['forward and backward']:.3g} | {ratios[1]:.2f} | "
                f"{row['peak, bytes'] / 2**30:.2f} |"
            )
    lines += [
        "",
        "In short sequences the host's launches take longer than the work, and SDPA, one kernel, "
        "wins. Parts in milliseconds, forward and forward + backward, at topk 0.05:",
        "",
        "| tokens | choice of blocks | softmax part | linear part |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for T, rows_ in found["rows"].items():
        name = f"sla, topk {TOPKS[0]}"
        parts = [
            f"{rows_[f'{name}, {part} part']['forward']:.3g} / "
            f"{rows_[f'{name}, {part} part']['forward and backward']:.3g}"
            for part in ("softmax", "linear")
        ]
        lines.append(f"| {int(T):,} | {rows_[name]['choice']:.3g} | {' | '.join(parts)} |")
    write_section(PERFORMANCE, "sla", "SLA beside full attention", "\n".join(lines))


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true", help="write docs/performance.md from it")
    args = parser.parse_args()
    out = args.out
    if args.page:
        page(json.loads(out.read_text()))
        return
    found: dict[str, Any] = {"made": machine(), "shape": {"B": 1, "H": HEADS, "K": DIM}}
    found["errors"] = gate()
    print(found["errors"])
    found["rows"] = {}
    for T in LENGTHS:
        found["rows"][str(T)] = rows(T)
        for name, row in found["rows"][str(T)].items():
            print(T, name, {key: round(value, 4) for key, value in row.items()})
        write_json(out, found)


if __name__ == "__main__":
    run()
