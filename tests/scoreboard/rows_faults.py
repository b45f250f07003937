"""The rows F1 to F10: faults survived."""

from tests.scoreboard.faults import (
    clients,
    ends,
    engine,
    kills,
    machine,
    poison,
    policy,
    rolling,
    starts,
    zombie,
)
from tests.scoreboard.row import Row

ROWS: tuple[Row, ...] = (
    kills.ROW,
    engine.ROW,
    poison.ROW,
    policy.ROW,
    clients.ROW,
    rolling.ROW,
    starts.ROW,
    machine.ROW,
    zombie.ROW,
    ends.ROW,
)
