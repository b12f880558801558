"""Sparse attention on this GPU, beside FlexAttention and dense attention, in one run.

    python benchmarks/sparse.py                  # every case: gate, times, table, JSON
    python benchmarks/sparse.py --cases window   # those whose name begins so
    python benchmarks/sparse.py --cpu            # the CPU's case

Every case is first checked against the definition in float64 at a smaller size (forward, lse and
gradients); a case whose gate is red is neither timed nor printed. ``floor`` is the larger of the
kept pairs' FLOPs over the measured matmul rate and the compulsory bytes over the measured copy
rate. Index building is timed apart (``index``) and is part of no other column but ``ours+index``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from subquad import mask
from subquad.ops.attention import attention, cost

RESULTS = Path(__file__).parent / "results"
GATE = 1e-2  # relative error of bfloat16 against float64


@dataclass
class Problem:
    """One case at one size.

    Attributes:
        T, B, H, G, D: the shape.
        build: makes the mask anew, with everything that attention would cache.
        area: pairs kept, over batch rows and query heads.
        flex: FlexAttention's mask function, None where it cannot say the mask.
        dense_causal: what dense attention would compute instead.
    """

    T: int
    B: int
    H: int
    G: int
    D: int
    build: Callable[[], mask.Mask]
    area: int
    flex: Callable | None
    dense_causal: bool
    note: str = ""

    def inputs(self) -> list[Tensor]:
        shapes = (self.B, self.T, self.H, self.D), *[(self.B, self.T, self.G, self.D)] * 2
        return [
            torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes
        ]


def window(small: bool) -> Problem:
    T, H, W = (1500, 2, 300) if small else (32768, 16, 1024)

    def flex(b, h, i, j):
        return (j <= i) & (i - j < W)

    def build():
        return mask.causal() & mask.window(W - 1)

    area = H * (T * W - W * (W - 1) // 2)
    return Problem(T, 1, H, H, 128, build, area, flex, True)


def random_blocks(share: float, small: bool) -> Problem:
    T, H = (2048, 2) if small else (32768, 16)
    R = T // 128
    kept = torch.rand(R, R, device="cuda") < share
    kept |= torch.eye(R, device="cuda", dtype=torch.bool)
    kept = kept.tril()
    block = torch.arange(R, device="cuda").expand(R, R)
    index = torch.where(kept, block, R).sort(-1)[0][:, : int(kept.sum(-1).max())]
    index = torch.where(index == R, -1, index).int()

    def flex(b, h, i, j):
        return kept[i // 128, j // 128] & (j <= i)

    def build():
        return mask.blocks(index, 128) & mask.causal()

    area = H * (int(kept.sum()) * 128 * 128 - R * 128 * 127 // 2)
    return Problem(T, 1, H, H, 128, build, area, flex, True)


def neighborhood(grid, window, dilation, tile, small: bool) -> Problem:
    H = 2 if small else 16
    T = math.prod(grid)
    plain = mask.neighborhood(grid, window, dilation=dilation)
    axes = plain.axes

    def flex(b, h, i, j):
        keep = None
        for axis in reversed(axes):
            a, c = i % axis.length, j % axis.length
            i, j = i // axis.length, j // axis.length
            d = axis.dilation
            n = (axis.length - a % d + d - 1) // d
            start = (a // d - axis.window // 2).clamp(min=0)
            start = torch.minimum(start, n - axis.window)
            own = (a % d == c % d) & (c // d >= start) & (c // d < start + axis.window)
            keep = own if keep is None else keep & own
        return keep

    def build():
        return mask.neighborhood(grid, window, dilation=dilation, tile=tile)

    area = H * T * math.prod(axis.window for axis in axes)
    note = f"in tiles of {'x'.join(map(str, tile))}"
    return Problem(build().tokens, 1, H, H, 64, build, area, flex, False, note)


def vertical_slash(small: bool) -> Problem:
    T, H, columns, slashes = (2048, 2, 40, 4) if small else (131072, 8, 1000, 24)
    M, R = 64, T // 64
    far = torch.randperm(T // 256, device="cuda")[:slashes].sort(descending=True)[0]
    far = (far + 1) * 256 + 37  # spans that begin anywhere
    distance = torch.cat([far, torch.tensor([64, 0], device="cuda")])
    end = (torch.arange(R, device="cuda")[:, None] + 1) * M
    starts = end - distance - M
    starts = torch.where(starts < 0, T, starts).sort(-1)[0]
    inside = starts < T
    starts = torch.where(inside, starts, -1).int()
    single = torch.randperm(T, device="cuda")[:columns].sort()[0].int()
    picked = []
    for r in range(R):  # drop the columns that a span covers or that come after
        own = starts[r][starts[r] >= 0]
        covered = ((single[:, None] >= own) & (single[:, None] < own + M)).any(1)
        column = torch.where(covered | (single >= r * M), T, single).sort()[0]
        picked.append(torch.where(column == T, -1, column))
    picked = torch.stack(picked)

    def build():
        return mask.spans(starts, picked, M) & mask.causal()

    area = H * M * (int(inside.sum()) * M + int((picked >= 0).sum())) - H * T * (M - 1) // 2
    note = "FlexAttention: a single column makes a whole tile partial"
    return Problem(T, 1, H, H, 128, build, area, None, True, note)


def chosen_by_token(small: bool) -> Problem:
    """InfLLM-V2's shape: 64 blocks of 64 for every token and key head: the first, the last 16
    and others at random."""
    T, H, G, n, local = (600, 8, 2, 4, 2) if small else (131072, 32, 2, 64, 16)
    blocks = -(-T // 64)
    own = torch.arange(T, device="cuda") // 64
    index = torch.empty(G, T, n, dtype=torch.int32, device="cuda")
    for g in range(G):
        for a in range(0, T, 8192):
            mine = own[a : a + 8192, None]
            rank = torch.rand(len(mine), blocks, device="cuda")
            block = torch.arange(blocks, device="cuda")
            rank = rank.masked_fill((block == 0) | ((block <= mine) & (block > mine - local)), 2.0)
            rank = rank.masked_fill(block > mine, -1.0)
            best, kept = rank.topk(min(n, blocks), -1)
            kept = torch.where(best < 0, blocks, kept).sort(-1)[0]
            index[g, a : a + 8192] = torch.where(kept == blocks, -1, kept).int()

    def build():
        return mask.blocks(index, 64, rows=1) & mask.causal()

    kept = int((index >= 0).sum())
    area = H // G * (kept * 64 - G * int((63 - torch.arange(T) % 64).sum()))
    note = "FlexAttention: lists of a token are finer than its tiles"
    return Problem(T, 1, H, G, 128, build, area, None, True, note)


CASES: dict[str, Callable[[bool], Problem]] = {
    "window 1024, T 32768": window,
    "10% random blocks, T 32768": lambda small: random_blocks(0.3 if small else 0.1, small),
    "40% random blocks, T 32768": lambda small: random_blocks(0.4, small),
    "grid 128x128, 13x13": lambda small: neighborhood(
        (24, 30) if small else (128, 128), 5 if small else 13, 1, (8, 8), small
    ),
    "grid 128x128, 13x13, dilation 2": lambda small: neighborhood(
        (24, 30) if small else (128, 128), 5 if small else 13, 2, (8, 8), small
    ),
    "grid 16x32x32, 5x9x9": lambda small: neighborhood(
        (8, 9, 10) if small else (16, 32, 32), 3 if small else (5, 9, 9), 1, (4, 4, 4), small
    ),
    "vertical-slash, T 131072": vertical_slash,
    "64 blocks a token, T 131072": chosen_by_token,
}


def gate(make: Callable[[bool], Problem]) -> float:
    """The largest relative error of o, lse and the gradients against float64."""
    torch.manual_seed(0)
    problem = make(True)
    q, k, v = problem.inputs()
    m = problem.build()
    got = attention(q, k, v, m, return_lse=True, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = attention(*exact, m, return_lse=True, backend="reference")
    do = torch.randn_like(want[0])
    grads = torch.autograd.grad(got[0], (q, k, v), do.bfloat16())
    exact_grads = torch.autograd.grad(want[0], exact, do)
    errors = []
    for a, b in [*zip(got, want, strict=True), *zip(grads, exact_grads, strict=True)]:
        a, b = (x.detach().double().nan_to_num(nan=1e9, neginf=0.0) for x in (a, b))
        errors.append(float((a - b).norm() / b.norm()))
    return max(errors)


def ms(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median")


def forward_backward(call: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    do = torch.randn_like(call())
    return lambda: torch.autograd.grad(call(), inputs, do)


def ceilings() -> tuple[float, float]:
    """Measured matmul FLOP/s (bfloat16, random data) and copied bytes/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / (ms(lambda: a @ b) * 1e-3)
    x = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    return rate, 2 * len(x) / (ms(lambda: y.copy_(x)) * 1e-3)


