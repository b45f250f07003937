"""Rows of the scoreboard about load, in their quick form."""

import pytest

from tests.scoreboard import rows_ceiling, rows_fairness, rows_load, rows_refusals
from tests.scoreboard.row import Row, Scope

ROWS = {row.key: row for module in (rows_load, rows_fairness, rows_refusals, rows_ceiling) for row in module.ROWS}
QUICK = Scope(is_quick=True, seed=1, tell=lambda done, of: None)


def test_all_rows_about_load_are_there() -> None:
    assert sorted(ROWS) == [f"G{number}" for number in range(1, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("row", [ROWS[key] for key in ("G3", "G4")], ids=lambda row: row.key)
async def test_a_row_holds_in_its_quick_form(row: Row) -> None:
    figure = await row.run(QUICK)
    assert figure.passed is not False, figure
    assert figure.passed or figure.note
    happened = {"G3": "refused", "G4": "cancelled_in_queue"}[row.key]
    assert float(figure.details[happened]) > 0
