"""Training: it learns, and it can be killed, starved and fed NaN without losing what it had."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from subquad import checkpoint
from subquad.tasks import EVAL_SEEDS, create_task
from subquad.train import NonFiniteLoss, TrainConfig, evaluate, export, train
from subquad.train.progress import Lines
from subquad.train.ranks import Ranks
from subquad.train.run import Run

HERE = Path(__file__).parent


class Block(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        y = self.norm(x)
        past = y.cumsum(1) / torch.arange(1, y.shape[1] + 1, dtype=y.dtype)[:, None]
        return x + self.dropout(torch.tanh(self.inner(torch.cat([y, past], -1))))


class Tiny(nn.Module):
    """Each token sees itself and the mean of the past. The head is tied, a buffer is saved."""

    def __init__(self, vocab: int = 32, dim: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList([Block(dim, dropout) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(1, dim))
        self.scale._no_weight_decay = True
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids):
        self.calls += self.training
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x * self.scale)


def tiny(**options) -> Tiny:
    torch.manual_seed(1)
    return Tiny(**options)


TASK = create_task("copy", segment=6)
CONFIG = TrainConfig(steps=12, batch=8, lr=1e-2, warmup=3, eval_batches=2, save_every=4)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())


def silent(event):
    pass


def saved(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir())


# --- the recipe ---------------------------------------------------------------------------------


def test_it_learns_and_tells(tmp_path):
    (tmp_path / "letters.txt").write_text("abcdefghij" * 100)
    task = create_task("text", path=tmp_path / "letters.txt", length=16)
    model, events = tiny(vocab=256), []
    config = TrainConfig(steps=60, batch=4, lr=3e-2, warmup=10, eval_every=30)
    result = train(model, task, config, progress=events.append)
    assert result.evals[-1]["accuracy"] == 1
    assert [e["step"] for e in result.evals] == [30, 60]
    assert result.history[-1]["loss"] < 0.2 < result.history[0]["loss"]
    assert [h["step"] for h in result.history] == list(range(1, 61))
    assert result.steps == 60
    assert result.tokens_per_second > 0
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_second"} <= set(events[0])
    assert events[-1]["perplexity"] < 1.3
    assert not model.training


def test_learning_rate():
    config = TrainConfig(steps=110, warmup=10, lr=2.0, min_lr_ratio=0.25)
    assert config.lr_at(0) == pytest.approx(0.2)
    assert config.lr_at(9) == config.lr_at(10) == 2.0
    assert config.lr_at(60) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert config.lr_at(110) == pytest.approx(0.5)
    assert TrainConfig(steps=2, warmup=0).lr_at(0) == 1e-3


def test_weight_decay_spares_vectors_and_the_marked():
    run = Run(tiny(), TASK, CONFIG, Ranks(0, 1, torch.device("cpu")), None)
    names = {id(p): n for n, p in run.parameters.items()}
    groups = {
        g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in run.optimizer.param_groups
    }
    assert groups == {
        0.1: {"embed.weight", "layers.0.inner.weight", "layers.1.inner.weight"},
        0.0: {n for n in run.parameters if n == "scale" or "norm" in n or n.endswith("bias")},
    }


def test_update_is_that_of_adamw():
    """Two steps against torch's own parts put together by hand."""
    model, other = tiny(), tiny()
    config = TrainConfig(steps=2, batch=4, lr=1e-2, warmup=2, clip=0.5, dtype="float32")
    result = train(model, TASK, config, progress=silent)
    decayed = [p for n, p in other.named_parameters() if p.dim() > 1 and n != "scale"]
    rest = [p for n, p in other.named_parameters() if p.dim() == 1 or n == "scale"]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    for step in range(2):
        batch = TASK.batch(4, step)
        loss = nn.functional.cross_entropy(
            other(batch.inputs).flatten(0, 1), batch.labels.flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 2
        optimizer.step()
        assert result.history[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert result.history[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_micro_batches_change_nothing():
    whole, parts = tiny(), tiny()
    train(whole, TASK, CONFIG, progress=silent)
    config = TrainConfig(**{**vars(CONFIG), "micro_batch": 3})
    train(parts, TASK, config, progress=silent)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_training_never_sees_the_evaluation_seeds():
    seen = []

    class Spy(type(TASK)):
        def batch(self, n, seed):
            seen.append(seed)
            return super().batch(n, seed)

    for seed in (0, 7, 11):
        config = TrainConfig(steps=3, batch=2, seed=seed, eval_batches=2)
        train(tiny(), Spy(segment=6), config, progress=silent)
    trained, evaluated = [s for s in seen if s < EVAL_SEEDS], [s for s in seen if s >= EVAL_SEEDS]
    assert len(set(trained)) == len(trained)  # another seed, other batches
    assert set(evaluated) == {EVAL_SEEDS, EVAL_SEEDS + 1}


def test_random_state_of_the_caller_is_kept():
    model = tiny(dropout=0.2)
    before = torch.get_rng_state()
    train(model, TASK, CONFIG, progress=silent)
    assert torch.equal(before, torch.get_rng_state())


BAD = [
    ({"steps": 0}, "steps must be a positive int, got 0"),
    ({"batch": -1}, "batch must be a positive int, got -1"),
    ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
    ({"min_lr_ratio": 2.0}, "min_lr_ratio must lie in 0..1, got 2.0"),
    ({"betas": (0.9, 1.0)}, "betas must be two numbers in 0..1"),
    ({"clip": -1.0}, "clip must be 0 or more, got -1.0"),
    ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ({"save_every": -5}, "save_every must be a non-negative int, got -5"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


# --- going on -----------------------------------------------------------------------------------


def test_stopped_and_gone_on_with_is_the_same_to_the_bit(tmp_path):
    """Dropout, a saved buffer and the optimizer included."""
    straight = tiny(dropout=0.3)
    whole = train(straight, TASK, CONFIG, progress=silent)
    left = iter([False] * 4 + [True])
    first = tiny(dropout=0.3)
    result = train(first, TASK, CONFIG, out=tmp_path, progress=silent, stop=lambda: next(left))
    assert result.steps == 5
    assert not result.evals
    again = Tiny(dropout=0.3)  # other initial weights
    result = train(again, TASK, CONFIG, out=tmp_path, progress=silent)
    assert same(again, straight)
    assert int(again.calls) == 12
    assert [h["loss"] for h in result.history] == [h["loss"] for h in whole.history]
    assert result.evals == whole.evals
    assert saved(tmp_path) == ["step-00000008", "step-00000012"]


def test_a_finished_run_is_only_read(tmp_path):
    model = tiny()
    result = train(model, TASK, CONFIG, out=tmp_path, progress=silent)
    times = [p.stat().st_mtime_ns for p in tmp_path.rglob("*")]
    events, other = [], Tiny()
    again = train(other, TASK, CONFIG, out=tmp_path, progress=events.append)
    assert again == result
    assert not events
    assert same(other, model)
    assert times == [p.stat().st_mtime_ns for p in tmp_path.rglob("*")]


SCRIPT = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
from test_train import CONFIG, TASK, silent, tiny
from subquad.train import TrainConfig, train

def slowly(event):
    print(event["step"], flush=True)
    time.sleep(0.01)

config = TrainConfig(**{{**vars(CONFIG), "steps": 60, "save_every": 1, "eval_every": 7}})
train(tiny(dropout=0.3), TASK, config, out=sys.argv[1], progress=slowly)
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """SIGKILL, twice, while a checkpoint is written at every step; then to the end."""
    steps = []
    for last in (9, 31):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                steps.append(int(line))
                if steps[-1] >= last:
                    time.sleep(0.001 * last)
                    child.send_signal(signal.SIGKILL)
                    break
        assert child.returncode == -signal.SIGKILL
    assert steps.count(5) == 1  # it went on, not anew
    config = TrainConfig(**{**vars(CONFIG), "steps": 60})
    straight, again = tiny(dropout=0.3), Tiny(dropout=0.3)
    train(straight, TASK, config, progress=silent)
    result = train(again, TASK, config, out=tmp_path, progress=silent)
    assert [h["step"] for h in result.history] == list(range(1, 61))
    assert same(again, straight)


@pytest.mark.parametrize("after", range(5))
def test_dying_at_any_point_of_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, after):
    """Cut off at each write to the disk in turn: what is found is the old or the new, whole."""
    model = tiny()
    checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(3)}}, {"x": 1})
    checkpoint.save(tmp_path, 2, {"model": {"w": torch.ones(3)}}, {"x": 2})
    calls = []

    def cut(real):
        def made(*args):
            calls.append(args)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(*args)

        return made

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_flush", cut(checkpoint._flush))
        patched.setattr(os, "replace", cut(os.replace))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 3, {"model": checkpoint.weights(model)}, {"x": 3})
    found = checkpoint.load(tmp_path)
    assert found.step == (2 if after < 3 else 3)
    assert found.data == {"x": found.step}
    checkpoint.save(tmp_path, 4, {"model": {"w": torch.ones(3)}}, {"x": 4})
    assert all(name.startswith("step-") for name in saved(tmp_path))
    assert len(saved(tmp_path)) == 2


