"""Conversion of pretrained models: the import, the stages, resuming, and what is refused."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import subquad
from subquad.recipes import RECIPES, choose, create_recipe, student, transfer
from subquad.recipes.base import Transfer, Tune
from subquad.recipes.teacher import import_decoder
from subquad.recipes.texts import Texts
from subquad.tasks import create_task
from subquad.tasks.base import EVAL_SEEDS

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "llama, positions interpolated": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


def teacher(kind="llama"):
    torch.manual_seed(1)
    model = DECODERS[kind]().eval()
    with torch.no_grad():  # weights of a real model: attention is not uniform, norms are not one
        for name, p in model.named_parameters():
            p.copy_(1 + torch.randn_like(p) / 5 if "norm" in name else torch.randn_like(p) / 5)
    return model


def texts():
    return create_task("text", length=64)


def small(key, **changes):
    return create_recipe(key, steps=4, batch=2, length=40, **changes)


def convert(out, recipe, model=None, **options):
    given = {"progress": lambda event: None, **options}
    return subquad.convert(model or teacher(), recipe, texts(), out=out, **given)


@pytest.mark.parametrize("kind", DECODERS)
def test_import_gives_the_same_logits(kind):
    model = teacher(kind)
    ids = torch.randint(256, (2, 33))
    made = import_decoder(model)
    torch.testing.assert_close(made(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        made.generate(ids[:1, :5], max_new_tokens=6, do_sample=False),
        model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False),
    )


def test_import_of_a_real_model(shared):
    folder = shared / "models" / "needle-16m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(8192, (1, 40))
    want = model(ids).logits
    torch.testing.assert_close(import_decoder(model)(ids).logits, want, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("key", RECIPES)
def test_converted_folder(tmp_path, key):
    """It loads by AutoModelForCausalLM, generates, and its state grows in kept layers alone."""
    options = {"lolcats": {"window": 4}, "still": {"chunk": 8, "ratio": 0}}.get(key, {})
    recipe = small(key, options=options)
    made = convert(tmp_path / "out", recipe, keep="1")
    mixers = [made.config.mixer(alias)[0] for alias in made.config.pattern]
    assert mixers == [key, recipe.kept, key]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(256, (1, 24))
    torch.testing.assert_close(loaded(ids).logits, made(ids).logits)
    out = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 29)
    prompts = [torch.randint(256, (1, T)) for T in (64, 128)]
    caches = [loaded(ids, use_cache=True).past_key_values for ids in prompts]
    sizes = [[sum(t.nbytes for t in s.tensors.values()) for s in c.states] for c in caches]
    grown = [b - a for a, b in zip(*sizes)]
    assert grown[1] > 0
    assert grown[0] == grown[2] == 0
    assert "layers kept: 1" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / ".conversion").exists()


def test_what_is_shared_stays_and_the_teacher_too(tmp_path):
    model = teacher()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for key in ("lolcats", "gated_deltanet"):
        made = convert(tmp_path / key, small(key), model=model, keep="0")
        for name, t in model.state_dict().items():
            assert torch.equal(t, before[name]), name
        same = torch.equal(
            made.layers[1].mlp.up_proj.weight, before["model.layers.1.mlp.up_proj.weight"]
        )
        assert same is (key == "lolcats")  # the other recipe tunes all weights
        if key == "lolcats":  # adapters are on the new mixers alone
            moved = [
                not torch.equal(block.mixer.q_proj.weight, old.self_attn.q_proj.weight)
                for block, old in zip(made.blocks, model.model.layers)
            ]
            assert moved == [False, True, True]


def test_new_mixers_begin_with_the_teachers_weights():
    made = import_decoder(teacher())
    recipe = create_recipe("gated_deltanet")
    mixer = student.twin(made, student.plan(made, recipe, []), 1)
    old = made.layers[1].mixer
    assert torch.equal(mixer.q_proj.weight, old.q_proj.weight)
    assert torch.equal(mixer.o_proj.weight, old.o_proj.weight)
    heads = mixer.k_proj.weight.view(4, 8, 32)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], old.k_proj.weight.view(2, 8, 32)[1])


def stages(**changes):
    common = {"steps": 4, "batch": 2, "length": 40}
    return (
        Transfer(train=("feature_map", "window_factors"), **common, **changes),
        Tune(loss="logits", **common),
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [("transfer", 3), ("distillation", 2)])
def test_killed_and_resumed_it_ends_the_same(tmp_path, at):
    recipe = create_recipe("lolcats", stages=stages(), options={"window": 4})
    whole = convert(tmp_path / "whole", recipe, keep=1)
    now = [""]

    def kill(event):
        if "cell" in event:
            now[0] = event["cell"]
        elif at[0] in now[0] and event["step"] == at[1]:
            raise Killed

    with pytest.raises(Killed):
        convert(tmp_path / "parts", recipe, keep=1, progress=kill, save_every=1)
    parts = convert(tmp_path / "parts", recipe, keep=1, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values()):
        assert torch.equal(a, b), name
    again = convert(tmp_path / "parts", recipe, keep=1, resume=True)
    assert torch.equal(again.layers[0].mixer.q_proj.weight, parts.layers[0].mixer.q_proj.weight)


@pytest.mark.parametrize("target", ["heads", "weights", "output"])
def test_a_layer_alone_goes_as_in_company(tmp_path, target):
    recipe = create_recipe("lolcats", stages=stages(target=target)[:1], options={"window": 4})
    together = convert(tmp_path / "together", recipe)
    for layers in ([1], [2]):
        assert convert(tmp_path / "alone", recipe, layers=layers, resume=True) is None
    files = sorted((tmp_path / "alone" / ".conversion" / "stage-0").glob("*.safetensors"))
    assert [f.name for f in files] == ["layer-001.safetensors", "layer-002.safetensors"]
    for l, file in zip((1, 2), files):
        for name, t in load_file(file).items():
            assert torch.equal(t, together.layers[l].mixer.state_dict()[name]), (l, name)
    rest = convert(tmp_path / "alone", recipe, resume=True, at_once=1)
    for a, b in zip(together.state_dict().values(), rest.state_dict().values()):
        assert torch.equal(a, b)


def test_transfer_lowers_the_loss_and_teaches_the_maps_alone(tmp_path):
    """Measured on one batch of held-out text, before and after: from batch to batch the loss in
    training differs by more than it falls."""
    stage = Transfer(train=("feature_map",), steps=100, batch=4, length=40)
    made = convert(
        tmp_path / "out", create_recipe("lolcats", stages=(stage,), options={"window": 4})
    )
    imported = import_decoder(teacher())
    unseen = texts().batch(32, EVAL_SEEDS).inputs[:, : stage.length]
    before = {l: student.twin(imported, made.config, l) for l in range(3)}
    after = {l: block.mixer for l, block in enumerate(made.blocks)}
    for mixers in (before, after):
        transfer.trained(mixers, stage)
    untrained, learned = (
        transfer.stepper(imported, mixers, stage, nullcontext)(unseen) for mixers in (before, after)
    )
    for layer, loss in learned.items():
        assert loss < 0.9 * untrained[layer]
    assert torch.equal(made.layers[0].mixer.q_proj.weight, imported.layers[0].mixer.q_proj.weight)


@pytest.mark.parametrize(
    ("keep", "layers"),
    [("0,5", [0, 5]), ("3:1", [3, 7]), ("9:1", [7]), ("", []), (0, []), (2, 2)],
)
def test_layers_to_keep(keep, layers):
    assert choose.named(keep, 8) == layers


@pytest.mark.parametrize("keep", ["8", "a", "1;2", 9, -1, True, "1:2"])
def test_layers_to_keep_that_are_refused(keep):
    with pytest.raises(ValueError, match="keep must be layers like"):
        choose.named(keep, 8)


def test_the_layer_whose_replacement_costs_most_is_kept():
    found = {l: {"score": s} for l, s in enumerate((0.1, 0.7, 0.3, 0.7))}
    assert choose.best(found, 1) == [1]
    assert choose.best(found, 3) == [1, 2, 3]


def test_a_layer_that_loses_nothing_scores_nothing():
    made = import_decoder(teacher())
    recipe = create_recipe("lolcats", options={"window": 4}, length=48)
    wide = create_recipe("lolcats", options={"window": 64}, length=48)
    mixers = {l: student.twin(made, student.plan(made, recipe, []), l) for l in (0, 2)}
    mixers[1] = student.twin(made, student.plan(made, wide, []), 1)
    found = choose.scores(made, mixers, recipe, Texts(texts(), None))
    assert abs(found[1]["recall"]) < 1e-5
    assert min(found[l]["recall"] for l in (0, 2)) > 1e-3
    assert choose.best(found, 2) == [0, 2]


class TestRefused:
    """Bad input is told before any work."""

    def test_texts(self, tmp_path):
        for given, said in (
            (None, "texts must be a file"),
            ([], "texts must be a file"),
            (tmp_path / "nowhere", "a file or a folder that exists"),
            (["too short"], "tokenizer must be given"),
        ):
            with pytest.raises(ValueError, match=said):
                subquad.convert(teacher(), small("lolcats"), given, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_no_tokenizer(self, tmp_path):
        teacher().save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="tokenizer missing"):
            subquad.convert(tmp_path / "model", small("lolcats"), texts(), out=tmp_path / "out")

    def test_no_model(self, tmp_path):
        with pytest.raises(ValueError, match="model must be a folder"):
            subquad.convert(tmp_path, small("lolcats"), texts(), out=tmp_path / "out")
        for path in ("./model", str(tmp_path / "model"), "some/where/else"):
            with pytest.raises(ValueError, match="model must be a folder"):
                subquad.convert(path, small("lolcats"), texts(), out=tmp_path / "out")

    def test_no_such_device(self, tmp_path):
        with pytest.raises(ValueError, match="device must be"):
            subquad.convert(
                teacher(), small("lolcats"), texts(), out=tmp_path / "out", device="gpu"
            )
        assert not (tmp_path / "out").exists()

    def test_sliding_windows(self, tmp_path):
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
        with pytest.raises(ValueError, match="whole text in every layer, it has sliding_window=8"):
            convert(tmp_path / "out", small("lolcats"), model=model)
        config = Qwen3Config(**SIZES, head_dim=8, use_sliding_window=True, max_window_layers=1)
        with pytest.raises(ValueError, match="whole text in every layer"):
            convert(tmp_path / "out", small("lolcats"), model=Qwen3ForCausalLM(config))

    def test_other_architectures(self, tmp_path):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True))
        with pytest.raises(ValueError, match=r"these differ: .*bias"):
            convert(tmp_path / "out", small("lolcats"), model=model)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
        with pytest.raises(ValueError, match="hidden_act 'silu', got 'gelu'"):
            convert(tmp_path / "out", small("lolcats"), model=model)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2))
        with pytest.raises(ValueError, match="must have RMS norms, one of type 'gpt2' has not"):
            convert(tmp_path / "out", small("lolcats"), model=model)

    def test_a_folder_that_exists(self, tmp_path):
        out = tmp_path / "out"
        recipe = create_recipe("lolcats", stages=stages()[:1])
        convert(out, recipe, keep="1,2")
        with pytest.raises(ValueError, match="--resume goes on with it"):
            convert(out, recipe, keep="1,2")
        with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
            convert(out, recipe, keep="1,2", resume=True, overwrite=True)
        other = create_recipe("lolcats", stages=stages(seed=1)[:1])
        with pytest.raises(ValueError, match=r"of another: stages\[0\].seed was 0, is 1"):
            convert(out, other, keep="1,2", resume=True)
        with pytest.raises(ValueError, match="recipe was 'lolcats', is 'gated_deltanet'"):
            convert(out, small("gated_deltanet"), keep="1,2", resume=True)
        convert(out, other, keep="1,2", overwrite=True)

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="a new folder or that of a conversion"):
                convert(tmp_path, small("lolcats"), overwrite=overwrite)
        assert (tmp_path / "file").exists()

    def test_too_little_disk(self, tmp_path, monkeypatch):
        import shutil

        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match="MiB of disk for the model and its checkpoints"):
            convert(tmp_path / "out", small("lolcats"))
        assert not (tmp_path / "out").exists()

    def test_stages_and_layers(self, tmp_path):
        recipe = small("gated_deltanet", stages=(Transfer(target="heads"),))
        with pytest.raises(ValueError, match="target must be 'output' for GatedDeltaNet"):
            convert(tmp_path / "out", recipe)
        recipe = small("lolcats", stages=(Transfer(train=("nothing",)),))
        with pytest.raises(ValueError, match="train must name parameters"):
            convert(tmp_path / "out", recipe)
        with pytest.raises(ValueError, match="layers must be one of"):
            convert(tmp_path / "out", small("lolcats"), keep="1", layers=[1])
        with pytest.raises(ValueError, match="keep must leave a layer"):
            convert(tmp_path / "out", small("lolcats"), keep="0,1,2")
        with pytest.raises(ValueError, match="recipe must be one of"):
            convert(tmp_path / "out", "lolcat")
        with pytest.raises(ValueError, match=r"changes of recipe.*did you mean 'steps'"):
            create_recipe("lolcats", step=4)
        with pytest.raises(ValueError, match="target must be one of"):
            Transfer(target="logits")
        assert not (tmp_path / "out").exists()


def test_texts_within_the_window_are_warned_of():
    mixer = subquad.create_mixer("lolcats", dim=16, heads=2, window=8)
    with pytest.warns(UserWarning, match="16 tokens lie within the 16 .* learn nothing"):
        transfer.check(mixer, Transfer(train=("feature_map",), length=16))
    transfer.check(mixer, Transfer(train=("feature_map",), length=17))


def test_stages_of_a_kind_are_changed_apart():
    both = {"steps": 4, "length": 32}
    recipe = create_recipe("lolcats", **both, transfer={"lr": 3e-2}, tune={"steps": 2, "rank": 4})
    transfer, tune = recipe.stages
    assert (transfer.steps, transfer.length, transfer.lr) == (4, 32, 3e-2)
    assert (tune.steps, tune.length, tune.rank) == (2, 32, 4)
    assert tune.lr == create_recipe("lolcats").stages[1].lr
    with pytest.raises(ValueError, match="rank"):
        create_recipe("lolcats", transfer={"rank": 4})
    with pytest.raises(ValueError, match="no stage of kind 'tune'"):
        create_recipe("lolcats", stages=stages()[:1], tune={"steps": 2})
