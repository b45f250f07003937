"""One row's load, from this process or from several, and what it leaves behind."""

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ml_inference_server.benchmark.load.channel import Target
from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.load.loops import ClosedLoop, FinishedRequest, OpenLoop, sender
from ml_inference_server.benchmark.load.records import Records, as_records
from ml_inference_server.benchmark.load.stream import EmbedStream

# What one process offers without being late, with room to spare, on a core of its own.
REQUESTS_PER_S_OF_A_PROCESS = 500.0


@dataclass(frozen=True)
class Share:
    """What one process sends: the requests first, first + step, ..., when they are due or `concurrency` at a time.

    requests: how many of them in a closed loop; without effect where `duration_s` or `due_s` say it. priority: of
    embeddings that do not stream; empty: none is named.
    """

    workload: Workload
    batch_size: int
    timeout_s: float
    streaming: bool
    requests: int = 0
    concurrency: int = 0
    duration_s: float = 0.0
    due_s: list[float] | None = None
    first: int = 0
    step: int = 1
    priority: str = ""


@dataclass
class Left:
    """What a load leaves behind: started == the number of records, those that were not answered included.

    cpu_s: processor time of the clients; seconds: from the start until the last answer.
    """

    records: Records = field(default_factory=lambda: as_records([]))
    started: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    processes: int = 1
    first_error: dict[str, Any] | None = None


class Driver:
    """Sends one share from this process. `left()` is right at every moment, also after a cancellation."""

    def __init__(self, target: Target, share: Share, on_call: Callable[[FinishedRequest], None]) -> None:
        self._share = share
        self._stream = EmbedStream(target) if share.streaming else None
        send = sender(
            target, share.workload, share.batch_size, share.timeout_s, stream=self._stream, priority=share.priority
        )
        kind = ClosedLoop if share.due_s is None else OpenLoop
        self._loop: ClosedLoop | OpenLoop = kind(send, target.is_alive, on_call)
        self._cpu_start_s = time.process_time()
        self._cpu_s: float | None = None

    async def run(self, began_s: float) -> None:
        """Start at `began_s` on the perf_counter clock. ServerGone when nothing answers any more."""
        share, loop = self._share, self._loop
        await asyncio.sleep(began_s - time.perf_counter())
        self._cpu_start_s = time.process_time()
        try:
            indexes = itertools.count(share.first, share.step)
            if isinstance(loop, OpenLoop):
                await loop.run(share.due_s or [], indexes, began_s)
            else:
                await loop.run(share.requests, share.concurrency, duration_s=share.duration_s, indexes=indexes)
        finally:
            self._cpu_s = time.process_time() - self._cpu_start_s
            if self._stream is not None:
                await self._stream.close()

    def left(self) -> Left:
        ledger = self._loop.ledger
        last_s = max((call.done_s for call in ledger.calls), default=ledger.began_s)
        return Left(
            records=ledger.records(),
            started=ledger.started,
            seconds=last_s - ledger.began_s,
            cpu_s=time.process_time() - self._cpu_start_s if self._cpu_s is None else self._cpu_s,
            first_error=ledger.first_error(),
        )


def processes_for(rate_per_s: float, wanted: int) -> int:
    """How many processes offer `rate_per_s`; `wanted` other than 0 decides."""
    return wanted or max(1, math.ceil(rate_per_s / REQUESTS_PER_S_OF_A_PROCESS))


def split(share: Share, processes: int) -> list[Share]:
    """Shares that together send what `share` does: each takes every so-manieth request."""
    processes = min(processes, share.concurrency) if share.due_s is None else min(processes, len(share.due_s))
    return [
        replace(
            share,
            requests=len(range(first, share.requests, processes)),
            concurrency=len(range(first, share.concurrency, processes)),
            due_s=None if share.due_s is None else share.due_s[first::processes],
            first=first,
            step=processes,
        )
        for first in range(processes)
    ]
