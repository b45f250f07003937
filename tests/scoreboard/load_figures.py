"""What the callers of a run leave, and figures of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_inference_server.benchmark.load.records import CODE_NUMBERS, Records, ok_only
from ml_inference_server.benchmark.load.schedule import Process, arrivals_s
from tests.scoreboard.callers import Job

# Above one of these the machine had too much else to do for a figure of time (reliability.md 4.7).
_BUSY_MS, _BUSY_SHARE = 50.0, 0.1
_REFUSED = CODE_NUMBERS["RESOURCE_EXHAUSTED"]


def _is_busy(idle_ms: float, waited_share: float) -> bool:
    return idle_ms > _BUSY_MS or waited_share > _BUSY_SHARE


@dataclass
class Machine:
    """How busy it was with other things in all runs of a row, at its worst; and how late the server's event loop."""

    idle_ms: float = 0.0
    waited_share: float = 0.0
    worst_lag_ms: float = 0.0

    def saw(self, run: "LoadRun") -> None:
        self.idle_ms = max(self.idle_ms, run.idle_ms)
        self.waited_share = max(self.waited_share, run.waited_share)
        self.worst_lag_ms = max(self.worst_lag_ms, run.worst_lag_ms)

    @property
    def is_busy(self) -> bool:
        return _is_busy(self.idle_ms, self.waited_share)

    def judge(self, exact: bool, timed: bool) -> tuple[bool | None, str]:
        """(verdict, note). exact: what no busy machine excuses. timed: what it makes worthless, either way."""
        if not exact:
            return False, ""
        if not self.is_busy:
            return timed, ""
        return None, (
            f"Inconclusive: the machine was busy (the event loop waited {100 * self.waited_share:.0f} % of the time "
            f"for a processor, an idle process ran {self.idle_ms:.0f} ms late at p99)."
        )

    def details(self) -> dict[str, float]:
        return {
            "worst_loop_lag_ms": self.worst_lag_ms,
            "idle_process_late_p99_ms": self.idle_ms,
            "loop_waited_for_a_processor_share": self.waited_share,
        }


@dataclass(frozen=True)
class Ran:
    """What one job left. not_serving: updates of that kind on its health streams."""

    job: Job
    records: Records
    not_serving: int
    cpu_s: float

    @property
    def ok(self) -> Records:
        return ok_only(self.records)

    @property
    def refused(self) -> Records:
        found: Records = self.records[self.records["code"] == _REFUSED]
        return found

    def count(self, code: str) -> int:
        return int(np.count_nonzero(self.records["code"] == CODE_NUMBERS[code]))

    @property
    def broken(self) -> int:
        """Calls that ended as none may: wrong answers, bugs of the callers, internal errors."""
        return sum(self.count(code) for code in ("INVALID_RESPONSE", "CLIENT_ERROR", "INTERNAL", "UNKNOWN"))


@dataclass(frozen=True)
class LoadRun:
    """Jobs that ran at the same time.

    idle_ms: how late a process was that had nothing to do, at the 99th percentile. waited_share: of the time, in which
    the server's event loop was kept waiting for a processor. seconds: the time that goodput is counted in: from the
    start to the last call that was due. counted: by how much the server's figures grew. worst_lag_ms: of its loop.
    """

    ran: list[Ran]
    idle_ms: float
    waited_share: float
    server_cpu_s: float
    seconds: float
    counted: Mapping[str, float]
    worst_lag_ms: float

    @property
    def is_busy(self) -> bool:
        return _is_busy(self.idle_ms, self.waited_share)

    @property
    def goodput(self) -> float:
        """Right answers per second, of all jobs together, that came while calls were sent."""
        return sum(int(np.count_nonzero(each.ok["done_s"] <= self.seconds)) for each in self.ran) / self.seconds

    @property
    def broken(self) -> int:
        return sum(each.broken for each in self.ran)


def arrivals(process: Process, rate_per_s: float, seconds: float, seed: int, *, after_s: float = 0.0) -> list[float]:
    due_s = arrivals_s(process, rate_per_s, duration_s=seconds, seed=seed, repeat=0) + after_s
    found: list[float] = due_s.tolist()
    return found


def in_processes(due_s: Sequence[float], processes: int) -> list[list[float]]:
    return [list(due_s[first::processes]) for first in range(processes)]


def latency_ms(records: Records, *, since: str = "due_s") -> Any:
    return 1e3 * (records["done_s"] - records[since])


def percentile(values: Any, share: float) -> float:
    """One of the values, none between two of them; NaN where there is none."""
    return float(np.percentile(values, 100 * share, method="higher")) if len(values) else float("nan")


def lag_ms(records: Records) -> float:
    """How late the callers sent what was due, at the 99th percentile."""
    return percentile(1e3 * (records["sent_s"] - records["due_s"]), 0.99)
