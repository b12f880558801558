"""The comparison: its language, equal sizes, resuming, and what it measures."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from subquad import mask
from subquad.bench import match, measure, report, spec
from subquad.bench.compare import PRESETS, Comparison, compare
from subquad.models.causal_lm import CausalLM
from subquad.train import TrainConfig

TINY = Comparison(
    mixers=("softmax", "delta=gated_deltanet[heads=1]", "hybrid:1"),
    tasks=("mqar[vocab_size=32,length=16,pairs=2]",),
    dim=16,
    depth=2,
    heads=2,
    mlp_dim=16,
    steps=5,
    batch=4,
    eval_every=3,
    eval_batches=1,
    lengths=(16, 32),
)


class TestSpec:
    def test_values(self):
        got = spec.options("a=8,b=0.5,c=true,d=none,e=gla,f=1e-3")
        assert got == {"a": 8, "b": 0.5, "c": True, "d": None, "e": "gla", "f": 1e-3}

    def test_lists_split_outside_brackets(self):
        assert spec.listed("a[x=1,y=2], b,c*3 d") == ["a[x=1,y=2]", "b", "c*3 d"]

    @pytest.mark.parametrize("bad", ["a,,b", "", "a,"])
    def test_empty_names(self, bad):
        with pytest.raises(ValueError, match="between its commas"):
            spec.listed(bad)

    @pytest.mark.parametrize("bad", ["heads", "=3", "a b=3", "heads:3"])
    def test_broken_options(self, bad):
        with pytest.raises(ValueError, match="name=value"):
            spec.options(bad)

    def test_pattern_with_options(self):
        config = spec.model("softmax[window=4]*2 gla", vocab_size=16, dim=16, depth=3)
        assert [config.mixer(alias) for alias in config.pattern] == [
            ("softmax", {"window": 4}),
            ("softmax", {"window": 4}),
            ("gla", {}),
        ]

    @pytest.mark.parametrize(
        ("text", "pattern"),
        [
            ("hybrid", ["gated_deltanet"] * 3 + ["softmax"]),
            ("hybrid:1", ["gated_deltanet", "softmax"] * 2),
            ("hybrid:gla:3", ["gla"] * 3 + ["softmax"]),
            ("hybrid[linear=retnet,ratio=0]", ["softmax"] * 4),
        ],
    )
    def test_presets(self, text, pattern):
        assert list(spec.model(text, vocab_size=16, dim=16, depth=4).pattern) == pattern

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("gated_deltanett", "gated_deltanet"),
            ("hybird:3", "name"),
            ("gla*x", "name\\*number"),
            ("based:3", "only hybrid"),
            ("softmax[", "name"),
        ],
    )
    def test_unknown_models(self, text, message):
        with pytest.raises(ValueError, match=message):
            spec.model(text, vocab_size=16, dim=16, depth=2)

    def test_masks(self):
        assert spec.mask("causal & (window(7) | ~sinks(2))") == mask.causal() & (
            mask.window(7) | ~mask.sinks(2)
        )
        for bad in ("causal +", "__import__('os')", "window", "causal.dense(2, 2)", "sinks(n=1)"):
            with pytest.raises(ValueError, match="mask"):
                spec.mask(bad)


def test_equal_parameters():
    entries = [(m, m) for m in ("softmax", "gated_deltanet", "hybrid:1", "based", "mamba2")]
    sizes = {"vocab_size": 64, "dim": 32, "depth": 4, "mlp_dim": 48}
    configs = match.matched(entries, **sizes)
    counts = {e: sum(p.numel() for p in CausalLM(c).parameters()) for e, c in configs.items()}
    assert counts == {e: match.parameters(c) for e, c in configs.items()}
    assert max(counts.values()) <= 1.02 * min(counts.values())
    assert min(c.mlp_dim for c in configs.values()) == 48


def test_heads_go_to_every_mixer_that_has_them():
    config = match.matched(
        [("a", "base_conv softmax gla[heads=4] cca")],
        vocab_size=16, dim=16, depth=4, mlp_dim=8, heads=1,
    )["a"]  # fmt: skip
    options = [config.mixer(alias)[1].get("heads") for alias in config.pattern]
    assert options == [None, 1, 4, 1]


def test_labels_stand_before_an_equals_sign_outside_brackets():
    texts = ("gla[heads=2]", "mine=gla[heads=2]", "gla[heads=2] small=gla[heads=2]*2")
    assert Comparison(mixers=texts).entries() == [
        ("gla[heads=2]", "gla[heads=2]"),
        ("mine", "gla[heads=2]"),
        ("gla[heads=2] small", "gla[heads=2]*2"),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison run to its end without a break."""
    out = tmp_path_factory.mktemp("whole")
    return compare(TINY, out), out


def _losses(results):
    return {c["entry"]: [row["loss"] for row in c["history"]] for c in results.trained()}


def test_results(whole):
    results, out = whole
    assert json.loads((out / "results.json").read_text())["cells"] == results.cells
    assert results.order == ["softmax", "delta", "hybrid:1"]
    for cell in results.trained("mqar"):
        assert len(cell["history"]) == cell["steps"] == 5
        assert [row["step"] for row in cell["evals"]] == [3, 5]
        assert cell["score"] == cell["evals"][-1]["accuracy"]
    sizes = [cell["parameters"] for cell in results.trained()]
    assert max(sizes) <= 1.02 * min(sizes)
    for cell in results.timed():
        assert cell["state"] == cell["formula"]["state"]
        assert cell["lengths"] == [16, 32]
        assert min(cell["prefill"] + cell["decode"]) > 0
    softmax, delta, _ = results.timed()
    assert softmax["state"][1] == 2 * softmax["state"][0]
    assert delta["state"][1] == delta["state"][0]
    assert "softmax" in report.html(results)