def time_index(problem: Problem) -> float:
    """Milliseconds to make the lists of queries and of keys, nothing cached."""
    from subquad.mask import tiles
    from subquad.ops.attention.triton import index, op

    q, k, v = problem.inputs()

    def build() -> None:
        for cached in (tiles.tiles, index.of_mask):
            cached.cache_clear()
        launch = op.prepare(q, k, v, problem.build(), 0)
        launch.index.by_keys(-(-problem.T // launch.index.size))
        torch.cuda.synchronize()

    build()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        build()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def time_ours(problem: Problem) -> tuple[float, float]:
    inputs = problem.inputs()
    m = problem.build()
    call = lambda: attention(*inputs, m, backend="triton")  # noqa: E731
    with torch.no_grad():
        forward = ms(call)
    return forward, ms(forward_backward(call, inputs))


def time_flex(problem: Problem) -> tuple[float, float] | None:
    if problem.flex is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in problem.inputs())
    torch._dynamo.reset()  # or, a few cases on, it would run uncompiled
    run = torch.compile(flex_attention)
    T = problem.T
    block_mask = create_block_mask(problem.flex, None, None, T, T, device="cuda", _compile=True)
    call = lambda: run(q, k, v, block_mask=block_mask)  # noqa: E731
    with torch.no_grad():
        forward = ms(call)
    return forward, ms(forward_backward(call, [q, k, v]))


def time_dense(problem: Problem) -> tuple[float, float]:
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in problem.inputs())

    def call():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(
                q, k, v, is_causal=problem.dense_causal, enable_gqa=problem.G != problem.H
            )

    with torch.no_grad():
        forward = ms(call)
    return forward, ms(forward_backward(call, [q, k, v]))


