"""``subquad convert`` and ``subquad eval`` on a small pretrained model."""

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from subquad.cli import app

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import conversion


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A random model over bytes, on disk as people keep theirs."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).save_pretrained(folder)
    return folder


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_convert_and_eval(host, tmp_path):
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text with {i * i} in it\n" for i in range(2000)))
    small = ("--set", "steps=2,batch=2,length=48", "--option", "window=8", "--device", "cpu")
    command = ("convert", host, "--recipe", "lolcats", "--text", text, "--out", out, *small)
    alone = run(*command, "--keep", "1", "--layer", "1")
    assert alone.exit_code == 0, alone.output
    done = run(*command, "--keep", "1", "--resume")
    assert done.exit_code == 0, done.output
    record = json.loads((out / "conversion.json").read_text())
    assert record["done"]
    assert len(record["kept"]) == 1
    assert set(record["scores"]) == {"0", "1"}

    again = run(*command, "--keep", "1")
    assert isinstance(again.exception, ValueError)
    assert "--resume goes on with it" in str(again.exception)
    other = run(*command, "--keep", "0", "--resume")
    assert "is of another: keep was 1, is []" in str(other.exception)
    missing = run(*command[:4], "--text", tmp_path / "none", "--out", tmp_path / "new")
    assert "texts must be a file or a folder that exists" in str(missing.exception)

    told = run("eval", out, "--lengths", "512", "--samples", "1", "--speed", "64,128")
    assert told.exit_code == 0, told.output
    rows = json.loads((out / "eval.json").read_text())["rows"]
    found = {(row["what"], row["length"]): row for row in rows}
    assert {what for what, _ in found} == {
        "needles, accuracy", "perplexity", "cache, bytes", "decode, tokens/s",
    }  # fmt: skip
    assert all(row["before"] is not None for row in rows)
    card = (out / "README.md").read_text()
    assert "| perplexity | 512 |" in card
    assert card.count("eval begins") == 1
    refused = run("eval", host)
    assert "DIR must be the folder of a conversion" in str(refused.exception)


def test_a_cell_of_the_benchmark(host, tmp_path, monkeypatch):
    """Alone, kept as it ends, not measured twice; what was converted is not converted again."""
    monkeypatch.setattr(conversion, "perplexity", lambda host: 2.0)
    cell, out = "lolcats, 1k texts, transfer alone", tmp_path / "conversion.json"
    small = ("--steps", 2, "--batch", 1, "--length", 40, "--lengths", 512, "--samples", 1)
    command = ["conversion.py", host, "--cell", cell, *small, "--out", out]
    command = [str(word) for word in (*command, "--work", tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", command)

    def measured():
        conversion.main()
        return json.loads(out.read_text())["cells"]

    first = measured()
    assert list(first) == [cell]
    assert first[cell]["tokens"] == 80
    assert sum(first[cell]["parts"].values()) < first[cell]["seconds"]
    beside = {"another": {"device": "a GPU"}, cell: {**first[cell], "perplexity": 1.0}}
    out.write_text(json.dumps({"cells": beside}))
    assert measured() == beside  # as it stands, whatever it says
    beside[cell]["spec"] = {}
    out.write_text(json.dumps({"cells": beside}))
    assert measured() == {**beside, cell: first[cell]}
