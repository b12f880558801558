"""The recurrence's GPU kernels beside flash-linear-attention and causal SDPA, in one run.

    python benchmarks/recurrence.py --out benchmarks/results/recurrence.json --limit 600

Each row is first checked against float64; a row that is not right stops the run before anything
is printed. Rows go by importance, all sides of a row one after the other, and the file is written
after each. No row begins after ``--limit`` seconds; ``--rows`` picks, ``--resume`` keeps those of
earlier files. The peer tunes itself for minutes, so it runs in a process with a limit of its own;
what it has compiled stays in Triton's cache: ``--peer-row`` beforehand, on a GPU that others share
and with FLA_CACHE_RESULTS=0 (nothing timed there may count), leaves it only the tuning.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from subquad.bench.recurrence import Case, gate
from subquad.bench.results import write_json
from subquad.ops.recurrence import recurrence

LONG = {"B": 1, "T": 32768, "H": 16, "K": 128, "V": 128}
BATCH = {"B": 4, "T": 8192, "H": 16, "K": 128, "V": 128}
SHORT = {"B": 8, "T": 1024, "H": 8, "K": 64, "V": 64}
ROWS = {
    "gated delta rule, batch": Case("head", True, **BATCH),
    "delta rule, long": Case("none", True, **LONG),
    "head decay, long": Case("head", False, **LONG),
    "channel decay, batch": Case("channel", False, **BATCH),
    "gated delta rule, long": Case("head", True, **LONG),
    "channel decay, long": Case("channel", False, **LONG),
    "gated delta rule, short": Case("head", True, **SHORT),
    "head decay, short": Case("head", False, **SHORT),
    "KDA, batch": Case("channel", True, **BATCH),
    "gated delta rule, 64 value heads": Case(
        "head", True, B=1, T=32768, H=64, K=128, V=128, groups=4
    ),
    "head decay, batch": Case("head", False, **BATCH),
    "gated delta rule, 131072": Case("head", True, B=1, T=131072, H=16, K=128, V=128),
    "gated delta rule, wide": Case("head", True, B=4, T=8192, H=8, K=256, V=256),
}


def median(run) -> float:
    """Milliseconds."""
    return triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median")


def leaves(case: Case) -> dict[str, Any]:
    return {
        n: t.requires_grad_() if t is not None and t.is_floating_point() else t
        for n, t in case.draw("cuda").items()
    }


def times(run, inputs: dict[str, Any], seen=lambda out: None) -> dict[str, Any]:
    """Forward, forward and backward (ms), peak bytes of the latter; ``seen`` is called between."""
    live = [t for t in inputs.values() if t is not None and t.requires_grad]

    def forward():
        with torch.no_grad():
            return run(**inputs)

    do = torch.randn_like(forward())
    out: dict[str, Any] = {"forward_ms": median(forward)}
    seen(out)

    def both():
        return torch.autograd.grad(run(**inputs), live, do)

    try:
        both()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        out["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        out["both_ms"] = median(both)
    except Exception as error:
        out["both_refused"] = f"{type(error).__name__}: {error}"[:160]
    return out


def ours(case: Case) -> dict[str, float]:
    return times(lambda **x: recurrence(**x, backend="triton")[0], leaves(case))


def first(case: Case) -> dict[str, float]:
    """Seconds of the first calls of a process, and so of compilation where nothing is cached."""
    inputs = leaves(case)
    live = [t for t in inputs.values() if t is not None and t.requires_grad]
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        do = torch.randn_like(recurrence(**inputs, backend="triton")[0])
    torch.cuda.synchronize()
    forward = time.perf_counter() - start
    torch.autograd.grad(recurrence(**inputs, backend="triton")[0], live, do)
    torch.cuda.synchronize()
    return {"forward_s": forward, "with_backward_s": time.perf_counter() - start}


def cold(row: str) -> dict[str, Any]:
    """:func:`first` in a process of its own with an empty compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--first-row", row],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": done.stderr}


def peer(case: Case) -> dict[str, Any]:
    """flash-linear-attention, in this process."""
    import fla.ops.common.chunk_o
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    # It refuses its gated backward here for wrong gradients; timed all the same.
    fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True
    op = {
        ("head", False): chunk_simple_gla,
        ("channel", False): chunk_gla,
        ("none", True): chunk_delta_rule,
        ("head", True): chunk_gated_delta_rule,
        ("channel", True): chunk_kda,
    }[case.decay, case.delta]

    def run(q, k, v, decay, beta, state, cu_seqlens):
        gates = {} if decay is None else {"g": decay}
        return op(q, k, v, **gates, **({} if beta is None else {"beta": beta.to(v.dtype)}))[0]

    found = times(run, leaves(case), lambda out: print(json.dumps(out), flush=True))
    if case.decay == "head":
        found["note"] = "its backward is refused here for wrong gradients; timed all the same"
    return found


