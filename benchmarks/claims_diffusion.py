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

from subquad.bench.results import machine, write_json, write_section
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
SIZE, BLOCK = 32, 16  # 1,024 tokens, 64 blocks
CELLS = (
    "softmax",
    "sla, swapped",
    "sla, tuned",
    "sparse only, tuned",
    "linear only, tuned",
    "softmax, tuned",
    "sla main, tuned",
    "linear only, swapped",
)
Row = dict[str, Any]


def gate(device: str) -> float:
    """The worst relative error of a layer's output and gradients in bfloat16 against float64, both
    over the blocks that float64 chooses; stops where it is too large."""
    torch.manual_seed(0)
    wide = SLA(dim=128, heads=2, topk=0.1, block=BLOCK).double()
    nn.init.normal_(wide.linear_proj.weight, std=0.3)
    narrow = copy.deepcopy(wide).to(device, torch.bfloat16)
    q, k, v, do = (torch.randn(2, SIZE**2, 2, 64).bfloat16() for _ in range(4))
    index, rest = wide.choose(q.double(), k.double())
    found = []
    for made, place, dtype in (
        (narrow, device, torch.bfloat16),
        (wide, "cpu", torch.float64),
    ):
        chosen = index.to(place), rest.to(place)
        made.choose = lambda q, k, chosen=chosen: chosen  # type: ignore[method-assign]
        own = [t.detach().to(place, dtype).requires_grad_() for t in (q, k, v)]
        o = made.attend(*own)
        o.backward(do.to(place, dtype))
        found.append([t.detach().cpu().double() for t in (o, *(t.grad for t in own))])
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))
    if not worst < 2e-2:
        raise SystemExit(f"the kernels are off by {worst:.2g}")
    return worst


class Judge:
    """A classifier of the digits: the accuracy of samples, and their Fréchet distance."""

    def __init__(self, path: str | None, device: str, steps: int) -> None:
        task = Images(size=SIZE, path=path)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"dims": [64], "heads": [4], "depths": [3], "init_std": 0.08}
        self.model: VisionModel = create_vision_model("micro", mixer="mala", **sizes).to(device)
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


