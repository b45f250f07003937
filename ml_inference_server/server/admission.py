"""Who is let in: bounded in requests and in tokens, and decided before any work is done for a request."""

import asyncio
import math
import random
from collections.abc import Callable
from types import TracebackType

from ml_inference_server.server.caller_limits import NO_LIMITS, CallerBuckets, CallerLimits
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.options import Priority
from ml_inference_server.server.refusals import RefusalPace
from ml_inference_server.server.shares import QueueShares
from ml_inference_server.utils.config import BatchingSettings
from ml_inference_server.utils.cpu import available_cpus
from ml_inference_server.utils.errors import DeadlinePassed, InvalidRequest, Overloaded, Unavailable

_MIN_RETRY_MS, _MAX_RETRY_MS = 20, 5000
# A request is let in only if the work in front of it should be done within this share of its time. Otherwise, under
# overload, every answer would come a moment too late (docs/batching.md).
_TIME_FOR_THE_QUEUE = 0.8


class Reservation:
    """The room of one request, as a `with` block: what is left of it at the end is given back.

    caller: who holds it. is_bulk: its texts are served as such. tokens, texts: those that no batch has taken yet.
    """

    __slots__ = ("_admission", "_held", "_is_named", "_is_overflow", "_shares", "caller", "is_bulk", "texts", "tokens")

    def __init__(
        self,
        admission: "Admission",
        shares: QueueShares,
        caller: str,
        tokens: int,
        texts: int,
        *,
        is_bulk: bool,
        is_overflow: bool,
        is_named: bool,
    ) -> None:
        self._admission, self._shares = admission, shares
        self.caller, self.is_bulk, self._is_overflow, self._is_named = caller, is_bulk, is_overflow, is_named
        self.tokens = self.texts = 0
        self._held = shares.enter(caller)
        self.resize(tokens, texts)

    def resize(self, tokens: int, texts: int) -> None:
        """Hold so much from now on: the true numbers, in place of the estimate."""
        more_tokens, more_texts = tokens - self.tokens, texts - self.texts
        if more_tokens or more_texts:
            self.tokens, self.texts = tokens, texts
            self._shares.change(
                self._held,
                more_tokens,
                more_texts,
                is_bulk=self.is_bulk,
                is_overflow=self._is_overflow,
                is_named=self._is_named,
            )

    def take(self, tokens: int) -> None:
        """One text more, of so many tokens, that another request had waited for."""
        self.resize(self.tokens + tokens, self.texts + 1)

    def give_back(self, tokens: int) -> None:
        """A batch has taken one text of `tokens` tokens out of the queue."""
        self.resize(max(0, self.tokens - tokens), max(0, self.texts - 1))

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._admission.release(self)


