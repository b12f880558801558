"""SLA in a diffusion transformer: softmax swapped for it, fine-tuned, beside either branch alone.

``python benchmarks/claims_diffusion.py --part images`` trains a DiT with softmax on digits, one
token a pixel, swaps its attention and fine-tunes every variant with the same loss, steps and
batches; quality is the held-out flow-matching loss, with fixed noise, and the samples' distance to
the images in a classifier's features. ``--part toy`` fits single layers to the outputs of a trained
DiT's softmax attention. ``--part page`` writes the section of docs/evidence.md. Results go to
results/claims_diffusion.json after every cell.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.bench.results import machine, write_json
from subquad.mixers.sla import SLA
from subquad.models.diffusion import DiT, create_diffusion_model, sample, save_grid
from subquad.models.vision import VisionModel, create_vision_model
from subquad.recipes.swap import swap
from subquad.tasks.flow import Flow
from subquad.tasks.images import Images
from subquad.train import TrainConfig, evaluate, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "claims_diffusion.json"
EVIDENCE = ROOT / "docs" / "evidence.md"
SIZE, BLOCK = 32, 64  # 1,024 tokens, 16 blocks
Row = dict[str, Any]


class Judge:
    """A classifier of the digits: the accuracy of samples, and their Fréchet distance."""

    def __init__(self, path: str | None, device: str, steps: int) -> None:
        task = Images(size=SIZE, path=path, shift=1)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"dims": [64], "heads": [4], "depths": [3], "init_std": 0.08}
        self.model: VisionModel = create_vision_model("micro", mixer="softmax", **sizes).to(device)
        config = TrainConfig(steps=steps, batch=60, lr=2e-3, warmup=20, eval_batches=6)
        found = train(self.model, task, config, progress=lambda _: None)
        self.accuracy = found.evals[-1]["accuracy"]
        plain = Images(size=SIZE, path=path)
        order = [plain.batch(count, seed) for count, seed in zip(plain.counts, (0, 10**6))]
        self.real, held = (self.features(batch.inputs)[0] for batch in order)
        self.floor = frechet(self.real, held)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float64 ``[n,F]`` before the last layer, and the guessed classes."""
        found, guesses = [], []
        for part in images.split(128):
            x = self.model.forward_features(part.to(self.model.device).clamp(-1, 1))
            found.append(self.model.forward_head(x, pre_logits=True).double().cpu())
            guesses.append(self.model.forward_head(x).argmax(-1).cpu())
        return torch.cat(found), torch.cat(guesses)

    def judge(self, images: Tensor, classes: Tensor) -> Row:
        features, guesses = self.features(images)
        return {
            "frechet": frechet(self.real, features),
            "accuracy": (guesses == classes).double().mean().item(),
        }


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians of two sets ``[n,F]``."""
    A, B = (torch.cov(x.T) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return (mean + A.trace() + B.trace() - 2 * cross).item()


def layers(model: DiT) -> list[SLA]:
    return [m for m in model.modules() if isinstance(m, SLA)]


def sparse_only(model: DiT, topk: float) -> DiT:
    """W and b stay 0: block-sparse softmax over the same share of pairs."""
    made = swap(model, "softmax", "sla", topk=topk, block=BLOCK)
    for layer in layers(made):
        layer.linear_proj.requires_grad_(False)
    return made


def nothing_critical(layer: SLA, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    index, rest = SLA.choose(layer, q, k)
    return torch.full_like(index, -1), torch.ones_like(rest)


def linear_only(model: DiT) -> DiT:
    """Every block is marginal and W starts as the identity."""
    made = swap(model, "softmax", "sla", topk=0.0, negligible=0.0, block=BLOCK)
    for layer in layers(made):
        nn.init.eye_(layer.linear_proj.weight)

        layer.choose = partial(nothing_critical, layer)  # type: ignore[method-assign]
    return made


def quality(model: DiT, task: Flow, judge: Judge, out: Path | None, count: int) -> Row:
    device = model.device.type
    config = TrainConfig(batch=60, eval_batches=6)
    row: Row = {"loss": evaluate(model, task, config)["loss"]}
    classes = torch.arange(count) % 10
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        images = sample(model, classes=classes, steps=30, solver="euler", batch=250, seed=1)
    row |= judge.judge(images, classes)
    if out is not None:
        save_grid(images[:100], out, columns=10)
    return row


def images(found: Row, args: argparse.Namespace) -> None:
    task = Flow(size=SIZE, path=args.path)
    judge = Judge(args.path, args.device, args.judge)
    rows = found.setdefault("images", {})
    rows["reference"] = {"classifier": judge.accuracy, "frechet, held-out": judge.floor}
    print(rows["reference"])
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "patch": 1, "dim": args.dim, "depth": args.depth}
    base = create_diffusion_model("dit_mini", heads=args.dim // 64, **sizes).to(args.device)
    how = {"batch": args.batch, "lr": 1e-3, "warmup": 50, "weight_decay": 0.01, "eval_batches": 6}

    def cell(name: str, model: DiT, steps: int, seed: int = 0, lr: float = 1e-3) -> None:
        start = time.perf_counter()
        if steps:
            own = TrainConfig(**{**how, "lr": lr, "steps": steps, "seed": seed})  # type: ignore[arg-type]
            train(model, task, own, progress=tell)
        spent = time.perf_counter() - start
        picture = args.out.parent / f"{name.replace(' ', '_').replace(',', '')}.png"
        row = {"steps": steps, "seconds": spent, **quality(model, task, judge, picture, args.count)}
        if layers(model):
            row["kept"] = sum(m.pairs(SIZE**2) for m in layers(model)) / (
                SIZE**4 * len(layers(model))
            )
        rows[name] = row
        print(name, row)
        write_json(args.out, found)

    def tell(event: dict[str, Any]) -> None:
        if event["step"] % 100 == 0:
            print({k: round(v, 4) for k, v in event.items()}, flush=True)

    cell("softmax", base, args.steps)
    tuned = {"seed": 1, "lr": args.tune_lr}
    more = copy.deepcopy(base)
    for topk in (0.07, 0.13):
        cell(f"sla {topk}, swapped", swap(base, "softmax", "sla", topk=topk, block=BLOCK), 0)
        made = swap(base, "softmax", "sla", topk=topk, block=BLOCK)
        cell(f"sla {topk}, tuned", made, args.tune, **tuned)
        cell(f"sparse {topk}, tuned", sparse_only(base, topk), args.tune, **tuned)
        if topk == 0.07:
            cell("linear, swapped", linear_only(base), 0)
            cell("linear, tuned", linear_only(base), args.tune, **tuned)
            cell("softmax, tuned", more, args.tune, **tuned)
            main = swap(base, "softmax", "sla", topk=topk, block=BLOCK, variant="main")
            cell(f"sla main {topk}, tuned", main, args.tune, **tuned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("images", "toy", "page"), default="page")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--path", help="a safetensors file of images and labels")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--tune", type=int, default=600)
    parser.add_argument("--tune-lr", type=float, default=5e-4)
    parser.add_argument("--judge", type=int, default=400, help="steps of the classifier")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--count", type=int, default=1000, help="samples to judge")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: Row = json.loads(args.out.read_text()) if args.out.is_file() else {}
    found["made"] = {**found.get("made", {}), args.part: machine()}
    {"images": images}[args.part](found, args)


if __name__ == "__main__":
    main()
