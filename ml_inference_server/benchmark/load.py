"""The load: a fixed number of requests in a closed loop, every one of them accounted for."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import grpc
import numpy as np

from ml_inference_server.benchmark.channel import OK, Reply, Target, check_embeddings, check_scores
from ml_inference_server.benchmark.dataset import Workload

# After these the server may be gone, and asking it the remaining questions would cost a deadline each.
_SUSPICIOUS = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})


class Call(NamedTuple):
    """One finished request. `sent_s` is on the perf_counter clock."""

    sent_s: float
    latency_s: float
    reply: Reply


class ServerGone(Exception):
    """Nothing answers at the address any more."""


@dataclass
class Ledger:
    """started == len(calls) + unfinished, at every moment."""

    started: int = 0
    calls: list[Call] = field(default_factory=list)
    began_s: float = 0.0

    @property
    def seconds(self) -> float:
        """From the start until the last reply; the search for a lost server is not part of the load."""
        return max((call.sent_s + call.latency_s for call in self.calls), default=self.began_s) - self.began_s

    @property
    def unfinished(self) -> int:
        return self.started - len(self.calls)

    @property
    def ok(self) -> int:
        return sum(call.reply.code == OK.code for call in self.calls)

    @property
    def errors(self) -> dict[str, int]:
        """Failures by code, the most frequent first."""
        return dict(Counter(call.reply.code for call in self.calls if call.reply.code != OK.code).most_common())

    @property
    def first_error(self) -> Call | None:
        failed = (call for call in self.calls if call.reply.code != OK.code)
        return min(failed, key=lambda call: call.sent_s + call.latency_s, default=None)

    @property
    def latencies_ms(self) -> list[float]:
        """Of the successful requests, in the order in which they ended."""
        return [call.latency_s * 1e3 for call in self.calls if call.reply.code == OK.code]


Send = Callable[[int], Awaitable[Call]]


def sender(target: Target, workload: Workload, batch_size: int, timeout_s: float, *, warmup: bool = False) -> Send:
    """A function that sends request number `index` and never raises but for its own cancellation."""
    embeds = workload.kind != "pairs"

    async def send(index: int) -> Call:
        batch = workload.batch(index, batch_size, from_end=warmup)
        sent_s = time.perf_counter()
        try:
            response = await (target.embed(batch, timeout_s) if embeds else target.score(batch, timeout_s))
            latency_s = time.perf_counter() - sent_s
            reply = check_embeddings(response, batch_size) if embeds else check_scores(response, batch_size)
        except grpc.aio.AioRpcError as error:
            latency_s = time.perf_counter() - sent_s
            reply = Reply(error.code().name, str(error.details() or "")[:300])
        except Exception as error:
            # A bug on this side must not thin out the load: it is counted like any other failure.
            latency_s = time.perf_counter() - sent_s
            reply = Reply("CLIENT_ERROR", f"{type(error).__name__}: {error}"[:300])
        return Call(sent_s, latency_s, reply)

    return send


class ClosedLoop:
    """`concurrency` workers that each send the next request as soon as their last one is answered.

    `ledger` is valid at every moment, so a run that is cut short by a cancellation can still be reported.
    """

    def __init__(self, send: Send, is_alive: Callable[[], Awaitable[bool]], on_call: Callable[[Call], None]) -> None:
        self.ledger = Ledger()
        self._send = send
        self._is_alive = is_alive
        self._on_call = on_call
        self._probing = asyncio.Lock()
        self._alive_at_s = 0.0

    async def run(self, requests: int, concurrency: int) -> None:
        """Send `requests` requests. ServerGone when the server no longer answers at all."""
        indexes = iter(range(requests))
        self.ledger.began_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, requests)):
                    group.create_task(self._worker(indexes))
        except* ServerGone as gone:
            raise ServerGone(str(gone.exceptions[0])) from None

    async def _worker(self, indexes: Iterator[int]) -> None:
        for index in indexes:
            self.ledger.started += 1
            call = await self._send(index)
            self.ledger.calls.append(call)
            self._on_call(call)
            if call.reply.code in _SUSPICIOUS:
                await self._require_alive(time.perf_counter())

    async def _require_alive(self, failed_at_s: float) -> None:
        """One probe serves all workers that failed before it."""
        async with self._probing:
            if self._alive_at_s >= failed_at_s:
                return
            asked_s = time.perf_counter()
            if not await self._is_alive():
                raise ServerGone("the server no longer answers")
            self._alive_at_s = asked_s


def latency_summary_ms(latencies_ms: list[float]) -> dict[str, float] | None:
    """avg, p50, p95, p99 over all samples (linear interpolation); None without a sample."""
    if not latencies_ms:
        return None
    p50, p95, p99 = np.percentile(latencies_ms, (50, 95, 99))
    return {"avg": float(np.mean(latencies_ms)), "p50": float(p50), "p95": float(p95), "p99": float(p99)}
