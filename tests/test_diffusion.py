"""Diffusion transformers: any mixer, flows, sampling, pictures, swapped attention, the commands."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel
from typer.testing import CliRunner

from kit import close
from subquad import cli
from subquad.mixers.sla import SLA
from subquad.models.diffusion import DiT, DiTConfig, create_diffusion_model, sample, save_grid
from subquad.models.diffusion.presets import DIFFUSION_PRESETS
from subquad.recipes.swap import swap
from subquad.tasks.base import EVAL_SEEDS
from subquad.tasks.flow import Flow
from subquad.train import TrainConfig, evaluate, train

SMALL = {"image_size": 8, "dim": 32, "depth": 2, "heads": 2}
MIXERS = [
    None,
    "inline",
    "mala",
    "gated_deltanet",
    "linear_attention",
    {"mixer": "sla", "block": 4, "topk": 0.3},
    {"mixer": "neighborhood", "window": [3, 3]},
]


def small(seed=0, **config):
    """A model whose gates and head are not zero."""
    torch.manual_seed(seed)
    model = create_diffusion_model("dit_micro", **{**SMALL, **config})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture
def digits(tmp_path):
    """Ten pictures of two classes, as a file."""
    from safetensors.torch import save_file

    images = torch.linspace(0, 1, 8).expand(10, 1, 8, 8).clone()
    images[1::2] = images[1::2].mT
    path = tmp_path / "digits.safetensors"
    save_file({"images": images, "labels": torch.arange(10) % 2}, path)
    return str(path)


# The model


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_any_mixer(mixer):
    model = small(mixer=mixer)
    x, t = torch.randn(3, 1, 8, 8), torch.rand(3)
    v = model(x, t, torch.tensor([0, 9, 10]))
    assert v.shape == x.shape
    v.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_starts_as_nothing_added():
    """adaLN-Zero: every block is the identity and the head gives 0; each of them learns."""
    torch.manual_seed(0)
    model = create_diffusion_model("dit_micro", **SMALL)
    v = model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    assert (v == 0).all()
    for block in model.blocks:
        assert (block.modulation.proj.weight == 0).all()
    v.sum().backward()
    assert model.head.weight.grad.abs().max() > 0


def test_time_class_and_place_matter():
    model = small()
    x, t, y = torch.randn(1, 1, 8, 8), torch.tensor([0.3]), torch.tensor([4])
    v = model(x, t, y)
    assert (model(x, t + 0.1, y) - v).abs().max() > 1e-3
    assert (model(x, t, y + 1) - v).abs().max() > 1e-3
    assert (model(x.flip(3), t, y).flip(3) - v).abs().max() > 1e-3
    close(model(x, t), model(x, t, torch.tensor([10])), 1e-6)


def test_patches_come_back_in_their_places():
    torch.manual_seed(0)
    model = create_diffusion_model("dit_micro", **{**SMALL, "channels": 3, "patch": 4})
    h = torch.randn(2, 4, 48)
    image = model._image(h, (2, 2))
    for i in range(2):
        for j in range(2):
            part = image[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            close(part, h[:, 2 * i + j].view(2, 3, 4, 4), 0)


def test_saved_and_loaded(tmp_path):
    model = small(mixer={"mixer": "sla", "block": 4, "topk": 0.3}).eval()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, DiT)
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    close(again(x, t), model(x, t), 0)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="corrupt"):
        DiT.from_pretrained(tmp_path)


def test_checkpointing_changes_nothing():
    model, x, t = small(), torch.randn(2, 1, 8, 8), torch.rand(2)
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(x, t).square().sum().backward()
        found.append(model.stem.weight.grad.clone())
    close(*found, 1e-6)


def test_presets_and_flops():
    for name, shape in DIFFUSION_PRESETS.items():
        with torch.device("meta"):
            model = create_diffusion_model(name)
        assert model.config.dim == shape["dim"]
    dense, sparse = (
        create_diffusion_model("dit_micro", mixer=m, patch=1) for m in (None, {"mixer": "sla"})
    )
    assert 0 < sparse.flops() < dense.flops()
    assert dense.flops(64) > 10 * dense.flops(32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "dit_mcro"}, "did you mean 'dit_micro'"),
        ({"mixer": "softmx"}, "did you mean 'softmax'"),
        ({"mixer": {"topk": 1}}, "mixer must be a key or have one as 'mixer'"),
        ({"image_size": 9}, "patch must divide image_size=9, got 2"),
        ({"dim": 30}, "dim must be a multiple of 4"),
        ({"depht": 2}, "did you mean 'depth'"),
    ],
)
def test_bad_models(options, message):
    with pytest.raises(ValueError) as error:
        create_diffusion_model(**{"name": "dit_micro", **options})
    assert message in str(error.value)


def test_bad_inputs():
    model, x, t = small(), torch.randn(2, 1, 8, 8), torch.rand(2)
    with pytest.raises(ValueError, match=r"pixel_values must be \[B,1,H,W\], patch=2"):
        model(x[..., :7], t)
    with pytest.raises(ValueError, match=r"time must be \[B\]=\[2\], got \[1\]"):
        model(x, t[:1])
    with pytest.raises(ValueError, match="classes must be None: the model has none"):
        small(classes=0)(x, t, torch.zeros(2, dtype=torch.int64))


# Flows and training


def test_a_batch_lies_on_the_way(digits):
    task = Flow(size=8, path=digits, drop=0.5)
    batch = task.batch(64, 3)
    t = batch.meta["time"][:, None, None, None]
    image = batch.inputs + (1 - t) * batch.labels
    noise = batch.inputs - t * batch.labels
    assert image.min() >= -1.001
    assert image.max() <= 1.001
    assert abs(noise.std().item() - 1) < 0.05
    assert batch.meta["time"].sort()[0].mul(64).floor().long().tolist() == list(range(64))
    told = batch.meta["classes"] < 2
    assert 15 < told.sum() < 50
    upright = (image[:, 0, 0] - image[:, 0, -1]).abs().amax(1) < 1e-3
    assert (batch.meta["classes"][told] == 1 - upright[told].long()).all()
    again = task.batch(64, 3)
    close(again.inputs, batch.inputs, 0)
    held = task.batch(4, EVAL_SEEDS)
    assert (held.meta["classes"] < 2).all()
    assert (task.batch(64, 4).inputs != batch.inputs).any()


def test_score_is_the_squared_error(digits):
    task = Flow(size=8, path=digits)
    batch = task.batch(5, 0)
    assert task.score(batch.labels + 2, batch)["loss"] == pytest.approx(4, rel=1e-5)
    assert task.summed_loss(batch.labels + 2, batch.labels).item() == pytest.approx(4 * 320)
    with pytest.raises(ValueError, match="logits must have shape"):
        task.score(batch.labels[:1], batch)
    with pytest.raises(ValueError, match=r"drop must lie in 0..1, got 2"):
        Flow(size=8, path=digits, drop=2)


def test_training_learns_and_goes_on(digits, tmp_path):
    task = Flow(size=8, path=digits)
    config = TrainConfig(steps=60, batch=16, lr=4e-3, warmup=5, eval_batches=2, save_every=20)
    models = [create_diffusion_model("dit_micro", **SMALL, classes=2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    before = evaluate(models[0], task, config)["loss"]
    steps = iter(range(100))
    found = train(models[0], task, config, progress=lambda _: None)
    assert found.evals[-1]["loss"] < 0.5 * before
    half = train(
        models[1],
        task,
        config,
        out=tmp_path,
        progress=lambda _: None,
        stop=lambda: next(steps) > 30,
    )
    assert half.steps < 60
    train(models[1], task, config, out=tmp_path, progress=lambda _: None)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


# Samples


class Field(DiT):
    """A velocity that is known: ``x * (1 + class)``, 0 for none."""

    def forward(self, pixel_values, time, classes=None):
        factor = torch.zeros(len(time)) if classes is None else (1.0 + classes) * (classes < 10)
        return pixel_values * factor[:, None, None, None]


def test_solvers_follow_the_field():
    model, noise = Field(DiTConfig(**SMALL)), torch.randn(3, 1, 8, 8)
    errors = {}
    for solver in ("euler", "heun"):
        for steps in (20, 40):
            x = sample(model, classes=[0, 0, 0], steps=steps, solver=solver, noise=noise)
            errors[solver, steps] = (x / noise - math.e).abs().max().item()
    assert 1.8 < errors["euler", 20] / errors["euler", 40] < 2.2  # first order
    assert 3.6 < errors["heun", 20] / errors["heun", 40] < 4.4  # second
    guided = sample(model, classes=[0, 0, 0], guidance=2.0, noise=noise, steps=200)
    close(guided, noise * math.exp(2), 1e-3)
    close(sample(model, 3, noise=noise, steps=3), noise, 0)


def test_samples_are_the_seed_and_not_the_batch():
    model = small().train()
    seen = []
    x = sample(model, 5, steps=2, batch=2, seed=4, progress=seen.append)
    assert x.shape == (5, 1, 8, 8)
    assert [event["step"] for event in seen] == list(range(1, 7))
    close(sample(model, 5, steps=2, seed=4), x, 1e-5)
    assert (sample(model, 5, steps=2, seed=5) - x).abs().max() > 0.1
    assert sample(model, 1, steps=1, image_size=12).shape == (1, 1, 12, 12)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "n must say how many"),
        ({"n": 0}, "n must be a positive int"),
        ({"n": 2, "steps": 0}, "steps must be a positive int"),
        ({"n": 2, "guidance": 2.0}, "guidance needs classes"),
        ({"n": 2, "classes": [1]}, "classes must be 2 of 0..9"),
        ({"classes": [1, 10]}, "classes must be 2 of 0..9, got [1, 10]"),
        ({"n": 2, "solver": "huen"}, "did you mean 'heun'"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError) as error:
        sample(small(), **options)
    assert message in str(error.value)


def test_grid(tmp_path):
    images = torch.linspace(-1.5, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    path = save_grid(images, tmp_path / "deep" / "grid.png", columns=3, gap=2, zoom=2)
    pixels = np.array(Image.open(path))
    assert pixels.shape == (2 * 10 - 2, 3 * 10 - 2)
    assert pixels[0, 0] == 0
    assert pixels[10, 10] == 255
    assert pixels[0, 20] == round((images[2, 0, 0, 0].item() + 1) * 127.5)
    assert pixels[10, 20] == 0  # nothing stands there
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
    colours = save_grid(torch.rand(1, 3, 4, 4), tmp_path / "one.png")
    assert np.array(Image.open(colours)).shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r"images must be \[n,1 or 3,H,W\], got \[2, 2, 4, 4\]"):
        save_grid(torch.rand(2, 2, 4, 4), tmp_path / "two.png")


# Attention swapped


def test_swapped_attention_keeps_the_weights():
    model = small(layers="softmax mala").eval()
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    whole = swap(model, "softmax", "sla", block=4, topk=1.0)
    assert [type(b.mixer).__name__ for b in whole.blocks] == ["SLA", "MALA"]
    close(whole(x, t), model(x, t), 1e-5)
    sparse = swap(model, "softmax", "sla", block=4, topk=0.3)
    mixer = sparse.blocks[0].mixer
    assert isinstance(mixer, SLA)
    assert not mixer.linear_proj.weight.any()
    assert torch.equal(mixer.q_norm.weight, model.blocks[0].mixer.q_norm.weight)
    assert (sparse(x, t) - model(x, t)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="'inline' must have the weights of 'softmax'"):
        swap(model, "softmax", "inline")


# The commands


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["diffuse", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands(digits, tmp_path, monkeypatch, capsys):
    first, tuned, png = tmp_path / "first", tmp_path / "tuned", tmp_path / "samples.png"
    sizes = ("--size", 8, "--dim", 32, "--depth", 1, "--heads", 2)
    said = run("train", "--path", digits, *sizes, "--steps", 3, "--batch", 4, "--out", first)
    assert re.search(r"held-out loss \d\.\d+, saved in", said)
    start = ["--start", first / "model", "--path", digits, "--steps", 2, "--batch", 4]
    run("train", "sla[topk=0.3,block=4]", *start, "--out", tuned)
    assert DiT.from_pretrained(tuned / "model").config.mixer("softmax")[0] == "sla"
    run("sample", tuned / "model", "--count", 6, "--steps", 2, "--columns", 3, "--out", png)
    assert np.array(Image.open(png)).shape == (2 * 18 - 2, 3 * 18 - 2)
    for arguments, message in (
        (["sample", tmp_path], "model must be a folder that train has written"),
        (["sample", tuned / "model", "--classes", "2"], "classes must be one of [0, 1], got 2"),
        (["train", *start, "--dim", 8], "start has sizes of its own, got ['dim'] beside it"),
    ):
        monkeypatch.setattr("sys.argv", ["subquad", "diffuse", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
