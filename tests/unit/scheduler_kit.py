"""A batcher whose worker is under the test's control, on the test's virtual clock."""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ml_inference_server.backends.base import Encoded, TokenBatch
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.admission import Admission
from ml_inference_server.server.answer_cache import AnswerCache
from ml_inference_server.server.batching import Limits
from ml_inference_server.server.call import Call
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.options import Priority
from ml_inference_server.server.scheduler import Computed, DynamicBatcher
from ml_inference_server.server.workers import Output
from ml_inference_server.utils.config import BatchingSettings

POISON = 666
HOUR = 3600.0


class StubWorker:
    """A worker without threads: a text's row is its first token id. Holds batches while `gate` is closed."""

    express_slots = 0
    pids: Sequence[int] = ()
    restarts = 0
    trouble = stuck = lost = ""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches: list[list[int]] = []
        self.bulk: list[bool] = []  # whether each of them was
        self.transform: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
        self.raises: Callable[[list[int]], bool] = lambda ids: POISON in ids
        self.closed = False
        self.limits_s: list[float] = []
        self.takes_s = 0.0
        self.ready_s = 0.0

    async def run(self, batch: TokenBatch, limit_s: float = math.inf, *, is_bulk: bool = False) -> Output:
        """takes_s: of the engine; ready_s: from its end until the loop is told."""
        self.limits_s.append(limit_s)
        ids = batch.ids[batch.starts[:-1]].tolist()
        self.batches.append(ids)
        self.bulk.append(is_bulk)
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        await self.gate.wait()
        if self.takes_s:
            await asyncio.sleep(self.takes_s)  # on the test's virtual clock
        ended_at = loop.time()
        if self.ready_s:
            await asyncio.sleep(self.ready_s)
        if self.raises(ids):
            raise RuntimeError("the model raised")
        return Output(self.transform(np.array([[i] for i in ids], np.float32)), started_at, ended_at)

    def renew(self) -> None:
        raise AssertionError("nothing here is to be started anew")

    def close(self) -> None:
        self.closed = True


def text(first: int, length: int = 3) -> Encoded:
    """Texts with the same first id and length are equal."""
    return Encoded(np.array([first] + [0] * (length - 1), np.int32))


class Rig:
    """Admission and a batcher over a stub worker, and callers."""

    def __init__(
        self,
        *,
        slots: int = 1,
        timeout_s: float = 0.0,
        max_batch_size: int = 8,
        enabled: bool = True,
        cache_bytes: int = 0,
        hang_timeout_s: float = math.inf,
        worker: Callable[[int], StubWorker] = StubWorker,
        **settings: Any,
    ) -> None:
        self.worker = worker(slots)
        limits = Limits(max_batch_size, max_batch_tokens=4096, timeout_s=timeout_s, enabled=enabled)
        self.metrics = Metrics(window_s=30)
        rate = EngineRate()
        # Of so many texts, that nobody has a batch in line and is bulk for it, unless a test says so.
        batching = BatchingSettings.model_validate({"max_batch_size": max(32, max_batch_size), **settings})
        self._whole_queue_tokens = batching.max_queue_tokens
        self.admission = Admission(batching, rate, batch_tokens=limits.max_batch_tokens)
        self.cache = AnswerCache(cache_bytes) if cache_bytes else None
        self.batcher = DynamicBatcher(
            self.worker,
            limits,
            rate,
            self.metrics,
            share_equal_texts=batching.share_equal_texts,
            cache=self.cache,
            hang_timeout_s=hang_timeout_s,
        )

    def call(
        self,
        *ids: int,
        timeout_s: float = HOUR,
        tokens: int | None = None,
        length: int = 3,
        caller: str = "",
        asked: Priority | None = None,
    ) -> asyncio.Task[list[float]]:
        """tokens: the estimate that it is admitted with; None: what it has."""
        return asyncio.create_task(self._call([text(i, length) for i in ids], timeout_s, tokens, caller, asked))

    async def _call(
        self, texts: Sequence[Encoded], timeout_s: float, tokens: int | None, caller: str, asked: Priority | None
    ) -> list[float]:
        computed = await self._compute(texts, timeout_s, tokens, fresh=False, caller=caller, asked=asked)
        return [float(value) for value in computed.rows[:, 0]]

    def compute(self, *texts: Encoded, timeout_s: float = HOUR, fresh: bool = False) -> asyncio.Task[Computed]:
        return asyncio.create_task(self._compute(texts, timeout_s, None, fresh=fresh))

    async def _compute(
        self,
        texts: Sequence[Encoded],
        timeout_s: float,
        tokens: int | None,
        *,
        fresh: bool,
        caller: str = "",
        asked: Priority | None = None,
    ) -> Computed:
        now = asyncio.get_running_loop().time()
        call = Call("test", received_at=now, deadline=now + timeout_s, fresh=fresh)
        estimate = sum(each.length for each in texts) if tokens is None else tokens
        with self.admission.admit(estimate, call.deadline, texts=len(texts), caller=caller, asked=asked) as reservation:
            return await self.batcher.compute(texts, call, reservation)

    def queue(self) -> tuple[int, int, int]:
        """Texts and tokens that wait, and batches in flight."""
        queue = self.metrics.snapshot()["queue"]
        return queue["texts"], queue["tokens"], queue["batches_in_flight"]

    def assert_at_rest(self) -> None:
        """Nothing is left of anybody: no request, no text, no token, no batch."""
        assert (self.admission.requests, self.admission.reserved_tokens) == (0, 0)
        assert self.queue() == (0, 0, 0)
        # The reserve itself: a request that fills the whole queue is admitted.
        with self.admission.admit(self._whole_queue_tokens, asyncio.get_running_loop().time() + HOUR):
            pass


async def turns(count: int = 16) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def busy_rig(**settings: Any) -> tuple[Rig, asyncio.Task[list[float]]]:
    """Its one slot is taken by a text (9) until `gate` is opened, so that what comes has to wait."""
    rig = Rig(**settings)
    rig.worker.gate.clear()
    return rig, rig.call(9)


def counter(rig: Rig, name: str) -> float:
    lines = rig.metrics.prometheus("")[0].decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))
