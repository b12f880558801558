"""What each policy keeps of a model's memory: needles in Python source, at and beyond its length.

    python benchmarks/needles.py MODEL --device cuda --workers 8      # the whole table
    python benchmarks/needles.py MODEL --lengths 1024 --samples 4     # the same code, smaller

One fact of four is asked for, 40 prompts a cell by default, in shares that several processes
measure side by side (times are therefore not reported here; see policies.py). A share that is done
stays on disk, the same command goes on from there. Heads of `duo` are calibrated first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from subquad.bench.policies import FULL, Host, Study
from subquad.bench.results import machine, write_json

RESULTS = Path(__file__).parent / "results"
SHARE = {8192: 20, 16384: 10, 65536: 5}  # prompts measured at once up to a length; beyond, 3
SEED = 3_000_000  # of the table's prompts; settings were chosen on others, from 1 and 2 million on
TRAINED = 8192
# needle-16m asks "\nWhat is ...": the template cuts a prompt there. The paper looks at the last
# layer, which in this model is not the one that finds facts.
WINDOWS = "infini_retri:topk=150,template={context}\nWhat is{question}"


@dataclass(frozen=True)
class Row:
    """A policy, where it is tried, and what is asked of it there.

    Attributes:
        least, most: of the accuracy.
        pairs: most of the (query, key) pairs of the prompt; keys: of those of the answer; cache: of
            the full cache's bytes.
    """

    entry: str
    lengths: tuple[int, ...] = (TRAINED,)
    least: float = 0.0
    most: float = 1.0
    pairs: float = 1.0
    keys: float = 1.0
    cache: float = 2.0


LIMITS = ("least", "most", "pairs", "keys", "cache")
BEYOND = (2 * TRAINED, 8 * TRAINED, 32 * TRAINED)
ROWS = (
    Row(FULL, least=1.0),
    Row(FULL, BEYOND, most=0.10),
    Row("streaming_llm:sinks=4,window=2044", most=0.9),
    Row("vertical_slash:vertical=512,slash=96,variant=frontier", least=0.95, pairs=0.25),
    Row("block_topk:topk=64", least=0.95, pairs=0.25),
    Row("flexprefill:gamma=0.85", least=0.95, pairs=0.25),
    Row("quest:budget=784,variant=frontier", least=0.95, keys=0.10),
    Row("quest:budget=800,dense_layers=0", least=0.95, keys=0.10),
    Row("hip:budget=800,block=1,representative=center,dense_layers=0", least=0.95, pairs=0.25),
    Row("hip:budget=768,dense_layers=0", least=0.95, pairs=0.25),
    Row("snapkv:capacity=850,variant=frontier,window=64", least=0.95, cache=0.12),
    Row("ada_snapkv:capacity=850,variant=frontier,window=64", least=0.95, cache=0.12),
    Row("duo:sparsity=0.8125", least=0.95, cache=0.25),
    Row("longheads:chunk=32,length=4096,after=8192", BEYOND[:1], least=0.90),
    Row("longheads:chunk=32,length=8192", BEYOND, least=0.90),
    Row(WINDOWS, BEYOND[:1], least=0.90),
    Row(WINDOWS + ",layer_index=6", BEYOND, least=0.90),
)
DUO = {"steps": 250, "lengths": (1000, 7000), "passkeys": 4, "words": 8}


@dataclass(frozen=True)
class Part:
    """A share of a cell."""

    entry: str
    length: int
    samples: int
    seed: int

    @property
    def file(self) -> str:
        plain = "".join(c if c.isalnum() or c in "=._-" else "_" for c in self.entry)
        return f"{plain}.{self.length}.{self.seed}.{self.samples}.json"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("model", help="a folder or name for AutoModelForCausalLM")
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--dtype", help="bfloat16 on a GPU, float32 elsewhere")
    asked.add_argument("--workers", type=int, default=1)
    asked.add_argument("--samples", type=int, default=40)
    asked.add_argument("--lengths", type=int, nargs="+", help="instead of the model's and beyond")
    asked.add_argument("--only", nargs="+", help="names of policies, and full")
    asked.add_argument("--entry", action="append", help="policies with settings of their own")
    asked.add_argument("--seconds", type=float, help="begin no share after so many")
    asked.add_argument("--work", type=Path, default=Path("runs/needles"), help="finished shares")
    asked.add_argument("--out", type=Path, default=RESULTS / "needles.json")
    options = asked.parse_args()
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    study = Study(model=options.model, policies=("quest",), device=options.device, dtype=dtype)
    rows = [
        replace(row, lengths=tuple(options.lengths or row.lengths))
        for row in ROWS
        if options.only is None or row.entry.partition(":")[0] in options.only
    ]
    if options.entry:
        rows = [Row(entry, tuple(options.lengths or (TRAINED,))) for entry in options.entry]
    begin = time.monotonic()
    left: dict[tuple[int, int], list[Part]] = {}
    for part in sorted(
        {part for row in rows for part in parts(row, options.samples)},
        key=lambda part: (part.length != TRAINED, part.seed, part.length),
    ):
        if not (options.work / part.file).exists():
            left.setdefault((part.length, part.seed), []).append(part)
    end = None if options.seconds is None else begin + options.seconds
    context = multiprocessing.get_context("spawn")
    todo = context.Queue()
    duo = [part for own in left.values() for part in own if part.entry.startswith("duo")]
    for own in left.values():
        todo.put([part for part in own if part not in duo])
    for _ in range(options.workers):
        todo.put(None)
    args = (study, todo, options.work, end)
    workers = [context.Process(target=work, args=args) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    if duo:
        calibrate(study, options.work / "duo")
        own_queue = context.Queue()
        for item in (duo, None):
            own_queue.put(item)
        work(study, own_queue, options.work, end)
    for worker in workers:
        worker.join()
    cells = [cell for row in rows for cell in gathered(row, options.samples, options.work)]
    full = {cell["length"]: cell["cache"] for cell in cells if cell["entry"] == FULL}
    for cell in cells:
        print(line(cell, full.get(cell["length"])))
    write_json(options.out, {"made": machine(), "model": Path(study.model).name, "cells": cells})
    print(options.out)
    if any(worker.exitcode for worker in workers):
        sys.exit("a process failed; what it had finished is kept")


def parts(row: Row, samples: int) -> Iterable[Part]:
    for length in row.lengths:
        share = next((n for most, n in SHARE.items() if length <= most), 3)
        for i in range(0, samples, share):
            yield Part(row.entry, length, min(share, samples - i), SEED + i // share)


def calibrate(study: Study, out: Path) -> None:
    """The gates of duo, once."""
    from subquad.policies import Duo

    if out.exists():
        return
    host = Host(replace(study, dtype="float32"))
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(errors="ignore") for path in sorted(library.glob("*.py"))]

    def tell(at: dict[str, float]) -> None:
        if at["step"] % 50 == 0:
            print("duo", {name: round(value, 4) for name, value in at.items()}, flush=True)

    Duo().calibrate(host.model, texts, tokenizer=host.tokenizer, out=out, progress=tell, **DUO)


def work(study: Study, todo: Any, out: Path, end: float | None) -> None:
    """One process: measure shares of the same prompts until none is left."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 16))
    host = None
    while (own := todo.get()) is not None:
        for part in own:
            if end is not None and time.monotonic() > end:
                break
            host = host or Host(study)
            host.study = replace(study, samples=part.samples, seed=part.seed)
            entry = part.entry.replace("duo:", f"duo:path={out / 'duo'},")
            begin = time.monotonic()
            found = host.needles(entry, part.length, lambda event: None)
            write_json(out / part.file, found)
            took = time.monotonic() - begin
            print(
                f"{part.length:>7} {found['score']:5.2f} {took:6.1f} s {part.entry!r}", flush=True
            )


