"""What must hold of the sparse mixers: limits, counts, who sees whom, and the definitions."""

import math
from itertools import pairwise, product

import pytest
import torch

from kit import close
from subquad import create_mixer, mask
from subquad.mask.grid import axes
from subquad.mask.simulate import simulate
from subquad.mixers.infllm_v2 import block_scores
from subquad.mixers.ls_attention import equal_mlp_dim
from subquad.mixers.masformer import full_layers
from subquad.mixers.parts.rotary import rope_frequencies, rotate
from subquad.mixers.power_attention import pattern
from subquad.ops import select
from subquad.ops.attention import attention, merge, windows
from subquad.ops.attention.chosen import chosen
from subquad.ops.attention.neighborhood import best_tile, neighborhood

DIM, HEADS = 16, 4


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mixer(key, **options):
    torch.manual_seed(3)
    return create_mixer(key, **{"dim": DIM, "heads": HEADS, **options}).double()


def twin(of, key="softmax", **options):
    """A mixer of another kind with the weights of ``of``."""
    made = mixer(key, **options)
    made.load_state_dict(of.state_dict())
    return made


def influence(layers, x, at):
    """Which positions of x the output at ``at`` depends on after the layers, bool ``[T]``."""
    x = x.clone().requires_grad_()
    h = x
    for layer in layers:
        h = h + layer(h)[0]
    (g,) = torch.autograd.grad(h[:, at].square().sum(), x)
    return g.abs().amax((0, 2)) > 0


