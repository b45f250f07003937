"""When a refusal is told: at once, unless there are so many that telling them would take the processor from the work.

A refusal costs nearly as much as any answer (docs/batching.md). Callers who come back at once, whatever they are
told, would have as many as they can receive. Beyond a rate, refusals wait for their turn, so that each of these callers
waits as one would who heeds the hint. Pure: no clock of its own.
"""

# These take 10 to 20 % of a processor. One event loop has to send them, however many processors there are.
_PER_S_OF_A_CPU, _MOST_PER_S = 250.0, 1000.0
# As many as come in so long are told at once although they come together.
_BURST_S = 0.1
_LONGEST_S = 1.0
# Of the time that the caller has left: he learns before its end.
_OF_TIME_LEFT = 0.5


class RefusalPace:
    """The turns of refusals. cpus: that the server may use."""

    def __init__(self, cpus: int) -> None:
        self._gap_s = 1 / min(_MOST_PER_S, cpus * _PER_S_OF_A_CPU)
        self._all_told_at = 0.0

    def wait_s(self, now: float, time_left_s: float) -> float:
        """How long the refusal is held that is due now; 0: not at all."""
        latest = now + _BURST_S + _LONGEST_S
        self._all_told_at = min(max(self._all_told_at, now) + self._gap_s, latest)
        return max(0.0, min(self._all_told_at - now - _BURST_S, _OF_TIME_LEFT * time_left_s))
