"""Training on a GPU: bfloat16 with float32 weights, and going on where it stopped."""

import pytest
import torch

from subquad.models.causal_lm import CausalLM, CausalLMConfig
from subquad.tasks import create_task
from subquad.train import NonFiniteLoss, TrainConfig, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

TASK = create_task("mqar", pairs=4)
CONFIG = TrainConfig(steps=45, batch=32, lr=3e-3, warmup=5, save_every=20, eval_batches=2)


def model() -> CausalLM:
    torch.manual_seed(0)
    config = CausalLMConfig(
        vocab_size=128, dim=64, depth=2, layers="gated_deltanet softmax", tie_embeddings=True
    )
    return CausalLM(config).cuda()


def silent(event):
    pass


def test_bfloat16_learns_as_float32_does():
    half, whole = model(), model()
    a = train(half, TASK, CONFIG, progress=silent)
    b = train(whole, TASK, TrainConfig(**{**vars(CONFIG), "dtype": "float32"}), progress=silent)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert [h["step"] for h in a.history] == list(range(1, 46))
    assert a.history[0]["loss"] == pytest.approx(b.history[0]["loss"], rel=0.02)
    assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=0.1)
    assert a.history[-1]["loss"] < 0.9 * a.history[0]["loss"]


def test_going_on(tmp_path):
    whole = train(model(), TASK, CONFIG, progress=silent)
    left = iter([False] * 16 + [True])
    first = train(model(), TASK, CONFIG, out=tmp_path, progress=silent, stop=lambda: next(left))
    assert first.steps == 17
    result = train(model(), TASK, CONFIG, out=tmp_path, progress=silent)
    losses = [[h["loss"] for h in r.history] for r in (result, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert result.evals[-1]["loss"] == pytest.approx(whole.evals[-1]["loss"], rel=0.05)


def test_nan_is_seen_before_a_checkpoint(tmp_path):
    """The loss is read every ten steps only, but always before saving."""
    spoiled, calls = model(), []

    def spoil(module, inputs, output):
        calls.append(module.training)
        if sum(calls) == 23:
            output.logits = output.logits * float("nan")
        return output

    spoiled.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLoss, match=r"at step 23 .*step-00000020"):
        train(spoiled, TASK, CONFIG, out=tmp_path, progress=silent)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000020"]
