"""SLA in a diffusion transformer: softmax swapped for it, fine-tuned, beside either branch alone.

    python benchmarks/claims_diffusion.py --part base --base RUN
    python benchmarks/claims_diffusion.py --part variant --base RUN --variant "sla, tuned"
    python benchmarks/claims_diffusion.py --part toy --base RUN
    python benchmarks/claims_diffusion.py --part page --base RUN

``base`` trains a DiT with softmax on digits, one token a pixel, and a classifier that judges
samples; both stay in the folder RUN, with the settings of all that follows. ``variant`` swaps its
attention and fine-tunes it, every variant with the same loss, steps and batches: one variant a
command, so that they can run apart. Without ``--variant`` it makes all that are missing. Quality is
the held-out flow-matching loss, with fixed noise, and the samples' distance to the images in the
classifier's features. ``toy`` fits single layers to the outputs of the base's softmax attention.
Every part writes its own file in RUN when it is done and is not repeated; one that was cut off goes
on from its last checkpoint. ``page`` takes what is in RUN into results/claims_diffusion.json and
writes the section of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.bench.results import Cells, write_json, write_section
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
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is made with; the variants of one base share it.

    Attributes:
        size: of the images, a token a pixel; block: tokens of SLA's blocks.
        dim, depth: of the DiT, whose heads have 64 features.
        steps: of the base; tune: of every variant that is tuned; lr, tune_lr: their rates.
        topk: of the blocks, critical; judge: steps of the classifier; count: samples to judge.
    """

    size: int = 32
    block: int = 16
    dim: int = 192
    depth: int = 4
    batch: int = 128
    steps: int = 900
    tune: int = 350
    lr: float = 1e-3
    tune_lr: float = 1e-3
    topk: float = 0.1
    judge: int = 400
    count: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """Where a run is made: its folder, the device, and a safetensors file of the digits (None:
    scikit-learn's)."""

    run: Path
    device: str
    path: str | None = None

    @property
    def cells(self) -> Cells:
        return Cells(self.run)


def gate(s: Setting, device: str) -> float:
    """The worst relative error of a layer's output and gradients in bfloat16 against float64, both
    over the blocks that float64 chooses; stops where it is too large."""
    torch.manual_seed(0)
    wide = SLA(dim=128, heads=2, topk=s.topk, block=s.block).double()
    nn.init.normal_(wide.linear_proj.weight, std=0.3)
    narrow = copy.deepcopy(wide).to(device, torch.bfloat16)
    q, k, v, do = (torch.randn(2, s.size**2, 2, 64).bfloat16() for _ in range(4))
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
    """A classifier of the digits: the accuracy of samples, and their Fréchet distance.

    Trained where the run has none yet.
    """

    def __init__(self, s: Setting, at: Place) -> None:
        task, folder = Images(size=s.size, path=at.path), at.run / "judge"
        if not (folder / "config.json").exists():
            torch.manual_seed(0)
            sizes: dict[str, Any] = {"dims": [64], "heads": [4], "depths": [3], "init_std": 0.08}
            made = create_vision_model("micro", mixer="mala", **sizes).to(at.device)
            config = TrainConfig(steps=s.judge, batch=60, lr=2e-3, warmup=20)
            train(made, task, config, progress=lambda _: None)
            made.save_pretrained(folder)
        self.model = VisionModel.from_pretrained(folder).to(at.device).eval()
        found = [task.batch(count, seed) for count, seed in zip(task.counts, (0, 10**6))]
        (self.real, _), (held, guesses) = (self.features(batch.inputs) for batch in found)
        self.accuracy = (guesses == found[1].labels).double().mean().item()
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


def sparse_only(base: DiT, s: Setting) -> DiT:
    """W and b stay 0: block-sparse softmax over the same share of pairs."""
    made = sparse_linear(base, s)
    for layer in layers(made):
        layer.linear_proj.requires_grad_(False)
    return made


def sparse_linear(base: DiT, s: Setting, **options: Any) -> DiT:
    return swap(base, "softmax", "sla", **{"topk": s.topk, "block": s.block, **options})


