"""Which rows there are, and in which order they stand."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tests.scoreboard.row import Row

# In the order of the table: the letter that keys begin with, and the title of the group.
GROUPS = {
    "G": "Load held",
    "F": "Faults survived",
    "X": "Bad inputs tried",
    "Z": "Nothing lost",
    "K": "Tests of the tests",
}


class UnknownRow(Exception):
    """A row was asked for that there is not; the message names those that there are."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table. row: None while nothing tries it."""

    key: str
    title: str
    pass_line: str
    row: Row | None


def table(rows: Iterable[Row], planned: Mapping[str, str]) -> list[Line]:
    """All lines in order. ValueError where two say the same key, or a key belongs to no group."""
    lines: dict[str, Line] = {}
    for row in rows:
        if row.key in lines:
            raise ValueError(f"two rows have the key {row.key}")
        if row.key in planned:
            raise ValueError(f"{row.key} has a row now and is planned as well")
        lines[row.key] = Line(row.key, row.title, row.pass_line, row)
    lines.update({key: Line(key, title, "", None) for key, title in planned.items()})
    return sorted(lines.values(), key=lambda line: place(line.key))


def place(key: str) -> tuple[int, int]:
    """Where the key stands: G2 before G10, and both before F1. ValueError for what is no key."""
    group, number = key[:1], key[1:]
    if group not in GROUPS or not number.isdecimal():
        raise ValueError(f"{key!r} is no key: one of {', '.join(GROUPS)} and a number is needed, as G1")
    return list(GROUPS).index(group), int(number)


def chosen(lines: Sequence[Line], wanted: str) -> list[Row]:
    """The rows that "G1,F" asks for, in the order of the table; a letter is its whole group, "" is all. UnknownRow."""
    words = [word.strip().upper() for word in wanted.split(",") if word.strip()]
    known = [line.key for line in lines if line.row is not None]
    unknown = [word for word in words if word not in known and not (word in GROUPS and _has_group(known, word))]
    if unknown:
        said = ", ".join(unknown)
        raise UnknownRow(f"--rows {wanted}: no row can be run as {said}; there are {', '.join(known) or 'none'}")
    rows = [line.row for line in lines if line.row is not None]
    return [row for row in rows if not words or row.key in words or row.key[0] in words]


def _has_group(keys: Iterable[str], group: str) -> bool:
    return any(key.startswith(group) for key in keys)