class Admission:
    """batch_tokens: of one batch, at most."""

    def __init__(
        self,
        settings: BatchingSettings,
        rate: EngineRate,
        *,
        batch_tokens: int,
        stuck: Callable[[], str] = lambda: "",
        limits_of: Callable[[str], CallerLimits] = lambda caller: NO_LIMITS,
    ) -> None:
        """stuck: why no request could be worked on now, nor soon. limits_of: a caller, as they are now."""
        self._settings = settings
        self._stuck = stuck
        self._rate = rate
        self._shares = QueueShares(
            max_requests=settings.max_queue_requests,
            max_tokens=settings.max_queue_tokens,
            batch_tokens=batch_tokens,
            batch_texts=settings.max_batch_size,
        )
        self._limits_of = limits_of
        self._buckets = CallerBuckets()
        self._refusals = RefusalPace(available_cpus())
        self._loop = asyncio.get_running_loop()
        self._held: set[Reservation] = set()
        self._refuses = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def requests(self) -> int:
        """How many were let in and are not answered."""
        return len(self._held)

    @property
    def reserved_tokens(self) -> int:
        """Of all requests that were let in, without those that a batch has taken."""
        return self._shares.tokens

    @property
    def expected_wait_s(self) -> float:
        """How long the engine takes for all that no batch has taken yet; 0 before it has run a batch."""
        return self._seconds_for(self._shares.tokens)

    def change(self, settings: BatchingSettings, *, batch_tokens: int) -> None:
        """Other bounds from now on; whoever is in stays."""
        self._settings = settings
        self._shares.change_bounds(
            max_requests=settings.max_queue_requests,
            max_tokens=settings.max_queue_tokens,
            batch_tokens=batch_tokens,
            batch_texts=settings.max_batch_size,
        )

    async def enter(
        self, tokens: int, deadline: float, *, texts: int = 1, caller: str = "", asked: Priority | None = None
    ) -> Reservation:
        """As `admit`; but Overloaded is held where there are too many refusals (refusals.py)."""
        try:
            return self.admit(tokens, deadline, texts=texts, caller=caller, asked=asked)
        except Overloaded:
            now = self._loop.time()
            if wait_s := self._refusals.wait_s(now, deadline - now):
                await asyncio.sleep(wait_s)
            raise

    def admit(
        self, tokens: int, deadline: float, *, texts: int = 1, caller: str = "", asked: Priority | None = None
    ) -> Reservation:
        """Room for a request of about `tokens` tokens, all or nothing. asked: the priority that it names.

        Raises Unavailable while draining or stuck, InvalidRequest if the request could never fit, Overloaded with a
        hint if it is beyond the limits of its caller, does not fit now or would wait for most of its time,
        DeadlinePassed if it is late already.
        """
        settings = self._settings
        if self._refuses:
            raise Unavailable("the server is shutting down; send the request to another one")
        if stuck := self._stuck():
            raise Unavailable(f"{stuck}; send the request to another server", reason="ENGINE_STUCK")
        now = self._loop.time()
        time_left_s = deadline - now
        if time_left_s <= 0:
            raise DeadlinePassed("the deadline had passed before the request was admitted")
        if tokens > settings.max_queue_tokens:
            raise InvalidRequest(
                f"the request has about {tokens} tokens, the whole queue takes {settings.max_queue_tokens}: split it",
                reason="TOO_MANY_TEXTS",
            )
        limits = self._limits_of(caller)
        if limits is not NO_LIMITS:
            self._check_limits(caller, limits, tokens, now)
        if bound := self._shares.full(caller, tokens):
            raise self._full(bound)
        priority, is_overflow = self._shares.priority(caller, tokens, texts, asked)
        wait_s = self._seconds_for(self._shares.tokens_ahead(caller, priority))
        if wait_s > _TIME_FOR_THE_QUEUE * time_left_s:
            hint = _retry_hint_ms(wait_s - _TIME_FOR_THE_QUEUE * time_left_s)
            raise Overloaded(
                f"the queue is too long for this deadline (the wait is about {wait_s:.1f} s, the request has "
                f"{time_left_s:.1f} s); retry in {hint} ms",
                reason="WAIT_TOO_LONG",
                retry_after_ms=hint,
            )
        if limits is not NO_LIMITS:
            self._buckets.take(caller, limits, tokens, now)
        is_bulk = priority is Priority.BULK
        reservation = Reservation(
            self,
            self._shares,
            caller,
            tokens,
            texts,
            is_bulk=is_bulk,
            is_overflow=is_overflow,
            is_named=asked is not None,
        )
        self._held.add(reservation)
        self._empty.clear()
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Give back all that it still holds. A second time does nothing."""
        if reservation not in self._held:
            return
        reservation.resize(0, 0)
        self._shares.leave(reservation.caller)
        self._held.discard(reservation)
        if not self._held:
            self._empty.set()

    def _check_limits(self, caller: str, limits: CallerLimits, tokens: int, now: float) -> None:
        wait_s, said = self._buckets.wait_s(caller, limits, tokens, now), "per second"
        if not wait_s and limits.queue_share is not None:
            most = limits.queue_share * self._settings.max_queue_tokens
            if tokens > most:
                raise InvalidRequest(
                    f"the request has about {tokens} tokens, this caller's share of the queue is {most:.0f}: split it",
                    reason="TOO_MANY_TEXTS",
                )
            if excess := self._shares.beyond(caller, tokens, limits.queue_share):
                wait_s, said = max(self._seconds_for(excess, unknown_s=1.0), _MIN_RETRY_MS / 1e3), "in the queue"
        if wait_s:
            hint = math.ceil(1e3 * wait_s)
            raise Overloaded(
                f"this caller may ask for no more {said}; retry in {hint} ms",
                reason="CALLER_LIMIT",
                retry_after_ms=hint,
            )

    def _seconds_for(self, tokens: float, unknown_s: float = 0.0) -> float:
        """How long the engine takes for them; `unknown_s` before it has run a batch."""
        return tokens / self._rate.tokens_per_s if self._rate.tokens_per_s else unknown_s

    def _full(self, limit: str) -> Overloaded:
        """The hint is what a fifth of the queue takes at the measured rate."""
        excess = max(self.reserved_tokens - 0.8 * self._settings.max_queue_tokens, 0.2 * self.reserved_tokens)
        hint = _retry_hint_ms(self._seconds_for(excess, unknown_s=1.0))
        return Overloaded(f"the queue is full ({limit}); retry in {hint} ms", retry_after_ms=hint)

    def refuse_new(self) -> None:
        """From now on `admit` raises Unavailable; what was let in goes on."""
        self._refuses = True

    async def drained(self, timeout_s: float) -> int:
        """Wait until all that was let in is answered, at most `timeout_s`; returns how many requests are not."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return self.requests
        return 0


def _retry_hint_ms(wait_s: float) -> int:
    wait_ms = 1000 * wait_s * random.uniform(0.75, 1.25)  # noqa: S311 - spreads retries, guards nothing
    return int(min(max(wait_ms, _MIN_RETRY_MS), _MAX_RETRY_MS))
