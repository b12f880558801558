"""Policies measured on a pretrained model, the page of it, and the command line's two commands."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from policy_kit import tiny
from subquad.bench import policies, policy_report, writing
from subquad.bench.policies import Study
from subquad.bench.results import Results
from subquad.cli import app

POLICIES = ("streaming_llm:sinks=2,window=60", "block_topk:block=32,topk=4+quest:budget=64")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A random model over bytes, on disk as people keep theirs."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    tiny(vocab_size=256).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(host, tmp_path_factory):
    """(study, its folder, results)"""
    study = Study(model=str(host), policies=POLICIES, lengths=(320,), samples=3, keys=1)
    out, told = tmp_path_factory.mktemp("study"), []
    results = policies.study(study, out, told.append)
    assert [e["index"] for e in told if "cell" in e] == list(range(6))
    assert sum("step" in e for e in told) == 6 * 3
    return study, out, results


def test_every_cell_is_measured(found):
    _, out, results = found
    assert json.loads((out / "results.json").read_text())["order"] == ["full", *POLICIES]
    cells = {(c["entry"], c["task"]): c for c in policies.rows(results)}
    assert len(cells) == 6
    for (entry, task), cell in cells.items():
        assert cell["metric"] == {"niah": "accuracy", "text": "perplexity"}[task]
        assert min(cell[key] for key in ("prefill", "decode", "cache")) > 0
        if entry == "full":
            assert cell["attended"] == {"prefill": 1.0, "decode": 1.0}
    full, stream, joined = (cells[entry, "text"] for entry in ("full", *POLICIES))
    assert stream["cache"] == 2 * 2 * (2 + 60 + 1) * 2 * 8 * 4
    assert joined["cache"] > full["cache"] > stream["cache"]
    assert stream["attended"]["decode"] < 0.2
    assert stream["attended"]["prefill"] < 0.4
    # The first two layers of Quest are dense, and there are no more.
    assert joined["attended"]["decode"] == 1.0
    assert joined["attended"]["prefill"] < 0.7
    assert 100 < full["score"] < 500


def test_a_study_goes_on(found, monkeypatch):
    """What is done is kept; a change of the study is measured anew."""
    study, out, results = found
    monkeypatch.setattr(policies, "Host", None)
    again = policies.study(study, out)
    assert again.cells == results.cells
    with pytest.raises(TypeError):
        policies.study(Study(**{**vars(study), "samples": 2}), out)


def test_perplexity_of_the_full_model_is_its_own(host):
    """Fed one by one behind the prompt = scored in one pass."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from subquad.tasks import create_task

    study = Study(model=str(host), policies=POLICIES[:1], tasks=("text",), lengths=(100,))
    cell = policies.Host(study).perplexity("full", 100, lambda event: None)
    tokenizer = AutoTokenizer.from_pretrained(host)
    batch = create_task("text", tokenizer=tokenizer, length=150).batch(10, study.seed)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(host)(batch.inputs).logits[:, 99:149]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 99:149].flatten()
    )
    assert cell["score"] == pytest.approx(losses.exp().item(), rel=1e-3)


def test_report(found, tmp_path):
    _, _, results = found
    page = policy_report.write(results, tmp_path / "report.html").read_text()
    assert "niah at 320 tokens: accuracy against pairs of the prompt" in page
    assert "text at 320 tokens: perplexity against cache" in page
    assert page.count("block_topk + quest") >= 4
    table = policy_report.table(results)
    assert table.row_count == 6


def test_policies_by_name():
    made = policies.policy("block_topk:topk=5,block=8+quest:budget=32,variant=frontier")
    assert (made.prompt.topk, made.prompt.block, made.answer.budget) == (5, 8, 32)
    with pytest.raises(ValueError, match="policy must be one of"):
        policies.policy("qest")
    with pytest.raises(ValueError, match="shapes the decoding, so it must come alone or last"):
        policies.policy("quest+block_topk")
    with pytest.raises(ValueError, match="options must be name=value"):
        policies.policy("quest:64")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": ()}, "policies must name at least one, got none"),
        ({"policies": ("quest:budget=0",)}, "budget must be a positive int, got 0"),
        ({"tasks": ("sums",)}, "task must be one of"),
        ({"lengths": (0,)}, "lengths must be a positive int, got 0"),
        ({"samples": 0}, "samples must be a positive int, got 0"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_studies_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Study(**{"model": "m", "policies": ("quest",), **change})


def test_an_entry_that_does_not_fit_is_refused_before_any_is_measured(host, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CALIBRATIONS", str(tmp_path))
    study = Study(model=str(host), policies=(*POLICIES, "duo"), lengths=(320,), samples=3, keys=1)
    with pytest.raises(ValueError, match=r"no calibration of duo .*calibrate\(model, texts\)"):
        policies.study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands(host, tmp_path):
    run = CliRunner().invoke
    done = run(
        app,
        ["apply", str(host), "--policy", POLICIES[0], "--lengths", "200", "--samples", "1",
         "--task", "text", "--out", str(tmp_path)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").is_file()
    assert len(Results.load(tmp_path / "results.json").cells) == 2

    (tmp_path / "text.txt").write_text("A rose is " * 20)
    command = ["generate", str(host), "a rose", "--file", str(tmp_path / "text.txt"), "--new", "9"]
    alone, with_policy = run(app, command), run(app, [*command, "--policy", "block_topk"])
    assert alone.exit_code == with_policy.exit_code == 0, with_policy.output
    # 206 bytes are less than the 64 blocks of 16, so nothing is left out.
    assert alone.stdout.splitlines()[0] == with_policy.stdout.splitlines()[0] != ""


def test_a_model_of_mixers_writes_too(host, tmp_path):
    """A converted model, say: no policy reaches it, and none is asked for."""
    import subquad

    AutoTokenizer.from_pretrained(host).save_pretrained(tmp_path)
    subquad.create_model("gla softmax", vocab_size=256, dim=16, depth=2, mixers={
        key: {"heads": 2} for key in ("gla", "softmax")
    }).save_pretrained(tmp_path)  # fmt: skip
    writer, shares = writing.Writer(str(tmp_path), None, device="cpu", dtype=torch.float32), []
    done = writer.write(writer.tokens("a rose"), 5, reading=shares.append)
    assert (done.tokens, shares) == (5, [0.5, 1.0])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer missing"):
        writing.Writer(str(tmp_path), None, device="cpu", dtype=torch.float32)


def test_writer_streams_what_it_returns(host):
    writer = writing.Writer(str(host), "quest:budget=32", device="cpu", dtype=torch.float32)
    shares, pieces = [], []
    done = writer.write(
        writer.tokens("How long is a line of text? " * 3), 12, 0.0, shares.append, pieces.append
    )
    assert shares == [0.5, 1.0]
    assert done.tokens == 12
    assert "".join(pieces)
    assert done.cache > 0
    assert not any(m._forward_hooks for m in writer.model.modules())
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        writer.tokens("")
    with pytest.raises(ValueError, match="new must be a positive int, got 0"):
        writer.write(writer.tokens("x"), 0)
