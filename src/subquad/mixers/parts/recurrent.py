"""What the mixers on the linear recurrence share: projections, short convolutions, state, cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.conv import ShortConv
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.ops import checks
from subquad.ops.backend import choose
from subquad.ops.layer.activation import ACTIVATIONS
from subquad.ops.recurrence import BACKENDS, cost, request
from subquad.parallel import recurrence


class RecurrentMixer(Mixer):
    """A mixer whose past is the recurrence's ``S`` and its short convolutions' last inputs.

    A subclass writes ``mix`` with the help of :meth:`convolve` and :meth:`recur`; the state and
    the costs follow from its modules.

    Args:
        dim: C, the model's width.
        heads: H, heads of the state.
        key_dim: K; value_dim: V.

    Class attributes:
        delta: whether the delta rule writes.
    """

    delta: ClassVar[bool] = False
    repeats = True
    A_log: Tensor  # of those that decode in one launch
    dt_bias: Tensor

    def __init__(self, *, dim: int, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__(dim=dim)
        sizes = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            checks.positive(name, size)
        self.state_heads, self.key_dim, self.value_dim = heads, key_dim, value_dim

    @property
    def splits(self) -> bool:
        return True

    def convolve(self, name: str, x: Tensor, context: Context, state: dict[str, Tensor]) -> Tensor:
        """``x [B,T,D]`` through the convolution ``name``, whose last inputs enter ``state``."""
        y, state[name] = self.get_submodule(name)(x, context.past(name), context.cu_seqlens)
        return y

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        state: dict[str, Tensor],
        *,
        decay: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The recurrence from the past on, ``o [B,T,H,V]``; the new ``S`` enters ``state``.

        Padding neither writes (its k is 0) nor forgets (its decay is 0; one decay for all tokens,
        ``[H]``, finds nothing to forget on the left).
        """
        o, state["S"] = recurrence(
            q,
            context.zero_padding(k),
            v,
            decay=decay if decay is None or decay.dim() == 1 else context.zero_padding(decay),
            beta=beta,
            scale=scale,
            state=context.past("S"),
            cu_seqlens=context.cu_seqlens,
        )
        return o

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        inputs = sum((conv.size - 1) * conv.weight.shape[0] for conv in self._convs())
        state = cost.state_bytes(H=self.state_heads, K=self.key_dim, V=self.value_dim)
        return inputs * dtype.itemsize + state

    def flops(self, T: int) -> int:
        """Projections, convolutions and the recurrence; norms and gates are left out."""
        return flops_of_weights(self, T) + cost.flops(
            B=1, T=T, H=self.state_heads, K=self.key_dim, V=self.value_dim, delta=self.delta
        )

    def _convs(self) -> Iterable[ShortConv]:
        return (m for m in self.modules() if isinstance(m, ShortConv))


