"""How long a batch may run: by a clock that stands still while the whole process does."""

import asyncio
import math
from collections.abc import Callable

# Of the measured time, which a busy machine makes longer; and at least so long, for what is met for the first time.
_TIMES_THE_USUAL, _LEAST_S = 20.0, 10.0
_BATCHES_TO_KNOW = 20
_LOOKS = 4
_LONGEST_STEP_S = 0.5


def hang_limit_s(expected_s: float, batches: int, most_s: float) -> float:
    """After which a batch hangs that takes `expected_s` as a rule, known from so many batches; at most `most_s`."""
    if batches < _BATCHES_TO_KNOW:
        return most_s
    return min(most_s, max(_LEAST_S, _TIMES_THE_USUAL * expected_s))


class Patience:
    """Calls `late` once the event loop has turned for `limit_s`, unless `end` was called before.

    A process that was stopped, or a machine that was suspended, does not count: the work that is waited for stood still
    too, or its result has been waiting in a socket.
    """

    __slots__ = ("_late", "_left_s", "_looked_at", "_loop", "_step_s", "_timer")

    def __init__(self, limit_s: float, late: Callable[[], None]) -> None:
        self._late = late
        self._left_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._step_s = min(limit_s / _LOOKS, _LONGEST_STEP_S)
        self._timer: asyncio.TimerHandle | None = None
        if limit_s < math.inf:
            self._wait()

    def _wait(self) -> None:
        self._looked_at = self._loop.time()
        self._timer = self._loop.call_later(self._step_s, self._look)

    def _look(self) -> None:
        self._left_s -= min(self._loop.time() - self._looked_at, 2 * self._step_s)
        if self._left_s > 0:
            self._wait()
        else:
            self._timer = None
            self._late()

    def end(self) -> None:
        """It is over. A second time does nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
