"""Facts of DuoAttention: gates, their optimisation, constant memory, calibrations on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import subquad
from policy_kit import applied, calls, close, read, tiny, tokens
from subquad.policies import Duo, Policy
from subquad.policies.calibration import load_calibration, save_calibration
from subquad.policies.parts.identify import Gated, Identification, Passkeys, identify, loss, mix

SMALL = {"lengths": (40, 60), "passkeys": 2, "words": 3, "sinks": 2, "recent": 6}
TEXTS = ["the quick brown fox jumps over the lazy dog, and then it sleeps. " * 4]


class Letters:
    """A tokenizer of letters, as far as the small models' vocabulary goes."""

    def encode(self, text, add_special_tokens=False):
        return [2 + ord(c) % 90 for c in text]


def _gated(model, gates, settings=None):
    """Last hidden states of both ways, and which of them are answers."""
    settings = settings or Identification(**SMALL)
    policy = Gated(settings)
    ids, answer = next(iter(Passkeys(Letters(), TEXTS, settings)))
    with subquad.apply(model, policy):
        with torch.no_grad():
            want = model.model(ids, use_cache=False).last_hidden_state
        policy.gates = gates
        return want, model.model(ids, use_cache=False).last_hidden_state, answer


@pytest.mark.parametrize("teacher_forced", [True, False])
def test_open_gates_are_the_model(teacher_forced):
    """Nothing to distill, and its gradient is zero: what is left is the price of a gate."""
    settings = Identification(**SMALL, teacher_forced=teacher_forced)
    gates = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    want, got, answer = _gated(tiny(), gates, settings)
    close(got, want)
    total = loss(want, got, answer) + settings.reg * gates.abs().mean()
    (gradient,) = torch.autograd.grad(total, gates)
    close(gradient, torch.full((2, 2), settings.reg / 4), 1e-7)


def test_shut_gates_stream():
    """Every head sees its sinks and the recent tokens only."""
    policy, (call, *_) = Gated(Identification(**SMALL)), list(calls(Policy()))
    j, t = torch.arange(75), torch.arange(75)[:, None]
    keep = (j <= t) & ((j < 2) | (t - j < 6))
    scores = torch.einsum("bthk,bshk->bhts", call.q, call.k.repeat_interleave(2, 2)) * call.scale
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    want = torch.einsum("bhts,bshv->bthv", weights, call.v.repeat_interleave(2, 2))
    close(policy.stream(call), want)
    whole = call.dense()
    close(mix(whole, want, torch.zeros(2)), want)
    half = torch.tensor([1.0, 0.25], dtype=torch.float64)
    close(mix(whole, want, half)[:, :, 2:], 0.25 * whole[:, :, 2:] + 0.75 * want[:, :, 2:])
    close(mix(whole, want, half)[:, :, :2], whole[:, :, :2])


