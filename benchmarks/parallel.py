"""One sequence on two GPUs beside one: equality first, then training at a length.

    torchrun --nproc-per-node 2 benchmarks/parallel.py [--tokens 131072] [--seconds 240]

1. The gate, in float32 and bfloat16: outputs, gradients and states of lasp2 (every decay, the delta
   rule, packed), ring attention, Ulysses and gathered keys, against the same inputs on one device
   in float64; and the loss and gradient of each model. Nothing is timed where it fails.
2. Forward and backward of a CausalLM (bfloat16, checkpointed layers, batch 1) at the length on one
   GPU and on two: tokens/s, peak memory of a rank, and what a rank sends, operation by operation,
   beside the formulas of the systems.

Writes `benchmarks/results/parallel.json` (or --out) after every line, and --page the tables of
docs/performance.md from it. A collective that waits for
90 seconds ends the run, and shows where. NVLS stays off. Without GPUs the gate of the operations
runs, over gloo.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist

from subquad import mask, parallel
from subquad.bench.results import machine, write_json, write_section
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
QUICK = (
    "lasp2 head plain", "lasp2 head delta", "lasp2 head delta packed", "ring", "ring packed",
    "ulysses", "gather", "gather packed",
)  # fmt: skip
MODELS = {
    "gated_deltanet, lasp2": ("gated_deltanet", {}),
    "softmax, ring": ("softmax", {"attention": "ring"}),
    "softmax, ulysses": ("softmax", {"attention": "ulysses"}),
    "softmax, gather": ("softmax", {"attention": "gather"}),
    "hybrid 3:1, lasp2 and ring": ("gated_deltanet*3 softmax", {"attention": "ring"}),
    "hybrid 3:1, lasp2 and gather": ("gated_deltanet*3 softmax", {"attention": "gather"}),
}
DIM, DEPTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 4, 8, 2, 128, 8192
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "parallel.json"
PERFORMANCE = ROOT / "docs" / "performance.md"
WAIT = 90  # seconds that a collective may take


def error(found, exact) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def gate_ops(device, quick: bool, say) -> Iterator[dict]:
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
            say(f"{case[0]} ...")
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
    mixers = {
        "gated_deltanet": {"heads": HEADS, "head_dim": HEAD_DIM, "expand_v": 1.0},
        "softmax": {"heads": HEADS, "kv_heads": KV_HEADS},
    }
    used = {key: mixers[key] for key in mixers if key in layers}
    config = CausalLMConfig(vocab_size=VOCAB, dim=DIM, depth=DEPTH, layers=layers, mixers=used)
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
    ids = torch.randint(0, VOCAB, (1, 8192), device=device, generator=seeded(device))
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
    ids = torch.randint(0, VOCAB, (1, T), device=device, generator=seeded(device))
    with counted() as sent:
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
        "sent": sent,
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this one of two ranks sends to the other inside, by operation."""
    sent: dict[str, int] = {}
    doing = ""
    attempt = parallel.Split.attempt

    def named(here, op, collective):
        nonlocal doing
        doing = op
        return attempt(here, op, collective)

    def wrapped(name):
        real = getattr(wire, name)

        def call(*args, **options):
            if name == "send_and_receive":
                tensors = [op.tensor for op in args[0] if op.op is dist.isend]
            else:
                tensors = [args[0] if name == "reduce_scatter" else args[1]]
            share = 0.5 if name == "all_to_all" else 1.0
            bytes_ = int(share * sum(t.nbytes for t in tensors if t.is_cuda))
            if bytes_:
                sent[doing] = sent.get(doing, 0) + bytes_
            return real(*args, **options)

        return mock.patch.object(wire, name, call)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(parallel.Split, "attempt", named))
        for name in ("all_gather", "reduce_scatter", "all_to_all", "send_and_receive"):
            stack.enter_context(wrapped(name))
        yield sent