def test_a_broken_checkpoint_is_passed_over(tmp_path):
    straight = tiny()
    train(straight, TASK, CONFIG, out=tmp_path, progress=silent)
    newest = tmp_path / "step-00000012"
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    again = Tiny()
    with pytest.warns(UserWarning, match="passed over an unreadable checkpoint.*step-00000012"):
        result = train(again, TASK, CONFIG, out=tmp_path, progress=silent)
    assert same(again, straight)
    assert result.steps == 12
    assert checkpoint.load(tmp_path).step == 12  # written anew


def test_no_readable_checkpoint_is_an_error(tmp_path):
    train(tiny(), TASK, CONFIG, out=tmp_path, progress=silent)
    for path in tmp_path.glob("step-*"):
        (path / "data.json").write_text("{")
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ValueError, match=r"out holds no checkpoint that can be read: .*step-0"),
    ):
        train(tiny(), TASK, CONFIG, out=tmp_path, progress=silent)


@pytest.mark.parametrize(
    ("model", "task", "config", "message"),
    [
        ({}, TASK, {"lr": 5e-3}, r"train.lr was 0.01, is 0.005"),
        ({}, TASK, {"steps": 20}, r"train.steps was 12, is 20"),
        ({}, create_task("copy", segment=5), {}, r"task.segment was 6, is 5"),
        ({}, create_task("mqar", vocab_size=32, length=16, pairs=2), {}, r"task.name was 'copy'"),
        ({"dim": 8}, TASK, {}, r"weights.embed.weight was \['torch.float32', 32, 16\], is"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, model, task, config, message):
    train(tiny(), TASK, CONFIG, out=tmp_path, progress=silent)
    before = saved(tmp_path)
    with pytest.raises(ValueError, match=f"of another run: .*{message}"):
        train(
            tiny(**model),
            task,
            TrainConfig(**{**vars(CONFIG), **config}),
            out=tmp_path,
            progress=silent,
        )
    assert saved(tmp_path) == before


def test_the_cadence_may_change(tmp_path):
    train(tiny(), TASK, CONFIG, out=tmp_path, progress=silent)
    config = TrainConfig(**{**vars(CONFIG), "save_every": 1, "eval_every": 2, "eval_batches": 1})
    assert train(tiny(), TASK, config, out=tmp_path, progress=silent).steps == 12


# --- what goes wrong ----------------------------------------------------------------------------


class Spoiled(Tiny):
    """Its loss, or only the gradient of its loss, is NaN at one step."""

    def __init__(self, at: int, gradient: bool) -> None:
        super().__init__()
        self.at, self.gradient = at, gradient

    def forward(self, ids):
        logits = super().forward(ids)
        if not self.training or int(self.calls) != self.at:
            return logits
        if self.gradient:
            return logits + (0 * self.scale).sqrt().sum()  # 0, with a slope of 0 * inf
        return logits * float("nan")


@pytest.mark.parametrize("gradient", [False, True])
def test_nan_stops_and_the_last_good_checkpoint_stays(tmp_path, gradient):
    torch.manual_seed(1)
    model = Spoiled(7, gradient)
    message = r"step 7 with lr 0.00\d+; the last good checkpoint is .*step-00000004"
    config = TrainConfig(**{**vars(CONFIG), "lr": 1e-3, "save_every": 1 if gradient else 4})
    if gradient:
        message = message.replace("00000004", "00000006")
    with pytest.raises(NonFiniteLoss, match=message):
        train(model, TASK, config, out=tmp_path, progress=silent)
    found = checkpoint.load(tmp_path)
    assert found.step == (6 if gradient else 4)
    assert all(t.isfinite().all() for t in found.tensors["model"].values())


def test_nan_without_a_folder():
    with pytest.raises(NonFiniteLoss, match="there is no checkpoint"):
        train(Spoiled(2, False), TASK, CONFIG, progress=silent)


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    """The system refuses to write beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    left = iter([False] * 5 + [True])
    train(tiny(), TASK, CONFIG, out=tmp_path, progress=silent, stop=lambda: next(left))
    before = saved(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="could not save a checkpoint in"):
            train(tiny(), TASK, CONFIG, out=tmp_path, progress=silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved(tmp_path) == before
    straight, again = tiny(), tiny()
    train(straight, TASK, CONFIG, progress=silent)
    train(again, TASK, CONFIG, out=tmp_path, progress=silent)
    assert same(again, straight)


def test_a_batch_without_labels_is_refused():
    class Mute(type(TASK)):
        def draw(self, n, rng):
            batch = super().draw(n, rng)
            batch.labels.fill_(-100)
            return batch

    with pytest.raises(ValueError, match="task 'copy' must give labels"):
        train(tiny(), Mute(segment=6), CONFIG, progress=silent)


# --- progress -----------------------------------------------------------------------------------


def test_lines_where_there_is_no_terminal(capsys):
    train(tiny(), TASK, CONFIG)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/12: loss ")
    assert "tokens_per_second" in lines[0]
    assert lines[-1].startswith("step 12/12: loss")
    assert "exact_match" in lines[-1]
    assert len(lines) < 6
    Lines(2)({"step": 2, "loss": math.nan})
    assert "loss nan" in capsys.readouterr().err


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    train(tiny(), TASK, CONFIG)
    shown = capsys.readouterr().err
    assert "12/12" in shown
    assert "tokens/s" in shown


# --- several processes --------------------------------------------------------------------------

RANKS = f"""
import json, sys
sys.path.insert(0, {str(HERE)!r})
import torch
from test_train import CONFIG, TASK, language_model, silent
from subquad.train import export, train
from subquad.train.ranks import Ranks

model = language_model()
ranks = Ranks.join(model)
if ranks.rank:
    torch.nn.init.zeros_(model.embed_tokens.weight)  # the weights of rank 0 count
found = train(model, TASK, CONFIG, out=sys.argv[1] + "/run", progress=silent)
export(model, sys.argv[1] + "/model")
again = train(language_model(), TASK, CONFIG, progress=silent)
if ranks.rank == 0:
    with open(sys.argv[1] + "/found.json", "w") as file:
        json.dump([found.history, found.evals, again.history], file)
"""


def language_model():
    from subquad.models.causal_lm import CausalLM, CausalLMConfig

    torch.manual_seed(1)
    options = {"heads": 2}
    return CausalLM(
        CausalLMConfig(
            vocab_size=32,
            dim=16,
            depth=2,
            layers="gated_deltanet softmax",
            mixers={"gated_deltanet": options, "softmax": options},
            tie_embeddings=True,
        )
    )


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Under torchrun: from the start, and going on with what one process began."""
    left = iter([False] * 2 + [True])
    options = {"out": tmp_path / "run", "progress": silent}
    train(language_model(), TASK, CONFIG, **options, stop=lambda: next(left))
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, str(tmp_path / "ranks.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=240)
    alone = language_model()
    result = train(alone, TASK, CONFIG, progress=silent)
    resumed, evals, whole = json.loads((tmp_path / "found.json").read_text())
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        mine = [step[name] for step in result.history]
        assert [step[name] for step in resumed] == pytest.approx(mine, rel=tolerance)
        assert [step[name] for step in whole] == pytest.approx(mine, rel=tolerance)
    assert evals[-1] == pytest.approx(result.evals[-1], rel=1e-3)
    found = load_file(tmp_path / "run" / "step-00000012" / "model.safetensors")
    for weight, t in checkpoint.weights(alone).items():
        torch.testing.assert_close(found[weight], t.detach(), rtol=1e-3, atol=1e-4)
    exported = type(alone).from_pretrained(tmp_path / "model")
    assert all(torch.equal(t, found[name]) for name, t in checkpoint.weights(exported).items())


def test_ranks_must_divide_the_batch():
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 processes, got 8"):
        Ranks(0, 3, torch.device("cpu")).share(8)
    assert Ranks(1, 2, torch.device("cpu")).share(8) == slice(4, 8)


# --- with the library's language model ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_language_model(tmp_path, dtype):
    config = TrainConfig(**{**vars(CONFIG), "dtype": dtype})
    straight = language_model()
    whole = train(straight, TASK, config, progress=silent)
    left = iter([False] * 5 + [True])
    train(
        language_model(),
        TASK,
        config,
        out=tmp_path,
        progress=silent,
        stop=lambda: next(left),
    )
    again = language_model()
    train(again, TASK, config, out=tmp_path, progress=silent)
    assert same(again, straight)
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]
    export(again, tmp_path / "model")
    assert same(type(again).from_pretrained(tmp_path / "model"), again)
    assert next(again.parameters()).dtype == torch.float32
    scores = evaluate(again, TASK, config)
    assert scores == pytest.approx(
        {k: v for k, v in whole.evals[-1].items() if k != "step"}, rel=1e-6
    )
