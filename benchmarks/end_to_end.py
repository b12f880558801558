"""Whole models of about 350M parameters on one GPU: training and decoding, in one run.

    python benchmarks/end_to_end.py --out benchmarks/results/end_to_end.json

Gated DeltaNet in every layer, Kimi Linear (three of KDA to one of MLA), and softmax attention
(PyTorch's), in bfloat16 with random weights and tokens. Training: forward, backward and a step of
fused AdamW, 32,768 tokens a step or one sequence; from 32,768 tokens a sequence on, all three
recompute their activations. Decoding: one text, behind a context that was read in pieces, launched
from Python and recorded (``CausalLM.steps``). The file is written after every figure.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from subquad.bench.results import machine, write_json
from subquad.caches.states import StateCache
from subquad.models import CausalLM, CausalLMConfig, presets

SIZES = {"dim": 1024, "vocab_size": 32000, "tie_embeddings": True}
MODELS: dict[str, Callable[[], CausalLMConfig]] = {
    "softmax": lambda: CausalLMConfig(
        layers="softmax", depth=26, mixers={"softmax": {"heads": 16}}, **SIZES
    ),
    "gated_deltanet": lambda: CausalLMConfig(
        layers="gated_deltanet", depth=22,
        mixers={"gated_deltanet": {"heads": 6, "head_dim": 128}}, **SIZES,
    ),
    "kimi_linear": lambda: presets.kimi_linear(depth=24, heads=8, head_dim=128, **SIZES),
}  # fmt: skip
TRAINING = {4096: 8, 32768: 1, 131072: 1}  # tokens of a sequence: sequences
CONTEXTS = (1024, 32768, 262144)
PIECE = 8192  # tokens of a context read at once
STEPS = 32  # tokens decoded


def build(name: str, device: str) -> CausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return CausalLM(MODELS[name]()).to(torch.bfloat16)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training(name: str, T: int, B: int, device: str) -> dict[str, Any]:
    model = build(name, device).train()
    if T >= 32768:
        model.gradient_checkpointing_enable()
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    tokens = torch.randint(SIZES["vocab_size"], (B, T), device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    if fused:
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(4):
        start = clock(device)
        step()
        took.append(clock(device) - start)
    seconds = sorted(took)[len(took) // 2]
    return {
        "B": B, "T": T, "seconds": seconds, "tokens_per_s": B * T / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if fused else None,
        "recomputes": T >= 32768,
    }  # fmt: skip


@torch.no_grad()
def decoding(name: str, context: int, device: str) -> dict[str, Any]:
    model = build(name, device).eval()
    cache = StateCache()
    start = clock(device)
    for at in range(0, context, PIECE):
        piece = torch.randint(SIZES["vocab_size"], (1, min(PIECE, context - at)), device=device)
        model(input_ids=piece, past_key_values=cache, logits_to_keep=1)
    read = clock(device) - start
    token = torch.randint(SIZES["vocab_size"], (1, 1), device=device)
    step = model.steps(cache, room=4 * STEPS)
    out: dict[str, Any] = {"context": context, "read_s": read, "cache_bytes": cache.nbytes}
    for recorded, tokens in ((False, STEPS), (True, 3 * STEPS)):
        if recorded and not step.repeats:
            continue
        one = step if recorded else lambda ids: model(input_ids=ids, past_key_values=cache).logits
        for _ in range(4):
            token = one(token).view(1, -1).argmax(-1, keepdim=True)
        start = clock(device)
        for _ in range(tokens):
            token = one(token).view(1, -1).argmax(-1, keepdim=True)
        rate = tokens / (clock(device) - start)
        out["recorded_tokens_per_s" if recorded else "tokens_per_s"] = rate
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/end_to_end.json"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--training", type=int, nargs="*", default=list(TRAINING))
    parser.add_argument("--contexts", type=int, nargs="*", default=list(CONTEXTS))
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.small:
        SIZES.update(dim=128, vocab_size=512)
    data: dict[str, Any] = {"made": machine(), "training": {}, "decoding": {}, "parameters": {}}
    jobs = [("training", T) for T in asked.training] + [("decoding", T) for T in asked.contexts]
    for name in asked.models:
        model = build(name, "meta")
        data["parameters"][name] = sum(p.numel() for p in model.parameters())
    print(data["made"], data["parameters"], flush=True)
    for what, T in jobs:
        for name in asked.models:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                if what == "training":
                    found = training(name, T, TRAINING.get(T, 1), device)
                else:
                    found = decoding(name, T, device)
            except torch.OutOfMemoryError as error:
                found = {"refused": str(error)[:160]}
            data[what][f"{name}, {T}"] = found
            write_json(asked.out, data)
            print(what, name, T, found, flush=True)


if __name__ == "__main__":
    main()
