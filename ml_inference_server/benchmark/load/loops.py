"""The load: requests in a closed loop or on a fixed schedule, every one of them accounted for."""

import asyncio
import itertools
import selectors
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc

from ml_inference_server.benchmark.load.channel import (
    OK,
    RequestFailed,
    Target,
    TimedReply,
    check_embeddings,
    check_scores,
)
from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.load.records import UNFINISHED, Records, as_records, record
from ml_inference_server.benchmark.load.stream import EmbedStream

# After these the server may be gone, and asking it the remaining questions would cost a deadline each.
_SUSPICIOUS = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})
NO_TIMING = (0, 0, 0, 0)


class FinishedRequest(NamedTuple):
    """One finished request, on the perf_counter clock.

    due_s: when it was to be sent; in a closed loop, when it was. timing_us: tokenize, queue, compute and total of the
    server's own answer.
    """

    due_s: float
    sent_s: float
    done_s: float
    reply: TimedReply
    timing_us: tuple[int, int, int, int] = NO_TIMING


class ServerGone(Exception):
    """Nothing answers at the address any more."""


@dataclass
class Ledger:
    """started == len(calls) + unfinished, at every moment."""

    started: int = 0
    calls: list[FinishedRequest] = field(default_factory=list)
    began_s: float = 0.0
    open_due_s: dict[int, float] = field(default_factory=dict)

    def begin(self, index: int, due_s: float) -> None:
        self.started += 1
        self.open_due_s[index] = due_s

    def end(self, index: int, call: FinishedRequest) -> None:
        del self.open_due_s[index]
        self.calls.append(call)

    @property
    def unfinished(self) -> int:
        return len(self.open_due_s)

    @property
    def ok(self) -> int:
        return sum(call.reply.code == OK.code for call in self.calls)

    @property
    def errors(self) -> dict[str, int]:
        """Failures by code, the most frequent first."""
        return dict(Counter(call.reply.code for call in self.calls if call.reply.code != OK.code).most_common())

    def first_error(self) -> dict[str, Any] | None:
        """When the first failure was told, and in what words."""
        failed = (call for call in self.calls if call.reply.code != OK.code)
        first = min(failed, key=lambda call: call.done_s, default=None)
        return first and {
            "after_s": round(first.done_s - self.began_s, 6),
            "code": first.reply.code,
            "message": first.reply.message,
        }

    def records(self) -> Records:
        """All requests that were started; one that was not answered has no end and is UNFINISHED."""
        rows = [
            record(c.due_s - self.began_s, c.sent_s - self.began_s, c.done_s - self.began_s, c.reply.code, c.timing_us)
            for c in self.calls
        ]
        nan = float("nan")
        rows += [record(due - self.began_s, nan, nan, UNFINISHED, NO_TIMING) for due in self.open_due_s.values()]
        return as_records(rows)


# Sends request number `index`, due at `due_s` (None: now), and never raises but for its own cancellation.
Send = Callable[[int, float | None], Awaitable[FinishedRequest]]


def sender(
    target: Target,
    workload: Workload,
    batch_size: int,
    timeout_s: float,
    *,
    warmup: bool = False,
    stream: EmbedStream | None = None,
    priority: str = "",
) -> Send:
    """How one request is sent, clocked and verified. With a `stream` it travels there, else as a unary call."""
    embeds = workload.kind != "pairs"

    async def send(index: int, due_s: float | None) -> FinishedRequest:
        batch = workload.batch(index, batch_size, from_end=warmup)
        timing = NO_TIMING
        sent_s = time.perf_counter()
        try:
            if stream is not None:
                response = await stream.embed(batch, timeout_s)
            else:
                asked = target.embed(batch, timeout_s, priority=priority) if embeds else target.score(batch, timeout_s)
                response = await asked
            done_s = time.perf_counter()
            reply = check_embeddings(response, batch_size) if embeds else check_scores(response, batch_size)
            t = response.timing
            timing = (t.tokenize_us, t.queue_us, t.compute_us, t.total_us)
        except grpc.aio.AioRpcError as error:
            done_s = time.perf_counter()
            reply = TimedReply(error.code().name, str(error.details() or "")[:300])
        except RequestFailed as error:
            done_s = time.perf_counter()
            reply = TimedReply(error.code, error.message[:300])
        except Exception as error:
            # A bug on this side must not thin out the load: it is counted like any other failure.
            done_s = time.perf_counter()
            reply = TimedReply("CLIENT_ERROR", f"{type(error).__name__}: {error}"[:300])
        return FinishedRequest(sent_s if due_s is None else due_s, sent_s, done_s, reply, timing)

    return send


