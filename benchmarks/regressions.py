"""Regression as a task for attention: sequences of pairs, small models, and how they are trained.

Legend: n sequences, L pairs before the one that is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import subquad
from subquad.ops.probe import local_linear, probe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Regression:
    """Sequences of pairs (x, y = W x + noise); W changes ``segments`` times as often as not.

    Attributes:
        d, out: of x and y.
        pairs: of a sequence.
        segments: equal parts, each with a W of its own.
        spread: None for x ~ N(0, I); else every segment has a part of the unit sphere of its own,
            around a random centre, and ``spread`` is how wide it is.
        noise: variance of y's.
    """

    d: int = 5
    out: int = 1
    pairs: int = 256
    segments: int = 1
    spread: float | None = None
    noise: float = 0.1

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x ``[n,pairs,d]`` and y ``[n,pairs,out]``."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device)

        s, each = self.segments, self.pairs // self.segments
        x = normal(n, s, each, self.d)
        if self.spread is not None:
            centre = F.normalize(normal(n, s, 1, self.d), dim=-1)
            x = F.normalize(centre + self.spread * self.d**-0.5 * x, dim=-1)
        y = x @ normal(n, s, self.d, self.out)
        if self.spread is None:
            y = y * self.d**-0.5
        y = y + self.noise**0.5 * normal(*y.shape)
        return x.flatten(1, 2), y.flatten(1, 2)

    def parts(self, error: Tensor) -> list[float]:
        """Mean of ``[n,pairs]`` over each segment but its first token, which nothing foretells."""
        return error.unflatten(1, (self.segments, -1))[:, :, 1:].mean((0, 2)).tolist()


def before(x: Tensor) -> Tensor:
    """Each place's predecessor, zero at the first."""
    return F.pad(x[:, :-1], (0, 0, 1, 0))


SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def untrained(data: Regression, method: str) -> Row:
    """At the best bandwidth (and ridge) of a grid."""
    x, y = (t.to(DEVICE) for t in data.draw(32, torch.Generator().manual_seed(0)))
    q, k, v = (t.double()[:, :, None] for t in (x[:, 1:], x[:, :-1], y[:, :-1]))
    best: Row = {}
    for scale, ridge in product(SCALES, (0.03, 0.1, 0.3, 1.0)):
        if method == "softmax":
            o = probe(q, k, v, torch.zeros_like(q), scale=scale)
        elif method == "lla":
            o = local_linear(q, k, v, ridge=ridge, scale=scale)
        elif scale:
            break  # a global fit has no bandwidth
        else:
            o = local_linear(q, k, v, ridge=ridge, scale=0.0)
        error = (o[:, :, 0] - y[:, 1:]).square().mean(-1)
        parts = data.parts(F.pad(error, (1, 0)))
        found = {"first segment": parts[0], "later segments": sum(parts[1:]) / len(parts[1:])}
        if not best or found["later segments"] < best["later segments"]:
            best = {**found, "scale": scale, "ridge": "" if method == "softmax" else ridge}
    return best


