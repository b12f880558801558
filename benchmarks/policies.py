"""Speed of the policies: a random Llama-shaped model's prompts and tokens, beside full attention.

    python benchmarks/policies.py                  # the whole table (a GPU with 80 GB or more)
    python benchmarks/policies.py --quick          # the same code on small shapes, any device

Prefill: one attention layer, choosing included, against dense causal SDPA (cuDNN on a GPU) on the
same tensors. Decode: the whole model, tokens/s and bytes of the cache, against its own full cache.
Before a policy is timed, its small form must agree with dense attention over a covering budget;
otherwise nothing is printed. Cases that lose are printed like the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import subquad
from subquad.bench.measure import timed
from subquad.bench.policies import cache_bytes, policy
from subquad.bench.results import machine, write_json
from subquad.policies import Duo
from subquad.policies.base import Call, Policy, Site, Tally

RESULTS = Path(__file__).parent / "results"
SIZES = {"dim": 1536, "mlp": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "head_dim": 128}
SMALL = {"dim": 64, "mlp": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
# At T tokens, budgets for about 10% of the pairs; what was reached is measured and printed.
PREFILL = {
    "vertical_slash": lambda T: f"vertical_slash:vertical={T // 40},slash={T // 40}",
    "block_topk": lambda T: f"block_topk:block=64,topk={max(3, T // 1280)},variant=frontier",
    "flexprefill": lambda T: f"flexprefill:gamma=0.5,tau=0,max_budget={max(512, T // 20)}",
    "hip": lambda T: f"hip:budget={max(512, T // 20 // 128 * 128)},dense_layers=0",
    "hip, coarse": lambda T: (
        f"hip:budget={max(512, T // 20 // 128 * 128)},rows=64,block=4,dense_layers=0"
    ),
}
DECODE = {
    "quest": lambda T: "quest:budget=1024",
    "snapkv": lambda T: "snapkv:capacity=1024",
    "duo": lambda T: "duo:sparsity=0.75",
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--quick", action="store_true", help="small shapes")
    asked.add_argument("--lengths", type=int, nargs="+", help="tokens")
    asked.add_argument("--out", type=Path, help="results/policies.json; with --quick none")
    options = asked.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        asked.error("the whole table needs a GPU; --quick runs anywhere")
    sizes = SMALL if options.quick else SIZES
    lengths = options.lengths or ([1024] if options.quick else [32768, 131072])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gate()
    rows: list[dict[str, Any]] = []
    out = options.out or (None if options.quick else RESULTS / "policies.json")

    def keep() -> None:
        if out is not None:
            write_json(out, {"made": machine(), "sizes": sizes, "dtype": str(dtype), "rows": rows})

    for T in lengths:
        rows += prefill(T, sizes, device, dtype, repeats=3 if options.quick else 5)
    model = random_model(sizes, max(lengths) + 64, device, dtype)
    keep()
    for T in lengths:
        rows += decode(model, sizes, T, device, steps=8 if options.quick else 16)
        keep()
    if out is not None:
        print(out)


def gate() -> None:
    """Stop unless covering budgets give dense attention."""
    q, k, v = (torch.randn(1, 96, n, 16) for n in (4, 2, 2))
    want = dense(q, k, v)
    for text in ("vertical_slash:vertical=99,slash=99", "block_topk:topk=64", "flexprefill"):
        got = policy(text).prefill(call(policy(text), q, k, v))
        if not torch.allclose(got, want, atol=1e-4):
            sys.exit(f"{text} does not equal dense attention; nothing is timed")


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    fast = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if q.is_cuda else nullcontext()
    with fast:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )


def call(chosen: Policy, q: Tensor, k: Tensor, v: Tensor, tally: Tally | None = None) -> Call:
    """A prompt in one attention layer."""
    site = Site(5, 28, q.shape[2], k.shape[2], q.shape[3], None)
    layer = chosen.layer(site)
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
    places = torch.arange(q.shape[1], device=q.device)[None]
    scale = q.shape[3] ** -0.5
    return Call(site, q, k, v, layer, scale, None, places, lambda x, p: x, tally)


def structured(T: int, sizes: dict[str, int], device: str, dtype: torch.dtype) -> list[Tensor]:
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


def prefill(
    T: int, sizes: dict[str, int], device: str, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """One layer's attention over a prompt, side by side with dense SDPA."""
    q, k, v = structured(T, sizes, device, dtype)
    peer = best(lambda: dense(q, k, v), repeats, q.device)
    show(
        "prefill", T, "dense SDPA" + " (cuDNN)" * (device == "cuda"), peer, peer, "100.0% of pairs"
    )
    rows = [{"phase": "prefill", "tokens": T, "policy": "full", "seconds": peer, "pairs": 1.0}]
    for name, text in PREFILL.items():
        chosen = named(text(T))
        if chosen is None:
            print(f"prefill {T:>9,}  {name}: not in this version")
            continue
        tally, made = Tally(), call(chosen, q, k, v)
        row = {"phase": "prefill", "tokens": T, "policy": text(T)}
        try:
            took = best(lambda chosen=chosen, made=made: chosen.prefill(made), repeats, q.device)
            chosen.prefill(call(chosen, q, k, v, tally))
        except RuntimeError as error:  # out of memory, say: the other policies' rows still count
            print(f"prefill {T:>9,}  {text(T)}: {str(error).splitlines()[0]}")
            rows.append({**row, "failed": str(error)[:300]})
            continue
        share = tally.prefill.attended / made.visible()
        show("prefill", T, text(T), took, peer, f"{share:.1%} of pairs")
        rows.append({**row, "seconds": took, "pairs": share})
    return rows