def test_finished_cells_are_kept(whole):
    results, out = whole
    before, events = json.dumps(results.cells), []
    again = compare(TINY, out, events.append)
    assert [event["done"] for event in events] == [True] * 6
    assert json.dumps(again.cells) == before


def test_only_what_changed_is_run(whole, tmp_path):
    _, out = whole
    (tmp_path / "results.json").write_text((out / "results.json").read_text())
    events = []
    other = replace(TINY, mixers=(*TINY.mixers[:2], "softmax[window=4]"), lengths=())
    compare(other, tmp_path, lambda event: events.append(event) if "cell" in event else None)
    assert {e["cell"]: e["done"] for e in events} == {
        "train/softmax/mqar": True,
        "train/delta/mqar": True,
        "train/softmax[window=4]/mqar": False,
    }


def test_stopped_and_resumed_it_ends_the_same(whole, tmp_path):
    whole, _ = whole
    quick = replace(TINY, tasks=("mqar[vocab_size=32,length=16,pairs=2,save_every=1]",), lengths=())
    steps = []

    def stop(event):
        steps.append(event.get("step"))
        if len([s for s in steps if s == 4]) == 2:  # in the second model's fourth step
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(quick, tmp_path, stop)
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 1
    steps.clear()
    resumed = compare(quick, tmp_path, lambda event: steps.append(event.get("step")))
    assert next(s for s in steps if s) in (4, 5), "the second model began anew"
    assert _losses(resumed) == _losses(whole)


def test_ctrl_c_on_the_command_line(tmp_path):
    command = [
        sys.executable, "-m", "subquad.cli", "compare", "--mixers", "softmax", "--tasks",
        "mqar[vocab_size=32,length=16,pairs=2,save_every=1]", "--steps", "100000",
        "--set", "dim=16,depth=1,batch=2", "--out", str(tmp_path),
    ]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.rglob("*.safetensors")) and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(run.pid, signal.SIGINT)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixers": ()}, "at least one"),
        ({"mixers": ("gla", "gla")}, "different labels"),
        ({"mixers": ("a=gla", "a=retnet")}, "different labels"),
        ({"mixers": ("gated_deltanett",)}, "gated_deltanet"),
        ({"mixers": ("gla[heds=2]",)}, "heds"),
        ({"tasks": ("mqarr",)}, "mqar"),
        ({"tasks": ("mqar[pears=3]",)}, "pears"),
        ({"tasks": ("text[path=/nowhere]",)}, "nowhere"),
        ({"steps": 0}, "steps"),
        ({"lengths": (64, 32)}, "rising"),
        ({"lengths": (0, 32)}, "positive"),
        ({"device": "tpu"}, "device must be one of"),
        ({"device": "cuda"}, "no GPU"),
    ],
)
def test_bad_input_before_any_training(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        compare(replace(TINY, **change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_preset_is_sound():
    from subquad.bench import compare as module

    for preset in PRESETS.values():
        for cell in module._cells(preset):
            assert cell.total > 0


def test_budget_leaves_out_long_prompts():
    config = spec.model("softmax", vocab_size=16, dim=16, depth=1, mlp_dim=8)
    model = match.build(config, 0, "cpu").eval()
    found = measure.over_lengths(model, (16, 32, 64), budget=1e-9, steps=2)
    assert found["lengths"] == [16]


def test_peak_memory_sees_what_was_freed():
    size = 64 << 20
    measure.peak_memory(lambda: torch.ones(10), torch.device("cpu"))
    peak = measure.peak_memory(lambda: torch.ones(size // 4).sum(), torch.device("cpu"))
    assert 0.9 * size < peak < 1.5 * size


def test_training_options_go_before_the_comparisons():
    from subquad.bench import compare as module

    config, rest = module._training(TINY, {"pairs": 3, "lr": 0.5, "batch": 2})
    assert rest == {"pairs": 3}
    assert (config.lr, config.batch, config.steps) == (0.5, 2, 5)
    assert isinstance(config, TrainConfig)


def test_images_are_compared_with_vision_models(tmp_path):
    models = ("mala", "near=neighborhood[window=3x3]*1 softmax", "soft[ratio=2]")
    images = Comparison(
        mixers=models,
        tasks=("images[size=8,patch=2,steps=4]",),
        dim=16,
        depth=2,
        heads=2,
        mlp_dim=16,
        batch=4,
        eval_batches=1,
        warmup=1,
    )
    found = compare(images, tmp_path)
    assert list(found.cells) == [f"train/{e}/images" for e in ("mala", "near", "soft[ratio=2]")]
    sizes = [cell["parameters"] for cell in found.cells.values()]
    assert max(sizes) < 1.04 * min(sizes)
    for cell in found.cells.values():
        assert 0 <= cell["score"] <= 1
        assert cell["tokens"] == 16
        assert cell["flops"] > 0
    text = report.write(found, tmp_path / "report.html").read_text()
    assert "accuracy against work" in text
    with pytest.raises(ValueError, match="patch must divide the images' size=8, got 3"):
        compare(replace(images, tasks=("images[size=8,patch=3]",)), tmp_path)
