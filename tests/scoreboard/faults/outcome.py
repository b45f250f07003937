"""How a fault ended, and what many of them come to."""

import contextlib
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tests.scoreboard.faults.live import LoopLag
from tests.scoreboard.row import Figure

T = TypeVar("T")

# A loop that is later than this makes a time no figure of the server's.
_BUSY_MS = 50.0
_MOST_TOLD = 5


class NotProven(AssertionError):
    """The fault cannot be shown to have happened."""


class TooLate(NotProven):
    """What the fault was to strike had ended before it came. It can be tried again."""


async def in_time(fault: Callable[[], Awaitable[T]], tries: int = 5) -> T:
    """The fault, tried again where it came too late."""
    for _ in range(tries - 1):
        with contextlib.suppress(TooLate):
            return await fault()
    return await fault()


@dataclass
class Outcomes:
    """Of many faults. failures: what did not survive, in words. times_s: to the first good reply, by kind."""

    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    times_s: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, wrong: Sequence[str], time_s: float | None = None) -> None:
        """One fault that happened. wrong: what was not as it must be."""
        self.tried[kind] += 1
        self.survived[kind] += not wrong
        self.failures += [f"{kind}: {each}" for each in wrong]
        if time_s is not None:
            self.times_s.setdefault(kind, []).append(time_s)

    @property
    def all_times_s(self) -> list[float]:
        return [time_s for times in self.times_s.values() for time_s in times]

    @property
    def survive(self) -> bool:
        return self.tried.total() == self.survived.total() > 0

    @property
    def text(self) -> str:
        return f"{self.survived.total()} of {self.tried.total()}"

    @property
    def note(self) -> str:
        told = "; ".join(self.failures[:_MOST_TOLD])
        return told + (f"; and {len(self.failures) - _MOST_TOLD} more" if len(self.failures) > _MOST_TOLD else "")

    def details(self) -> dict[str, float | int | str]:
        found: dict[str, float | int | str] = {}
        for kind, tried in self.tried.items():
            found[f"{kind}: survived"] = f"{self.survived[kind]} of {tried}"
        for kind, times_s in self.times_s.items():
            found[f"{kind}: median_s"] = round(statistics.median(times_s), 3)
            found[f"{kind}: worst_s"] = round(max(times_s), 3)
        return found


def within(outcomes: Outcomes, limits_s: dict[str, float], lag: LoopLag) -> tuple[bool | None, str]:
    """(passed, note): all survived, and each within the limit of its kind.

    Where one is late and this machine was busy, nobody can tell: None.
    """
    if not outcomes.survive:
        return False, outcomes.note
    late = [
        f"{kind}: {max(times_s):.2f} s, at most {limits_s[kind]:.2f} s"
        for kind, times_s in outcomes.times_s.items()
        if max(times_s) > limits_s[kind]
    ]
    if not late:
        return True, ""
    if lag.worst_ms > _BUSY_MS:
        return None, f"the machine was busy (the loop of the test was {lag.worst_ms:.0f} ms late): {'; '.join(late)}"
    return False, "; ".join(late)


def figure(outcomes: Outcomes, *, lag: LoopLag | None = None, **more: float | int | str) -> Figure:
    """Of faults that only have to be survived."""
    details = outcomes.details() | more
    if lag is not None:
        details["loop_lag_worst_ms"] = round(lag.worst_ms, 1)
    return Figure(text=outcomes.text, passed=outcomes.survive, note=outcomes.note, details=details)