def dense(case: Case) -> dict[str, float]:
    """Causal softmax attention of the same shape, cuDNN."""
    shape = (case.B, case.H, case.T, case.K)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=case.dtype, requires_grad=True) for _ in "qkv"
    )

    def run(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return times(run, {"q": q, "k": k, "v": v})


def apart(row: str, limit: float) -> dict[str, Any]:
    """The peer's row in a process of its own."""
    command = [sys.executable, __file__, "--peer-row", row]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        known = json.loads(text.splitlines()[-1]) if text.strip() else {}
        return {**known, "skipped": f"not done in {limit:.0f} s"}
    except (IndexError, ValueError):
        return {"skipped": done.stderr.strip()[-200:] or "printed nothing"}


def ceilings() -> dict[str, float]:
    """Measured copy bandwidth (bytes read and written) and bf16 matrix rate."""
    x = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16).normal_()
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / (median(lambda: y.copy_(x)) * 1e-3)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {"bandwidth": copy, "rate": 2 * 8192**3 / (median(lambda: a @ a) * 1e-3)}


def versions() -> dict[str, str]:
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "date": date.today().isoformat()}
    for name in ("flash-linear-attention", "fla-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def line(name: str, row: dict[str, Any]) -> str:
    def ms(side: str, what: str) -> str:
        value = row[side].get(what)
        return f"{value:9.3f}" if value else "        -"

    floor = row["floor_ms"] / row["ours"]["forward_ms"]
    sides = "".join(f"{ms(s, 'forward_ms')}{ms(s, 'both_ms')} |" for s in ("ours", "peer", "dense"))
    peak = row["ours"].get("peak_bytes", 0) / 2**30
    first = row.get("first", {}).get("with_backward_s", float("nan"))
    return f"{name:34}|{sides} {floor:6.0%} {peak:7.2f} {first:6.1f}"


def measure(
    name: str, case: Case, ceilings: dict[str, float], limit: float, first_call: bool
) -> dict[str, Any]:
    """One row: all sides, one after the other."""
    try:
        error = gate(case, "cuda")
    except ValueError as wrong:
        raise SystemExit(f"not printed: {wrong}") from None
    row = {
        "case": case.name, "error": error, "gpu": torch.cuda.get_device_name(), "ours": ours(case),
        "floor_ms": 1e3 * case.floor(**ceilings), "dense": dense(case),
    }  # fmt: skip
    if first_call:
        row["first"] = cold(name)
    torch.cuda.empty_cache()
    row["peer"] = apart(name, limit)
    row["ours again"] = ours(case)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recurrence.json"))
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds; no row begins later")
    parser.add_argument("--peer-limit", type=float, default=300.0, help="seconds of a peer's row")
    parser.add_argument("--first-call", action="store_true", help="time compilation, too")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--resume", type=Path, nargs="+", default=[], help="files of earlier rows")
    parser.add_argument("--peer-row", choices=ROWS, metavar="ROW", help="the peer alone, no file")
    parser.add_argument("--first-row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer_row:
        print(json.dumps(peer(ROWS[arguments.peer_row])))
        return
    if arguments.first_row:
        print(json.dumps(first(ROWS[arguments.first_row])))
        return
    end = time.monotonic() + arguments.limit
    measured = ceilings()
    data: dict[str, Any] = {"made": versions(), "ceilings": measured, "rows": {}}
    for path in arguments.resume:
        data["rows"] |= json.loads(path.read_text())["rows"]
    for name in arguments.rows:
        if name not in data["rows"] and time.monotonic() < end:
            data["rows"][name] = measure(
                name, ROWS[name], measured, arguments.peer_limit, arguments.first_call
            )
            write_json(arguments.out, data)
    if arguments.resume:
        write_json(arguments.out, data)
    print(data["made"], {k: f"{v:.3g}" for k, v in measured.items()})
    print(
        f"{'ms':34}|     ours fwd+bwd |     peer fwd+bwd |    dense fwd+bwd | floor/fwd GiB first s"
    )
    for name, row in data["rows"].items():
        print(line(name, row))


if __name__ == "__main__":
    main()
