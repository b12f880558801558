"""The house rules: import cost, floors, and that every system has its card, row and page."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from rows import ROWS
from subquad.catalogue import systems

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "subquad"
CARDS = systems()

# Lowest first; a room imports from its own floor and those below.
FLOORS = (
    ("catalogue",),
    ("lazy", "mask", "state", "checkpoint"),
    ("ops",),
    ("parallel",),
    ("mixers", "policies", "caches"),
    ("models", "tasks"),
    ("recipes", "analysis"),
    ("bench", "train"),
    ("cli",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_little_beyond_torch():
    said = _python(
        "import sys, time, torch\n"
        "for _ in range(3):\n"
        "    for name in [*sys.modules]:\n"
        "        if name.startswith('subquad'): del sys.modules[name]\n"
        "    start = time.perf_counter()\n"
        "    import subquad; dir(subquad)\n"
        "    print(time.perf_counter() - start)\n"
    )
    assert min(map(float, said.split())) < 0.3


def test_first_calls_do_not_import_the_compiler():
    """torch._dynamo and sympy take seconds to import, which a first call would wait for."""
    _python(
        "import sys, torch, subquad\n"
        "x = torch.randn(1, 130, 64, requires_grad=True)\n"
        "for key in ('softmax', 'gated_deltanet', 'parallax', 'lolcats', 'titans', 'sla'):\n"
        "    y, _ = subquad.create_mixer(key, dim=64)(x)\n"
        "    y.sum().backward()\n"
        "    for name in ('torch._dynamo', 'sympy'):\n"
        "        assert name not in sys.modules, f'{key} imports {name}'\n"
    )


def test_base_needs_only_its_dependencies():
    """Mixers and operations work where none of the extras is installed."""
    extras = ("transformers", "rich", "typer", "plotly", "matplotlib", "peft", "psutil", "sklearn")
    _python(
        f"import sys; sys.modules.update(dict.fromkeys({extras!r}))\n"
        "import torch, subquad\n"
        "mixer = subquad.create_mixer('gated_deltanet', dim=16, heads=2)\n"
        "y, state = mixer(torch.randn(1, 5, 16)); mixer(y[:, -1:], state=state)"
    )


def _modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """The rooms of subquad that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            names = [f"subquad.{a.name}" for a in node.names] if module == "subquad" else [module]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("subquad.")}
    return rooms & set(FLOOR)


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_downwards(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    above = {other for other in _imports(path) if FLOOR[other] > FLOOR[room]}
    assert not above, f"{room} imports from above: {sorted(above)}"


def test_every_room_has_a_floor():
    rooms = {p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in _modules()}
    assert rooms - {"__init__", "__main__"} <= set(FLOOR)


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += [line for line in extra if not line.startswith("subquad[")]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line
    )
    pinned = {name.lower().replace("_", "-"): Version(version) for name, version in pins.items()}
    for requirement in map(Requirement, wanted):
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), requirement


def test_keys_are_unique():
    assert len({card.key for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)
class TestCard:
    def test_home_imports(self, card):
        assert callable(card.load())

    def test_evidence_is_known(self, card):
        assert set(card.evidence) <= {"facts", "golden", "claim"}
        assert card.evidence

    def test_has_a_row(self, card):
        if card.kind != "mixer":
            pytest.skip(f"{card.kind} systems have test files of their own")
        rows = [row for row in ROWS if row.key == card.key]
        assert rows, f"tests/rows.py has no row for {card.key}"
        if "golden" in card.evidence:
            assert any(row.golden is not None for row in rows)

    def test_has_a_page(self, card):
        page = ROOT / "docs" / "systems" / f"{card.key}.md"
        assert page.is_file(), f"docs/systems/{card.key}.md is missing"
        assert page.read_text().startswith("# ")
