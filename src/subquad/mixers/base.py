"""The contract of a mixer, and what every mixer would otherwise repeat."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subquad import catalogue
from subquad.ops import checks
from subquad.parallel.mesh import Split, current
from subquad.state import State


@dataclass(frozen=True)
class Context:
    """What surrounds a mixer's input, checked: the past, the padding, the packing, the places.

    Attributes:
        state: the past, or None at the start of the sequences.
        padding: bool ``[B,T]``, True at padding (on the left); None where there is none.
        cu_seqlens: int32 ``[N+1]`` of packed sequences, or None.
        seen: int64 ``[B]`` (``[N]`` when packed), real tokens before this input.
        given: the ``positions`` that the caller passed, or None.
        grid: the axes of an image or a volume whose flattened tokens are the sequence, or None.
        tokens: T.
        here: where the sequences are split over several devices, which of them this is: the tokens
            are then its own, all the rest is said of the whole sequences. None otherwise.
    """

    state: State | None
    padding: Tensor | None
    cu_seqlens: Tensor | None
    seen: Tensor
    given: Tensor | None
    grid: tuple[int, ...] | None
    tokens: int
    here: Split | None = None

    def past(self, name: str) -> Tensor | None:
        """The tensor ``name`` of the past, None at the start."""
        return None if self.state is None else self.state[name]

    @property
    def clock(self) -> Tensor | None:
        """int64 ``[1]``, the tokens that a state's memory with room holds; None without such."""
        roomy = self.state is not None and self.state.roomy and self.state.past
        return self.seen[:1] if roomy else None

    def zero_padding(self, x: Tensor) -> Tensor:
        """``x [B,T,...]`` with zeros at the padded positions."""
        if self.padding is None:
            return x
        return x.masked_fill(self.padding.view(*self.padding.shape, *[1] * (x.dim() - 2)), 0)

    @property
    def positions(self) -> Tensor:
        """int64 ``[B,T]``: each token's index in its own sequence, padding not counted."""
        if self.given is not None:
            return self.given
        steps = torch.arange(self.tokens, device=self.seen.device)
        if self.here is not None:
            steps = steps + self.here.rank * self.tokens
        if self.cu_seqlens is not None:
            which = torch.searchsorted(self.cu_seqlens[1:].contiguous(), steps, right=True)
            return (steps - self.cu_seqlens[which] + self.seen[which])[None]
        if self.padding is None:
            return self.seen[:, None] + steps
        return self.seen[:, None] + ((~self.padding).cumsum(1) - 1).clamp_min(0)

    @property
    def seen_after(self) -> Tensor:
        if self.cu_seqlens is not None:
            return self.seen + self.cu_seqlens.diff()
        if self.padding is None:
            return self.seen + self.tokens * (1 if self.here is None else self.here.size)
        return self.seen + (~self.padding).sum(1)


