"""Where a backend runs. A worker takes a batch of token ids and gives back an array; the scheduler knows no more."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Backend, BackendInfo, TokenBatch
from ml_inference_server.server.patience import Patience
from ml_inference_server.utils.give_way import give_way

# Beyond its limit a batch gets as long again, and at least so long, before it is given up with its process.
_LEAST_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Output:
    """What a batch gave: `rows` as the backend returned it, unchecked; times on the event loop's monotonic clock."""

    rows: NDArray[np.float32]
    started_at: float
    ended_at: float


class Worker(Protocol):
    """`slots` batches may be in flight at a time, and `express_slots` more for a moment."""

    @property
    def slots(self) -> int: ...

    @property
    def express_slots(self) -> int: ...

    @property
    def pids(self) -> Sequence[int]:
        """Processes besides the server's own that belong to it now."""
        ...

    @property
    def restarts(self) -> int:
        """How often one of them had to be replaced."""
        ...

    @property
    def trouble(self) -> str:
        """Why others should get the calls; empty if all is well."""
        ...

    @property
    def stuck(self) -> str:
        """Why no batch can run now, nor soon; empty if one can."""
        ...

    @property
    def lost(self) -> str:
        """Why only a new process of the server can help; empty as long as it goes on."""
        ...

    async def run(self, batch: TokenBatch, limit_s: float = math.inf, *, is_bulk: bool = False) -> Output:
        """Run one batch, which hangs if it takes longer than `limit_s`; raises whatever the backend raised.

        is_bulk: it gives way to those that are not, where both want the processor.
        """
        ...

    def renew(self) -> None:
        """The backend fails on everything: have it started anew."""
        ...

    def close(self) -> None: ...


class _Running:
    """A batch in a thread, and whether it is late: beyond its limit; lost: for so long that nobody waits any more."""

    def __init__(self, output: Future[Output], limit_s: float, changed: Callable[[], None]) -> None:
        self.output = output
        self.limit_s = limit_s
        self.is_late = self.is_lost = False
        self._changed = changed
        self._patience = Patience(limit_s, self._be_late)

    def _be_late(self) -> None:
        self.is_late = True
        self._patience = Patience(max(self.limit_s, _LEAST_GRACE_S), self._be_lost)
        self._changed()

    def _be_lost(self) -> None:
        self.is_lost = True
        self._changed()

    def end(self) -> None:
        self._patience.end()


def express_slots(info: BackendInfo) -> int:
    """Batches beyond the slots that a worker runs beside bulk ones: a GPU would not divide itself so well."""
    return int(info.device == "cpu")


def _started_pool(threads: int, name: str, begin: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """All of its threads are there from the start: none begins under load, and a leak of threads can be told."""
    all_here = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=begin)
    for _ in range(threads):
        pool.submit(all_here.wait)
    return pool


class ThreadWorker:
    """Runs a loaded backend in `backend.info.concurrency` threads of this process, and on a CPU bulk in as many others.

    No thread can be ended from outside: one that hangs for good is lost, and the process with it.
    """

    pids: Sequence[int] = ()
    restarts = 0

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.slots = backend.info.concurrency
        self.express_slots = express_slots(backend.info)
        self.trouble = self.stuck = self.lost = ""
        self._pool = _started_pool(self.slots, "backend")
        self._bulk_pool = _started_pool(self.slots, "bulk", give_way) if self.express_slots else self._pool
        self._running: set[_Running] = set()
        self._fails = False

    async def run(self, batch: TokenBatch, limit_s: float = math.inf, *, is_bulk: bool = False) -> Output:
        pool = self._bulk_pool if is_bulk else self._pool
        running = _Running(pool.submit(self._infer, batch), limit_s, self._look)
        self._running.add(running)
        try:
            return await asyncio.wrap_future(running.output)
        finally:
            running.end()
            self._running.discard(running)
            if running.is_late:
                self._look()

    def _look(self) -> None:
        # The thread says what runs, whatever happened to those who waited for it.
        self._running = {each for each in self._running if not each.output.done()}
        late = [each for each in self._running if each.is_late]
        limit_s = max((each.limit_s for each in late), default=0.0)
        self.trouble = f"a batch has been running for more than {limit_s:.3g} s" if late else ""
        self.stuck = "the engine does not answer; it is given some more time" if len(late) >= self.slots else ""
        hangs = any(each.is_lost for each in late)
        self.lost = "a batch hangs in a thread, which cannot be ended" if hangs else ""
        if self._fails:
            self.lost = "the model fails on everything"

    def renew(self) -> None:
        self._fails = True
        self._look()

    def _infer(self, batch: TokenBatch) -> Output:
        started_at = time.monotonic()
        result = self.backend.infer(batch)
        return Output(result, started_at, time.monotonic())

    def close(self) -> None:
        """Let the threads end once their batches have; does not wait for one that hangs."""
        for pool in (self._pool, self._bulk_pool):
            pool.shutdown(wait=False, cancel_futures=True)
