"""Rows K: whether the tests see what they are there for."""

from tests.scoreboard import planted_row
from tests.scoreboard.row import Row

ROWS: tuple[Row, ...] = (
    Row(
        key="K1",
        title="Bugs that are planted in the server one after the other, and the test that must see each",
        pass_line="all caught",
        run=planted_row.run,
    ),
)