class Mixer(nn.Module):
    """A trainable attention system, ``x [B,T,C] -> y [B,T,C]``.

    A subclass has a keyword-only constructor (``dim`` is C) and writes ``mix(x, context)``, which
    returns y and the named tensors of its new state. Prefill, chunked prefill and decode are the
    same call: the state that one call returns is passed to the next.

    Class attributes:
        causal: whether y at t depends on x up to t only.
        off_grid: tokens in front of those that ``grid`` holds.
        past: names of the state's tensors that hold one entry per token (see ``State.past``).
        repeats: whether a token's launches depend on no number of the host but the shapes of its
            state, which may have room (``State.roomy``).
        FOREIGN: other libraries' parameter names, where they differ, to ours (see ``translate``).
        ADDED: parameters that add nothing at first, so that a model without them may be taken over.
        WITHOUT: options of the class that it is made of, and hands on, which it does not take.
    """

    causal: bool = True
    off_grid: int = 0
    past: tuple[str, ...] = ()
    repeats: bool = False
    FOREIGN: ClassVar[Mapping[str, str]] = {}
    ADDED: ClassVar[tuple[str, ...]] = ()
    WITHOUT: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        checks.positive("dim", dim)
        self.dim = dim

    def forward(
        self,
        x: Tensor,
        *,
        state: State | None = None,
        padding: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, State]:
        """Mix the tokens of ``x``.

        Args:
            x: ``[B,T,C]``, T >= 1.
            state: the past, as the last call returned it (its memory is spent); None at a start.
            padding: bool ``[B,T]``, True at padding, which must lie on the left of the first call.
            cu_seqlens: int32 ``[N+1]``: x ``[1,T,C]`` packs N sequences, and so does the state.
            positions: int ``[B,T]``, the tokens' places; counted from the state where None.
            grid: the axes (height, width, ...) whose product is T (less ``off_grid``), for mixers
                of images.

        Returns:
            ``y [B,T,C]`` and the state after the last token.

        Raises:
            ValueError: for shapes and boundaries that do not fit.
        """
        context = self._context(x, state, padding, cu_seqlens, positions, grid)
        y, tensors = self.mix(x, context)
        if context.here is not None and not context.here.states:
            tensors = {}
        past = tuple(name for name in self.past if name in tensors)
        return y, State(tensors, context.seen_after, past)

    @property
    def splits(self) -> bool:
        """Whether its sequences may lie on several devices (see :mod:`subquad.parallel`)."""
        return False

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another library's weights of this layer under our names, for ``load_state_dict``."""
        return {cls.FOREIGN.get(name, name): t for name, t in weights.items()}

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        raise NotImplementedError

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state of one sequence after T tokens; dtype is the activations'."""
        raise NotImplementedError

    def flops(self, T: int) -> int:
        """Floating-point operations of the forward pass over one sequence of T tokens."""
        raise NotImplementedError

    def _context(self, x, state, padding, cu_seqlens, positions, grid) -> Context:
        if x.dim() != 3 or x.shape[2] != self.dim or x.shape[1] < 1:
            raise ValueError(f"x must be [B,T,C] with T >= 1, C={self.dim}, got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if state is not None and not isinstance(state, State):
            raise ValueError(f"state must be a State or None, got {type(state).__name__}")
        B, T, _ = x.shape
        here = self._split(state, padding)
        checks.cu_seqlens(cu_seqlens, B=B, T=T if here is None else T * here.size)
        rows = B if cu_seqlens is None else cu_seqlens.numel() - 1
        if state is not None and state.seen.shape[0] != rows:
            raise ValueError(f"state must hold {rows} sequences as x does, got {len(state.seen)}")
        if padding is not None:
            checks.shape("padding", padding, (B, T))
            if padding.dtype != torch.bool:
                raise ValueError(f"padding must be bool, got {padding.dtype}")
            if cu_seqlens is not None:
                raise ValueError("padding and cu_seqlens exclude each other, got both")
            if checks.readable(padding):
                if state is not None and bool(padding.any()):
                    raise ValueError("padding must lie before the first token: got it with a state")
                if bool((padding[:, 1:] & ~padding[:, :-1]).any()):
                    raise ValueError("padding must lie on the left, got padding after a token")
        if positions is not None:
            checks.shape("positions", positions, (B, T))
        if grid is not None and torch.Size(grid).numel() != T - self.off_grid:
            beside = f" and {self.off_grid} more" if self.off_grid else ""
            raise ValueError(f"grid {tuple(grid)}{beside} must hold T={T} tokens")
        seen = x.new_zeros(rows, dtype=torch.int64) if state is None else state.seen
        return Context(state, padding, cu_seqlens, seen, positions, grid, T, here)

    def _split(self, state: State | None, padding: Tensor | None) -> Split | None:
        """The sequence mesh that is set, once it is known that it suits."""
        here = current()
        if here is None:
            return None
        if not self.splits:
            raise ValueError(f"{type(self).__name__} splits no sequence over several devices")
        if padding is not None:
            raise ValueError("padding must be None where a sequence is split: pack the texts")
        if state is not None and not state.tensors:
            raise ValueError("state is empty: it was left behind under sequence(states=False)")
        return here


def create_mixer(name: str, **options: Any) -> Mixer:
    """Build a mixer by its key in the catalogue, e.g. ``create_mixer("gla", dim=256, heads=4)``.

    Raises:
        ValueError: for an unknown name or option (with the nearest ones) or a value out of range.
    """
    cards = {card.key: card for card in catalogue.systems(kind="mixer")}
    checks.one_of("mixer", name, cards)
    cls = cards[name].load()
    known = [*options_of(name), *cls.WITHOUT]  # which are refused with a reason
    for option in options:
        checks.one_of(f"options of mixer {name!r}", option, known)
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"options of mixer {name!r}: {error}") from None


def options_of(name: str) -> dict[str, Any]:
    """The options that a mixer's constructor knows and their defaults, those among them that it
    hands on to the class it is made of."""
    cls: type[Mixer] = catalogue.system(name).load()
    found: dict[str, Any] = {}
    for above in cls.__mro__:
        if "__init__" not in vars(above):
            continue
        own = inspect.signature(above).parameters.values()
        for p in own:
            if p.kind is p.KEYWORD_ONLY:
                found.setdefault(p.name, p.default)
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            break
    return {name: value for name, value in found.items() if name not in cls.WITHOUT}
