"""What one caller may ask for: requests and tokens per second, as token buckets, and a share of the queue. Pure."""

from dataclasses import dataclass

# A bucket holds what its rate gives in so long: a caller who was quiet may ask for that much at once.
BURST_S = 1.0
# Who waits as long as he was told has waited long enough.
_ROUNDING_S = 1e-6


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """None: as much as there is. queue_share: of the queue's requests and of its tokens, 0..1."""

    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    queue_share: float | None = None

    def changed(
        self, requests_per_s: float | None, tokens_per_s: float | None, queue_share: float | None
    ) -> "CallerLimits":
        """With each of these that is there."""
        if requests_per_s is tokens_per_s is queue_share is None:
            return self
        return CallerLimits(
            self.requests_per_s if requests_per_s is None else requests_per_s,
            self.tokens_per_s if tokens_per_s is None else tokens_per_s,
            self.queue_share if queue_share is None else queue_share,
        )


NO_LIMITS = CallerLimits()


class CallerBuckets:
    """The buckets of all callers, each told by when it will be full again; full ones are forgotten."""

    def __init__(self) -> None:
        self._full_at: dict[tuple[str, str], float] = {}
        self._most = 1024

    def wait_s(self, caller: str, limits: CallerLimits, tokens: int, now: float) -> float:
        """Until a request of `tokens` tokens keeps to the limits, if he asks for nothing else; 0 where it does now.

        One of more tokens than a bucket holds has to wait until it is full.
        """
        wait_s = 0.0
        for kind, rate, size, amount in _parts(limits, tokens):
            may_lack_s = (size - min(amount, size)) / rate
            wait_s = max(wait_s, self._full_at.get((caller, kind), now) - may_lack_s - now)
        return wait_s if wait_s > _ROUNDING_S else 0.0

    def take(self, caller: str, limits: CallerLimits, tokens: int, now: float) -> None:
        """A request of `tokens` tokens is let in. More of them than a bucket holds are taken from the time to come."""
        for kind, rate, _, amount in _parts(limits, tokens):
            self._full_at[caller, kind] = max(self._full_at.get((caller, kind), now), now) + amount / rate
        if len(self._full_at) > self._most:
            self._full_at = {name: full_at for name, full_at in self._full_at.items() if full_at > now}
            self._most = max(1024, 2 * len(self._full_at))

    def __len__(self) -> int:
        return len(self._full_at)


def _parts(limits: CallerLimits, tokens: int) -> list[tuple[str, float, float, float]]:
    """(kind, rate, size of the bucket, amount). A bucket holds one at least."""
    rates = (("requests", limits.requests_per_s, 1.0), ("tokens", limits.tokens_per_s, float(tokens)))
    return [(kind, rate, max(1.0, rate * BURST_S), amount) for kind, rate, amount in rates if rate is not None]
