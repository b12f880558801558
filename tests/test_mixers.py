"""Every mixer against the kit: the table in rows.py times the equalities in kit.py."""

import pytest

import kit
from rows import ROWS

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
