"""Speed of the operations on this machine, each race beside what a user would run otherwise.

Times are the best of repeats taken in turns, in one process. A race whose two sides disagree is not
timed: it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import mask
from subquad.bench.measure import timed
from subquad.ops.attention import attention
from subquad.ops.recurrence import recurrence

Run = Callable[[], Tensor]
GATE = 1e-3  # largest relative difference, float32


@dataclass(frozen=True)
class Race:
    """Two ways to do a job.

    Attributes:
        name: the job, with its shape.
        ours, peer: do it.
        against: the peer's name and version.
        required: times faster that ours must be.
        apart: the relative difference (in norm) between ours and what is right.
    """

    name: str
    ours: Run
    peer: Run
    against: str
    required: float
    apart: Callable[[], float]


@dataclass(frozen=True)
class Outcome:
    """Seconds of both sides; ``ratio`` is how many times faster ours is."""

    name: str
    against: str
    ours: float
    peer: float
    ratio: float
    required: float

    @property
    def holds(self) -> bool:
        return self.ratio >= self.required


def run(race: Race, repeats: int = 5) -> Outcome:
    """Check that ours is right, then time both sides in turns.

    Raises:
        ValueError: where ours is not right.
    """
    device = torch.device("cpu")
    apart = race.apart()
    if not apart <= GATE:
        raise ValueError(f"{race.name}: off by {apart:.2g}, more than {GATE}, so it is not timed")
    ours = peer = float("inf")
    for _ in range(repeats):
        ours = min(ours, timed(race.ours, device)[0])
        peer = min(peer, timed(race.peer, device)[0])
    return Outcome(race.name, race.against, ours, peer, peer / ours, race.required)


def races(T: int = 4096, long: int = 16384) -> Iterator[Race]:
    """The races of this CPU: the gated delta rule and the sliding window."""
    import transformers
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    inputs = delta_inputs(T)
    ours = partial(_ours, *inputs)
    theirs = partial(_theirs, torch_chunk_gated_delta_rule, *inputs)
    name = f"gated delta rule, T {T:,} H 8 K=V=64"
    against = f"transformers {transformers.__version__}"
    for way, wrap, required in (
        ("forward", _forward, 1.5),
        ("forward+backward", partial(_with_gradient, inputs=inputs), 5.0),
    ):
        pair = wrap(ours), wrap(theirs)
        yield Race(f"{name}, {way}", *pair, against, required, partial(_difference, *pair))

    q, k, v = _random(3, 1, long, 8, 64)
    window = mask.causal() & mask.window(511)
    yield Race(
        f"sliding window 512, T {long:,} H 8 K=V=64, forward",
        _forward(lambda: attention(q, k, v, window)),
        _forward(lambda: _dense(q, k, v, is_causal=True)),
        f"dense causal SDPA, torch {torch.__version__}",
        8.0,
        _window_difference,
    )


def _difference(ours: Run, right: Run) -> float:
    want = right()
    return float((ours() - want).norm() / want.norm())


def _window_difference(T: int = 2048) -> float:
    """Ours against dense attention that is masked afterwards, at a length that affords it."""
    q, k, v = _random(3, 1, T, 8, 64)
    window = mask.causal() & mask.window(511)
    return _difference(
        lambda: attention(q, k, v, window), lambda: _dense(q, k, v, attn_mask=window.dense(T, T))
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def linearity(lengths: Sequence[int] = (4096, 16384, 65536)) -> list[tuple[int, float]]:
    """(T, seconds a token) of the gated delta rule's forward and backward pass."""
    out = []
    for T in lengths:
        inputs = delta_inputs(T)
        call = _with_gradient(partial(_ours, *inputs), inputs)
        best = min(timed(call, torch.device("cpu"))[0] for _ in range(2))
        out.append((T, best / T))
    return out


def delta_inputs(T: int, H: int = 8, K: int = 64) -> tuple[Tensor, ...]:
    """q, k, v, decay, beta of a gated delta rule as a trained layer feeds it."""
    q, k, v = _random(3, 1, T, H, K)
    decay = -F.softplus(_random(1, 1, T, H)[0])
    beta = torch.sigmoid(_random(1, 1, T, H)[0])
    inputs = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, decay, beta)
    return tuple(t.requires_grad_() for t in inputs)


def _random(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count + sum(shape))
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def _ours(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return recurrence(q, k, v, decay=decay, beta=beta)[0]


def _theirs(run: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return run(q, k, v, g=decay, beta=beta)[0]


def _forward(call: Run) -> Run:
    def run() -> Tensor:
        with torch.inference_mode():
            return call()

    return run


def _with_gradient(call: Run, inputs: Sequence[Tensor]) -> Run:
    """Forward and backward; returns the inputs' gradients in one tensor, for the gate."""

    def run() -> Tensor:
        gradients = torch.autograd.grad(call().square().sum(), inputs)
        return torch.cat([g.flatten() for g in gradients])

    return run