def decode(
    model: Any, sizes: dict[str, int], T: int, device: str, steps: int
) -> list[dict[str, Any]]:
    """Tokens/s of the whole model behind a prompt, and the bytes of its cache."""
    from transformers import DynamicCache

    rows, peer = [], None
    ids = torch.randint(100, (1, T), generator=torch.Generator().manual_seed(1)).to(device)
    for name, text in {"full": None, **DECODE}.items():
        chosen = None if text is None else named(text(T))
        if text is not None and chosen is None:
            print(f"decode  {T:>9,}  {name}: not in this version")
            continue
        if isinstance(chosen, Duo):  # a random model has no heads to find: any will do
            gates = torch.rand(sizes["layers"], sizes["kv_heads"]).tolist()
            chosen = dataclasses.replace(chosen, gates=gates)
        with nullcontext() if chosen is None else subquad.apply(model, chosen) as on:
            cache = DynamicCache(config=model.config) if on is None else on.new_cache()
            with torch.inference_mode():
                model(ids, past_key_values=cache, logits_to_keep=1)
                one = ids[:, :1]
                times = [
                    timed(
                        lambda cache=cache, one=one: model(one, past_key_values=cache), ids.device
                    )[0]
                    for _ in range(steps)
                ]
                kernels = busy(
                    lambda cache=cache, one=one: model(one, past_key_values=cache), ids.device
                )
        took, held = median(times), cache_bytes(cache)
        peer = took if peer is None else peer
        title = text(T) if text else "full cache, SDPA"
        note = f"{held >> 20} MiB, {1 / took:.0f} tokens/s"
        note += "" if kernels is None else f", kernels {kernels * 1e3:.2f} ms"
        show("decode", T, title, took, peer, note)
        row = {"phase": "decode", "tokens": T, "policy": name, "seconds": took, "cache": held}
        rows.append({**row, "kernels": kernels})
    return rows


def busy(run: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds that the GPU works for ``run``, without the gaps in which it waits for Python."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) * 1e-6


def named(text: str) -> Policy | None:
    """The policy, None where this version has none of that name; wrong options still raise."""
    known = {card.key for card in subquad.systems(kind="policy")}
    return policy(text) if text.partition(":")[0] in known else None


def best(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The least seconds of several runs after a first."""
    with torch.inference_mode():
        run()
        return min(timed(run, device)[0] for _ in range(repeats))


def show(phase: str, T: int, name: str, took: float, peer: float, note: str) -> None:
    print(f"{phase:8}{T:>9,}  {took * 1e3:10.3f} ms  {peer / took:6.2f}x  {note:26} {name}")


def random_model(sizes: dict[str, int], positions: int, device: str, dtype: torch.dtype) -> Any:
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
