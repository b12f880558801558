"""Every mixer against the kit: the table in rows.py times the equalities in kit.py."""

import pytest
import torch

import kit
import subquad
from rows import ROWS
from subquad import catalogue
from subquad.mixers.base import options_of
from subquad.mixers.softmax import Softmax

# Where every token sees those after it, a part alone is not the part of the whole.
CAUSAL = (kit.check_causal, kit.check_split, kit.check_decode)


@pytest.mark.parametrize("check", kit.CHECKS.values(), ids=kit.CHECKS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_mixer(row, check):
    if check is kit.check_packed and not row.packs:
        pytest.skip(f"{row.key} does not take packed sequences")
    if check in CAUSAL and not row.causal:
        pytest.skip(f"{row.id} is not causal")
    if check in kit.TEXT_ONLY and row.grid is not None:
        pytest.skip(f"{row.id} sees an image")
    check(row)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.golden is not None], ids=lambda row: row.id
)
def test_golden(row, shared):
    kit.check_golden(row, shared)


@pytest.mark.parametrize(
    "key", [c.key for c in catalogue.systems(kind="mixer") if issubclass(c.load(), Softmax)]
)
def test_causal_is_no_empty_word(key):
    """Where a system says that its tokens see the future, they do; else it is refused."""
    if "causal" in catalogue.system(key).load().WITHOUT or key == "sla":  # that one never is
        with pytest.raises(ValueError, match="causal"):
            subquad.create_mixer(key, dim=16, heads=2, causal=False)
        return
    mixer = subquad.create_mixer(key, dim=16, heads=2, causal=False).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0][:, 0].square().sum(), x)
    assert gradient[:, 8].abs().max() > 0


def test_what_is_no_tensor_or_state_is_named():
    mixer, x = subquad.create_mixer("gla", dim=16, heads=2), torch.randn(1, 5, 16)
    for wrong, named in (
        ({"cu_seqlens": [0, 2, 5]}, "cu_seqlens must be int32"),
        ({"state": mixer(x)}, "state must be a State or None, got tuple"),
    ):
        with pytest.raises(ValueError, match=named):
            mixer(x, **wrong)
    with pytest.raises(ValueError, match="x must be floating point"):
        mixer(x.long())


def test_what_a_mixer_can_be_told():
    """Its own options, then those of the class it hands them on to, but for what it refuses."""
    found = options_of("cca")
    assert list(found)[:4] == ["dim", "group", "local", "core_rope"]
    assert found["heads"] == 8
    assert not found.keys() & {"window", "sinks", "causal", "options"}
    for key in (card.key for card in catalogue.systems(kind="mixer")):
        for name in catalogue.system(key).load().WITHOUT:
            with pytest.raises(ValueError, match=name):
                subquad.create_mixer(key, dim=16, heads=2, **{name: WRONG[name]})


WRONG = {"causal": False, "window": 3, "sinks": 1, "scale": 0.5, "out_bias": True}
