"""What happened in the last seconds: sums, rates and percentiles. Pure: `now_s` is an argument.

Time is cut into slots (one second; a tenth of one where the window is under ten seconds). A slot is added to a running
total when it closes and taken out when it leaves the window, so that neither writing nor reading grows with the length
of the window. Everything inside is an integer: adding and taking out cancel exactly.
"""

import math
from collections import Counter, defaultdict, deque

import numpy as np
from numpy.typing import NDArray

RELATIVE_ERROR = 0.01
"""A percentile differs from the exact nearest-rank one by at most this share of it (above a microsecond)."""

SMALLEST_S = 1e-6
"""Shorter times are counted as 0."""

_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GROWTH = math.log(_GROWTH)
_NS = 1_000_000_000


class Distribution:
    """Times in log-spaced buckets: bucket i holds ]growth^(i-1), growth^i] microseconds."""

    __slots__ = ("_buckets", "_total_ns", "count")

    def __init__(self) -> None:
        self.count = 0
        self._total_ns = 0
        self._buckets: defaultdict[int, int] = defaultdict(int)

    def add_many(self, seconds: NDArray[np.float64]) -> None:
        long = seconds[seconds >= SMALLEST_S]
        self.count += len(seconds)
        if len(long) < len(seconds):
            self._buckets[-1] += len(seconds) - len(long)
        if len(long):
            self._total_ns += int(np.rint(long * _NS).astype(np.int64).sum())
            places = np.ceil(np.log(long / SMALLEST_S) / _LOG_GROWTH).astype(np.int64)
            for place, count in Counter(places.tolist()).items():
                self._buckets[place] += count

    def merge(self, other: "Distribution", sign: int = 1) -> None:
        """Add what `other` holds, or with sign -1 take it out again."""
        self.count += sign * other.count
        self._total_ns += sign * other._total_ns  # noqa: SLF001 - its own class
        for bucket, count in other._buckets.items():  # noqa: SLF001
            left = self._buckets[bucket] + sign * count
            if left:
                self._buckets[bucket] = left
            else:
                del self._buckets[bucket]

    @property
    def mean_s(self) -> float | None:
        return self._total_ns / _NS / self.count if self.count else None

    def percentiles_s(self, *shares: float) -> list[float] | None:
        """The nearest-rank percentile for each share in ]0, 1], ascending; None when nothing was added."""
        if not self.count:
            return None
        found: list[float] = []
        seen = 0
        ranks = iter([max(1, math.ceil(share * self.count)) for share in shares])
        rank = next(ranks, None)
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            while rank is not None and rank <= seen:
                found.append(_middle_s(bucket))
                rank = next(ranks, None)
        return found


def _middle_s(bucket: int) -> float:
    """The value that is at most RELATIVE_ERROR away from all of the bucket."""
    return 0.0 if bucket < 0 else 2 * _GROWTH**bucket / (_GROWTH + 1) * SMALLEST_S


class Slot:
    """What one stretch of time holds: named integer sums (a pair names a bucket) and named distributions."""

    __slots__ = ("sums", "times")

    def __init__(self) -> None:
        self.sums: defaultdict[str | tuple[str, int], int] = defaultdict(int)
        self.times: defaultdict[str, Distribution] = defaultdict(Distribution)

    def merge(self, other: "Slot", sign: int = 1) -> None:
        for name, amount in other.sums.items():
            self.sums[name] += sign * amount
        for name, distribution in other.times.items():
            self.times[name].merge(distribution, sign)


class SlidingWindow:
    """The last `window_s` seconds; `covered_s` says how much of them a view really holds."""

    def __init__(self, window_s: float, start_s: float) -> None:
        self._start_s = start_s
        self._slot_s = 1.0 if window_s >= 10 else 0.1
        self._slots_kept = round(window_s / self._slot_s)
        self._index = 0
        self._current = Slot()
        self._closed: deque[tuple[int, Slot]] = deque()
        self._total = Slot()  # of _closed
        self._untaken = Slot()  # closed since the last take_closed
        self._taken_index = 0

    def at(self, now_s: float) -> Slot:
        """The slot to write into. A `now_s` before an earlier one counts as that one."""
        index = int((now_s - self._start_s) / self._slot_s)
        if index > self._index:
            self._advance(index)
        return self._current

    @property
    def current(self) -> Slot:
        """The slot that the latest `at` gave."""
        return self._current

    @property
    def current_ends_s(self) -> float:
        """From then on `at` gives another slot."""
        return self._start_s + (self._index + 1) * self._slot_s

    def view(self, now_s: float) -> Slot:
        """A copy of everything inside the window."""
        current = self.at(now_s)
        whole = Slot()
        whole.merge(self._total)
        whole.merge(current)
        return whole

    def take_closed(self, now_s: float) -> tuple[Slot, float]:
        """What closed since the last call, and how many seconds that covers: each slot is handed out once."""
        self.at(now_s)
        taken, covered_s = self._untaken, (self._index - self._taken_index) * self._slot_s
        self._untaken, self._taken_index = Slot(), self._index
        return taken, covered_s

    def covered_s(self, now_s: float) -> float:
        """How long a view at `now_s` looks back; never 0, never more than the window.

        The time since the start (one slot at least) until the window is full, then all whole slots and the running one.
        """
        elapsed_s = max(now_s - self._start_s, self._slot_s)
        into_slot_s = elapsed_s - int(elapsed_s / self._slot_s) * self._slot_s
        return min(elapsed_s, (self._slots_kept - 1) * self._slot_s + into_slot_s)

    def _advance(self, index: int) -> None:
        self._closed.append((self._index, self._current))
        self._total.merge(self._current)
        self._untaken.merge(self._current)
        self._index = index
        self._current = Slot()
        oldest = index - self._slots_kept
        while self._closed and self._closed[0][0] <= oldest:
            self._total.merge(self._closed.popleft()[1], -1)