def measure(name: str, rate: float, copy: float) -> dict[str, Any]:
    error = gate(CASES[name])
    if not error < GATE:
        return {"case": name, "gate": error, "red": True}
    torch.manual_seed(0)
    problem = CASES[name](False)
    forward, both = time_ours(problem)
    D, area = problem.D, problem.area
    moved = cost.bytes_moved(
        B=problem.B, T=problem.T, S=problem.T, H=problem.H, G=problem.G, K=D, V=D, itemsize=2
    )
    floor = max(cost.flops(area=area, K=D, V=D) / rate, moved / copy) * 1e3
    row: dict[str, Any] = {
        "case": name, "gate": error, "ours": forward, "ours_both": both,
        "index": time_index(problem), "floor": floor, "note": problem.note,
        "floor_both": cost.flops(area=area, K=D, V=D, backward=True) / rate * 1e3,
    }  # fmt: skip
    for peer, found in (("flex", time_flex(problem)), ("dense", time_dense(problem))):
        if found is not None:
            row[peer], row[f"{peer}_both"] = found
    torch.cuda.empty_cache()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        f"{'case':34}{'index':>8}{'floor':>8}{'ours':>8}{'flex':>8}{'dense':>8}"
        f"{'| both':>9}{'flex':>8}{'dense':>8}{'gate':>10}"
    )
    lines = [head + "   (ms)"]

    def cell(row, key, width=8):
        return f"{row[key]:{width}.3f}" if key in row else f"{'-':>{width}}"

    for row in rows:
        if row.get("red"):
            lines.append(f"{row['case']:34} not timed: its gate is red, {row['gate']:.1e}")
            continue
        cells = [cell(row, k) for k in ("index", "floor", "ours", "flex", "dense")]
        cells += [cell(row, "ours_both", 9), cell(row, "flex_both"), cell(row, "dense_both")]
        lines.append(f"{row['case']:34}" + "".join(cells) + f"{row['gate']:10.1e}")
        for peer in ("flex", "dense"):
            if peer in row:
                with_index = row["ours"] + row["index"]
                lines.append(
                    f"    {peer:5} / ours: forward {row[peer] / row['ours']:.2f} "
                    f"(index built each time {row[peer] / with_index:.2f}), "
                    f"forward + backward {row[f'{peer}_both'] / row['ours_both']:.2f}"
                )
        if row["note"]:
            lines.append(f"    {row['note']}")
    return "\n".join(lines)