def axis_mask(L, w, s, d, c):
    """One axis of a neighborhood, entry by entry."""
    m = torch.zeros(L, L, dtype=torch.bool)
    for i in range(L):
        g, i_, n = i % d, i // d, -(-(L - i % d) // d)
        if c:
            low, high = max(min(i_ // s * s + s - 1, n - 1) - w + 1, 0), i_ + 1
        else:
            leader = min(i_ // s * s + s // 2, n - 1)
            low = min(max(leader - w // 2, 0), n - w)
            high = low + w
        m[i, [g + j * d for j in range(low, high)]] = True
    return m


class TestNeighborhood:
    @pytest.mark.parametrize("seed", range(12))
    def test_any_grid_in_any_order(self, seed):
        """Masks, tiles and the operation, forward and backward, against the product of the axes."""
        g = torch.Generator().manual_seed(seed)

        def draw(low, high):
            return int(torch.randint(low, high + 1, (), generator=g))

        rank = 1 + seed % 3
        rows, want = [], torch.ones(1, 1, dtype=torch.int)
        for _ in range(rank):
            L = draw(2, (40, 9, 5)[rank - 1])
            w = draw(2, L)
            rows.append((L, w, draw(1, w), draw(1, L // w), bool(draw(0, 1))))
            want = torch.kron(want, axis_mask(*rows[-1]).int())
        grid, w, s, d, c = zip(*rows)
        T = math.prod(grid)
        m = mask.neighborhood(grid, w, s, d, c)
        assert torch.equal(m.dense(T, T), want.bool())
        assert m.area(T, T) == int(want.sum())
        tile = tuple(draw(1, 4) for _ in grid)
        q, k, v = (randn(1, *grid, h, 4).requires_grad_() for h in (4, 2, 2))
        got = [
            neighborhood(q, k, v, w, stride=s, dilation=d, causal=c, tile=t, return_lse=True)
            for t in (None, tile)
        ]
        scores = torch.einsum("bihk,bjhk->bhij", *(
            t.flatten(1, -3).repeat_interleave(4 // t.shape[-2], 2) for t in (q, k)
        )) / 2  # fmt: skip
        scores = scores.masked_fill(~want.bool(), -torch.inf)
        values = v.flatten(1, -3).repeat_interleave(2, 2)
        dense = torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), values)
        grads = torch.autograd.grad(dense.sin().sum(), (q, k, v), retain_graph=True)
        for o, lse in got:
            close(o.flatten(1, -3), dense)
            close(lse.flatten(1, -2), scores.logsumexp(-1).transpose(1, 2))
            for a, b in zip(torch.autograd.grad(o.sin().sum(), (q, k, v)), grads):
                close(a, b)

    def test_every_query_has_a_whole_window(self):
        m = mask.neighborhood((7, 9), (3, 4), dilation=(2, 1)).dense(63, 63)
        assert (m.sum(1) == 12).all()
        causal = mask.neighborhood((20,), 6, causal=True).dense(20, 20)
        assert causal.sum(1).tolist() == [min(i + 1, 6) for i in range(20)]
        assert mask.neighborhood((20,), 5).dense(20, 20)[0].nonzero().flatten().tolist() == [
            0, 1, 2, 3, 4,
        ]  # fmt: skip

    def test_limits(self):
        assert mask.neighborhood((4, 5), (4, 5)).dense(20, 20).all()
        assert torch.equal(
            mask.neighborhood((12,), 12, causal=True).dense(12, 12), mask.causal().dense(12, 12)
        )
        assert torch.equal(
            mask.neighborhood((12,), 4, causal=True).dense(12, 12), mask.window(3).dense(12, 12)
        )
        x = randn(2, 12, DIM)
        near = mixer("neighborhood", window=4, causal=True, bias=False)
        close(near(x)[0], twin(near, window=4, rope_theta=None)(x)[0])
        close(near(x, grid=(12,))[0], near(x)[0])

    def test_dilation_is_apart_residue_classes(self):
        q, k, v = (randn(1, 23, 2, 4) for _ in range(3))
        whole = neighborhood(q, k, v, 5, dilation=3)
        for g in range(3):
            part = neighborhood(q[:, g::3], k[:, g::3], v[:, g::3], 5)
            close(whole[:, g::3], part)
        k.requires_grad_()
        (grad,) = torch.autograd.grad(
            neighborhood(q, k, v, 5, dilation=3)[:, 1::3].square().sum(), k
        )
        assert grad[:, 0::3].abs().max() == grad[:, 2::3].abs().max() == 0

    def test_inside_it_moves_with_the_picture(self):
        m = mask.neighborhood((11, 11), 5).dense(121, 121).view(11, 11, 11, 11)
        assert torch.equal(m[4, 5, 1:9, 2:10], m[5, 6, 2:10, 3:11])

    def test_additional_tokens_are_one_softmax(self):
        q, k, v = (randn(2, 4, 5, 2, 4) for _ in range(3))
        extra = randn(2, 3, 2, 4), randn(2, 3, 2, 4)
        o, lse = neighborhood(q, k, v, 3, extra=extra, return_lse=True)
        keys, values = (torch.cat([a.flatten(1, 2), b], 1) for a, b in zip((k, v), extra))
        keep = torch.cat(
            [mask.neighborhood((4, 5), 3).dense(20, 20), torch.ones(20, 3, dtype=torch.bool)], 1
        )
        scores = torch.einsum("bihk,bjhk->bhij", q.flatten(1, 2), keys) / 2
        scores = scores.masked_fill(~keep, -torch.inf)
        want = torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), values)
        close(o.flatten(1, 2), want)
        close(lse.flatten(1, 2), scores.logsumexp(-1).transpose(1, 2))

    def test_golden_additional_tokens_and_cases(self, shared):
        from safetensors.torch import load_file

        path = shared / "golden" / "neighborhood.safetensors"
        if not path.is_file():
            pytest.skip("no golden vectors for neighborhood")
        g = load_file(path)
        q, k, v, ak, av = (g[f"addkv.{n}"] for n in ("q", "k", "v", "ak", "av"))
        o, lse = neighborhood(q, k, v, 3, extra=(ak, av), return_lse=True)
        close(o, g["addkv.out"], 1e-5)
        close(lse, g["addkv.lse"], 1e-5)
        for name in sorted({n.partition(".")[0] for n in g if n.endswith(".cfg")}):
            grid, w, s, d, c = g[f"{name}.cfg"].tolist()
            inputs = [g[f"{name}.{n}"].clone().requires_grad_() for n in "qkv"]
            o, lse = neighborhood(
                *inputs, w, stride=s, dilation=d, causal=[bool(x) for x in c], return_lse=True
            )
            T = math.prod(grid)
            dense = mask.neighborhood(grid, w, s, d, [bool(x) for x in c]).dense(T, T)
            assert torch.equal(dense, g[f"{name}.mask"].bool()), name
            close(o, g[f"{name}.out"], 1e-5)
            close(lse, g[f"{name}.lse"], 1e-5)
            o.square().mean().backward()
            for n, t in zip("qkv", inputs):
                close(t.grad, g[f"{name}.g.{n}"], 1e-6)

    def test_two_dilations_reach_further(self):
        x = randn(1, 64, DIM)
        near = [mixer("neighborhood", window=5) for _ in range(2)]
        far = [near[0], mixer("neighborhood", window=5, dilation=8)]
        assert influence(near, x, 32).sum() == 9
        assert influence(far, x, 32).sum() == 25

    @pytest.mark.parametrize("copied", [1 << 22, 300])
    def test_relative_bias(self, copied, monkeypatch):
        """Added by the distance inside the dilation group, clamped windows included."""
        monkeypatch.setattr(windows, "COPIED", copied)
        grid, w, d, H = (7, 6), (3, 5), (2, 1), 2
        q, k, v = (randn(2, *grid, H, 4).requires_grad_() for _ in range(3))
        bias = randn(H, 5, 9).requires_grad_()
        T = math.prod(grid)
        rows, columns = torch.arange(T) // 6, torch.arange(T) % 6
        apart = [(x[None] - x[:, None]) // s for x, s in ((rows, 2), (columns, 1))]
        keep = mask.neighborhood(grid, w, dilation=d).dense(T, T)
        added = bias[:, (apart[0] + 2).clamp(0, 4), (apart[1] + 4).clamp(0, 8)]
        scores = torch.einsum("bihk,bjhk->bhij", q.flatten(1, 2), k.flatten(1, 2)) / 2 + added
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1)
        want = torch.einsum("bhij,bjhv->bihv", weights, v.flatten(1, 2)).unflatten(1, grid)
        got = windows.biased_neighborhood(q, k, v, bias, w, dilation=d)
        close(got, want)
        inputs = (q, k, v, bias)
        grads = (torch.autograd.grad(o.sin().sum(), inputs) for o in (got, want))
        for a, b in zip(*grads):
            close(a, b)
        biased = mixer("neighborhood", window=w, dilation=d, relative_bias=True)
        x = randn(1, T, DIM)
        with torch.no_grad():
            biased.relative_bias.zero_()
        weights = {n: t for n, t in biased.state_dict().items() if n != "relative_bias"}
        plain = mixer("neighborhood", window=w, dilation=d)
        plain.load_state_dict(plain.translate(weights))
        close(biased(x, grid=grid)[0], plain(x, grid=grid)[0])
        for options, message in (
            ({"window": (3, 3), "registers": 2}, "relative_bias takes no"),
            ({"window": 3, "causal": True}, "relative_bias takes no"),
        ):
            with pytest.raises(ValueError, match=message):
                mixer("neighborhood", relative_bias=True, **options)
        with pytest.raises(ValueError, match="window must be odd"):
            mixer("neighborhood", relative_bias=True, window=(4, 3))(x, grid=grid)

    def test_sorting_is_chosen_where_it_pays(self):
        assert best_tile(axes((32, 32), 7), "cpu") is None
        assert best_tile(axes((128, 128), 13), "cuda") == (8, 16)
        assert best_tile(axes((128, 128), 13), "cpu") == (4, 8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"window": (1, 3)}, "window must lie in 2"),
            ({"window": (3, 3, 3, 3)}, "1 to 3 axes"),
            ({"window": (3, 3), "dilation": (1, 0)}, "dilation must be a positive int"),
            ({"window": (3, 3), "causal": (True,)}, "causal must be one value or 2"),
        ],
    )
    def test_refuses_windows_that_fit_no_grid(self, options, message):
        with pytest.raises(ValueError, match=message):
            mixer("neighborhood", **options)

    def test_refuses_grids_that_do_not_fit(self):
        x = randn(1, 20, DIM)
        image = mixer("neighborhood", window=(3, 3), dilation=(2, 1))
        for grid, message in (((4, 6), "grid"), ((20,), "2 axes"), ((4, 5), "dilation must lie")):
            with pytest.raises(ValueError, match=message):
                image(x, grid=grid)
        with pytest.raises(ValueError, match="2 axes"):
            image(x)
        with pytest.raises(ValueError, match="no state, padding"):
            image(x, grid=(10, 2), padding=torch.zeros(1, 20, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"grid \(4, 5\) has 20 tokens"):
            mask.neighborhood((4, 5), 3).dense(19, 19)


class TestGNA:
    def test_a_stride_of_one_is_a_neighborhood(self):
        x = randn(2, 20, DIM)
        plain = mixer("neighborhood", window=(2, 3))
        close(
            plain(x, grid=(4, 5))[0], twin(plain, "gna", window=(2, 3), stride=1)(x, grid=(4, 5))[0]
        )

    def test_a_stride_of_the_window_is_blocks(self):
        blocks = mask.block_band(0, 0, 4).dense(12, 12)
        assert torch.equal(mask.neighborhood((12,), 4, 4).dense(12, 12), blocks)
        last = mask.neighborhood((10,), 4, 4).dense(10, 10)[-1]
        assert last.nonzero().flatten().tolist() == [6, 7, 8, 9]
        assert mask.neighborhood((6, 5), (6, 5), (4, 3)).dense(30, 30).all()

    def test_a_group_shares_its_keys(self):
        m = mask.neighborhood((24,), 7, 3).dense(24, 24)
        assert (m.sum(1) == 7).all()
        for first in range(0, 24, 3):
            assert (m[first : first + 3] == m[first]).all()

    def test_causal_counts(self):
        w, s = 6, 4
        m = mask.neighborhood((40,), w, s, causal=True).dense(40, 40)
        assert not m.triu(1).any()
        assert m.diagonal().all()
        assert m.sum(1)[8:36].tolist() == [w - s + 1 + i % s for i in range(8, 36)]

    def test_a_grid_ends_where_a_text_goes_on(self):
        """The last group of a grid is led by its last member, that of a text by one to come."""
        one = mixer("gna", window=4, stride=4, causal=True, bias=False)
        x = randn(1, 8, DIM)
        part, whole = one(x[:, :6])[0], one(x)[0]
        close(part, whole[:, :6])
        assert not torch.allclose(one(x[:, :6], grid=(6,))[0], part)
        close(one(x, grid=(8,))[0], whole)

    @pytest.mark.parametrize(
        ("w", "s", "mean", "least", "most"),
        [(16, 1, 2.75, 2, 3), (16, 4, 2.75, 2, 3), (16, 8, 2.75, 2, 3), (16, 16, 2, 2, 2),
         (24, 1, 4.25, 3, 5), (24, 8, 3, 3, 3)],
    )  # fmt: skip
    def test_tiles_of_a_line(self, w, s, mean, least, most):
        found = simulate(axes((64,), w, s), (8,))
        assert (found.mean, found.most) == (mean, most)
        tiles = mask.neighborhood((64,), w, s).tiles(64, 64, 8)
        counts = tiles.ptr.diff()
        assert (int(counts.min()), int(counts.max())) == (least, most)

    def test_tiles_of_images_and_volumes(self):
        assert simulate(axes((16, 16), 12, 1), (4, 4)).mean == 12.25
        assert simulate(axes((16, 16), 12, 1), (4, 4)).most == 16
        assert simulate(axes((16, 16), 12, 4), (4, 4)).mean == 9
        video = (30, 48, 80), (18, 24, 24)
        best = simulate(axes(*video, (16, 8, 8)), (2, 8, 8))
        assert best.bound == pytest.approx(best.flop_bound) == pytest.approx(11.111, abs=1e-3)
        assert best.perfect
        assert simulate(axes(*video), (2, 8, 16)).bound == pytest.approx(4.6, abs=0.01)
        assert simulate(axes((256, 256), 80, 16), (16, 16), (8, 16)).bound == pytest.approx(10.24)
        assert simulate(axes((256, 256), 80), (16, 16), (8, 16)).bound == pytest.approx(
            7.06, abs=0.01
        )
        image = axes((16, 16), 8, 4)
        assert simulate(image, (4, 4)).mean == 6.25
        assert simulate(image, (4, 4), mode="flat").mean == 8

    def test_dynamic_tiles_inside(self):
        for w, s, T in ((64, 1, 16), (64, 4, 16), (64, 32, 16), (48, 16, 16)):
            found = simulate(axes((4096,), w, s), (T,), mode="dynamic").mean
            span = w + (T // s - 1) * s if T % s == 0 else w
            assert abs(found - math.ceil(span / T)) < 0.1

    @pytest.mark.parametrize("mode", ["static", "flat"])
    def test_counts_are_those_of_the_tiles_themselves(self, mode):
        made = axes((10, 6), (5, 3), (2, 1), (1, 2), (False, True))
        found = simulate(made, (2, 3), mode=mode)
        m = mask.neighborhood((10, 6), (5, 3), (2, 1), (1, 2), (False, True),
                              tile=(2, 3) if mode == "static" else None)  # fmt: skip
        tiles = m.tiles(m.tokens, m.tokens, 6)
        assert found.mean == len(tiles.column) / tiles.rows
        assert found.wasted == pytest.approx(1 - tiles.area / (len(tiles.column) * 36))

    def test_sorted_tiles_are_found_full(self):
        m = mask.neighborhood((16, 16), 12, 4, tile=(4, 4))
        tiles = m.tiles(256, 256, 16)
        assert (tiles.pattern < 0).all()
        assert len(tiles.column) == 16 * 9

    @pytest.mark.parametrize("stride", [0, 5, (1, 5)])
    def test_refuses_strides_beyond_the_window(self, stride):
        with pytest.raises(ValueError, match=r"stride must lie in 1\.\.4"):
            mixer("gna", window=(4, 4), stride=stride)


class TestPowerAttention:
    def test_limit(self):
        x = randn(2, 30, DIM)
        power = mixer("power_attention", block=4, window=8)
        close(power(x)[0], twin(power)(x)[0])

    def test_the_pattern_entry_by_entry(self):
        for S, W, T in ((1, 1, 20), (3, 2, 31), (5, 1, 33), (8, 3, 7)):
            m = pattern(T, S, W).dense(T, T)
            for i, j in product(range(T), range(T)):
                D = i // S - j // S
                want = j <= i and (D < W or D & (D - 1) == 0 or j < S)
                assert m[i, j] == want, (S, W, i, j)

    def test_layers_reach_powers_of_two(self):
        n = 32
        step = torch.zeros(n, n, dtype=torch.bool)
        for i, j in product(range(n), range(n)):
            step[i, j] = i >= j and (i - j) & (i - j - 1) == 0
        seen = torch.eye(n, dtype=torch.bool)
        distance = torch.full((n, n), -1)
        distance[seen] = 0
        for d in range(1, 6):
            seen = (seen.int() @ step.int()) > 0
            distance[seen & (distance < 0)] = d
            near = torch.ones(n, n).tril().triu(1 - 2**d).bool()
            assert seen[near].all()
        assert seen[torch.ones(n, n).tril().bool()].all()
        for i, j in torch.ones(n, n).tril().nonzero().tolist():
            assert distance[i, j] == (i - j).bit_count()

    def test_ten_blocks_of_128(self):
        S, n = 8, 128
        row = pattern(n * S, S, 5).dense(1, n * S, n * S - 1)[0].view(n, S)
        distances = (n - 1 - row.any(1).nonzero().flatten()).tolist()
        assert distances == [127, 64, 32, 16, 8, 4, 3, 2, 1, 0]

    def test_gradients_reach_every_token(self):
        T, S = 32, 2
        x = randn(1, T, DIM)
        layers = [mixer("power_attention", block=S, window=1) for _ in range(4)]
        assert influence(layers, x, T - 1).all()
        window = [mixer("softmax", window=2 * S) for _ in range(4)]
        assert influence(window, x, T - 1).sum() == 4 * (2 * S - 1) + 1


class TestLongLoRA:
    def test_one_group(self):
        """Half of the heads attend in full, the others in two halves."""
        T = 12
        q, k, v = (randn(1, T, HEADS, 4) for _ in range(3))
        s2 = mixer("longlora", group=T)
        o = attention(q, k, v, s2._part(T))
        full = attention(q, k, v, mask.causal())
        close(o[:, :, :2], full[:, :, :2])
        for half in (slice(0, 6), slice(6, 12)):
            part = attention(q[:, half], k[:, half], v[:, half], mask.causal())
            close(o[:, half, 2:], part[:, :, 2:])

    def test_shifted_heads_alone_connect_groups(self):
        m = mixer("longlora", group=8)._part(32).dense(32, 32)[0]
        for g in range(3):
            later, earlier = slice(8 * g + 8, 8 * g + 12), slice(8 * g + 4, 8 * g + 8)
            assert not m[0, later, earlier].any()
            assert m[1, later, earlier].all()

    @pytest.mark.parametrize("T", [32, 30, 29, 5, 1])
    def test_default_group_is_a_quarter(self, T):
        G = mixer("longlora").groups(T)
        assert G % 2 == 0
        assert 0 <= G - T / 4 < 2

    def test_only_wrapping_leaks(self):
        x = randn(1, 32, DIM)
        wrap = mixer("longlora", variant="wrap")
        seen = influence([wrap], x, 2)
        assert seen[32 - 4 :].all()
        assert not influence([twin(wrap, "longlora")], x, 2)[3:].any()
        close(wrap(x)[0][:, 4:], twin(wrap, "longlora")(x)[0][:, 4:])
        with pytest.raises(ValueError, match="no state, padding"):
            wrap(x, cu_seqlens=torch.tensor([0, 32], dtype=torch.int32))

    def test_golden_wrap_and_full(self, shared):
        from safetensors.torch import load_file

        path = shared / "golden" / "longlora.safetensors"
        if not path.is_file():
            pytest.skip("no golden vectors for longlora")
        g = load_file(path)
        weights = {n[2:]: t for n, t in g.items() if n.startswith("w.")}
        for T in (64, 96):
            layer = create_mixer("longlora", dim=32, heads=4, kv_heads=2, variant="wrap")
            layer.load_state_dict(weights)
            x = g[f"t{T}.x"].clone().requires_grad_()
            y, _ = layer(x)
            close(y, g[f"t{T}.out_wrap"], 2e-4)
            y.square().mean().backward()
            close(x.grad, g[f"t{T}.g_wrap.x"], 2e-4)
            close(layer.eval()(g[f"t{T}.x"])[0], g[f"t{T}.out_full"], 2e-4)

    def test_reach_grows_by_half_a_group_a_layer(self):
        x = randn(1, 64, DIM)
        for n in (1, 2, 3):
            shifted = [mixer("longlora", group=8) for _ in range(n)]
            assert influence(shifted, x, 60).nonzero()[0] <= 60 - 4 * n
            apart = [mixer("longlora", group=8, variant="none") for _ in range(n)]
            assert influence(apart, x, 60).nonzero()[0] == 56

    def test_full_attention_in_eval(self):
        x = randn(2, 16, DIM)
        s2 = mixer("longlora", rope_factor=2.0)
        close(s2.eval()(x)[0], twin(s2, rope_factor=2.0)(x)[0])

    def test_interpolated_positions(self):
        """A text twice as long turns through the angles of the training."""
        long = mixer("softmax", rope_factor=2.0)
        x = randn(1, 8, DIM)
        places = torch.arange(0, 16, 2)[None]
        close(long(x, positions=places)[0], twin(long)(x)[0])
        with pytest.raises(ValueError, match="rope_factor must be at least 1"):
            mixer("softmax", rope_factor=0.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"heads": 1}, "heads must be even"),
            ({"group": 5}, "group must be even"),
            ({"ratio": 0.0}, "ratio must lie"),
            ({"variant": "roll"}, "variant must be one of"),
            ({"window": 4}, "window must be None"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            mixer("longlora", **options)


class TestMASFormer:
    def test_limits(self):
        x = randn(2, 20, DIM)
        for options in ({"full": 3, "layer": 2, "layers": 3}, {"block": 20}, {"block": 32}):
            one = mixer("masformer", **options)
            close(one(x)[0], twin(one)(x)[0])

    @pytest.mark.parametrize("previous", [0, 1, 2])
    def test_blocks_entry_by_entry(self, previous):
        one = mixer("masformer", block=4, previous=previous)
        T = 18
        m = one._blocks().dense(T, T)
        for i, j in product(range(T), range(T)):
            assert m[i, j] == (j <= i and i // 4 - j // 4 <= previous)

    def test_a_window_counts_one_more(self):
        one = mixer("masformer", short="window", block=5)
        assert influence([one], randn(1, 16, DIM), 12).nonzero().flatten().tolist() == [
            *range(7, 13)
        ]

    @pytest.mark.parametrize(("full", "reached"), [(0, 4), (1, 24)])
    def test_one_full_layer_reaches_everything(self, full, reached):
        layers = [
            mixer("masformer", block=4, previous=0, full=full, layer=n, layers=3) for n in range(3)
        ]
        assert influence(layers, randn(1, 24, DIM), 23).sum() == reached

    def test_blocks_reach_a_block_a_layer(self):
        layers = [mixer("masformer", block=4, full=0, layer=n, layers=3) for n in range(3)]
        assert influence(layers, randn(1, 24, DIM), 23).nonzero()[0] == 23 - (3 * 4 + 3)

    def test_placements(self):
        assert full_layers(8, 2) == {0, 1}
        assert full_layers(8, 2, "top") == {6, 7}
        assert full_layers(8, 2, "interleaved") == {0, 4}
        assert full_layers(8, 0, [3, 5]) == {3, 5}
        for bad, message in (("middle", "placement must be one of"), ([8], "in 0..7")):
            with pytest.raises(ValueError, match=message):
                full_layers(8, 2, bad)

    def test_the_state_stays_small(self):
        one = mixer("masformer", block=4)
        state, x = None, randn(1, 40, DIM)
        for t in range(40):
            _, state = one(x[:, t : t + 1], state=state)
            assert state["k"].shape[1] <= 8

    def test_cost_ratio(self):
        L, full, b, T = 8, 2, 64, 8192
        layers = [mixer("masformer", full=full, block=b, layer=n, layers=L) for n in range(L)]
        ratio = sum(one.pairs(T) for one in layers) / (L * twin(layers[0]).pairs(T))
        # A short layer's block of queries sees half of its own block, on average, and the previous:
        # 1.5 b pairs a token, where full attention has T / 2.
        assert ratio == pytest.approx((full + (L - full) * 3 * b / T) / L, rel=0.005)

    def test_refuses(self):
        for options, message in (
            ({"short": "band"}, "short must be one of"),
            ({"block": 0}, "block must be a positive int"),
            ({"window": 3}, "give way to block"),
        ):
            with pytest.raises(ValueError, match=message):
                mixer("masformer", **options)


class TestLSAttention:
    def test_limits(self):
        x = randn(2, 14, DIM)
        wide = mixer("ls_attention", span=14)
        close(wide(x)[0], twin(wide, rope_theta=None)(x)[0])
        far = mixer("ls_attention", local_heads=0)
        close(far(x)[0], twin(far, rope_theta=None)(x)[0])
        near = mixer("ls_attention", local_heads=HEADS, span=3)
        close(near(x)[0], twin(near, rope_theta=None, window=3)(x)[0])
        layers = [mixer("ls_attention", local_heads=HEADS, span=3) for _ in range(3)]
        assert influence(layers, x, 13).nonzero()[0] == 13 - 3 * 2

    def test_local_heads_come_first(self):
        x = randn(1, 12, DIM)
        for inclusive, keys in ((False, 4), (True, 5)):
            one = mixer("ls_attention", local_heads=3, span=4, inclusive_span=inclusive)
            with torch.no_grad():
                one.o_proj.weight[:] = torch.eye(DIM)
            for head in range(HEADS):
                x = x.detach().requires_grad_()
                out = one(x)[0][:, 11, 4 * head : 4 * head + 4]
                (g,) = torch.autograd.grad(out.square().sum(), x)
                assert (g.abs().amax((0, 2)) > 0).sum() == (keys if head < 3 else 12)

    def test_the_state_shrinks_to_the_global_heads(self):
        one = mixer("ls_attention", span=4)
        ratio = one.state_bytes(100_000) / twin(one).state_bytes(100_000)
        assert ratio == pytest.approx(1 / HEADS, rel=1e-3)
        _, state = one(randn(1, 20, DIM))
        assert state["local_k"].shape == (1, 4, 3, 4)
        assert state["k"].shape == (1, 20, 1, 4)

    def test_equal_parameters(self):
        for heads, head_dim in ((6, 32), (3, 32), (4, 16)):
            inner = equal_mlp_dim(192, heads, head_dim, mlp_dim=4 * 192)
            assert inner == 4 * 192 + 2 * (192 - heads * head_dim)
            assert 4 * 192 * heads * head_dim + 2 * 192 * inner == 12 * 192**2

    def test_fewer_pairs(self):
        one = mixer("ls_attention", span=50)
        assert one.flops(4096) < 0.5 * twin(one).flops(4096)

    def test_refuses(self):
        for options, message in (
            ({"local_heads": 5}, "local_heads must lie in 0..4"),
            ({"kv_heads": 2, "local_heads": 3}, "local_heads must be a multiple of 2"),
            ({"span": 0}, "span must be a positive int"),
        ):
            with pytest.raises(ValueError, match=message):
                mixer("ls_attention", **options)


def infllm(**options):
    small = {"kv_heads": 2, "block": 4, "init": 1, "local": 1, "topk": 3, "dense_len": 0}
    return mixer("infllm_v2", **{**small, **options})


class TestInfLLMv2:
    def test_limits(self):
        x = randn(2, 23, DIM)
        for options in ({"topk": 6}, {"local": 6}, {"dense_len": 24}):
            one = infllm(**options)
            close(one(x)[0], twin(one, kv_heads=2)(x)[0])

    def test_the_switch(self):
        x = randn(1, 24, DIM)
        one = infllm(dense_len=24)
        dense = twin(one, kv_heads=2)
        assert torch.equal(one(x[:, :23])[0], dense(x[:, :23])[0])
        close(
            one(x)[0],
            twin(one, "infllm_v2", kv_heads=2, block=4, local=1, topk=3, dense_len=0)(x)[0],
        )
        assert not torch.allclose(one(x)[0], dense(x)[0])
        # The token that brings the past to the threshold is sparse.
        _, state = one(x[:, :23])
        close(one(x[:, 23:], state=state)[0], one(x)[0][:, 23:])

    def choice(self, T=48, **options):
        one = infllm(**options)
        q, k = randn(2, T, HEADS, 4), randn(2, T, 2, 4)
        windows = select.pool(k, 2, stride=1)
        return one, q, k, windows, one.choose(q, windows, T)

    def test_what_is_always_kept(self):
        one, *_, index = self.choice(local=2)
        for i in range(48):
            own = i // 4
            for lists in index[:, :, i].flatten(0, 1).tolist():
                kept = {b for b in lists if b >= 0}
                assert {0, own, max(own - 1, 0), max(own - 2, 0)} <= kept
                assert max(kept) == own
                assert len(kept) == min(own + 1, one.kept)

    def test_choices_are_shared_in_a_group_only(self):
        *_, index = self.choice()
        assert index.shape == (2, 2, 48, 4)
        assert (index[:, 0] != index[:, 1]).any()

    def test_dropped_blocks_do_not_matter(self):
        _, q, k, _, index = self.choice()
        v = randn(*k.shape)
        dropped = next(b for b in range(12) if b not in index[0, 0, 47].tolist())
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[0, dropped * 4 : dropped * 4 + 4, 0] += 1
        changed_v[0, dropped * 4 : dropped * 4 + 4, 0] += 1
        before, after = (chosen(q, k_, v_, index, 4) for k_, v_ in ((k, v), (changed_k, changed_v)))
        assert torch.equal(before[0, 47, :2], after[0, 47, :2])
        assert not torch.equal(before[0, :, :2], after[0, :, :2])

    def test_the_approximation_keeps_the_choice_of_a_single_head(self):
        """Coarse windows only rescale a head's row (once there is one)."""
        q, k = randn(1, 96, 2, 4), randn(1, 96, 2, 4)
        windows = select.pool(k, 8, stride=4)
        options = {"heads": 2, "kv_heads": 2, "head_dim": 4, "block": 16, "topk": 2}
        fast, exact = (infllm(**options, approximate=a) for a in (True, False))
        assert torch.equal(fast.choose(q, windows, 96), exact.choose(q, windows, 96))

    def test_block_scores_reach_over_the_edges(self):
        mass = torch.arange(1.0, 12.0)[None]
        assert block_scores(mass, 3)[0].tolist() == [4.0, 8.0, 11.0]
        assert block_scores(mass[:, :3], 2)[0].tolist() == [3.0, -math.inf]
        assert block_scores(mass[:, :0], 1)[0].tolist() == [-math.inf]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_scores_go_to_the_earlier_block(self, dtype):
        scores = torch.tensor([[0.5, 2.0, 1.0, 2.0, 2.0, -1.0, -torch.inf]], dtype=dtype)
        for k, want in ((1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])):
            assert select.top(scores, k, size=1, causal=False)[0].tolist() == want
        assert select.top(scores, 7, size=1, causal=False)[0].tolist() == [0, 1, 2, 3, 4, 5, -1]

    def test_chosen_equals_the_mask(self):
        _, q, k, _, index = self.choice(T=30)
        q, k, v = (t.requires_grad_() for t in (q, k, randn(*k.shape)))
        got = chosen(q, k, v, index, 4)
        want = attention(q, k, v, mask.causal() & mask.blocks(index, 4, 1))
        close(got, want)
        grads = (torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (got, want))
        for a, b in zip(*grads):
            close(a, b)

    def test_counted_pairs_are_those_read(self):
        one, *_, index = self.choice(T=46)
        read = sum(
            min(4, i + 1 - 4 * b) for i in range(46) for b in index[0, 0, i].tolist() if b >= 0
        )
        windows = sum(
            max(0, (i + 1 - wide) // far + 1) if i + 1 >= wide else 0
            for wide, far in ((2, 1), (8, 4))
            for i in range(46)
        )
        assert one.pairs(46) == read + windows // 2

    def test_refuses(self):
        for options, message in (
            ({"block": 6}, "block windows must divide block"),
            ({"topk": 1}, "topk must hold"),
            ({"nope": True, "rope_theta": None}, "nope needs rotated keys"),
            ({"local": -1}, "local must be a non-negative int"),
        ):
            with pytest.raises(ValueError, match=message):
                infllm(**options)


def core_attention(q, k, v, g, s):
    """One head ``[T,K]``, token by token, as the equations have it."""
    scale, m = q.shape[1] ** -0.5, len(q) // g
    groups = [slice(n * g, n * g + g) for n in range(m)]
    share = [(scale * k[own] @ q[own.stop - 1]).softmax(0) for own in groups]
    cores = [[a @ t[own] for a, own in zip(share, groups)] for t in (k, v)]
    rows = []
    for i in range(1, len(q) + 1):
        J = max(0, (i - s) // g)
        keys, values = (torch.stack([*c[:J], *t[J * g : i]]) for c, t in zip(cores, (k, v)))
        rows.append((scale * keys @ q[i - 1]).softmax(0) @ values)
    return torch.stack(rows)


class TestCCA:
    @pytest.mark.parametrize(("g", "s", "T"), [(3, 4, 23), (4, 1, 17), (5, 2, 30), (8, 99, 20)])
    def test_equal_to_the_sums(self, g, s, T):
        one, x = mixer("cca", group=g, local=s), randn(1, T, DIM)
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)) for p in (one.q_proj, one.k_proj, one.v_proj))
        turns = rope_frequencies(4, wide=True)
        q, k = (rotate(t, torch.arange(T)[None], turns) for t in (q, k))
        heads = [core_attention(q[0, :, h], k[0, :, h], v[0, :, h], g, s) for h in range(HEADS)]
        close(one(x)[0][0], one.o_proj(torch.cat(heads, -1)))

    def test_limits(self):
        x = randn(2, 24, DIM)
        for options in ({"group": 1, "local": 3}, {"group": 4, "local": 24}):
            one = mixer("cca", **options)
            close(one(x)[0], twin(one)(x)[0])
        one = mixer("cca", group=1, local=3, core_rope="rotated")
        close(one(x)[0], twin(one)(x)[0])

    @pytest.mark.parametrize(("g", "s"), [(1, 1), (3, 4), (4, 1), (5, 9)])
    def test_every_token_counts_once(self, g, s):
        one, T = mixer("cca", group=g, local=s), 40
        near, far = one._near().dense(T, T), one._far().dense(T, T // g, 0)
        for i in range(T):
            covered = [n * g + j for n in far[i].nonzero().flatten().tolist() for j in range(g)]
            covered += near[i].nonzero().flatten().tolist()
            assert covered == list(range(i + 1))
            for n in far[i].nonzero().flatten().tolist():
                assert i + 1 >= (n + 1) * g + s

    def test_a_group_of_equal_keys_counts_as_one(self):
        one = mixer("cca", group=4, local=2, rope_theta=None)
        k = randn(1, 1, 1, HEADS, 4).expand(1, 3, 4, HEADS, 4)
        v = randn(1, 3, 4, HEADS, 4)
        core_k, core_v = one._pool(randn(1, 3, HEADS, 4), k, v)
        close(core_k, k[:, :, 0])
        close(core_v, v.mean(2))

    def test_rotated_cores_stand_at_their_last_token(self):
        """Keys that differ by their rotation alone pool to the last one."""
        one = mixer("cca", group=4, local=2, core_rope="rotated")
        plain = randn(1, 1, HEADS, 4).expand(1, 4, HEADS, 4)
        turned = rotate(plain, torch.arange(4, 8)[None], rope_frequencies(4, wide=True))
        core_k, _ = one._pool(randn(1, 1, HEADS, 4), turned[:, None], turned[:, None])
        close(core_k[:, 0], turned[:, 3])

    def test_the_state_stays_small(self):
        one = mixer("cca", group=4, local=6)
        state, x = None, randn(1, 60, DIM)
        for t in range(60):
            _, state = one(x[:, t : t + 1], state=state)
            assert state["k"].shape[1] + state["core_k"].shape[1] <= (t + 1) // 4 + 6 + 4

    def test_groups_may_change(self):
        one, x = mixer("cca", group=4, local=6), randn(1, 30, DIM)
        other = twin(one, "cca", group=3, local=5)
        one.group, one.local = 3, 5
        close(one(x)[0], other(x)[0])

    def test_refuses(self):
        for options, message in (
            ({"group": 0}, "group must be a positive int"),
            ({"local": 0}, "local must be a positive int"),
            ({"core_rope": "pre"}, "core_rope must be one of"),
            ({"sinks": 2}, "give way to local"),
        ):
            with pytest.raises(ValueError, match=message):
                mixer("cca", **options)


class TestRecipes:
    def model(self, **mixers):
        from subquad.models import CausalLM, CausalLMConfig

        torch.manual_seed(5)
        config = CausalLMConfig(
            vocab_size=23, dim=DIM, depth=2, layers="softmax", mlp_dim=24,
            mixers={"softmax": {"heads": HEADS, **mixers}}, init_std=0.3,
        )  # fmt: skip
        return CausalLM(config).eval()

    def test_a_pretrained_model_changes_its_masks(self):
        from subquad.recipes.swap import swap

        ids = torch.randint(23, (2, 24))
        model = self.model()
        want = model(ids).logits
        for new, wide, narrow in (
            ("masformer", {"full": 2}, {"full": 0, "block": 4}),
            ("power_attention", {"block": 24}, {"block": 2, "window": 1}),
            ("infllm_v2", {}, {"block": 4, "local": 0, "topk": 2, "dense_len": 0}),
            ("cca", {"local": 24}, {"group": 4, "local": 4}),
        ):
            torch.testing.assert_close(swap(model, "softmax", new, **wide)(ids).logits, want)
            assert not torch.allclose(swap(model, "softmax", new, **narrow)(ids).logits, want)
        with pytest.raises(ValueError, match="old must be one of"):
            swap(model, "gla", "softmax")
        with pytest.raises(ValueError, match="must have the weights of 'softmax'"):
            swap(model, "softmax", "gla")

    def test_longlora(self):
        from subquad.recipes import longlora

        ids = torch.randint(23, (2, 32))
        model = self.model()
        tuned = longlora.prepare(model, 32, trained=16)
        stretched = self.model(rope_factor=2.0)
        stretched.load_state_dict(model.state_dict())
        assert torch.equal(tuned.eval()(ids).logits, stretched(ids).logits)
        for name, p in tuned.named_parameters():
            assert p.requires_grad == any(part in name for part in ("lora_", "embed", "norm")), name
        assert all(p.shape[0] == 8 for n, p in tuned.named_parameters() if "lora_A" in n)
        tuned.train()
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-2)
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
        want = tuned.eval()(ids).logits
        done = longlora.finish(tuned)
        torch.testing.assert_close(done(ids).logits, want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(want, stretched(ids).logits)
        assert done.config.mixer("softmax") == ("softmax", {"heads": HEADS, "rope_factor": 2.0})


def test_explain_prints_the_bounds(capsys):
    pytest.importorskip("typer")
    from subquad.bench import tiles

    table = tiles.report({"grid": "16x16", "window": 12, "stride": 4, "tile": "4x4"})
    assert table.row_count == 3
    assert next(iter(table.columns[1].cells)) == "1.78x"
    for options, message in (
        ({"grid": 16}, "grid=,window="),
        ({"grid": 16, "window": 4, "size": 2}, "grid=,window="),
        ({"grid": "16xa", "window": 4}, "grid must be numbers joined by x"),
        ({"grid": 16, "window": 4, "tile": "2x2"}, "query_tile must have 1 sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            tiles.report(options)


def test_merge_joins_what_a_window_splits():
    q, k, v = (randn(1, 20, 2, 4) for _ in range(3))
    near = attention(q, k, v, mask.window(5), return_lse=True)
    far = attention(q, k, v, mask.causal() & ~mask.window(5), return_lse=True)
    close(merge([near, far])[0], attention(q, k, v, mask.causal()))


def test_placed_rows_are_rows_without_padding():
    """Block patterns count from each row's first token, whatever stands before it."""
    m = mask.causal() & mask.block_band(0, 1, 3)
    starts = torch.tensor([0, 4, -5])
    dense = mask.placed(m, starts).dense(9, 9)
    assert torch.equal(dense[0, 0], m.dense(9, 9))
    assert torch.equal(dense[1, 0, 4:, 4:], m.dense(5, 5))
    assert not dense[1, 0, :4].any()
    assert torch.equal(dense[2, 0], m.dense(14, 14)[5:, 5:])
    for bad, message in (
        (torch.zeros(2, 2, dtype=torch.int64), "queries must be int"),
        (torch.zeros(2), "queries must be int"),
    ):
        with pytest.raises(ValueError, match=message):
            mask.placed(m, bad)
    with pytest.raises(ValueError, match="keys must place 3 rows"):
        mask.placed(m, starts, starts[:2])


def test_pairwise_bands_partition_the_past():
    """Bands of blocks at distances 0, 1, 2, ... keep every earlier pair once."""
    bands = [mask.block_band(d, d, 4).dense(16, 16).int() for d in range(4)]
    assert torch.equal(sum(bands).bool(), mask.block_band(0, None, 4).dense(16, 16))
    assert sum(bands).max() == 1
    for a, b in pairwise(bands):
        assert not (a & b).any()