def started(args: argparse.Namespace) -> DiT:
    """The model before any training."""
    torch.manual_seed(args.seed)
    sizes = {"image_size": SIZE, "patch": 1, "dim": args.dim, "depth": args.depth}
    model = create_diffusion_model("dit_mini", heads=args.dim // 64, **sizes)
    return model.to(args.device)


def taught(model: DiT, task: Flow, args: argparse.Namespace, **how: Any) -> None:
    fixed = {"batch": args.batch, "weight_decay": 0.01, "warmup": 50, "eval_batches": 6}

    def tell(event: dict[str, Any]) -> None:
        if event["step"] % 100 == 0:
            print({k: round(v, 4) for k, v in event.items()}, flush=True)

    train(model, task, TrainConfig(**{**fixed, **how}), progress=tell)  # type: ignore[arg-type]


def toy(found: Row, args: argparse.Namespace) -> None:
    """Each layer's softmax attention, learned by layers of SLA that begin with its weights, a fifth
    of the pairs left: relative squared error over the last 20 steps."""
    task = Flow(size=SIZE, path=args.path)
    base = started(args)
    taught(base, task, args, steps=args.steps, seed=args.seed)
    base.requires_grad_(False).eval()
    inputs: dict[int, Tensor] = {}
    for i, block in enumerate(base.blocks):
        block.mixer.register_forward_pre_hook(lambda _, x, i=i: inputs.update({i: x[0]}))
    makers = {
        "both": lambda: swap(base, "softmax", "sla", topk=0.2, block=BLOCK),
        "sparse only": lambda: sparse_only(base, 0.2),
        "linear only": lambda: linear_only(base),
    }
    students = {name: layers(make()) for name, make in makers.items()}
    optimizers, errors = {}, {name: [[] for _ in base.blocks] for name in makers}
    for name, made in students.items():
        for layer in made:
            layer.requires_grad_(True)
            layer.linear_proj.requires_grad_(name != "sparse only")
        learns = [p for layer in made for p in layer.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.Adam(learns, 5e-4)
    half = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    for step in range(args.tune):
        batch = task.batch(32, step)
        given = {n: batch.meta[n].to(args.device) for n in task.conditions}
        with half, torch.no_grad():
            base(batch.inputs.to(args.device), **given)
            seen = dict(inputs)
            wants = [base.blocks[i].mixer(x)[0].float() for i, x in seen.items()]
        for name, made in students.items():
            with half:
                reads = [layer(seen[i])[0].float() for i, layer in enumerate(made)]
            parts = [(r - w).square().mean() / w.square().mean() for r, w in zip(reads, wants)]
            torch.stack(parts).sum().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            for i, part in enumerate(parts):
                errors[name][i].append(part.item())
        if step % 50 == 0:
            print(
                step, {n: [round(e[-1], 4) for e in own] for n, own in errors.items()}, flush=True
            )
    last = {n: [sum(e[-20:]) / len(e[-20:]) for e in own] for n, own in errors.items()}
    first = {n: [e[0] for e in own] for n, own in errors.items()}
    found["toy"] = {
        "steps": args.tune,
        "kept": layers(makers["both"]())[0].pairs(SIZE**2) / SIZE**4,
    }
    found["toy"] |= {"errors": last, "at first": first}
    print(found["toy"])
    write_json(args.out, found)


def images(found: Row, args: argparse.Namespace) -> None:
    task = Flow(size=SIZE, path=args.path)
    judge = Judge(args.path, args.device, args.judge)
    rows = found.setdefault(f"images, topk {args.topk}", {})
    rows["reference"] = {"classifier": judge.accuracy, "frechet, held-out": judge.floor}
    rows["reference"] |= {"depth": args.depth, "samples": args.count}
    print(rows["reference"])
    base = started(args)

    def cell(name: str, model: DiT, steps: int = 0, seed: int = 0, lr: float = 1e-3) -> None:
        start = time.perf_counter()
        if steps:
            taught(model, task, args, steps=steps, seed=seed, lr=lr)
        spent = time.perf_counter() - start
        picture = args.out.parent / f"{name.replace(' ', '_').replace(',', '')}.png"
        row = {"steps": steps, "seconds": spent, **quality(model, task, judge, picture, args.count)}
        if layers(model) and "linear" not in name:
            row["kept"] = layers(model)[0].pairs(SIZE**2) / SIZE**4
        rows[name] = row
        print(name, row)
        write_json(args.out, found)

    def swapped(**options: Any) -> DiT:
        return swap(base, "softmax", "sla", topk=args.topk, block=BLOCK, **options)

    cell("softmax", base, args.steps, args.seed)
    cell("sla, swapped", swapped())
    tuned = {"steps": args.tune, "seed": args.seed + 1, "lr": args.tune_lr}
    cell("sla, tuned", swapped(), **tuned)
    cell("sparse only, tuned", sparse_only(base, args.topk), **tuned)
    cell("linear only, tuned", linear_only(base), **tuned)
    cell("softmax, tuned", copy.deepcopy(base), **tuned)
    cell("sla main, tuned", swapped(variant="main"), **tuned)
    cell("linear only, swapped", linear_only(base))


def page(found: Row) -> None:
    lines: list[str] = []
    for name in sorted(n for n in found if n.startswith("images")):
        made, rows = found["made"]["images"], found[name]
        ref, tuned = rows["reference"], rows["sla, tuned"]
        lines += [
            f"`python benchmarks/claims_diffusion.py --part images --topk {name.split()[-1]} "
            f"--steps {rows['softmax']['steps']} --tune {tuned['steps']} --count "
            f"{ref['samples']}` on {made['device']}, torch {made['torch']}, {made['date']}. A DiT "
            f"of {ref['depth']} blocks, {SIZE}x{SIZE} digits, a token a pixel, blocks of {BLOCK}: "
            f"{rows['softmax']['steps']} steps with softmax, then every variant {tuned['steps']} "
            "more from those weights, equal batches and rates. From the softmax of SLA "
            f"{1 - tuned['kept']:.1%} of the pairs are gone. Loss: held-out flow matching, fixed "
            f"noise. Distance: squared Fréchet, {ref['samples']} samples against the training "
            "images in a classifier's features (held-out images: "
            f"{ref['frechet, held-out']:.2f}). Class: how often the classifier sees the class that "
            f"was asked for (its own accuracy is {ref['classifier']:.3f}).",
            "",
            "| | loss | distance | class |",
            "| --- | ---: | ---: | ---: |",
        ]
        for entry, row in rows.items():
            if entry != "reference":
                cells = f"{row['loss']:.4f} | {row['frechet']:.2f} | {row['accuracy']:.3f}"
                lines.append(f"| {entry} | {cells} |")
        lines += [
            "",
            "Samples of softmax and, from the same noise, of SLA after tuning:",
            "",
            "![softmax](figures/diffusion_softmax.png) ![SLA](figures/diffusion_sla.png)",
            "",
        ]
        missing = [entry for entry in CELLS if entry not in rows]
        if missing:
            lines += [
                f"Not measured yet: {'; '.join(missing)}. So it is not known here what the same "
                "further steps would do for softmax, nor what either branch keeps alone in a whole "
                "model.",
                "",
            ]
    if "toy" in found:
        made, row = found["made"]["toy"], found["toy"]
        blocks = len(row["errors"]["both"])
        lines += [
            f"`python benchmarks/claims_diffusion.py --part toy --steps 350 --tune "
            f"{row['steps']}` on {made['device']}. Each layer's "
            f"softmax attention in a trained DiT, learned in {row['steps']} steps by layers that "
            f"begin with its weights, {1 - row['kept']:.0%} of the pairs gone; relative squared "
            "error:",
            "",
            "| | " + " | ".join(f"block {i}" for i in range(blocks)) + " |",
            "| --- |" + " ---: |" * blocks,
        ]
        for name, errors in row["errors"].items():
            lines.append(f"| {name} | " + " | ".join(f"{e:.4f}" for e in errors) + " |")
        lines.append("")
    write_section(EVIDENCE, "diffusion", "SLA in a diffusion transformer", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("images", "toy", "page"), default="page")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--path", help="a safetensors file of images and labels")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tune", type=int, default=350)
    parser.add_argument("--tune-lr", type=float, default=1e-3)
    parser.add_argument("--topk", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=int, default=400, help="steps of the classifier")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--count", type=int, default=1000, help="samples to judge")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    parts = {"images": images, "toy": toy}
    found: Row = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if args.part == "page":
        page(found)
        return
    found["made"] = {**found.get("made", {}), args.part: machine()}
    print("error of a layer:", gate(args.device))
    parts[args.part](found, args)


if __name__ == "__main__":
    main()
