"""From noise to images, along the velocity that a model has learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from subquad.models.diffusion.model import DiT
from subquad.ops import checks

BATCH = 64  # images at a time, unless told otherwise
SOLVERS = {"euler": 1, "heun": 2}  # and how often a step asks the model


@torch.no_grad()
def sample(
    model: DiT,
    n: int | None = None,
    *,
    classes: Sequence[int] | Tensor | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    solver: str = "heun",
    image_size: int | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    batch: int = BATCH,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Solve ``dx/dt = v(x, t)`` from t = 0, noise, to t = 1, images, in equal steps.

    Args:
        model: left as it is, on the device that it computes on.
        n: images; as many as ``classes`` where None.
        classes: of the images, ``[n]``; None for no class in particular.
        steps: of the solver.
        guidance: w of ``v = v_none + w (v_class - v_none)``, classifier-free guidance (Ho and
            Salimans, arXiv 2207.12598); 1 asks for the class alone, and the model once.
        solver: "euler", or "heun", which asks the model twice a step.
        image_size: pixels a side; the configuration's where None.
        noise: ``[n,channels,H,W]`` to begin with; drawn by ``seed`` where None.
        seed: of the noise, the same on every device.
        batch: images at a time.
        progress: is told ``{"step", "steps"}`` after each step of each batch.

    Returns:
        float32 ``[n,channels,H,W]`` on the CPU, about -1..1.

    Raises:
        ValueError: for counts that do not fit, classes that the model does not have, guidance
            without classes.
    """
    config = model.config
    given = None if classes is None else torch.as_tensor(classes, dtype=torch.int64)
    if n is None:
        like = noise if given is None else given
        if like is None:
            raise ValueError("n must say how many images where classes and noise are None")
        n = len(like)
    for name, count in (("n", n), ("steps", steps), ("batch", batch)):
        checks.positive(name, count)
    checks.one_of("solver", solver, SOLVERS)
    side = image_size or config.image_size
    if given is None:
        if guidance != 1:
            raise ValueError(f"guidance needs classes to guide to, got {guidance} without")
    elif given.shape != (n,) or not 0 <= int(given.min()) <= int(given.max()) < config.classes:
        raise ValueError(
            f"classes must be {n} of 0..{config.classes - 1}, got {given.tolist()[:20]}"
        )
    if noise is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, config.channels, side, side, generator=generator)
    checks.shape("noise", noise, (n, config.channels, *noise.shape[2:]))
    was_training = model.training
    model.eval()
    parts, total, done = [], steps * -(-n // batch), 0
    times = torch.linspace(0, 1, steps + 1).tolist()
    for start in range(0, n, batch):
        x = noise[start : start + batch].to(model.device, torch.float32)
        asked = None if given is None else given[start : start + batch].to(model.device)
        for t, after in pairwise(times):
            v = _velocity(model, x, t, asked, guidance)
            there = x + (after - t) * v
            if solver == "heun":
                v = (v + _velocity(model, there, after, asked, guidance)) / 2
                there = x + (after - t) * v
            x, done = there, done + 1
            if progress is not None:
                progress({"step": done, "steps": total})
        parts.append(x.cpu())
    model.train(was_training)
    return torch.cat(parts)


def _velocity(model: DiT, x: Tensor, t: float, classes: Tensor | None, guidance: float) -> Tensor:
    time = torch.full((len(x),), t, device=x.device)
    if classes is None or guidance == 1:
        return model(x.to(model.dtype), time, classes).float()
    nothing = torch.full_like(classes, model.config.classes)
    both = model(
        x.to(model.dtype).repeat(2, 1, 1, 1), time.repeat(2), torch.cat([nothing, classes])
    )
    without, within = both.float().chunk(2)
    return without + guidance * (within - without)