class QKVMixer(RecurrentMixer):
    """A :class:`RecurrentMixer` with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.

    Args:
        dim: C, the model's width.
        heads: of q; key_heads: of k; value_heads: of v.
        key_dim: K; value_dim: V.
        conv_size: kernel of the short convolutions ``q_conv``, ``k_conv``, ``v_conv``; 0 for none.
        qk_activation: of q and k, after the convolution; a key of ``ACTIVATIONS``.
        v_activation: of v, likewise.
    """

    FOREIGN: ClassVar[Mapping[str, str]] = {
        "q_conv1d.weight": "q_conv.weight",
        "k_conv1d.weight": "k_conv.weight",
        "v_conv1d.weight": "v_conv.weight",
        "o_norm.weight": "norm.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        conv_size: int,
        qk_activation: str = "silu",
        v_activation: str = "silu",
    ) -> None:
        super().__init__(
            dim=dim, heads=max(heads, value_heads), key_dim=key_dim, value_dim=value_dim
        )
        checks.positive("conv_size", conv_size, zero=True)
        checks.one_of("qk_activation", qk_activation, ACTIVATIONS)
        self.qkv_heads = {"q": heads, "k": key_heads, "v": value_heads}
        self.qkv_activations = {"q": qk_activation, "k": qk_activation, "v": v_activation}
        self.q_proj = nn.Linear(dim, heads * key_dim, bias=False)
        self.k_proj = nn.Linear(dim, key_heads * key_dim, bias=False)
        self.v_proj = nn.Linear(dim, value_heads * value_dim, bias=False)
        self.o_proj = nn.Linear(self.state_heads * value_dim, dim, bias=False)
        self.conv_size = conv_size
        if conv_size:
            self.q_conv = ShortConv(heads * key_dim, conv_size, activation=qk_activation)
            self.k_conv = ShortConv(key_heads * key_dim, conv_size, activation=qk_activation)
            self.v_conv = ShortConv(value_heads * value_dim, conv_size, activation=v_activation)

    def qkv(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k ``[B,T,H,K]`` and v ``[B,T,H,V]``: projection, convolution, activation, heads.

        The last of the four is the new state so far, the convolutions' inputs.
        """
        state: dict[str, Tensor] = {}
        out = []
        for name, heads in self.qkv_heads.items():
            y = self.get_submodule(f"{name}_proj")(x)
            if self.conv_size:
                y = self.convolve(f"{name}_conv", y, context, state)
            else:
                y = ACTIVATIONS[self.qkv_activations[name]](y)
            out.append(y.unflatten(-1, (heads, -1)))
        q, k, v = out
        return q, k, v, state

    def one_token(self, x: Tensor, context: Context, decay: Literal["head", "channel"]) -> bool:
        """Whether :meth:`decode` may take ``x``: a token a row, with a past and without gradients,
        padding or packing, where the recurrence's GPU kernels are chosen."""
        past = context.past("S")
        if x.shape[1] != 1 or past is None or torch.is_grad_enabled() or self.conv_size < 2:
            return False
        around = context.padding, context.cu_seqlens, context.here
        if any(a is not None for a in around) or past.dtype != torch.float32:
            return False
        asked = request(
            B=x.shape[0], T=1, H=self.state_heads, K=self.key_dim, V=self.value_dim,
            device=x.device.type, dtype=self.q_proj.weight.dtype, decay=decay, delta=self.delta,
            state=True,
        )  # fmt: skip
        return past.is_contiguous() and choose("recurrence", BACKENDS, asked).name == "triton"

    def decode(
        self,
        x: Tensor,
        context: Context,
        *,
        decay: Tensor,
        beta: Tensor,
        gate: Tensor,
        norm: GatedRMSNorm,
        **options: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``x [B,1,C]`` in one launch between the projections, with the parameters ``A_log`` and
        ``dt_bias``; the state's memory is written over.

        Args:
            decay: raw, ``[B,1,HV]`` or ``[B,1,HV,K]``; beta: raw, ``[B,1,HV]``.
            gate: of the output norm, ``[B,1,HV V]``.
            **options: of :func:`subquad.ops.recurrence.triton.decode.decode_layer`.

        Returns:
            The normed and gated output ``[B,1,HV V]``, and the new state.
        """
        from subquad.ops.recurrence.triton.decode import decode_layer, fits_gate

        past = context.state
        assert past is not None
        q, k, v = (
            self.get_submodule(f"{n}_proj")(x[:, 0]).unflatten(-1, (heads, -1))
            for n, heads in self.qkv_heads.items()
        )
        gate = gate[:, 0].unflatten(-1, (self.state_heads, -1))
        inside = fits_gate(self.key_dim, self.value_dim)
        o, nexts = decode_layer(
            q, k, v,
            pasts=(past["q_conv"], past["k_conv"], past["v_conv"]),
            weights=(self.q_conv.weight[:, 0], self.k_conv.weight[:, 0], self.v_conv.weight[:, 0]),
            decay=decay[:, 0], A_log=self.A_log, dt_bias=self.dt_bias, beta=beta[:, 0],
            state=past["S"], gate=gate if inside else None, norm=norm.weight if inside else None,
            activation=norm.activation, norm_eps=norm.eps, **options,
        )  # fmt: skip
        if not inside:
            o = norm(o, gate)
        q, k, v = nexts
        state = {"q_conv": q, "k_conv": k, "v_conv": v, "S": past["S"]}
        return o.flatten(1)[:, None], state


def low_rank(dim: int, rank: int, width: int, *, bias: bool = False) -> nn.Sequential:
    """``W2 (W1 x) (+ b)``, W1 ``[rank, dim]`` and W2 ``[width, rank]``, as parameters 0 and 1."""
    checks.positive("rank", rank)
    return nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, width, bias=bias))


def flops_of_weights(mixer: nn.Module, T: int) -> int:
    """A multiply and an add for every weight of a projection or convolution, T tokens long."""
    kinds = (nn.Linear, ShortConv)
    return 2 * T * sum(m.weight.numel() for m in mixer.modules() if isinstance(m, kinds))
