"""Every policy against the kit: the table in policy_rows.py times the equalities in the kit."""

import pytest

import policy_kit
from policy_rows import ROWS
from subquad.catalogue import systems


@pytest.mark.parametrize("check", policy_kit.CHECKS.values(), ids=policy_kit.CHECKS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_policy(row, check):
    check(row)


@pytest.mark.parametrize("card", systems(kind="policy"), ids=lambda card: card.key)
def test_every_policy_has_a_row(card):
    assert any(row.key == card.key for row in ROWS)
