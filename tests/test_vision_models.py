"""Vision models: any mixer, pyramids, heads, saving; the authors' block."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import subquad
from kit import close
from subquad.models.vision import VisionConfig, VisionModel, create_vision_model
from subquad.models.vision.blocks import Block
from subquad.models.vision.presets import VISION_PRESETS, vision_config

MIXERS = [
    None,
    "softmax",
    "linear_attention",
    "inline",
    "rala",
    {"mixer": "neighborhood", "window": [2, 2]},
    {"mixer": "soft", "ratio": 2},
    "gated_deltanet",
]


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("name", ["micro", "micro_pyramid"])
def test_any_mixer_classifies(name, mixer):
    torch.manual_seed(0)
    model = create_vision_model(name, mixer=mixer, classes=5)
    out = model(torch.randn(2, 1, 32, 24), labels=torch.tensor([1, 4]))
    assert out.logits.shape == (2, 5)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_pyramid_is_what_timm_users_expect():
    model = create_vision_model("micro_pyramid", features_only=True, out_indices=(1, -1))
    maps = model(torch.randn(2, 1, 48, 32))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 12, 8), (2, 64, 3, 2)]
    assert model.feature_info.channels() == [32, 64]
    assert model.feature_info.reduction() == [4, 16]
    assert model.feature_info.module_name() == ["stages.1", "stages.3"]
    assert model.feature_info.out_indices == [1, 3]
    assert model.feature_info.get_dicts(["num_chs"]) == [{"num_chs": 32}, {"num_chs": 64}]
    assert model.head is None
    blocks = create_vision_model("micro", features_only=True, out_indices=(0, 3))
    assert [tuple(m.shape) for m in blocks(torch.randn(1, 1, 8, 8))] == [(1, 48, 4, 4)] * 2
    assert blocks.feature_info.module_name() == ["stages.0.blocks.0", "stages.0.blocks.3"]
    published = vision_config("mala_tiny", features_only=True)
    with torch.device("meta"):
        info = VisionModel(published).feature_info
    assert info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("options", [{}, {"features_only": True, "out_indices": (-1,)}])
def test_saved_and_loaded(tmp_path, options):
    torch.manual_seed(0)
    model = create_vision_model("micro_pyramid", head_width=20, **options).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is VisionModel
    x = torch.randn(2, 1, 32, 32)
    if options:
        assert torch.equal(model(x)[0], again(x)[0])
    else:
        assert torch.equal(model(x).logits, again(x).logits)
    assert again.config.mixers == model.config.mixers


def test_heads():
    model = create_vision_model("micro").eval()
    x = torch.randn(2, 1, 16, 16)
    maps = model.forward_features(x)
    assert maps.shape == (2, 48, 8, 8)
    close(model(x).logits, model.forward_head(maps), 1e-6)
    assert model.forward_head(maps, pre_logits=True).shape == (2, 48)
    model.reset_classifier(3)
    assert model(x).logits.shape == (2, 3)
    model.reset_classifier(0)
    close(model(x).logits, model.forward_head(maps, pre_logits=True), 1e-6)
    wide = create_vision_model("micro", head_width=20, classes=0).eval()
    assert wide(x).logits.shape == (2, 20)


@pytest.mark.parametrize("key", ["hedgehog", "parallax", "cca"])
def test_a_mixer_of_softmax_has_the_stages_heads_and_no_rotation(key):
    """Though its own constructor hands them on, and names neither."""
    model = subquad.create_vision_model("softmax_tiny", mixer=key, image_size=64)
    mixer = next(m for m in model.modules() if isinstance(m, subquad.Mixer))
    assert (mixer.heads, mixer.rope_theta) == (3, None)
    assert mixer.causal == (key == "cca")


def test_learned_positions_follow_the_image():
    model = create_vision_model("micro", position="learned", image_size=16).eval()
    assert model(torch.randn(1, 1, 24, 8)).logits.shape == (1, 10)
    same = model.stages[0].position
    assert same.shape == (1, 48, 8, 8)


def test_post_norm_layer_scale_and_drop_path():
    torch.manual_seed(0)
    options = {"norm": "post", "layer_scale": [0.5], "drop_path": 0.5}
    model = create_vision_model("micro", **options)
    x = torch.randn(4, 1, 8, 8)
    a, b = model(x).logits, model(x).logits
    assert not torch.equal(a, b)
    model.eval()
    close(model(x).logits, model(x).logits)
    assert model.norm is None


SIZES = {
    "rala_tiny": 15, "rala_small": 26, "rala_base": 48, "rala_large": 95,
    "soft_tiny": 13, "soft_medium": 45, "soft_large": 64, "soft_huge": 87,
    "inline_tiny": 6.5, "inline_small": 16.7, "inline_base": 23.8,
    "softmax_tiny": 5.7, "softmax_small": 22, "softmax_base": 86.6,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_sizes(name):
    with torch.device("meta"):
        found = sum(p.numel() for p in VisionModel(vision_config(name)).parameters())
    assert abs(found / 1e6 / SIZES[name] - 1) < 0.02


def test_the_authors_block(shared):
    path = shared / "golden" / "mala.safetensors"
    if not path.is_file():
        pytest.skip("no golden vectors for mala")
    golden = load_file(path)
    names = {
        "pos": "position", "norm1.norm": "mixer_norm", "norm2.norm": "mlp_norm",
        "ffn.fc1": "mlp.fc1", "ffn.dwconv": "mlp.conv", "ffn.fc2": "mlp.fc2",
    }  # fmt: skip
    layers = {"dims": [32], "depths": [1], "heads": [2], "layers": "mala"}
    block = Block(VisionConfig(**layers, mlp_dim=64, layer_scale=0.5), 0, 0, 0.0)

    def ours(prefix: str) -> dict[str, torch.Tensor]:
        found = {n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)}
        attn = {n.removeprefix("attn."): t for n, t in found.items() if n.startswith("attn.")}
        out = {f"mixer.{n}": t for n, t in block.mixer.translate(attn).items()}
        for n, t in found.items():
            layer, _, kind = n.rpartition(".")
            if layer in names:
                out[f"{names[layer]}.{kind}"] = (
                    t.flatten(1) if ".fc" in layer and t.dim() > 1 else t
                )
        out |= {"mixer_scale": found["gamma_1"].flatten(), "mlp_scale": found["gamma_2"].flatten()}
        return out

    block.load_state_dict(ours("block.w."))
    x = golden["block.x"].clone().requires_grad_()
    y = block(x.flatten(2).mT, (7, 10)).mT.reshape(x.shape)
    close(y, golden["block.out"], 2e-4)
    y.square().mean().backward()
    close(x.grad, golden["block.g.x"], 2e-4)
    gradients = ours("block.gw.")
    for name, p in block.named_parameters():
        close(p.grad, gradients[name], 2e-4)


BAD = [
    ({"name": "mala_tny"}, "did you mean 'mala_tiny'"),
    ({"mixer": "mla_"}, "did you mean"),
    ({"mixer": {"window": 3}}, "mixer must be a key or have one as 'mixer'"),
    ({"heads": [1, 2]}, "heads must have 4 stages as dims has"),
    ({"layers": ["mala"], "mixers": {}}, "layers must be one pattern or 4"),
    ({"mixer": 3}, "mixer must be a key or have one as 'mixer', got 3"),
    ({"features_only": True, "out_indices": (4,)}, "out_indices must lie in -4..3, got 4"),
    ({"features_only": True, "out_indices": (True,)}, "out_indices must lie in -4..3, got True"),
    ({"features_only": True, "out_indices": ()}, "out_indices must name a map"),
    ({"features_only": True, "out_indices": 2}, "out_indices must be a tuple of indices, got 2"),
    ({"out_indices": (1,)}, "takes features_only=True"),
    ({"classes": -1}, "classes must be a non-negative int"),
    ({"stem": "convs"}, "did you mean 'conv'"),
    ({"stem": "conv"}, "patch must be 4 where stem is 'conv', got 2"),
    ({"drop_path": 1.0}, "drop_path must lie in 0..1"),
    ({"window": 3}, "an argument of VisionConfig"),
    ({"layer_scale": [1.0]}, "layer_scale must be one or 4 values"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        create_vision_model(**{"name": "micro_pyramid", **options})
    assert message in str(error.value)


def test_bad_images_are_refused():
    model = create_vision_model("micro")
    with pytest.raises(ValueError, match=r"pixel_values must be \[B,1,H,W\], got \[2, 3, 8, 8\]"):
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="sides that patch=2 divides"):
        model(torch.randn(2, 1, 7, 8))
    with pytest.raises(ValueError, match=r"must be floating point and not empty, got torch\.uint8"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"not empty, got torch\.float32 \[2, 1, 0, 8\]"):
        model(torch.zeros(2, 1, 0, 8))
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"labels must have shape \[2\], got \[1\]"):
        model(x, labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="labels must be int64"):
        model(x, labels=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="num_classes must be a non-negative int, got -1"):
        model.reset_classifier(-1)
    maps = create_vision_model("micro", features_only=True)
    with pytest.raises(ValueError, match="None with features_only"):
        maps(x, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="num_classes must not be set"):
        maps.reset_classifier(3)


def test_public_name():
    assert subquad.create_vision_model is create_vision_model
    assert {"mala_tiny", "rala_tiny", "soft_tiny", "inline_tiny"} <= set(VISION_PRESETS)


def test_compiled_and_checkpointed():
    torch.manual_seed(0)
    model = create_vision_model("micro", depths=[2])
    x = torch.randn(2, 1, 16, 16)
    want = torch.autograd.grad(
        model(x).logits.square().sum(), model.stages[0].blocks[0].mlp.fc1.weight
    )
    model.gradient_checkpointing_enable()
    model.train()
    got = torch.autograd.grad(
        model(x).logits.square().sum(), model.stages[0].blocks[0].mlp.fc1.weight
    )
    close(got[0], want[0], 1e-5)
    model.gradient_checkpointing_disable()
    whole = torch.compile(model.eval(), fullgraph=True, backend="eager")
    close(whole(x).logits, model(x).logits, 1e-5)
