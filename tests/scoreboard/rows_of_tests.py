"""Rows K: whether the tests see what they are there for, and what they say of another server."""

from tests.scoreboard import leak_row, planted_row
from tests.scoreboard.peer import row as peer_row
from tests.scoreboard.row import Row

ROWS: tuple[Row, ...] = (
    Row(
        key="K1",
        title="Bugs that are planted in the server one after the other, and the test that must see each",
        pass_line="all caught",
        run=planted_row.run,
    ),
    Row(
        key="K2",
        title="A server that keeps 1 kB of each cancelled call, and the soak that must see it",
        pass_line="seen; without the leak nothing is",
        run=leak_row.run,
    ),
    Row(
        key="K3",
        title="Ours and another server over the same HTTP route: bad inputs and clients, a crowd, a freeze, stops",
        pass_line="0 of ours; the other's stand beside",
        run=peer_row.run,
    ),
)
