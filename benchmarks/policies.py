"""Speed of the policies: a random Llama-shaped model's prompts, beside full attention.

    python benchmarks/policies.py                  # the whole table (a GPU with 80 GB or more)
    python benchmarks/policies.py --quick          # the same code on small shapes, any device
    python benchmarks/policies.py --only layer --profile profiles  # and each policy's kernels

"layer" is the attention of one layer's prompt, choosing included, beside dense causal SDPA (cuDNN
on a GPU) on the same tensors; "prompt" the whole model's prompt. (Decoding: policy_tokens.py.)
Before anything is timed, attention by the policies must agree with dense attention in float64 where
their budgets cover the text; otherwise nothing is. Every row is printed and written as soon as it
is measured, cases that lose like the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import subquad
from subquad.bench.measure import timed
from subquad.bench.policies import new_cache, policy
from subquad.bench.results import machine, write_json, write_section
from subquad.policies.base import Call, Policy, Site, Tally

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SIZES = {"dim": 1536, "mlp": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "head_dim": 128}
SMALL = {"dim": 64, "mlp": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
# At T tokens, budgets for about 10% of the pairs; what was reached is measured and printed.
PREFILL = {
    "vertical_slash": lambda T: f"vertical_slash:vertical={T // 40},slash={100 + T // 500}",
    "block_topk": lambda T: f"block_topk:block=64,topk={max(3, T // 1280)},variant=frontier",
    "flexprefill": lambda T: f"flexprefill:gamma=0.95,tau=0,max_budget={max(512, T // 14)}",
    "hip": lambda T: f"hip:budget={max(512, T // 20 // 128 * 128)},dense_layers=0",
    "hip, coarse": lambda T: (
        f"hip:budget={max(512, T // 20 // 128 * 128)},rows=64,block=4,dense_layers=0"
    ),
    "hip, shared": lambda T: (
        f"hip:budget={max(512, T // 20 // 128 * 128)},rows=64,block=4,share=True,dense_layers=0"
    ),
    "hip, 2048": lambda T: "hip:budget=2048,rows=64,block=4,dense_layers=0",
}
COVERING = (
    "vertical_slash:vertical={T},slash={T}",
    "block_topk:block=64,topk={T}",
    "flexprefill:gamma=1,tau=0,min_budget=128",
    "hip:budget={T},dense_layers=0",
)
KINDS = ("layer", "prompt")


class Table:
    """Rows, printed and written as they come."""

    def __init__(self, out: Path | None, head: dict[str, Any]) -> None:
        self.out, self.head, self.rows = out, head, []

    def add(self, kind: str, T: int, name: str, took: float, peer: float, **more: Any) -> None:
        row = {"kind": kind, "tokens": T, "policy": name, "seconds": took, "full": peer, **more}
        note = ", ".join(f"{key} {value:.4g}" for key, value in more.items() if value is not None)
        print(
            f"{kind:7}{T:>8,} {took * 1e3:10.3f} ms {peer / took:6.2f}x  {name}  {note}", flush=True
        )
        self._keep(row)

    def fail(self, kind: str, T: int, name: str, error: Exception) -> None:
        print(f"{kind:7}{T:>8,} {name}: {str(error).splitlines()[0]}", flush=True)
        self._keep({"kind": kind, "tokens": T, "policy": name, "failed": str(error)[:300]})

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.out is not None:
            write_json(self.out, {**self.head, "rows": self.rows})


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--quick", action="store_true", help="small shapes")
    asked.add_argument("--lengths", type=int, nargs="+", help="tokens")
    asked.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="kinds of rows")
    asked.add_argument("--policies", nargs="+", help="names of rows; all where not given")
    asked.add_argument("--profile", type=Path, help="a folder for the kernels of each layer's row")
    asked.add_argument("--out", type=Path, help="results/policies.json; with --quick none")
    asked.add_argument("--page", action="store_true", help="only write the figures to the docs")
    options = asked.parse_args()
    if options.page:
        write_page(options.out or RESULTS / "policies.json")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        asked.error("the whole table needs a GPU; --quick runs anywhere")
    sizes = SMALL if options.quick else SIZES
    lengths = options.lengths or ([1024] if options.quick else [32768, 131072])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gate(sizes, device, dtype)
    out = options.out or (None if options.quick else RESULTS / "policies.json")
    table = Table(out, {"made": machine(), "sizes": sizes, "dtype": str(dtype)})
    wanted = {k: v for k, v in PREFILL.items() if not options.policies or k in options.policies}
    if "layer" in options.only:
        for T in lengths:
            layer(table, wanted, T, sizes, device, dtype, options.profile)
    if set(options.only) == {"layer"}:
        return
    model = random_model(sizes, max(lengths) + 64, device, dtype)
    for T in lengths:
        ids = torch.randint(100, (1, T), generator=torch.Generator().manual_seed(1)).to(device)
        if "prompt" in options.only:
            prompts(table, wanted, model, ids)


def gate(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> None:
    """Stop unless covering budgets give dense attention."""
    T = 300 if device.type == "cpu" else 1500
    q, k, v = structured(T, sizes, device, dtype)
    want = dense(*(x.double() for x in (q, k, v)))
    for text in COVERING:
        chosen = policy(text.format(T=T))
        got = chosen.prefill(call(chosen, q, k, v)).double()
        error = float((got - want).norm() / want.norm())
        if not error < (1e-2 if dtype == torch.bfloat16 else 1e-5):
            sys.exit(f"{text} is {error:.1e} from dense attention; nothing is timed")
        print(f"{text.format(T=T)}: {error:.1e} from dense attention in float64", flush=True)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def fastest_dense(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> tuple[float, str]:
    """Seconds of dense attention: the best of cuDNN with grouped and with repeated heads."""
    if not q.is_cuda:
        return best(lambda: dense(q, k, v), repeats, q.device), "SDPA"
    group = q.shape[2] // k.shape[2]
    wide = [x.repeat_interleave(group, 2) for x in (k, v)]
    found = []
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for name, (a, b) in {"cuDNN, grouped": (k, v), "cuDNN, repeated": wide}.items():
            try:
                found.append((best(lambda a=a, b=b: dense(q, a, b), repeats, q.device), name))
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}", flush=True)
    return min(found)


def call(chosen: Policy, q: Tensor, k: Tensor, v: Tensor, tally: Tally | None = None) -> Call:
    """A prompt in one attention layer."""
    site = Site(5, 28, q.shape[2], k.shape[2], q.shape[3], None)
    held = chosen.layer(site)
    held.update(k.transpose(1, 2), v.transpose(1, 2))
    places = torch.arange(q.shape[1], device=q.device)[None]
    scale = q.shape[3] ** -0.5
    return Call(site, q, k, v, held, scale, None, places, lambda x, p: x, tally)


def structured(
    T: int, sizes: dict[str, int], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Random q, k, v in which a few keys are looked at by all and neighbours resemble each other,
    as in real models; on pure noise no choice is better than another."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(heads: int) -> Tensor:
        x = torch.randn(1, T, heads, sizes["head_dim"], generator=generator, device=device)
        drift = torch.randn(
            1, -(-T // 64), heads, sizes["head_dim"], generator=generator, device=device
        )
        return x + drift.repeat_interleave(64, 1)[:, :T]

    q, k, v = (drawn(sizes[n]) for n in ("heads", "kv_heads", "kv_heads"))
    common = torch.randn(sizes["head_dim"], generator=generator, device=device)
    loud = torch.randint(T, (T // 200,), generator=generator, device=device)
    q = q + common
    k[:, loud] += common
    return [x.to(dtype) for x in (q, k, v)]


def layer(
    table: Table,
    rows: dict[str, Any],
    T: int,
    sizes: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    profiles: Path | None,
) -> None:
    """One layer's attention over a prompt, side by side with dense SDPA."""
    q, k, v = structured(T, sizes, device, dtype)
    peer, name = fastest_dense(q, k, v, 5)
    table.add("layer", T, f"full ({name})", peer, peer, pairs=1.0, kernels=peer)
    for entry in rows.values():
        text = entry(T)
        chosen = policy(text)
        made = call(chosen, q, k, v)
        try:
            took = best(lambda chosen=chosen, made=made: chosen.prefill(made), 3, device)
            tally = Tally()
            with torch.inference_mode():
                chosen.prefill(call(chosen, q, k, v, tally))
            share = tally.prefill.attended / made.visible()
            with torch.inference_mode():
                kernels = busy(lambda chosen=chosen, made=made: chosen.prefill(made), device)
            table.add("layer", T, text, took, peer, pairs=share, kernels=kernels)
            if profiles is not None:
                profiled(lambda chosen=chosen, made=made: chosen.prefill(made), profiles, text, T)
        except RuntimeError as error:  # out of memory, say: the other policies' rows still count
            table.fail("layer", T, text, error)