class _Loop:
    """`ledger` is valid at every moment, so a run that is cut short by a cancellation can still be reported."""

    def __init__(
        self, send: Send, is_alive: Callable[[], Awaitable[bool]], on_call: Callable[[FinishedRequest], None]
    ) -> None:
        self.ledger = Ledger()
        self._send = send
        self._is_alive = is_alive
        self._on_call = on_call
        self._probing = asyncio.Lock()
        self._alive_at_s = 0.0

    async def _one(self, index: int, due_s: float | None) -> None:
        self.ledger.begin(index, time.perf_counter() if due_s is None else due_s)
        call = await self._send(index, due_s)
        self.ledger.end(index, call)
        self._on_call(call)
        if call.reply.code in _SUSPICIOUS:
            await self._require_alive(time.perf_counter())

    async def _require_alive(self, failed_at_s: float) -> None:
        """One probe serves all requests that failed before it."""
        async with self._probing:
            if self._alive_at_s >= failed_at_s:
                return
            asked_s = time.perf_counter()
            if not await self._is_alive():
                raise ServerGone("the server no longer answers")
            self._alive_at_s = asked_s


class ClosedLoop(_Loop):
    """`concurrency` workers that each send the next request as soon as their last one is answered."""

    async def run(
        self, requests: int, concurrency: int, *, duration_s: float = 0.0, indexes: Iterator[int] | None = None
    ) -> None:
        """Send `requests` requests, or as many as begin within `duration_s`. ServerGone when the server is gone.

        indexes: the numbers of the requests, where not 0, 1, 2, ...
        """
        self.ledger.began_s = self.ledger.began_s or time.perf_counter()
        numbers: Iterator[int] = itertools.count() if indexes is None else indexes
        if duration_s:
            end_s = self.ledger.began_s + duration_s
            numbers = itertools.takewhile(lambda _: time.perf_counter() < end_s, numbers)
        else:
            numbers = itertools.islice(numbers, requests)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._worker(numbers))
        except* ServerGone as gone:
            raise ServerGone(str(gone.exceptions[0])) from None

    async def _worker(self, numbers: Iterator[int]) -> None:
        for index in numbers:
            await self._one(index, None)


def event_loop() -> asyncio.AbstractEventLoop:
    """The loop to send from. On Linux, asyncio's own waits in epoll, which rounds every wait up to a millisecond.

    An open loop would send each request half a millisecond late at the median, and count it as latency.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class OpenLoop(_Loop):
    """Sends each request when it is due, whether or not the earlier ones are answered."""

    async def run(self, due_s: Sequence[float], indexes: Iterator[int], began_s: float) -> None:
        """due_s: from `began_s`, ascending, one for each request. ServerGone when the server is gone."""
        self.ledger.began_s = began_s
        try:
            async with asyncio.TaskGroup() as group:
                for due, index in zip(due_s, indexes, strict=False):
                    # At least once round the event loop, so that what is overdue is really on its way.
                    await asyncio.sleep(max(began_s + due - time.perf_counter(), 0))
                    group.create_task(self._one(index, began_s + due))
        except* ServerGone as gone:
            raise ServerGone(str(gone.exceptions[0])) from None
