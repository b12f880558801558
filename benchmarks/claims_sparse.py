"""The main claim of each sparse mixer, in direction, with models small enough for a CPU.

``python benchmarks/claims_sparse.py`` trains some thirty small models, a claim at a time (minutes
each; ``--claim`` picks one), writes results/claims_sparse.json after every model and the tables in
docs/evidence.md at the end. Deterministic; what is in the JSON is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from subquad.bench.results import machine, table, write_json, write_section
from subquad.mixers.softmax import Softmax
from subquad.models import CausalLM, CausalLMConfig
from subquad.ops.layout import repeat_heads
from subquad.recipes import longlora
from subquad.recipes.swap import swap
from subquad.tasks import create_task
from subquad.tasks.base import IGNORED, Batch, Task, to_batch
from subquad.train import TrainConfig, evaluate, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "claims_sparse.json"
EVIDENCE = ROOT / "docs" / "evidence.md"

Row = dict[str, Any]
Cells = Iterator[tuple[str, Callable[[], Row]]]


@dataclass(frozen=True, kw_only=True)
class Echo(Task):
    """At every place from ``back`` on: the token that stood ``back`` places before."""

    name: ClassVar[str] = "echo"
    vocab_size: int = 16
    length: int = 64
    back: int = 20

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        inputs = rng.integers(self.vocab_size, size=(n, self.length))
        labels = np.full_like(inputs, IGNORED)
        labels[:, self.back :] = inputs[:, : -self.back]
        return to_batch(inputs, labels)


@dataclass(frozen=True, kw_only=True)
class FarRecall(Task):
    """Pairs of a key and its value in the first quarter, the keys asked in the last eighth; noise
    between. Keys 0..15, values 16..31, noise 32..47."""

    name: ClassVar[str] = "far_recall"
    vocab_size: int = 48
    length: int = 128
    pairs: int = 4

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        T, D = self.length, self.pairs
        inputs = rng.integers(32, 48, size=(n, T))
        labels = np.full_like(inputs, IGNORED)
        keys = np.argsort(rng.random((n, 16)), 1)[:, :D]
        values = rng.integers(16, 32, size=(n, D))
        place = 2 * np.argsort(rng.random((n, T // 8)), 1)[:, :D]
        asked = T - T // 8 + np.argsort(rng.random((n, T // 8)), 1)[:, :D]
        for at, what in ((place, keys), (place + 1, values), (asked, keys)):
            np.put_along_axis(inputs, at, what, 1)
        np.put_along_axis(labels, asked, values, 1)
        return to_batch(inputs, labels)


def model(vocab: int, layers: str, depth: int, mixers: dict[str, Any], **config: Any) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"dim": 64, "mlp_dim": 128, "init_std": 0.045}
    made = {k: {"heads": 2, **v} for k, v in mixers.items()}
    return CausalLM(
        CausalLMConfig(vocab_size=vocab, layers=layers, depth=depth, mixers=made, **sizes | config)
    )


def fit(lm: Any, task: Task, steps: int, lr: float = 3e-3, batch: int = 16, seed: int = 0) -> Row:
    config = TrainConfig(steps=steps, batch=batch, lr=lr, seed=seed, eval_batches=8)
    return train(lm, task, config, progress=lambda _: None).evals[-1]


def score(lm: Any, task: Task, batch: int = 16) -> float:
    return evaluate(lm, task, TrainConfig(batch=batch, eval_batches=8))[task.metric]


def trained(task: Task, steps: int, *shape: Any, lr: float = 3e-3, **config: Any) -> Row:
    return {
        task.metric: fit(model(task.vocab_size, *shape, **config), task, steps, lr)[task.metric]
    }


def neighborhood() -> Cells:
    """The token 20 back: a window must reach it; dilation reaches it with 5 keys, or in two steps
    where the second layer is dilated."""
    task = Echo()
    cases: dict[str, list[dict[str, int]]] = {
        "one layer, 16 keys": [{"window": 16}],
        "one layer, 24 keys": [{"window": 24}],
        "one layer, 5 keys, dilation 5": [{"window": 5, "dilation": 5}],
        "two layers, 5 keys each": [{"window": 5}, {"window": 5}],
        "two layers, 5 keys, dilation 1 and 8": [{"window": 5}, {"window": 5, "dilation": 8}],
    }
    for name, each in cases.items():
        mixers = {
            f"n{i}": {"mixer": "neighborhood", "causal": True, **o} for i, o in enumerate(each)
        }
        shape = " ".join(mixers), len(each), mixers
        yield name, partial(trained, task, 600, *shape, max_positions=64)


def gna() -> Cells:
    """At one window, a larger stride needs fewer tiles and keeps what the window can do."""
    task = Echo()
    for stride in (1, 4, 8):
        mixers = {"g": {"mixer": "gna", "causal": True, "window": 32, "stride": stride}}
        yield (
            f"window 32, stride {stride}",
            partial(trained, task, 600, "g", 1, mixers, max_positions=64),
        )


def power_attention() -> Cells:
    """Far recall over four layers, blocks of 4: powers of two reach what a window does not."""
    yield from _recall(
        {
            "full": {"mixer": "softmax"},
            "power (window of 3 blocks)": {"mixer": "power_attention", "block": 4, "window": 3},
            "sliding window of 20 and 4 sinks": {"mixer": "softmax", "window": 20, "sinks": 4},
        },
        depth=5,
    )


def masformer() -> Cells:
    """Far recall over a short convolution and two layers: one of them full does what both full do,
    blocks of 8 alone do not."""
    short = {"mixer": "masformer", "block": 8}
    yield from _recall(
        {
            "both full": {"mixer": "softmax"},
            "the lower full": {**short, "placement": [1]},
            "none full": {**short, "placement": []},
        },
        depth=3,
    )


def _recall(entries: dict[str, dict[str, Any]], depth: int) -> Cells:
    task = FarRecall()
    for name, options in entries.items():
        layers = " ".join(["base_conv", *["m"] * (depth - 1)])
        mixers = {"m": {"rope_theta": None, **options}}
        yield name, partial(trained, task, 600, layers, depth, mixers)


def longlora_() -> Cells:
    """A small model of text made four times longer, 64 to 256 tokens; all read in full attention
    at the end (loss in nats a byte)."""
    short, long = create_task("text", length=64), create_task("text", length=256)
    base = model(256, "softmax", 2, {"softmax": {"heads": 4}})

    def pretrained() -> CausalLM:
        if not hasattr(base, "ready"):
            fit(base, short, 600)
            base.ready = True
        return base

    yield "before", lambda: {"loss": score(pretrained(), long)}
    every = ("",)  # a part of each name: all weights train
    for name, options in {
        "full attention, all weights": {"group": 256, "variant": "none", "trainable": every},
        "shifted groups, all weights": {"trainable": every},
        "groups without shift, all weights": {"variant": "none", "trainable": every},
        "shifted groups, LoRA": {"trainable": ("lora_",)},
        "shifted groups, LoRA, embeddings and norms": {},
    }.items():

        def cell(options: dict[str, Any] = options) -> Row:
            torch.manual_seed(0)
            tuned = longlora.prepare(pretrained(), 256, trained=64, **options)
            fit(tuned, long, 150, lr=1e-3, batch=8)
            return {"loss": score(longlora.finish(tuned), long)}

        yield name, cell


def ls_attention() -> Cells:
    """Text at a high learning rate: the largest |q k| K^-1/2 of any head after and over training,
    equal parameters, mean over three seeds."""
    task = create_task("text", length=256)
    for name, options in {
        "softmax": {"mixer": "softmax", "heads": 4, "rope_theta": None},
        "ls_attention": {"mixer": "ls_attention", "heads": 4, "span": 16},
    }.items():

        def cell(options: dict[str, Any] = options) -> Row:
            peaks, losses = [], []
            for seed in range(3):
                lm = model(256, "m", 2, {"m": options}, max_positions=256)
                watch = [Peak(block.mixer) for block in lm.blocks]
                losses.append(fit(lm, task, 150, lr=1e-2, batch=8, seed=seed)["loss"])
                peaks.append(max(w.peak for w in watch))
            return {"largest score": sum(peaks) / 3, "loss": sum(losses) / 3}

        yield name, cell


class Peak:
    """The largest score over a mixer's visible keys, in every 25th forward pass while training."""

    def __init__(self, mixer: Softmax) -> None:
        self.peak, self.calls, self.mixer, self.made = 0.0, 0, mixer, mixer.qkv
        mixer.qkv = self.qkv  # type: ignore[method-assign]

    def qkv(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.made(*given)
        self.calls += self.mixer.training
        if self.mixer.training and self.calls % 25 == 0:
            with torch.no_grad():
                keys = repeat_heads(k, q.shape[2])
                scores = torch.einsum("bihk,bjhk->bhij", q, keys).abs().tril()
                reach = getattr(self.mixer, "span", None)
                if reach is not None:
                    scores[:, : self.mixer.local_heads].triu_(1 - reach)  # type: ignore[index]
                self.peak = max(self.peak, float(scores.max()) * self.mixer.scale)
        return q, k, v


def needle(length: int) -> FarRecall:
    return FarRecall(length=length)


def infllm_v2() -> Cells:
    """A model trained dense on 128 tokens reads 512 sparse, 6 blocks of 8 of 64: far recall as with
    all keys; blocks chosen at random do not do."""
    base = model(48, "base_conv softmax", 2, {"softmax": {"rope_theta": None}})

    def sparse(random: bool) -> Row:
        options = {"block": 8, "local": 2, "topk": 4, "dense_len": 256}
        lm = swap(_ready(base), "softmax", "infllm_v2", **options)
        if random:
            mixer = lm.blocks[1].mixer
            mixer.choose = partial(_random, mixer)  # type: ignore[assignment]
        return {"accuracy": score(lm, needle(512))}

    yield "dense, 128 tokens", lambda: {"accuracy": score(_ready(base), needle(128))}
    yield "dense", lambda: {"accuracy": score(_ready(base), needle(512))}
    yield "chosen blocks", lambda: sparse(False)
    yield "random blocks", lambda: sparse(True)


def _ready(base: CausalLM) -> CausalLM:
    if not hasattr(base, "ready"):
        fit(base, needle(128), 800)
        base.ready = True
    return base.eval()


def _random(mixer: Any, q: Tensor, windows: Tensor, tokens: int) -> Tensor:
    """The forced blocks, and others at random."""
    from subquad.ops import select

    g = torch.Generator().manual_seed(0)
    blocks = -(-tokens // mixer.block)
    scores = torch.rand(len(q), windows.shape[2], q.shape[1], blocks, generator=g)
    sizes = {"size": mixer.block, "rows": 1, "offset": tokens - q.shape[1]}
    return select.top(scores, mixer.kept, sinks=mixer.init, local=mixer.local + 1, **sizes)


def cca() -> Cells:
    """Far recall, a window of 16 and cores of 8 tokens (a state of at most 40 a layer), fine-tuned
    from full attention; a window alone of as many tokens does not reach."""
    base = model(48, "base_conv softmax", 2, {"softmax": {"rope_theta": None}})
    task = needle(128)

    def tuned(**options: Any) -> Row:
        lm = swap(_ready(base), "softmax", **options)
        before = score(lm, task)
        return {"accuracy": fit(lm, task, 200, lr=1e-3)["accuracy"], "before tuning": before}

    yield "full", lambda: {"accuracy": score(_ready(base), task)}
    yield "cca", lambda: tuned(new="cca", group=8, local=16)
    yield "window of 40", lambda: tuned(new="softmax", window=40)


CLAIMS: dict[str, Callable[[], Cells]] = {
    "neighborhood": neighborhood,
    "gna": gna,
    "power_attention": power_attention,
    "masformer": masformer,
    "cca": cca,
    "infllm_v2": infllm_v2,
    "longlora": longlora_,
    "ls_attention": ls_attention,
}


def caption(name: str, claim: Callable[..., Cells]) -> str:
    """What stands above a claim's table: its docstring."""
    return f"**{name}.** {' '.join((claim.__doc__ or '').split())}"


def write_evidence(made: dict[str, Any], done: dict[str, dict[str, Row]]) -> None:
    lines = [
        f"`python benchmarks/claims_sparse.py` on {made['device']}, torch {made['torch']}.",
        "",
    ]
    for name in (name for name in CLAIMS if name in done):
        lines += [caption(name, CLAIMS[name]), "", *table(done[name])]
    write_section(EVIDENCE, "claims_sparse", "Claims of the sparse mixers", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--claim", choices=list(CLAIMS))
    asked = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"made": {}, "claims": {}}
    made, done = kept["made"], kept["claims"]
    for name in [asked.claim] if asked.claim else CLAIMS:
        for entry, cell in CLAIMS[name]():
            if entry not in done.setdefault(name, {}):
                done[name][entry], made = cell(), machine()
                write_json(RESULTS, {"made": made, "claims": done})
            print(name, "|", entry, "|", done[name][entry], flush=True)
    write_evidence(made, done)


if __name__ == "__main__":
    main()
