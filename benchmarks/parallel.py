"""One sequence on two GPUs beside one: equality first, then training at a length.

    torchrun --nproc-per-node 2 benchmarks/parallel.py [--tokens 131072] [--seconds 240]

1. The gate, in float32 and bfloat16: outputs, gradients and states of lasp2 (every decay, the delta
   rule, packed), ring attention, Ulysses and gathered keys, against the same inputs on one device
   in float64; and the loss and gradient of each model. Nothing is timed where it fails.
2. Forward and backward of a CausalLM (bfloat16, checkpointed layers, batch 1) at the length on one
   GPU and on two: tokens/s, peak memory of a rank, and what a rank sends.

Writes `benchmarks/results/parallel.json` (or $OUT/parallel.json). NVLS stays off. Without GPUs the
gate of the operations runs, over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist

from subquad import mask, parallel
from subquad.models.causal_lm import CausalLM, CausalLMConfig
from subquad.ops.attention import attention
from subquad.ops.recurrence import recurrence
from subquad.parallel import wire
from subquad.parallel.gather import gathered
from subquad.parallel.lasp2 import lasp2
from subquad.parallel.ring_attention import ring
from subquad.parallel.ulysses import ulysses, ulysses_recurrence

# A relative error in the Frobenius norm, of the split run over the whole one's in the same dtype
# against float64: both round, so the split may be somewhat worse, not another number.
WORSE, FLOOR = 3.0, {torch.float32: 2e-6, torch.bfloat16: 4e-3}
QUICK = ("lasp2 head plain", "lasp2 head delta", "ring", "ulysses", "gather")
MODELS = {
    "gated_deltanet": ("gated_deltanet", {}),
    "softmax, ring": ("softmax", {"attention": "ring"}),
    "softmax, ulysses": ("softmax", {"attention": "ulysses"}),
    "softmax, gather": ("softmax", {"attention": "gather"}),
    "hybrid 3:1": ("gated_deltanet*3 softmax", {"attention": "ring"}),
}


def error(found, exact) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def gate_ops(device, quick: bool) -> Iterator[dict]:
    """Every operation on two GPUs, and on one, against one in float64; quick: a few, in bfloat16,
    for kernels take a while to compile."""
    B, T, H, G, D = 1, 1024, 4, 2, 64
    cu = torch.tensor([0, 300, 301, 700, T], dtype=torch.int32, device=device)
    cases = []
    for decay in (None, "constant", "head", "channel"):
        for delta in (False, True):
            name = f"lasp2 {decay} {'delta' if delta else 'plain'}"
            cases.append((name, lasp2, decay, delta, None))
    cases.append(("lasp2 head delta packed", lasp2, "head", True, cu))
    cases.append(("ulysses head delta", ulysses_recurrence, "head", True, None))
    for name, run in (("ring", ring), ("ulysses", ulysses), ("gather", gathered)):
        cases.append((name, run, None, False, None))
        cases.append((f"{name} packed", run, None, False, cu))
    dtypes = (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16)
    for case in cases:
        if not quick or case[0] in QUICK:
            yield judge(*case, B, T, H, G, D, device, dtypes)


def judge(name, run, decay, delta, cu, B, T, H, G, D, device, dtypes) -> dict:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device, generator=generator)

    linear = run in (lasp2, ulysses_recurrence)
    kv = H if linear else G
    x = {"q": drawn(B, T, H, D), "k": drawn(B, T, kv, D), "v": drawn(B, T, kv, D)}
    options, shared = {"cu_seqlens": cu}, set()
    if linear:
        x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
        shape = {"constant": (H,), "head": (B, T, H), "channel": (B, T, H, D)}
        if decay:
            x["decay"] = -0.1 * drawn(*shape[decay]).abs()
        if delta:
            x["beta"] = drawn(B, T, H).sigmoid()
        x["state"] = drawn(B if cu is None else len(cu) - 1, H, D, D)
        shared = {"state", "decay"} if decay == "constant" else {"state"}
    else:
        options["mask"] = mask.causal()
    do = drawn(B, T, H, D)
    alone = recurrence if linear else attention
    keep = {"decay", "beta", "state"}  # in float32 at least, as layers have them
    worst, ok = {}, True
    exact = outcome(alone, x, do, options, torch.float64, keep)
    for dtype in dtypes:
        one = outcome(alone, x, do, options, dtype, keep)
        world = dist.group.WORLD
        mine = {n: t if n in shared else parallel.split(t, mesh=world) for n, t in x.items()}
        part = parallel.split(do, mesh=world)
        with parallel.sequence(dist.group.WORLD) as here:
            two = outcome(run, mine, part, {**options, "mesh": here}, dtype, keep)
        for key, want in exact.items():
            got = two[key]
            if key[0] == "d" and key[1:] in shared:
                dist.all_reduce(got)
            elif key == "state":
                pass
            else:
                got = parallel.join(got, mesh=dist.group.WORLD)
            found, base = error(got, want), error(one[key], want)
            good = found <= max(WORSE * base, FLOOR[dtype])
            ok = ok and good
            kind = str(dtype).removeprefix("torch.")
            if found > worst.get(kind, (0.0,))[0]:
                worst[kind] = (found, base, key)
    return {"case": name, "ok": ok, "error": worst}


def outcome(run, x, do, options, dtype, keep) -> dict:
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {n: t.to(wide if n in keep else dtype).detach().requires_grad_() for n, t in x.items()}
    found = run(**inputs, **options)
    o, *state = found if isinstance(found, tuple) else (found,)
    grads = torch.autograd.grad(o, list(inputs.values()), do.to(o.dtype), allow_unused=True)
    out = {"o": o.detach()}
    if state:
        out["state"] = state[0].detach()
    for (name, t), g in zip(inputs.items(), grads, strict=True):
        out["d" + name] = torch.zeros_like(t) if g is None else g
    return out


def model_of(layers: str, device) -> CausalLM:
    torch.manual_seed(0)
    gated = {"heads": 8, "head_dim": 128, "expand_v": 1.0}
    config = CausalLMConfig(
        vocab_size=8192, dim=1024, depth=4, layers=layers,
        mixers={"gated_deltanet": gated, "softmax": {"heads": 8, "kv_heads": 2}},
    )  # fmt: skip
    model = CausalLM(config).to(device).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def step(model, ids, kinds, split: bool):
    """The loss of the whole and the gradients, summed over the ranks where they share the text."""
    with parallel.sequence(dist.group.WORLD if split else None, states=False, **kinds):
        mine = parallel.split(ids) if split else ids
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(mine, labels=mine, use_cache=False, logits_to_keep=1).loss
        loss.backward()
    loss = loss.detach()
    if split:
        dist.all_reduce(loss)
        for p in model.parameters():
            dist.all_reduce(p.grad)
    return loss


def gate_model(name, layers, kinds, device) -> dict:
    ids = torch.randint(0, 8192, (1, 8192), device=device, generator=seeded(device))
    grads, losses = [], []
    for split in (False, True):
        model = model_of(layers, device)
        losses.append(float(step(model, ids, kinds, split)))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    found = error(grads[1], grads[0].double())
    ok = found < 0.03 and abs(losses[0] - losses[1]) < 2e-3 * losses[0]
    return {"case": f"model {name}", "ok": ok, "losses": losses, "gradient": found}


def seeded(device):
    return torch.Generator(device).manual_seed(1)


def timed(layers, kinds, T, split: bool, device, repeats: int = 3) -> dict:
    """Forward, backward and the sum of the gradients of one text."""
    model = model_of(layers, device)
    ids = torch.randint(0, 8192, (1, T), device=device, generator=seeded(device))
    sent = 0

    def count(name):
        real = getattr(wire, name)

        def call(*args, **options):
            nonlocal sent
            if name == "send_and_receive":
                tensors = [op.tensor for op in args[0] if op.op is dist.isend]
            else:
                tensors = [args[0] if name == "reduce_scatter" else args[1]]
            share = {"all_to_all": 0.5}.get(name, 1.0)
            sent += int(share * sum(t.nbytes for t in tensors if t.is_cuda))
            return real(*args, **options)

        return mock.patch.object(wire, name, call)

    with ExitStack() as stack:
        for name in ("all_gather", "reduce_scatter", "all_to_all", "send_and_receive"):
            stack.enter_context(count(name))
        step(model, ids, kinds, split)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        if split:
            dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(model, ids, kinds, split)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    best = sorted(seconds)[len(seconds) // 2]
    peak = torch.cuda.max_memory_allocated()
    return {
        "gpus": 2 if split else 1,
        "seconds": best,
        "tokens_per_second": T / best,
        "peak_gib": peak / 2**30,
        "sent_mib": sent / 2**20,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing new after")
    parser.add_argument("--quick", action="store_true", help="a short gate, in bfloat16 alone")
    options = parser.parse_args()
    began = time.monotonic()
    rank = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    say = print if rank == 0 else lambda *args, **options: None
    out = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    results = {
        "command": " ".join(["torchrun --nproc-per-node 2 benchmarks/parallel.py", *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name() if gpu else "",
        "torch": torch.__version__, "tokens": options.tokens,
        "gate": [], "rows": [],
    }  # fmt: skip

    def write():
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "parallel.json").write_text(json.dumps(results, indent=1) + "\n")

    def judged(row):
        results["gate"].append(row)
        say("ok " if row["ok"] else "BAD", json.dumps(row, default=str)[:230], flush=True)

    for row in gate_ops(device, options.quick):
        judged(row)
    for name, (layers, kinds) in MODELS.items() if gpu else ():
        judged(gate_model(name, layers, kinds, device))
        torch.cuda.empty_cache()
    held = torch.tensor(float(all(row["ok"] for row in results["gate"])), device=device)
    dist.all_reduce(held, dist.ReduceOp.MIN)
    if not held or not gpu:
        say("nothing to time on" if held else "the gate is red: nothing is timed")
        dist.destroy_process_group()
        return 0 if held else 1
    write()
    say(f"\n{time.monotonic() - began:.0f} s; {results['gpu']}, {options.tokens} tokens")
    say(f"{'model':20s} {'GPUs':>4s} {'tokens/s':>10s} {'GiB':>6s} {'sent MiB':>9s}")
    alone: dict[str, dict] = {}
    for name, (layers, kinds) in MODELS.items():
        for split in (False, True):
            late = torch.tensor(float(time.monotonic() - began > options.seconds), device=device)
            dist.all_reduce(late, dist.ReduceOp.MAX)
            if late:
                say(f"{name}: no time left")
                continue
            if not split and layers in alone:
                row = alone[layers]
            else:
                row = timed(layers, kinds, options.tokens, split, device)
                torch.cuda.empty_cache()
            if not split:
                alone[layers] = row
            peak = torch.tensor(row["peak_gib"], device=device)
            dist.all_reduce(peak, dist.ReduceOp.MAX)
            row = {"model": name, **row, "peak_gib": float(peak)}
            results["rows"].append(row)
            say(f"{name:20s} {row['gpus']:4d} {row['tokens_per_second']:10.0f} "
                f"{row['peak_gib']:6.2f} {row['sent_mib']:9.1f}", flush=True)  # fmt: skip
            write()
    say(f"{time.monotonic() - began:.0f} s")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