def prompts(table: Table, rows: dict[str, Any], model: Any, ids: Tensor) -> None:
    """The whole model's prompt, side by side with the model alone."""
    T = ids.shape[1]

    def read(on: Any) -> float:
        times = []
        for _ in range(2):
            cache = new_cache(model) if on is None else on.new_cache()
            with torch.inference_mode():
                run = partial(model, ids, past_key_values=cache, logits_to_keep=1)
                times.append(timed(run, ids.device)[0])
            del cache, run
        return min(times)

    fast = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if ids.is_cuda else nullcontext()
    with fast:
        peer = read(None)
    table.add("prompt", T, "full (cuDNN)" if ids.is_cuda else "full", peer, peer)
    for entry in rows.values():
        text = entry(T)
        try:
            with subquad.apply(model, policy(text)) as on:
                table.add("prompt", T, text, read(on), peer)
        except RuntimeError as error:
            table.fail("prompt", T, text, error)


def write_page(results: Path) -> None:
    """The rows of a run as tables of docs/performance.md."""
    found = json.loads(results.read_text())
    made, rows = found["made"], [row for row in found["rows"] if "failed" not in row]
    lines = [
        f"`python benchmarks/policies.py` on one {made['device']}, torch {made['torch']}, Triton "
        f"{made['triton']}, {made['date']}, bfloat16: a Llama of random weights with 28 layers, 12 "
        "heads of 128 and 2 key heads (1.5 B parameters). *ms* is by the clock, *GPU* what its "
        "kernels took of that; each ratio is full attention's time over the policy's, same run.",
        "",
        "One layer's prompt, choosing included, beside cuDNN's causal attention:",
        "",
        "| tokens | policy | pairs | ms | faster | GPU ms | faster by it |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row["kind"] == "layer":
            ms, full, gpu = (1e3 * row[k] for k in ("seconds", "full", "kernels"))
            lines.append(
                f"| {row['tokens']:,} | `{row['policy']}` | {row['pairs']:.1%} | {ms:.2f} "
                f"| {full / ms:.2f} | {gpu:.2f} | {full / gpu:.2f} |"
            )
    lines += [
        "",
        "The whole model's prompt:",
        "",
        "| tokens | policy | ms | faster |",
        "| ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        if row["kind"] == "prompt":
            ms, ratio = 1e3 * row["seconds"], row["full"] / row["seconds"]
            lines.append(f"| {row['tokens']:,} | `{row['policy']}` | {ms:.0f} | {ratio:.2f} |")
    write_section(PAGE, "policies", "Policies beside full attention", "\n".join(lines))


def busy(run: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds that the GPU works for ``run``, without the gaps in which it waits for Python."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) * 1e-6


def profiled(run: Callable[[], Any], out: Path, text: str, T: int) -> None:
    """Write which kernels ``run`` spends its time in."""
    out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), profile() as found:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    name = "".join(c if c.isalnum() else "_" for c in text)
    table = found.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
    (out / f"{name}.{T}.txt").write_text(table)


def best(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The least seconds of several runs after a first."""
    with torch.inference_mode():
        run()
        return min(timed(run, device)[0] for _ in range(repeats))


def random_model(
    sizes: dict[str, int], positions: int, device: torch.device, dtype: torch.dtype
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=sizes["dim"],
        intermediate_size=sizes["mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=positions,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


if __name__ == "__main__":
    main()