class Stack(nn.Module):
    """Two mixers with residuals over tokens (x_t, x_(t-1), y_(t-1)); y_t is read from the last."""

    def __init__(self, data: Regression, options: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(2 * data.d + data.out, dim)
        self.mixers = nn.ModuleList(subquad.create_mixer(dim=dim, **options) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(3))
        self.head = nn.Linear(dim, data.out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(torch.cat([x, before(x), before(y)], -1))
        for norm, mixer in zip(self.norms, self.mixers):
            h = h + mixer(norm(h))[0]
        return self.head(self.norms[2](h))


def regressed(data: Regression, options: dict[str, Any], muon: bool, steps: int) -> Row:
    """Error at the better of two learning rates, by the same evaluation for every model."""
    rates = (0.005, 0.02) if muon else (1e-3, 4e-3)
    found = [fitted(data, options, muon, rate, steps) for rate in rates]
    return min(found, key=lambda row: row["error"])


def fitted(
    data: Regression,
    options: dict[str, Any],
    muon: bool,
    lr: float,
    steps: int,
    *,
    seed: int = 0,
    dim: int = 64,
    batch: int = BATCH,
) -> Row:
    torch.manual_seed(seed)
    model = Stack(data, options, dim).to(DEVICE)
    matrices = [p for p in model.mixers.parameters() if p.dim() == 2 and muon]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    optimizers: list[Any] = [torch.optim.AdamW(rest, lr=3e-3 if muon else lr, weight_decay=0.0)]
    if muon:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=o.param_groups[0]["lr"], total_steps=steps, pct_start=0.05,
            cycle_momentum=False,
        )
        for o in optimizers
    ]  # fmt: skip
    generator = torch.Generator(DEVICE).manual_seed(1)
    for _ in range(steps):
        x, y = data.draw(batch, generator)
        loss = (model(x, y) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, schedule in zip(optimizers, schedules):
            o.step()
            schedule.step()
            o.zero_grad()
    return {
        **score(data, model),
        "lr": lr,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def seeded(data: Regression, options: dict[str, Any], steps: int) -> Row:
    """Mean, least and largest error of three seeds of a small model, trained with AdamW."""
    found = [
        fitted(data, options, False, 4e-3, steps, seed=seed, dim=32, batch=16) for seed in range(3)
    ]
    errors = [row["error"] for row in found]
    return {
        "error": sum(errors) / len(errors), "least": min(errors), "largest": max(errors),
        "parameters": found[0]["parameters"],
    }  # fmt: skip


@torch.no_grad()
def score(data: Regression, model: Callable[[Tensor, Tensor], Tensor]) -> Row:
    generator = torch.Generator(DEVICE).manual_seed(2)
    errors = []
    for _ in range(16):
        x, y = data.draw(128, generator)
        errors.append((model(x, y) - y).square().mean(-1))
    error = torch.cat(errors)
    if data.segments > 1:
        parts = data.parts(error)
        late = error.unflatten(1, (data.segments, -1))[:, 1:, -16:].mean().item()
        return {
            "error": sum(parts) / len(parts), "first segment": parts[0],
            "later segments": sum(parts[1:]) / len(parts[1:]), "their last 16 pairs": late,
        }  # fmt: skip
    if data.pairs < 64:
        return {"error": error.mean().item()}
    return {"error": error.mean().item(), "after 40 pairs": error[:, 36:45].mean().item(),
            "last 64": error[:, -64:].mean().item()}  # fmt: skip


def bayes(data: Regression) -> Row:
    """Ridge regression of the pairs before, with the prior's and the noise's true variances."""

    def predict(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.double(), y.double()
        gram = (x[..., :, None] * x[..., None, :]).cumsum(1) - x[..., :, None] * x[..., None, :]
        moment = (x[..., :, None] * y[..., None, :]).cumsum(1) - x[..., :, None] * y[..., None, :]
        eye = data.noise * data.d * torch.eye(data.d, dtype=x.dtype, device=x.device)
        return (x[..., None, :] @ torch.linalg.solve(gram + eye, moment))[..., 0, :].float()

    return score(data, predict)


class Prompt(nn.Module):
    """One layer: (x_q, 0) reads the tokens (x_l, y_l), all heads as wide as a token; no bias,
    positions or residual (He et al., arXiv 2503.12734)."""

    def __init__(self, method: str, d: int, heads: int) -> None:
        super().__init__()
        E, self.heads, self.method = d + 1, heads, method
        names = ("q_proj", "k_proj", "v_proj", *["r_proj"] * (method == "parallax"))
        for name in names:
            setattr(self, name, nn.Linear(E, E * heads, bias=False))
        self.o_proj = nn.Linear(E * heads, 1, bias=False)
        self.ridge = nn.Parameter(torch.zeros(heads)) if method == "lla" else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x ``[n,L+1,d]``, y ``[n,L+1,1]``; the last y is predicted ``[n]``, not seen."""
        z = torch.cat([x[:, :-1], y[:, :-1]], -1)
        asked = torch.cat([x[:, -1:], torch.zeros_like(y[:, -1:])], -1)
        k, v = (m(z).unflatten(-1, (self.heads, -1)) for m in (self.k_proj, self.v_proj))
        q = self.q_proj(asked).unflatten(-1, (self.heads, -1))
        if self.ridge is not None:
            o = local_linear(q, k, v, ridge=F.softplus(self.ridge) + 1e-4, causal=False)
        else:
            r = torch.zeros_like(q)
            if self.method == "parallax":
                r = self.r_proj(asked).unflatten(-1, (self.heads, -1))
            o = probe(q, k, v, r, causal=False)
        return self.o_proj(o.flatten(-2))[:, 0, 0]


def prompted(method: str, heads: int, steps: int) -> Row:
    """Trained on prompts of 40 pairs; errors there and on 100."""
    torch.manual_seed(0)
    data, model = Regression(pairs=41), Prompt(method, 5, heads).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for _ in range(steps):
        x, y = data.draw(256, generator)
        loss = (model(x, y) - y[:, -1, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return asked_last(model)


@torch.no_grad()
def asked_last(model: Callable[[Tensor, Tensor], Tensor]) -> Row:
    row = {}
    for length in (40, 100):
        x, y = Regression(pairs=length + 1).draw(20_000, torch.Generator(DEVICE).manual_seed(2))
        row[f"error, {length} pairs"] = (model(x, y) - y[:, -1, 0]).square().mean().item()
    return row


def ridge_prompt() -> Row:
    def predict(x: Tensor, y: Tensor) -> Tensor:
        past, seen = x[:, :-1].double(), y[:, :-1].double()
        eye = 0.5 * torch.eye(5, dtype=past.dtype, device=past.device)
        W = torch.linalg.solve(past.mT @ past + eye, past.mT @ seen)
        return (x[:, -1:].double() @ W)[:, 0, 0].float()

    return asked_last(predict)