def test_gradients_of_gates():
    """Right to finite differences, through all layers (whose norms compute in float32)."""
    model = tiny()
    gates = torch.tensor([[0.9, 0.2], [0.4, 0.6]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda gates: loss(*_gated(model, gates)).double(), (gates,), eps=1e-3, atol=2e-4, rtol=1e-3
    )


def test_first_steps_shrink_all_gates_and_the_model_is_left_alone():
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = []
    gates = identify(model, Letters(), TEXTS, Identification(steps=3, **SMALL), seen.append)
    assert gates.shape == (2, 2)
    assert bool((gates < 1).all())
    assert [at["step"] for at in seen] == [1, 2, 3]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.grad is None


def test_rate_rises_and_falls():
    factors = [Identification(steps=100).factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(0.5)
    assert factors[19:80] == [1.0] * 61
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.1)


def test_a_text_holds_its_answers():
    """Each passkey stands once in the text and once, labelled, behind its question, in order."""
    settings = Identification(lengths=(400, 500), passkeys=3, words=4)
    tokenizer = type("Bytes", (), {"encode": lambda self, t, add_special_tokens: list(t.encode())})
    ids, answer = next(iter(Passkeys(tokenizer(), TEXTS * 10, settings)))
    text = bytes(ids[0].tolist()).decode()
    said = bytes(ids[0, answer].tolist()).decode().strip()
    keys = [said.split()[4 * i : 4 * i + 4] for i in range(3)]
    places = [text.index(" ".join(key)) for key in keys]
    assert places == sorted(places)
    assert all(text.count(" ".join(key)) == 2 for key in keys)
    assert "second passkey" in text


def test_streaming_heads_stay_constant():
    """Memory of rho T + (1 - rho) (s + w) tokens a head, and of the newest."""
    model, ids = tiny(), tokens(2)
    duo = Duo(gates=((1, 0), (0.2, 0.8)), sinks=2, window=5)
    with applied(model, duo) as on:
        sizes = [read(model, on, ids, new=new)[1] for new in (1, 4)]
    for cache, length in zip(sizes, (76, 79)):
        held = [[part.keys.shape[1] for _, part in layer.parts] for layer in cache.layers]
        assert held == [[length, 8]] * 2
    with applied(model, Policy()) as on:
        whole = read(model, on, ids, new=1)[1].nbytes
    assert sizes[0].nbytes < (0.5 + 0.5 * 9 / 75) * whole


def test_heads_are_chosen_by_the_quantile():
    gates = torch.rand(4, 2).tolist()
    for sparsity in (0.0, 0.25, 0.5, 0.75):
        streaming = Duo(gates=gates, sparsity=sparsity).streaming
        assert int(streaming.sum()) == round(8 * sparsity)
        least_kept = torch.tensor(gates)[~streaming].min()
        assert bool((torch.tensor(gates)[streaming] <= least_kept + 2e-6).all())
    assert int(Duo(gates=[[1.0, 1.0]] * 4).streaming.sum()) == 4  # ties are broken


def test_calibration_on_disk(tmp_path, monkeypatch):
    """Found by the names of model and policy, refused for another model or policy, or broken."""
    monkeypatch.setenv("SUBQUAD_CALIBRATIONS", str(tmp_path))
    model, ids = tiny(), tokens()
    made = Duo(sinks=2, window=5).calibrate(model, TEXTS, tokenizer=Letters(), steps=2, **SMALL)
    (folder,) = (tmp_path / "duo").iterdir()
    names = sorted(p.suffix for p in folder.iterdir())
    assert names == [".json", ".safetensors"]
    assert load_calibration("duo", model).settings["steps"] == 2
    with applied(model, Duo(sinks=2, window=5)) as on:
        got, _ = read(model, on, ids)
        assert on.policy.gates == made.gates
    with applied(model, made) as on:
        close(got, read(model, on, ids)[0])
    with pytest.raises(ValueError, match="no calibration of hip for LlamaForCausalLM"):
        load_calibration("hip", model)
    with pytest.raises(ValueError, match="is for the policy duo, not hip"):
        load_calibration("hip", model, folder)
    with pytest.raises(ValueError, match="is for another model"):
        load_calibration("duo", tiny(hidden_size=48), folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"is for another model.*its weights differ"):
        subquad.apply(model, Duo())
    (folder / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_calibration("duo", tiny(), folder)


def test_calibration_is_replaced_whole(tmp_path, monkeypatch):
    """A write that fails leaves the calibration that was there."""
    model = tiny()
    save_calibration("duo", model, {"gates": torch.ones(2, 2)}, {"steps": 1}, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_calibration("duo", model, {"gates": torch.zeros(2, 2)}, {}, tmp_path)
    assert float(load_calibration("duo", model, tmp_path).tensors["gates"].min()) == 1
    save_calibration("duo", model, {"gates": torch.zeros(2, 2)}, {"steps": 2}, tmp_path)
    assert float(load_calibration("duo", model, tmp_path).tensors["gates"].max()) == 0
    assert len(list(tmp_path.iterdir())) == 2
    bf16 = tiny().bfloat16()
    assert load_calibration("duo", bf16, tmp_path).settings == {"steps": 2}


def test_only_safe_formats(tmp_path):
    """The folder holds safetensors and JSON, and nothing else is read."""
    path = save_calibration("duo", tiny(), {"gates": torch.ones(2, 2)}, {}, tmp_path)
    data = json.loads((path / "calibration.json").read_text())
    assert "gates" in load_file(path / data["tensors"])
    save_file({"gates": torch.ones(1)}, path / data["tensors"])
    with pytest.raises(ValueError, match="cannot be read"):
        load_calibration("duo", tiny(), path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must lie in 0..1, got 1.5"),
        ({"window": 0}, "window must be a positive int, got 0"),
        ({"gates": [[1.0], [1.0, 0.0]]}, r"gates must be \[L\]\[G\]"),
        ({"chunk": 0}, "chunk must be a positive int, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Duo(**options)


def test_gates_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"gates must be \[L\]\[G\]=\[2, 2\]"):
        subquad.apply(tiny(), Duo(gates=[[1.0, 0.0]]))


def test_bad_calibration():
    with pytest.raises(ValueError, match="texts must have 32000 tokens or more"):
        Duo().calibrate(tiny(), TEXTS, tokenizer=Letters())
    with pytest.raises(ValueError, match="passkeys must be at most 10, got 11"):
        Identification(passkeys=11)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        Duo().calibrate(tiny(), TEXTS)
