"""Speed on the CPU beside what a user would otherwise run: ``python benchmarks/cpu.py``.

- the gated delta rule against transformers' torch fallback, forward and forward + backward;
- the recurrence over length, up to 65,536 tokens, and in its other forms;
- a sliding window of 512 at 16,384 tokens against dense causal SDPA.

Both sides run in turn, in one process, on the same tensors; a figure is the least of the repeats.
Nothing is timed before both sides agree with a float64 reference. Writes results/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

import subquad
from subquad import mask
from subquad.ops.attention import attention
from subquad.ops.recurrence import recurrence

PEER = f"transformers {transformers.__version__} torch_chunk_gated_delta_rule"
SDPA = f"torch {torch.__version__} SDPA, dense causal"
HEADS, DIM, WINDOW = 8, 64, 512
TOLERANCE = 1e-4


def inputs(T: int, decay: str = "head", delta: bool = True) -> dict[str, Tensor]:
    """Keys of norm 1, gates that keep about 0.9, writes of half a value."""
    torch.manual_seed(0)
    gates = {"none": None, "head": (1, T, HEADS), "channel": (1, T, HEADS, DIM)}[decay]
    made = {
        "q": F.normalize(torch.randn(1, T, HEADS, DIM), dim=-1),
        "k": F.normalize(torch.randn(1, T, HEADS, DIM), dim=-1),
        "v": torch.randn(1, T, HEADS, DIM),
        "decay": None if gates is None else -F.softplus(torch.randn(gates) - 2),
        "beta": torch.rand(1, T, HEADS) if delta else None,
    }
    return {n: t.requires_grad_() for n, t in made.items() if t is not None}


def ours(x: dict[str, Tensor]) -> Tensor:
    return recurrence(**x)[0]


def peer(x: dict[str, Tensor]) -> Tensor:
    return qwen3_next.torch_chunk_gated_delta_rule(
        x["q"], x["k"], x["v"], g=x["decay"], beta=x["beta"], output_final_state=True
    )[0]


def forward(op: Callable[..., Tensor], x: dict[str, Tensor]) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            op(x)

    return call


def training(op: Callable[..., Tensor], x: dict[str, Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(op(x).sum(), list(x.values()))


def window(x: dict[str, Tensor]) -> Tensor:
    return attention(x["q"], x["k"], x["v"], mask.causal() & mask.window(WINDOW - 1, 0))


def dense(x: dict[str, Tensor], seen: Tensor | None = None) -> Tensor:
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
    return o.transpose(1, 2)


def gate() -> list[str]:
    """What is wrong; no figure is printed unless this is empty."""
    x = inputs(300)
    exact = {n: t.detach().double().requires_grad_() for n, t in x.items()}
    o = recurrence(**exact, form="recurrent")[0]
    want = [o, *torch.autograd.grad(o.sum(), list(exact.values()))]
    wrong = []
    for name, op in (("ours", ours), ("peer", peer)):
        o = op(x)
        got = [o, *torch.autograd.grad(o.sum(), list(x.values()))]
        for what, a, b in zip(("o", *(f"d{n}" for n in x)), got, want, strict=True):
            error = float((a.detach() - b.detach()).norm() / b.detach().norm())
            if not error < TOLERANCE:
                wrong.append(f"{name}: {what} is off by {error:.1e} of its norm")
    x = inputs(1500, "none", False)
    i = torch.arange(1500)
    seen = (i[:, None] >= i) & (i[:, None] - i < WINDOW)
    error = float((window(x) - dense(x, seen)).detach().norm() / dense(x, seen).detach().norm())
    if not error < TOLERANCE:
        wrong.append(f"window: o is off by {error:.1e} of its norm")
    return wrong


def milliseconds(*calls: Callable[[], Any], repeats: int) -> list[float]:
    """The least time of each call; the calls take turns."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], (time.perf_counter() - start) * 1e3)
    return best


def beside_peers(repeats: int) -> list[dict[str, Any]]:
    """The rows that have a peer, each with the ratio that is asked for."""
    gdn, T = inputs(4096), 16384
    wide = {n: t.detach() for n, t in inputs(T, "none", False).items()}
    cases = [
        ("gated delta rule, T 4,096, forward", forward(ours, gdn), forward(peer, gdn), PEER, 1.5),
        ("gated delta rule, T 4,096, fwd + bwd", training(ours, gdn), training(peer, gdn), PEER, 5),
        ("window 512, T 16,384, forward", forward(window, wide), forward(dense, wide), SDPA, 8),
    ]
    rows = []
    for name, mine, other, version, asked in cases:
        a, b = milliseconds(mine, other, repeats=repeats)
        rows.append(
            {"name": name, "ms": a, "peer": version, "peer_ms": b, "ratio": b / a, "asked": asked}
        )
    return rows


def over_length(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for T in (1024, 4096, 16384, 65536):
        x = inputs(T)
        calls = (forward(ours, x), training(ours, x))
        a, b = milliseconds(*calls, repeats=repeats if T < 16384 else 2)
        rows.append({"tokens": T, "forward_ms": a, "training_ms": b})
    return rows


def other_forms(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for decay in ("none", "head", "channel"):
        for delta in (False, True):
            x = inputs(4096, decay, delta)
            a, b = milliseconds(forward(ours, x), training(ours, x), repeats=repeats)
            rows.append({"decay": decay, "delta": delta, "forward_ms": a, "training_ms": b})
    return rows


def show(results: dict[str, Any]) -> None:
    print(f"{results['cpu']}, {results['threads']} threads, float32, B1 H{HEADS} K=V={DIM}\n")
    print(f"{'':38}{'ours ms':>10}{'peer ms':>10}{'ratio':>8}{'asked':>7}  peer")
    for r in results["peers"]:
        print(
            f"{r['name']:38}{r['ms']:10.1f}{r['peer_ms']:10.1f}"
            f"{r['ratio']:7.1f}x{r['asked']:6}x  {r['peer']}"
        )
    print(f"\n{'gated delta rule over length':38}{'fwd ms':>10}{'+bwd ms':>10}{'us/token':>17}")
    for r in results["length"]:
        each = (
            f"{r['forward_ms'] / r['tokens'] * 1e3:.1f}, {r['training_ms'] / r['tokens'] * 1e3:.1f}"
        )
        print(f"{r['tokens']:>38,}{r['forward_ms']:10.1f}{r['training_ms']:10.1f}{each:>17}")
    print(f"\n{'forms, T 4,096':38}{'fwd ms':>10}{'+bwd ms':>10}")
    for r in results["forms"]:
        name = f"decay {r['decay']}{', delta rule' if r['delta'] else ''}"
        print(f"{name:38}{r['forward_ms']:10.1f}{r['training_ms']:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if wrong := gate():
        sys.exit("no figures, the results are wrong:\n  " + "\n  ".join(wrong))
    results = {
        "subquad": subquad.__version__,
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "threads": options.threads,
        "peers": beside_peers(options.repeats),
        "length": over_length(options.repeats),
        "forms": other_forms(options.repeats),
    }
    show(results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    aside = options.out.with_suffix(".tmp")
    aside.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(aside, options.out)
    short = [r["name"] for r in results["peers"] if r["ratio"] < r["asked"]]
    if short:
        sys.exit(f"slower than asked: {'; '.join(short)}")


if __name__ == "__main__":
    main()
