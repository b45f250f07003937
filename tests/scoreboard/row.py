"""What a row of the scoreboard is: what is tried, the figure that it gives, and the line at which it passes."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one run of a row gave.

    text: the figure as the table shows it. passed: None where the run cannot tell, and `note` says why in a sentence.
    details: what stands in the JSON beside it, by names with their unit.
    """

    text: str
    passed: bool | None
    note: str = ""
    details: Mapping[str, float | int | str] = field(default_factory=dict)


class NotRun(Exception):
    """Raised by a row that lacks something here; the message says what, in a sentence. An earlier figure stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """How much a row may take. is_quick: a slice of half a minute at most, for CI; else as much as its line asks for.

    seed: of all that is drawn at random. tell: called with (done, of) as the row goes on, for the progress bar.
    """

    is_quick: bool
    seed: int
    tell: Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. key: as "G1"; pass_line: what the figure must reach, in words.

    run: tries it against real parts. What it raises fails the row, and is told beside it.
    """

    key: str
    title: str
    pass_line: str
    run: Callable[[Scope], Awaitable[Figure]]