def cpu() -> dict[str, Any]:
    """A window of 512 over 16,384 tokens against dense causal attention, and its memory."""
    T, H, D = 16384, 8, 64
    q, k, v = (torch.randn(1, T, H, D, requires_grad=True) for _ in range(3))
    m = mask.causal() & mask.window(511)
    small = [x.detach()[:, :1500].double().requires_grad_() for x in (q, k, v)]
    got, want = (attention(*small, m, backend=b) for b in ("torch", "reference"))
    error = float((got - want).detach().norm() / want.detach().norm())

    def once(call: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times)

    sparse = lambda: attention(q, k, v, m)  # noqa: E731
    dense = lambda: attention(q, k, v, mask.causal(), backend="sdpa")  # noqa: E731
    row: dict[str, Any] = {"case": "CPU, window 512, T 16384, H8 D64", "gate": error}
    with torch.no_grad():
        sparse()
        row["ours"], row["dense"] = once(sparse, 5), once(dense, 2)
    row["ours_both"] = once(forward_backward(sparse, [q, k, v]), 3)
    row["dense_both"] = once(forward_backward(dense, [q, k, v]), 1)
    row["threads"] = torch.get_num_threads()
    row["memory"] = {T: memory(T) for T in (65536, 131072, 262144)}
    return row


def memory(T: int) -> int:
    """Bytes a token that a forward and backward pass adds to the process's peak (H2 D64): rising
    lengths in one process, so that each sets the peak anew."""
    q, k, v = (torch.randn(1, T, 2, 64, requires_grad=True) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    forward_backward(lambda: attention(q, k, v, mask.causal() & mask.window(511)), [q, k, v])()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak * 1024 - held) // T if peak > before else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=[""], help="names that begin so")
    parser.add_argument("--cpu", action="store_true", help="the CPU's case alone")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    setting: dict[str, Any] = {
        "date": date.today().isoformat(), "torch": torch.__version__, "triton": triton.__version__,
        "limit": GATE,
    }  # fmt: skip
    if options.cpu:
        row = cpu()
        if not row["gate"] < 1e-9:
            raise SystemExit(f"not timed: the gate is red, {row['gate']:.1e}")
        for key, name in (("", "forward"), ("_both", "forward + backward")):
            mine, theirs = row[f"ours{key}"], row[f"dense{key}"]
            print(f"{name}: {mine:.0f} ms, dense {theirs:.0f} ms: {theirs / mine:.1f}x")
        for T, bytes_ in row["memory"].items():
            print(f"{T} tokens, H2 D64: {bytes_ or 'no more'} bytes a token, forward + backward")
        rows, device = [row], platform.processor() or platform.machine()
    else:
        device = torch.cuda.get_device_name()
        rate, copy = ceilings()
        setting |= {"matmul_flops": rate, "copy_bytes": copy}
        print(f"{device}: matmul {rate / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s")
        names = [n for n in CASES if any(n.startswith(c) for c in options.cases)]
        rows = []
        for name in names:
            rows.append(measure(name, rate, copy))
            print(table(rows[-1:]).split("\n", len(rows) == 1)[-1], flush=True)
            if options.out:
                options.out.write_text(json.dumps({"device": device, **setting, "rows": rows}))
        print(table(rows))
    RESULTS.mkdir(exist_ok=True)
    path = (
        options.out or RESULTS / f"sparse-{'cpu' if options.cpu else device.replace(' ', '-')}.json"
    )
    path.write_text(json.dumps({"device": device, **setting, "rows": rows}, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