def nothing_critical(layer: SLA, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    index, rest = SLA.choose(layer, q, k)
    return torch.full_like(index, -1), torch.ones_like(rest)


def linear_only(base: DiT, s: Setting) -> DiT:
    """Every block is marginal and W starts as the identity."""
    made = sparse_linear(base, s, topk=0.0, negligible=0.0)
    for layer in layers(made):
        nn.init.eye_(layer.linear_proj.weight)

        layer.choose = partial(nothing_critical, layer)  # type: ignore[method-assign]
    return made


VARIANTS: dict[str, Callable[[DiT, Setting], DiT]] = {
    "softmax": lambda base, s: copy.deepcopy(base),
    "softmax, tuned": lambda base, s: copy.deepcopy(base),
    "sla, swapped": sparse_linear,
    "sla, tuned": sparse_linear,
    "sla main, tuned": partial(sparse_linear, variant="main"),
    "sla of half the blocks, tuned": lambda base, s: sparse_linear(base, s, topk=s.topk / 2),
    "sparse only, tuned": sparse_only,
    "linear only, swapped": linear_only,
    "linear only, tuned": linear_only,
}


def quality(model: DiT, s: Setting, at: Place, judge: Judge, out: Path) -> Row:
    task = Flow(size=s.size, path=at.path)
    loss = evaluate(model, task, TrainConfig(batch=60, eval_batches=6))["loss"]
    classes = torch.arange(s.count) % 10
    with torch.autocast(at.device, torch.bfloat16, enabled=at.device == "cuda"):
        images = sample(model, classes=classes, steps=30, solver="euler", batch=250, seed=1)
    save_grid(images[:100], out, columns=10)
    return {"loss": loss, **judge.judge(images, classes)}


def taught(model: DiT, s: Setting, at: Place, name: str, **how: Any) -> float:
    """Train, going on where it was cut off; the seconds that the steps took."""

    def tell(event: dict[str, Any]) -> None:
        if event["step"] % 100 == 0:
            print({k: round(v, 4) for k, v in event.items()}, flush=True)

    config = TrainConfig(
        batch=s.batch, weight_decay=0.01, warmup=50, eval_batches=6, save_every=100, **how
    )
    task, out = Flow(size=s.size, path=at.path), at.run / "steps" / name
    ended = train(model, task, config, out=out, progress=tell)
    return ended.steps * s.batch * s.size**2 / ended.tokens_per_second


def base(s: Setting, at: Place) -> None:
    """Train the base and the judge, and keep them with what they were made with."""
    print("error of a layer:", gate(s, at.device))
    judge = Judge(s, at)
    torch.manual_seed(s.seed)
    sizes = {"image_size": s.size, "patch": 1, "dim": s.dim, "depth": s.depth}
    model = create_diffusion_model("dit_mini", heads=s.dim // 64, **sizes).to(at.device)
    spent = taught(model, s, at, "base", steps=s.steps, lr=s.lr, seed=s.seed)
    model.save_pretrained(at.run / "base")
    reference = {"classifier": judge.accuracy, "frechet, held-out": judge.floor}
    at.cells.keep("base", {"setting": asdict(s), "seconds": spent, **reference})


def variant(name: str, s: Setting, at: Place) -> None:
    torch.manual_seed(s.seed)
    model = VARIANTS[name](DiT.from_pretrained(at.run / "base").to(at.device), s)
    row: Row = {}
    if name.endswith("tuned"):
        how = {"steps": s.tune, "lr": s.tune_lr, "seed": s.seed + 1}
        row["seconds"] = taught(model, s, at, name, **how)
    if layers(model) and "linear" not in name:
        row["kept"] = layers(model)[0].pairs(s.size**2) / s.size**4
    row |= quality(model.eval(), s, at, Judge(s, at), at.run / f"{name}.png")
    at.cells.keep(name, row)


def toy(s: Setting, at: Place) -> None:
    """Each layer's softmax attention, learned by layers of SLA that begin with its weights, a fifth
    of the pairs left: relative squared error over the last 20 steps."""
    task, device = Flow(size=s.size, path=at.path), at.device
    base = DiT.from_pretrained(at.run / "base").to(device)
    base.requires_grad_(False).eval()
    inputs: dict[int, Tensor] = {}
    for i, block in enumerate(base.blocks):
        block.mixer.register_forward_pre_hook(lambda _, x, i=i: inputs.update({i: x[0]}))
    fifth = replace(s, topk=0.2)
    makers = {"both": sparse_linear, "sparse only": sparse_only, "linear only": linear_only}
    students = {name: layers(make(base, fifth)) for name, make in makers.items()}
    optimizers, errors = {}, {name: [[] for _ in base.blocks] for name in makers}
    for name, made in students.items():
        for layer in made:
            layer.requires_grad_(True)
            layer.linear_proj.requires_grad_(name != "sparse only")
        learns = [p for layer in made for p in layer.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.Adam(learns, 5e-4)
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    for step in range(s.tune):
        batch = task.batch(32, step)
        given = {n: batch.meta[n].to(device) for n in task.conditions}
        with half, torch.no_grad():
            base(batch.inputs.to(device), **given)
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
            print(step, {n: [e[-1] for e in own] for n, own in errors.items()}, flush=True)
    found = {
        "kept": students["both"][0].pairs(s.size**2) / s.size**4,
        "errors": {n: [sum(e[-20:]) / len(e[-20:]) for e in own] for n, own in errors.items()},
        "at first": {n: [e[0] for e in own] for n, own in errors.items()},
    }
    at.cells.keep("toy", found)


def gathered(at: Place) -> Row:
    """What is in the folder."""
    found = {n: at.cells[n] for n in ("base", *VARIANTS, "toy") if n in at.cells}
    return {
        "base": found.pop("base"),
        **({"toy": found.pop("toy")} if "toy" in found else {}),
        "rows": found,
    }


def page(runs: dict[str, Row]) -> None:
    lines: list[str] = []
    for name, run in runs.items():
        lines += [*words(run), *pictured(name), *toy_words(run)]
    write_section(EVIDENCE, "diffusion", "SLA in a diffusion transformer", "\n".join(lines))


def words(run: Row) -> list[str]:
    made, s, rows = run["base"]["made"], Setting(**run["base"]["setting"]), run["rows"]
    kept = next((row["kept"] for name, row in rows.items() if name.startswith("sla, ")), 1)
    given = {k: v for k, v in asdict(s).items() if v != getattr(Setting, k)}
    options = "".join(f" --{k.replace('_', '-')} {v}" for k, v in given.items())
    others = sorted({row["made"]["device"] for row in rows.values()} - {made["device"]})
    elsewhere = f" (variants on {' and '.join(others)})" if others else ""
    lines = [
        f"`python benchmarks/claims_diffusion.py --part base{options}`, then `--part variant`, on "
        f"{made['device']}{elsewhere}, torch {made['torch']}, {made['date']}. A DiT of {s.depth} "
        f"blocks of width {s.dim}, digits of {s.size}x{s.size}, a token a pixel, blocks of "
        f"{s.block}: {s.steps} steps with softmax, then the tuned variants {s.tune} more from "
        f"those weights, equal batches of {s.batch} and rates. From the softmax of SLA "
        f"{1 - kept:.1%} of the pairs are gone. Loss: held-out flow matching, fixed noise. "
        "Distance: squared Fréchet, "
        f"{s.count} samples against the training images in a classifier's features (held-out "
        f"images: {run['base']['frechet, held-out']:.2f}). Class: how often the classifier sees "
        "the class that was asked for (its own accuracy is "
        f"{run['base']['classifier']:.3f}). One seed.",
        "",
        "| | pairs kept | loss | distance | class |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in VARIANTS:
        if name in rows:
            row = rows[name]
            share = f"{row['kept']:.1%}" if "kept" in row else ""
            cells = f"{row['loss']:.4f} | {row['frechet']:.2f} | {row['accuracy']:.3f}"
            lines.append(f"| {name} | {share} | {cells} |")
    missing = [name for name in VARIANTS if name not in rows]
    return [*lines, "", *([f"Not measured: {'; '.join(missing)}.", ""] if missing else [])]


def pictured(name: str) -> list[str]:
    """Samples of softmax and SLA, where docs/figures has them of this run."""
    shown = {kind: f"figures/diffusion_{name}_{kind}.png" for kind in ("softmax", "sla")}
    if not all((EVIDENCE.parent / file).exists() for file in shown.values()):
        return []
    links = " ".join(f"![{kind}]({file})" for kind, file in shown.items())
    return ["Samples of softmax and, from the same noise, of SLA after tuning:", "", links, ""]


def toy_words(run: Row) -> list[str]:
    if "toy" not in run:
        return []
    row = run["toy"]
    blocks = len(row["errors"]["both"])
    lines = [
        f"`--part toy`, {row['made']['device']}: each layer's softmax attention in a trained DiT, "
        f"learned by layers that begin with its weights, {1 - row['kept']:.0%} of the pairs gone; "
        "relative squared error:",
        "",
        "| | " + " | ".join(f"block {i}" for i in range(blocks)) + " |",
        "| --- |" + " ---: |" * blocks,
    ]
    for name, errors in row["errors"].items():
        lines.append(f"| {name} | " + " | ".join(f"{e:.4f}" for e in errors) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("base", "variant", "toy", "page"), default="page")
    parser.add_argument("--base", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--variant", choices=list(VARIANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for f in fields(Setting):
        kind = type(f.default)
        option = f"--{f.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, help=f"of --part base; {f.default}")
    parser.add_argument("--path", help="a safetensors file of the digits; else scikit-learn's")
    asked = parser.parse_args()
    at = Place(asked.base or Path(), asked.device, asked.path)
    if asked.part == "page":
        runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if asked.base is not None:
            runs[at.run.name] = gathered(at)
            write_json(RESULTS, runs)
        return page(runs)
    given = {f.name: v for f in fields(Setting) if (v := getattr(asked, f.name)) is not None}
    if asked.base is None:
        parser.error(f"--part {asked.part} needs --base")
    if asked.part == "base":
        return None if "base" in at.cells else base(Setting(**given), at)
    if given or "base" not in at.cells:
        parser.error("the settings are those of --part base, which must be done")
    s = Setting(**at.cells["base"]["setting"])
    if asked.part == "toy":
        return None if "toy" in at.cells else toy(s, at)
    for name in [asked.variant] if asked.variant else VARIANTS:
        if name not in at.cells:
            variant(name, s, at)
    return None


if __name__ == "__main__":
    main()
