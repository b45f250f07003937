"""Where a backend runs. A worker takes a batch of token ids and gives back an array; the scheduler knows no more."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Backend, TokenBatch


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
        """Why no batch can run now; empty if one can."""
        ...

    async def run(self, batch: TokenBatch) -> Output:
        """Run one batch; raises whatever the backend raised."""
        ...

    def close(self) -> None: ...


class ThreadWorker:
    """Runs a loaded backend in `backend.info.concurrency` threads of this process, and on a CPU in one more."""

    pids: Sequence[int] = ()
    restarts = 0
    trouble = ""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.slots = backend.info.concurrency
        self.express_slots = int(backend.info.device == "cpu")
        self._pool = ThreadPoolExecutor(self.slots + self.express_slots, thread_name_prefix="backend")

    async def run(self, batch: TokenBatch) -> Output:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._infer, batch)

    def _infer(self, batch: TokenBatch) -> Output:
        started_at = time.monotonic()
        result = self.backend.infer(batch)
        return Output(result, started_at, time.monotonic())

    def close(self) -> None:
        """Let the threads end once their batches have; does not wait for one that hangs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