def gathered(row: Row, samples: int, work: Path) -> Iterable[dict[str, Any]]:
    """The cells of a row from the shares that are done."""
    for length in row.lengths:
        mine = list(parts(replace(row, lengths=(length,)), samples))
        done = [json.loads((work / p.file).read_text()) for p in mine if (work / p.file).exists()]
        if not done:
            continue
        count = sum(found["samples"] for found in done)
        right = sum(found["score"] * found["samples"] for found in done)
        read = {
            phase: sum(found["attended"][phase] for found in done) / len(done)
            for phase in ("prefill", "decode")
        }
        yield {
            "entry": row.entry,
            "length": length,
            "samples": count,
            "accuracy": right / count,
            "pairs": read["prefill"],
            "keys": read["decode"],
            "cache": max(found["cache"] for found in done),
            "asked": {name: value for name, value in asdict(row).items() if name in LIMITS},
        }


def missed(cell: dict[str, Any], full: float | None) -> list[str]:
    """What was asked of a cell and not reached."""
    asked, found = cell["asked"], {**cell, "cache": cell["cache"] / full if full else 0.0}
    over = [name for name in ("pairs", "keys", "cache") if found[name] > asked[name]]
    accurate = asked["least"] <= cell["accuracy"] <= asked["most"]
    return over + ([] if accurate else ["accuracy"])


def line(cell: dict[str, Any], full: float | None) -> str:
    cache = f"{cell['cache'] / 2**20:7.2f} MiB"
    short = missed(cell, full)
    return (
        f"{cell['length']:>8,}  {cell['accuracy']:.3f} of {cell['samples']:>3}  "
        f"pairs {cell['pairs']:6.1%}  keys {cell['keys']:6.1%}  cache {cache}  "
        f"{'as asked' if not short else 'MISSED ' + ', '.join(short):16}  {cell['entry']!r}"
    )


if __name__ == "__main__":
    main()