def formulas(layers: str, kinds, T: int, W: int = 2) -> dict[str, int]:
    """Bytes that a rank sends in a step, by the systems' formulas: layers run forward twice, for
    they are checkpointed, and backward once; states are float32, keys and values bfloat16."""
    gated = {"gated_deltanet": DEPTH, "softmax": 0}.get(layers, DEPTH * 3 // 4)
    softmax = DEPTH - gated
    C, out = T // W, {}
    if gated:  # the maps [K,V] and [K,K] of every head
        states = (W - 1) * HEADS * 2 * HEAD_DIM**2 * 4
        out |= {"lasp2": 2 * gated * states, "lasp2 (backward)": gated * states}
    keys = (W - 1) * C * KV_HEADS * 2 * HEAD_DIM  # elements
    kind = kinds.get("attention")
    if softmax and kind == "ring":  # gradients of keys and values travel in float32, W hops
        back = keys * 2 + keys * W // (W - 1) * 4
        moved = C // W * 2 * (HEADS + KV_HEADS) * HEAD_DIM * 2  # q, k, v and o, to zigzag and back
        out |= {
            "ring": 2 * softmax * moved,
            "ring (backward)": softmax * moved,
            "ring_attention": 2 * softmax * keys * 2,
            "ring_attention (backward)": softmax * back,
        }
    if softmax and kind == "gather":
        out |= {"gather": 2 * softmax * keys * 2, "gather (backward)": softmax * keys * 2}
    if softmax and kind == "ulysses":
        dealt = (W - 1) * C // W * 2 * (HEADS + KV_HEADS) * HEAD_DIM * 2
        out |= {"ulysses": 2 * softmax * dealt, "ulysses (backward)": softmax * dealt}
    return out


def page(results: dict) -> None:
    """The section of docs/performance.md."""
    made, gate, rows = results["made"], results["gate"], results["rows"]
    models = [row for row in gate if row["case"].startswith("model ")]

    def formula(row: dict) -> dict[str, int]:
        return formulas(*MODELS[row["model"]], results["tokens"])

    def rest(row: dict) -> float:
        return sum(n for op, n in row["sent"].items() if op not in formula(row)) / 2**20

    lines = [
        f"`{results['command']}` on two {made['device']}, torch {made['torch']}, {made['date']}.",
        "",
        f"First the gate: {len(gate) - len(models)} operations on two GPUs, with their gradients "
        "and states, are as near to one GPU's float64 as the same operation on one GPU is, and "
        f"{len(models)} models find the loss and, within {max(r['gradient'] for r in models):.1%}, "
        "the gradient of one GPU in bfloat16 "
        f"({'all pass' if all(r['ok'] for r in gate) else 'NOT ALL PASS'}).",
        "",
        f"Forward and backward of a CausalLM ({DEPTH} checkpointed layers of width {DIM}, {HEADS} "
        f"heads of {HEAD_DIM}, {KV_HEADS} of keys in softmax, bfloat16) and the sum of its "
        f"gradients, one text of {results['tokens']:,} tokens; the median of three steps:",
        "",
        "| layers | GPUs | tokens/s | of one GPU's | peak GiB of a GPU |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    one: dict[str, float] = {}
    for row in rows:
        one.setdefault(row["model"], row["tokens_per_second"])
        times = row["tokens_per_second"] / one[row["model"]]
        lines.append(
            f"| {row['model']} | {row['gpus']} | {row['tokens_per_second']:,.0f} | {times:.2f} | "
            f"{row['peak_gib']:.1f} |"
        )
    lines += [
        "",
        "What a rank sends in such a step (layers run forward twice, for they are checkpointed), "
        "counted on the wire, beside the formulas of the systems; labels and short convolutions, "
        f"which have none, send {max(rest(row) for row in rows):.2f} MiB at most:",
        "",
        "| layers | operation | MiB sent | MiB by formula |",
        "| --- | --- | ---: | ---: |",
    ]
    for row in rows:
        for op, by_formula in formula(row).items() if row["sent"] else ():
            sent = row["sent"].get(op, 0) / 2**20
            lines.append(f"| {row['model']} | {op} | {sent:,.1f} | {by_formula / 2**20:,.1f} |")
    write_section(PERFORMANCE, "parallel", "One sequence on two GPUs", "\n".join([*lines, ""]))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing new after")
    parser.add_argument("--quick", action="store_true", help="a short gate, in bfloat16 alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="only write docs/performance.md")
    options = parser.parse_args()
    if options.page:
        page(json.loads(options.out.read_text()))
        return 0
    began = time.monotonic()
    rank = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        device_id=device if gpu else None,
        timeout=timedelta(seconds=WAIT),
    )
    command = "torchrun --nproc-per-node 2 benchmarks/parallel.py"
    results = {
        "command": command + " --quick" * options.quick,
        "made": machine(), "tokens": options.tokens, "gate": [], "rows": [],
    }  # fmt: skip

    def say(*words):
        """On rank 0, with the seconds; and a process that then does nothing for long says where it
        stands."""
        faulthandler.dump_traceback_later(WAIT / 2, repeat=True)
        if rank == 0:
            print(f"{time.monotonic() - began:6.1f}", *words, flush=True)
            write_json(options.out, results)

    def judged(row):
        results["gate"].append(row)
        say("ok " if row["ok"] else "BAD", str(row)[:300])

    say(f"{dist.get_world_size()} ranks over {dist.get_backend()}")
    for row in gate_ops(device, options.quick, say):
        judged(row)
    for name, (layers, kinds) in MODELS.items() if gpu else ():
        say(f"model {name} ...")
        judged(gate_model(name, layers, kinds, device))
        torch.cuda.empty_cache()
    held = torch.tensor(float(all(row["ok"] for row in results["gate"])), device=device)
    dist.all_reduce(held, dist.ReduceOp.MIN)
    if not held or not gpu:
        say("nothing to time on" if held else "the gate is red: nothing is timed")
        dist.destroy_process_group()
        return 0 if held else 1
    say(f"{results['made']['device']}, {options.tokens} tokens")
    say(f"{'model':28s} {'GPUs':>4s} {'tokens/s':>10s} {'GiB':>6s}  sent MiB / by formula")
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
            known = formulas(layers, kinds, options.tokens)
            sent = ", ".join(
                f"{op} {n / 2**20:.1f}/{known.get(op, 0) / 2**20:.1f}"
                for op, n in row["sent"].items()
            )
            say(f"{name:28s} {row['gpus']:4d} {row['tokens_per_second']:10.0f} "
                f"{row['peak_gib']:6.2f}  {sent}")  # fmt: skip
    say("done")
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
