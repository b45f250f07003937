"""The quick form of rows of the scoreboard: each fault happens, or the row raises, and is survived."""

import pytest

from tests.scoreboard.row import Row, Scope
from tests.scoreboard.rows_faults import ROWS

SEED = 20261126
# The others take minutes: `python -m tests.scoreboard --quick --rows F1,F3,F6,F7,F8,F9,F10`. Their faults have tests of
# their own in tests/integration, one by one.
IN_CI = {"F2", "F4", "F5"}


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.key in IN_CI], ids=lambda row: row.key)
async def test_a_slice_of_the_row_is_survived(row: Row) -> None:
    told: list[tuple[int, int]] = []
    figure = await row.run(Scope(is_quick=True, seed=SEED, tell=lambda done, of: told.append((done, of))))
    assert figure.passed is not False, (figure.text, figure.note, dict(figure.details))
    assert told, "nothing was tried"


def test_each_row_has_a_key_of_its_own_in_the_order_of_the_table() -> None:
    assert [row.key for row in ROWS] == [f"F{number}" for number in range(1, 11)]
