"""The command line, and the examples of the README."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import subquad
from subquad import cli
from subquad.bench import units
from subquad.catalogue import systems

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _refused(monkeypatch, capsys, *arguments: str) -> str:
    """What a refused command says: one line on stderr, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["subquad", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out.strip() == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    return said.err


def test_help_and_list_do_without_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from subquad import cli;"
        "run = CliRunner().invoke;"
        "assert run(cli.app, ['--help']).exit_code == 0;"
        "assert run(cli.app, ['list', '--json']).exit_code == 0;"
        "assert not {'torch', 'transformers', 'plotly'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_has_help():
    groups = {(group.name,): group.typer_instance for group in cli.app.registered_groups}
    for above, app in {(): cli.app, **groups}.items():
        for command in app.registered_commands:
            name = command.name or command.callback.__name__
            assert command.callback.__doc__, f"{name} has no docstring"
            assert "Usage" in _run(*above, name, "--help")


def test_list():
    cards = json.loads(_run("list", "--json"))
    assert [card["key"] for card in cards] == [card.key for card in systems()]
    assert set(cards[0]) >= {"key", "name", "paper", "arxiv", "family", "kind", "home", "evidence"}
    mixers = _run("list", "--kind", "mixer")
    assert all(card.key in mixers for card in systems(kind="mixer"))


def test_show_prints_card_costs_and_page():
    said = _run("show", "gated_deltanet")
    assert "arxiv.org/abs/2412.06464" in said
    mixer = subquad.create_mixer("gated_deltanet", dim=1024)
    held = units.bytes_(mixer.state_bytes(65536, torch.bfloat16))
    assert re.search(rf"65,536 +{held} +{units.flops(mixer.flops(65536))}", said)
    page = ROOT / "docs" / "systems" / "gated_deltanet.md"
    assert page.read_text().splitlines()[0].removeprefix("# ") in said


def test_show_takes_options():
    assert "65,536" in _run("show", "gated_deltanet", "--option", "heads=2", "--dim", "64")


@pytest.mark.parametrize("card", systems(), ids=lambda card: card.key)
def test_show_every_system(card):
    assert card.name in _run("show", card.key)


def test_explain_says_who_runs():
    said = _run(
        "explain", "attention", "--shape", "T=64,H=2,K=8", "--mask", "causal", "--device", "cpu"
    )
    assert len(re.findall("^runs ", said, re.M)) == 1
    said = _run("explain", "recurrence", "--shape", "T=64,H=2,K=8,decay=head,delta=true")
    assert len(re.findall("^runs ", said, re.M)) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("list", "--kind", "mixr"), "mixer"),
        (("show", "gated_delta"), "gated_deltanet"),
        (("show", "gla", "--option", "heads=7"), "heads"),
        (("explain", "attentoin", "--shape", "T=1"), "attention"),
        (("explain", "recurrence", "--shape", "T=64,H=2,K=8,Q=3"), "Q"),
        (("explain", "recurrence", "--shape", "T64"), "name=value"),
        (("explain", "recurrence", "--shape", "T=64,H=2,K=8,decay=heads"), "'head'"),
        (("explain", "recurrence", "--shape", "T=64,H=2,K=8", "--device", "gpu"), "cuda"),
        (("explain", "recurrence", "--shape", "T=64,H=2,K=8", "--dtype", "int8"), "float32"),
        (("explain", "attention", "--shape", "T=64,H=2,K=8", "--mask", "windw(3)"), "window"),
        (("compare", "--preset", "dem"), "demo"),
        (("compare", "--set", "dims=3"), "dim"),
        (("compare", "--mixers", "gated_deltanett"), "gated_deltanet"),
        (("compare", "--lengths", "many"), "lengths"),
        (("train", "gla", "--task", "mqarr"), "mqar"),
        (("train", "gla", "--steps", "0"), "steps"),
        (("generate", "./model", "Why?"), "config.json"),
        (("generate", "model", "Why?", "--device", "gpu"), "cuda"),
        (("diffuse", "train", "--device", "gpu"), "cuda"),
        (("tune", "--sizes", "64"), "sizes"),
        (("tune", "--forms", "head,heads:delta"), "heads:delta"),
    ],
)
def test_what_is_wrong_is_one_line(monkeypatch, capsys, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert named in _refused(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_train_saves_a_model_and_goes_on(tmp_path):
    from transformers import AutoModelForCausalLM

    arguments = ("train", "gla[heads=2]", "--task", "mqar[vocab_size=32,length=16,pairs=2]")
    sizes = ("--steps", "3", "--batch", "2", "--dim", "16", "--depth", "1", "--out", str(tmp_path))
    assert "accuracy" in _run(*arguments, *sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.layers == "gla_heads2"
    assert "accuracy" in _run(*arguments, *sizes)


def test_a_full_disk_is_one_line(monkeypatch, capsys, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subquad.bench.compare.compare", full)
    assert "No space left" in _refused(monkeypatch, capsys, "compare", "--out", str(tmp_path))


def test_readme_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_readme_names_only_commands_that_exist():
    shell = "".join(re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S))
    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    assert set(re.findall(r"^subquad (\w+)", shell, re.M)) <= known
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", shell, re.M)) <= targets
