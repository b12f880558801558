"""What the paper says of Titans, and what a model needs of it."""

from itertools import pairwise

import pytest
import torch

import subquad
from kit import close
from subquad.mixers.titans import VARIANTS
from subquad.models import CausalLM, CausalLMConfig

WIRINGS = ("lmm", "mac", "mag", "mal")


def build(**options):
    torch.manual_seed(0)
    mixer = subquad.create_mixer("titans", **{"dim": 8, "heads": 2, "chunk": 4, **options}).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


def tokens(*shape: int):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def test_a_wide_window_is_full_attention_with_the_persistent_tokens_as_sinks():
    """MAG with a constant gate."""
    mixer, x = build(variant="mag", window=64, persistent=3), tokens(2, 17, 8)
    full = subquad.create_mixer("softmax", dim=8, heads=2).double()
    full.load_state_dict(mixer.swa.state_dict())
    with torch.no_grad():
        mixer.memory_norm.weight.zero_()  # the gate is sigmoid(0)
    whole = torch.cat([mixer.persistent.expand(2, -1, -1), x], 1)
    want = 0.5 * mixer.attention_norm(full(whole)[0][:, 3:])
    close(mixer(x)[0], want)


def test_persistent_tokens_are_read_first():
    """LMM over [P, x] = the same layer without P over the two joined, at any length and packed."""
    mixer, x = build(persistent=3), tokens(1, 13, 8)
    bare = build(persistent=0)
    bare.load_state_dict({n: t for n, t in mixer.state_dict().items() if n != "persistent"})
    whole = torch.cat([mixer.persistent[None], x], 1)
    close(mixer(x)[0], bare(whole)[0][:, 3:])
    cu = torch.tensor([0, 5, 5, 13], dtype=torch.int32)
    y, state = mixer(x, cu_seqlens=cu)
    close(y[:, 5:], bare(torch.cat([mixer.persistent[None], x[:, 5:]], 1))[0][:, 3:])
    assert state["tokens"].tolist() == [8, 3, 11]


def test_without_forgetting_and_momentum_no_gate_is_there():
    mixer = build(momentum=False, forget=False)
    names = [n for n, _ in mixer.named_parameters()]
    assert not any("momentum" in n or "forget" in n for n in names)
    x = tokens(1, 9, 8)
    _, state = mixer(x)
    # Without momentum S is the last token's step alone; a longer memory of steps differs.
    assert not torch.allclose(build(forget=False)(x)[1]["momentum0"], state["momentum0"])


def test_mac_recalls_what_earlier_segments_wrote():
    """The first token of a segment asks a memory that the segment before has written, whatever the
    attention sees; inside the first segment it asks the first weights."""
    mixer, x = build(variant="mac", segment=4, chunk=2), tokens(1, 12, 8)
    _, state = mixer(x[:, :4])
    close(state["old0"], state["weights0"])
    _, later = mixer(x[:, 4:7], state=state.snapshot())
    close(later["old0"], state["weights0"])
    assert not torch.allclose(later["weights0"], state["weights0"])
    blank = state.snapshot()
    first = mixer(x[:, :1])[1]["old0"]
    blank.tensors["old0"].copy_(first)
    other = mixer(x[:, 4:7], state=blank)[0]
    assert not torch.allclose(other, mixer(x[:, 4:7], state=state)[0])


@pytest.mark.parametrize("variant", WIRINGS)
def test_far_tokens_matter(variant):
    """Beyond every window and segment, through the memory."""
    mixer = build(variant=variant, window=4, segment=4, persistent=2)
    x = tokens(1, 20, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[0][:, -1].square().sum(), x)
    assert (gradient[0].abs().amax(1) > 0).all()


@pytest.mark.parametrize("variant", WIRINGS)
def test_a_model_generates_saves_and_pads(variant, tmp_path):
    torch.manual_seed(0)
    options = {"heads": 2, "chunk": 4, "variant": variant, "window": 5, "segment": 4}
    sizes = {"vocab_size": 20, "dim": 16, "depth": 2, "mlp_dim": 16}
    lm = CausalLM(CausalLMConfig(layers="titans", mixers={"titans": options}, **sizes)).eval()
    lm.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(20, (1, 7))
    close(again(ids).logits, lm(ids).logits, 1e-5)
    want = lm.generate(ids, max_new_tokens=5, do_sample=False)
    longer = want
    for t in range(7, 12):
        assert lm(longer[:, :t]).logits[0, -1].argmax() == longer[0, t]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    got = lm.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(got[:, 3:], want)


def test_a_model_trains():
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "dim": 16, "depth": 1, "mlp_dim": 16}
    options = {"titans": {"heads": 2, "chunk": 4}}
    lm = CausalLM(CausalLMConfig(layers="titans", mixers=options, **sizes))
    optimizer = torch.optim.Adam(lm.parameters(), lr=1e-2)
    ids = torch.randint(12, (4, 16))
    losses = []
    for _ in range(30):
        loss = lm(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_flops_grow_with_the_text_alone():
    for variant in VARIANTS:
        mixer = build(variant=variant, window=4, segment=4, head_dim=4)
        costs = [mixer.flops(T) for T in (64, 128, 192)]
        steps = [b - a for a, b in pairwise(costs)]
        assert steps[0] == steps[1] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "map"}, "variant must be one of"),
        ({"heads": 3}, "heads must divide dim=8, got 3"),
        ({"depth": 0}, "depth must be a positive int, got 0"),
        ({"chunk": 4, "step": 3}, "step must divide chunk=4, got 3"),
        ({"read": "during"}, "read must be one of"),
        ({"lr_max": 0.0}, "lr_max must be positive, got 0.0"),
        ({"persistent": -1}, "persistent must be a non-negative int, got -1"),
        ({"variant": "mag", "window": 0}, "window must be a positive int, got 0"),
        ({"variant": "mac", "segment": 0}, "segment must be a positive int, got 0"),
        ({"variant": "library", "activation": "tanh"}, "activation must be one of"),
        ({"variant": "library", "gate_heads": False, "head_dim": 3}, "gate_heads must be true"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
