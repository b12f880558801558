"""Secondary attention sinks: tokens whose residual turns into the first token's direction for some
layers (Wong et al., On the Existence and Behaviour of Secondary Attention Sinks)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import checks
from subquad.ops.layout import repeat_heads
from subquad.policies.parts.decoder import attention_modules, decoder_of, site_of

ALIGNED, MADE = 0.9, 0.98  # |cos| of a sink's residual; cos of the MLP output that makes one
MIN_LIFE, MAX_GAP = 5, 15
SECONDARY, PRIMARY, NOISE = "secondary", "primary-like", "noise"
MLP = ("x", "up", "gate", "act", "product", "down")


@dataclass(frozen=True)
class Sink:
    """A token that points where the primary sink does, in ``layers``."""

    position: int
    layers: tuple[int, ...]
    label: str

    @property
    def first(self) -> int:
        """The creation layer."""
        return self.layers[0]

    @property
    def lifetime(self) -> int:
        return len(self.layers)

    @property
    def level(self) -> tuple[int, int]:
        return self.first, self.lifetime


@dataclass(frozen=True)
class SinkMap:
    """The primary sink at position ``primary`` in layers ``start..end-1``, and all others."""

    primary: int
    start: int
    end: int
    sinks: tuple[Sink, ...]
    layers: int

    def of(self, label: str) -> list[Sink]:
        return [sink for sink in self.sinks if sink.label == label]


def clip(norms: Tensor) -> tuple[int, int]:
    """Layers ``start..end-1`` in which the primary sink stands, from its norm ``[L]`` by layer:
    from its largest rise to its largest fall after that (the last layer where it never falls)."""
    steps = norms.diff()
    if not len(steps):
        return 0, len(norms)
    start = int(steps.argmax()) + 1
    rest = steps[start:]
    if not len(rest) or bool((rest >= 0).all()):
        return start, len(norms)
    return start, start + int(rest.argmin()) + 1


def label(lifetime: int, layers: int, min_life: int = MIN_LIFE, max_gap: int | None = None) -> str:
    """secondary, primary-like (it lives in all but ``max_gap`` layers) or noise.

    ``max_gap`` is 15, or a third of the layers in a small model.
    """
    gap = min(MAX_GAP, layers // 3) if max_gap is None else max_gap
    if lifetime >= layers - gap and lifetime >= min_life:
        return PRIMARY
    return SECONDARY if lifetime >= min_life else NOISE


def detect(
    hidden: Tensor, *, bos: Sequence[int] = (0,), aligned: float = ALIGNED,
    min_life: int = MIN_LIFE, max_gap: int | None = None, real: Tensor | None = None,
) -> SinkMap:  # fmt: skip
    """The sinks of one sequence.

    Args:
        hidden: ``[L,T,C]``, the residual after each layer, the embeddings left out and no norm
            applied. bos: candidates of the primary sink; the one with the largest norm is taken.
        aligned: least |cos| with the primary sink. min_life, max_gap: see :func:`label`.
        real: bool ``[T]``, False at padding, which is left out.
    """
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be [L,T,C], got {list(hidden.shape)}")
    L, T, _ = hidden.shape
    if not bos or not all(0 <= b < T for b in bos):
        raise ValueError(f"bos must name tokens in 0..{T - 1}, got {list(bos)}")
    h = hidden.double() if hidden.dtype == torch.float64 else hidden.float()
    norms = h.norm(dim=-1)
    primary = max(bos, key=lambda b: float(norms[:, b].mean()))
    start, end = clip(norms[:, primary])
    near = F.cosine_similarity(h, h[:, primary : primary + 1], dim=-1).abs() > aligned
    near[:start] = near[end:] = False
    near[:, : primary + 1] = False
    if real is not None:
        near[:, ~real.to(near.device)] = False
    sinks = []
    for t in near.any(0).nonzero()[:, 0].tolist():
        layers = tuple(near[:, t].nonzero()[:, 0].tolist())
        sinks.append(Sink(t, layers, label(len(layers), L, min_life, max_gap)))
    return SinkMap(primary, start, end, tuple(sinks), L)


def levels(maps: Sequence[SinkMap], kind: str = SECONDARY) -> Counter[tuple[int, int]]:
    """How many sinks there are of each (creation layer, lifetime)."""
    return Counter(sink.level for m in maps for sink in m.of(kind))


def sink_score(weights: Tensor) -> Tensor:
    """How much attention each key draws: ``weights [H,T,T]`` to ``[T]``, the mean over the heads
    and over the queries that can see the key (from its own place on)."""
    T = weights.shape[-1]
    return weights.sum(-2).mean(0) / torch.arange(T, 0, -1, device=weights.device)


def streamed_sink_score(
    q: Tensor, k: Tensor, scale: float, block: int = 512, window: int | None = None
) -> Tensor:
    """:func:`sink_score` of causal softmax attention, ``q [T,H,K]`` over ``k [T,G,K]``, a block of
    queries at a time, without a T x T map; with a window over the last tokens alone."""
    T, H = q.shape[:2]
    keys = repeat_heads(k[None], H)[0]
    total = q.new_zeros(T)
    for i in range(0, T, block):
        part = q[i : i + block]
        scores = torch.einsum("ihk,jhk->hij", part, keys[: i + len(part)]) * scale
        ahead = torch.arange(len(keys[: i + len(part)]), device=q.device)
        behind = torch.arange(i, i + len(part), device=q.device)[:, None] - ahead
        hidden = (behind < 0) | (behind >= (window or T))
        scores = scores.masked_fill(hidden, -torch.inf)
        total[: i + len(part)] += scores.softmax(-1).sum((0, 1)) / H
    return total / torch.arange(T, 0, -1, device=q.device).clamp_max(window or T)


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder's layers, each with a gated MLP (``gate_proj``, ``up_proj``, ``down_proj``)."""
    found = list(getattr(decoder_of(model), "layers", []))
    parts = ("gate_proj", "up_proj", "down_proj")
    if not found or not all(hasattr(getattr(m, "mlp", None), p) for m in found for p in parts):
        raise ValueError(
            f"model must have decoder layers with a gated MLP, {type(model).__name__} has not"
        )
    return found


@dataclass
class Captured:
    """Of one sequence, by layer: ``hidden [L,T,C]``; the MLP's intermediates ``[T,*]`` under the
    names of ``MLP``; q ``[T,H,K]`` and k, v ``[T,G,*]`` as they enter attention, the scale of its
    scores and its window."""

    hidden: Tensor
    mlp: list[dict[str, Tensor]]
    qkv: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


@torch.inference_mode()
def capture(model: Any, ids: Tensor) -> Captured:
    """Run ``model`` over ``ids [T]`` and keep what the analysis looks at."""
    layers = layers_of(model)
    hidden: list[Tensor] = []
    mlps: list[dict[str, Tensor]] = [{} for _ in layers]

    def keep(store: dict[str, Tensor], name: str, module: Any, args: Any, out: Any) -> None:
        store[name] = (out[0] if isinstance(out, tuple) else out)[0].float()

    def enter(store: dict[str, Tensor], module: Any, args: Any) -> None:
        store["x"] = args[0][0].float()

    def leave(module: Any, args: Any, out: Any) -> None:
        hidden.append((out[0] if isinstance(out, tuple) else out).reshape(-1, out[0].shape[-1]))

    with ExitStack() as hooks:
        for layer, store in zip(layers, mlps, strict=True):
            mlp: Any = layer.mlp
            hooks.callback(layer.register_forward_hook(leave).remove)
            hooks.callback(mlp.register_forward_pre_hook(partial(enter, store)).remove)
            for name in ("up", "gate", "down"):
                module = getattr(mlp, f"{name}_proj")
                hooks.callback(module.register_forward_hook(partial(keep, store, name)).remove)
        with _projections(model) as qkv:
            model(ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    for layer, store in zip(layers, mlps, strict=True):
        store["act"] = layer.mlp.act_fn(store["gate"])  # type: ignore[union-attr, operator]
        store["product"] = store["act"] * store["up"]
    modules = attention_modules(model)
    scales = [float(getattr(m, "scaling", q.shape[-1] ** -0.5)) for m, (q, *_) in zip(modules, qkv)]
    windows = [site_of(m, len(modules)).window for m in modules]
    return Captured(torch.stack(hidden).float(), mlps, qkv, scales, windows)


@contextmanager
def _projections(model: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """q, k and v of every layer, as they enter attention (rotated)."""
    from subquad.analysis.watch import Watch

    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    with Watch(model) as watch:
        watch.enter = lambda q, k, v: seen.append(tuple(t[0].transpose(0, 1) for t in (q, k, v)))  # type: ignore[arg-type]
        yield seen


def mlp_similarity(states: Mapping[str, Tensor], primary: int) -> dict[str, Tensor]:
    """cos of each token with the primary sink, ``[T]``, at each intermediate of one MLP."""
    return {
        name: F.cosine_similarity(x, x[primary : primary + 1], dim=-1) for name, x in states.items()
    }


@contextmanager
def steer(
    model: Any, layer: int, norm: float, *, primary: int = 0, made: float = MADE, spared: int = 3
) -> Iterator[None]:
    """While the block lasts, the MLP outputs of ``layer`` that would make a secondary sink (cos
    with the primary's over ``made``, the first ``spared`` tokens excepted) are scaled to ``norm``.

    For whole sequences from their start on, without a cache.
    """
    found = layers_of(model)
    if not 0 <= layer < len(found):
        raise ValueError(f"layer must lie in 0..{len(found) - 1}, got {layer}")
    if norm < 0:
        raise ValueError(f"norm must be 0 or more, got {norm}")

    def damp(module: Any, args: Any, out: Tensor) -> Tensor:
        y = out.float()
        near = F.cosine_similarity(y, y[:, primary : primary + 1], dim=-1) > made
        near[:, :spared] = False
        size = y.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return torch.where(near[..., None], (y * (norm / size)).to(out.dtype), out)

    handle = found[layer].mlp.down_proj.register_forward_hook(damp)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def directions(
    mlp: nn.Module, inputs: Tensor, down: Tensor, alphas: Sequence[float], count: int = 8
) -> list[dict[str, float]]:
    """Which principal directions of an MLP's inputs make a sink.

    Args:
        mlp: the layer's MLP. inputs: ``[N,C]``, inputs of secondary sinks and of other tokens with
            the same ids. down: ``[C]``, the primary sink's MLP output. alphas: lengths to try.

    Returns:
        For every direction and length, in both signs: ``component, alpha, cos, norm``; a direction
        is effective where |cos| > 0.98.
    """
    centred = inputs - inputs.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:count]
    out = []
    for i, axis in enumerate(axes):
        for alpha in (s * a for a in alphas for s in (1, -1)):
            y = mlp((alpha * axis)[None])[0]
            cos = float(F.cosine_similarity(y, down, dim=0))
            out.append({"component": i, "alpha": alpha, "cos": cos, "norm": float(y.norm())})
    return out


@dataclass(frozen=True, kw_only=True)
class SecondarySinks:
    """The analysis: the sinks of some texts, what makes them, and how much attention they draw.

    Args:
        length: tokens of a text. samples: texts. bos: candidates of the primary sink.
        aligned: least |cos|. min_life, max_gap: see :func:`label`.
        text: file or folder; None for the Python standard library.
    """

    length: int = 1024
    samples: int = 8
    bos: tuple[int, ...] = (0,)
    aligned: float = ALIGNED
    min_life: int = MIN_LIFE
    max_gap: int | None = None
    seed: int = 0
    text: str | None = None

    def __post_init__(self) -> None:
        for name in ("length", "samples", "min_life"):
            checks.positive(name, getattr(self, name))

    def run(self, model: Any, tokenizer: Any) -> SinksFound:
        rule: dict[str, Any] = {"bos": self.bos, "aligned": self.aligned}
        rule |= {"min_life": self.min_life, "max_gap": self.max_gap}
        maps, rows = [], []
        for ids in self._texts(tokenizer):
            seen = capture(model, ids)
            found = detect(seen.hidden, **rule)
            maps.append(found)
            rows += [_row(tokenizer, ids, seen, found, sink) for sink in found.sinks]
        return SinksFound(maps, rows)

    def _texts(self, tokenizer: Any) -> Iterator[Tensor]:
        from subquad.analysis.retrieval_heads import facts

        for sample in facts(tokenizer, self.length, self.samples, self.seed, self.text):
            yield sample.ids


def _row(tokenizer: Any, ids: Tensor, seen: Captured, found: SinkMap, sink: Sink) -> dict[str, Any]:
    """What stands about one sink in the table."""
    layer = sink.first
    q, k, v = seen.qkv[layer]
    drawn = streamed_sink_score(
        q.float(), k.float(), seen.scales[layer], window=seen.windows[layer]
    )
    cos = mlp_similarity(seen.mlp[layer], found.primary)
    down = seen.mlp[layer]["down"].norm(dim=-1)
    others = torch.ones(len(ids), dtype=torch.bool, device=drawn.device)
    others[[found.primary, *(s.position for s in found.sinks)]] = False
    at, rest = sink.position, drawn[others].mean()
    return {
        "position": at,
        "token": tokenizer.decode([int(ids[at])]),
        "first": sink.first,
        "lifetime": sink.lifetime,
        "label": sink.label,
        "cos": {name: float(c[at]) for name, c in cos.items()},
        "down_norm": float(down[at] / down[found.primary]),
        "score_over_rest": float(drawn[at] / rest),
        "primary_over_rest": float(drawn[found.primary] / rest),
        "key_norm": float(k[at].float().norm(dim=-1).mean()),
        "value_norm": float(v[at].float().norm(dim=-1).mean()),
        "value_norm_rest": float(v[others].float().norm(dim=-1).mean()),
    }


@dataclass(frozen=True)
class SinksFound:
    """The maps of the texts, and a row a sink."""

    maps: list[SinkMap]
    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        return {
            "layers": self.maps[0].layers,
            "primary": [[m.primary, m.start, m.end] for m in self.maps],
            "labels": dict(Counter(s.label for m in self.maps for s in m.sinks)),
            "levels": [[*level, n] for level, n in sorted(levels(self.maps).items())],
            "sinks": self.rows,
        }

    def lines(self) -> list[str]:
        """What a terminal shows."""
        spans = Counter((m.start, m.end - 1) for m in self.maps)
        (first, last), _ = spans.most_common(1)[0]
        kinds = Counter(s.label for m in self.maps for s in m.sinks)
        out = [
            f"{len(self.maps)} texts; the primary sink stands in layers {first}..{last}",
            ", ".join(f"{kinds[kind]} {kind}" for kind in (SECONDARY, PRIMARY, NOISE)),
        ]
        for row in [r for r in self.rows if r["label"] == SECONDARY][:10]:
            out.append(
                f"  {row['token']!r} at {row['position']}: layer {row['first']}, "
                f"{row['lifetime']} layers, draws {row['score_over_rest']:.1f}x the rest"
            )
        return out

    def draw(self, folder: Path) -> list[Path]:
        """Creation layer against lifetime, log(1 + count), secondary_sinks.png."""
        from subquad.analysis.drawing import figure, save

        L = self.maps[0].layers
        counts = torch.zeros(L + 1, L)
        for sink in (s for m in self.maps for s in m.sinks):
            counts[sink.lifetime, sink.first] += 1
        made, (panel,) = figure(1)
        image = panel.imshow(counts.log1p(), origin="lower", cmap="viridis", aspect="auto")
        made.colorbar(image, ax=panel, label="log(1 + sinks)")
        panel.set(xlabel="creation layer", ylabel="lifetime", title="sinks beside the first token")
        return [save(made, folder / "secondary_sinks.png")]
