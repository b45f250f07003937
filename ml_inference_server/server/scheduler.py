"""The asyncio side of the batching policy: dispatch, futures, retries of batches that raised.

Nothing here loops or polls. `_pump` hands batches to free slots and is called when a text arrives, when a batch ends
and when a batching window closes; so there is no background task whose death would leave the callers waiting.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import BackendInfo, Encoded, TokenBatch
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.admission import Reservation
from ml_inference_server.server.batching import Batch, BatchQueue, ClosedBy, Item, Limits, Running
from ml_inference_server.server.call import Call
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.workers import Output, Worker
from ml_inference_server.utils.config import BatchingSettings
from ml_inference_server.utils.errors import (
    BackendFailure,
    DeadlinePassed,
    NonFiniteOutput,
    ServiceError,
    Unavailable,
)

log = logging.getLogger(__name__)


def batch_limits(settings: BatchingSettings, info: BackendInfo) -> Limits:
    """The policy's limits. On a GPU a batch has to be large to pay for its start; on a CPU it should fit the cache."""
    on_cpu = info.device == "cpu"
    return Limits(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=max(settings.max_batch_tokens or (2048 if on_cpu else 16384), info.max_tokens),
        timeout_s=settings.timeout_ms / 1000,
        enabled=settings.enabled,
        length_grouping=settings.length_grouping,
        overhead_tokens=settings.batch_overhead_tokens or (64 if on_cpu else 4096),
        padding_free=info.padding_free,
    )


@dataclass(frozen=True, slots=True)
class Computed:
    """One row for each text, in order: (texts, dimension). The times are those of the same names in Stamps."""

    rows: NDArray[np.float32]
    tokenized_at: float
    engine_started_at: float
    engine_ended_at: float


@dataclass(slots=True, eq=False)
class _Pending:
    """A request whose texts wait or are being computed."""

    call: Call
    reservation: Reservation
    future: asyncio.Future[NDArray[np.float32]]
    items: list[Item] = field(default_factory=list)
    rows: NDArray[np.float32] | None = None
    missing: int = 0
    is_dispatched: bool = False
    engine_started_at: float = math.inf
    engine_ended_at: float = 0.0


class _InFlight(NamedTuple):
    since: float
    tokens: int
    cost_tokens: int


class DynamicBatcher:
    """Computes requests of one or more texts and answers each exactly once: with its rows, or with one error."""

    def __init__(self, worker: Worker, limits: Limits, rate: EngineRate, metrics: Metrics) -> None:
        self._worker = worker
        self._queue = BatchQueue(limits)
        self._rate = rate
        self._metrics = metrics
        self._free_slots = worker.slots
        self._loop = asyncio.get_running_loop()
        self._pending: set[_Pending] = set()
        self._running: dict[asyncio.Task[None], _InFlight] = {}
        self._pump_handle: asyncio.Handle | None = None
        self._window: asyncio.TimerHandle | None = None
        self._closed = False
        self._failures_in_a_row = 0
        metrics.watch(
            queue_texts=lambda: self._queue.texts,
            queue_tokens=lambda: self._queue.tokens,
            batches_in_flight=lambda: len(self._running),
            slots=worker.slots,
            pids=lambda: worker.pids,
            restarts=lambda: worker.restarts,
        )

    async def compute(self, texts: Sequence[Encoded], call: Call, reservation: Reservation) -> Computed:
        """The texts may travel in different batches; `reservation` shrinks as batches take them.

        Raises DeadlinePassed, BackendFailure, NonFiniteOutput, Unavailable. Leaving this call (a cancelled caller)
        takes the texts that have not started out of the queue.
        """
        if self._closed:
            raise _shutting_down()
        now = self._loop.time()
        reservation.resize(sum(text.length for text in texts))
        pending = _Pending(call, reservation, self._loop.create_future(), missing=len(texts))
        pending.items = [Item(pending, row, text.length, now, text) for row, text in enumerate(texts)]
        self._pending.add(pending)
        self._queue.add(pending.items)
        self._pump_soon()
        timer = self._loop.call_at(call.deadline, _expire, pending)
        try:
            rows = await pending.future
        finally:
            timer.cancel()
            self._pending.discard(pending)
            self._queue.remove(pending.items)
        return Computed(rows, now, pending.engine_started_at, pending.engine_ended_at)

    def _pump_soon(self) -> None:
        """All texts that arrive in one turn of the event loop are there before the first batch is chosen."""
        if self._pump_handle is None:
            self._pump_handle = self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_handle = None
        if self._window is not None:
            self._window.cancel()
            self._window = None
        while self._free_slots:
            try:
                smallest = min(self._running.values(), key=_by_tokens, default=None)
                chosen = self._queue.next_batch(self._loop.time(), smallest and self._expected(smallest))
            except Exception:
                # A bug in the policy must not leave anybody waiting.
                log.exception("the batching policy failed; every waiting request is answered with an error")
                for pending in self._pending:
                    _fail(pending, ServiceError("internal error in the batcher"))
                    for item in pending.items:
                        item.waiting = False
                self._queue = BatchQueue(self._queue.limits)
                return
            if chosen is None:
                return
            if isinstance(chosen, float):
                self._window = self._loop.call_at(chosen, self._pump)
                return
            self._free_slots -= 1
            task = self._loop.create_task(self._run(chosen))
            self._running[task] = _InFlight(self._loop.time(), chosen.tokens, self._cost(chosen))
            task.add_done_callback(self._slot_free)

    def _cost(self, batch: Batch) -> int:
        """As the policy counts it, in tokens."""
        limits = self._queue.limits
        return limits.overhead_tokens + limits.work_tokens(len(batch.items), batch.longest, batch.tokens)

    def _expected(self, batch: _InFlight) -> Running:
        return Running(batch.tokens, batch.since + self._rate.s_per_cost_token * batch.cost_tokens)

    def _slot_free(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._free_slots += 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a batch ended in a bug of the scheduler", exc_info=error)
        self._pump()

    async def _run(self, batch: Batch) -> None:
        """All of one batch that was taken out of the queue, with its retries."""
        try:
            for item in batch.items:
                item.owner.reservation.give_back(item.length)
            await self._answer(batch.items, batch.closed_by)
        finally:
            # Whatever went wrong above, nobody is left without an answer.
            for item in batch.items:
                if not item.owner.future.done() and item.payload is not None:
                    _fail(item.owner, ServiceError("internal error in the batcher"))

    async def _answer(self, items: Sequence[Item], closed_by: ClosedBy) -> None:
        """Run those that are still wanted. A batch that raises is halved until only the guilty are left."""
        if not (wanted := self._wanted(items)):
            return
        try:
            await self._attempt(wanted, closed_by)
        except Exception as error:
            if len(wanted) > 1:
                log.warning("a batch of %d texts failed (%s): halving it", len(wanted), type(error).__name__)
        else:
            return
        if len(wanted) == 1:
            await self._try_once_more(wanted[0])
            return
        middle = len(wanted) // 2
        await self._answer(wanted[:middle], ClosedBy.RETRY)
        await self._answer(wanted[middle:], ClosedBy.RETRY)

    async def _try_once_more(self, item: Item) -> None:
        """A text that failed on its own gets a second try, as the cause may lie outside of it."""
        if not self._wanted([item]):
            return
        try:
            await self._attempt([item], ClosedBy.RETRY)
        except Exception as error:
            self._failures_in_a_row += 1
            name = item.owner.call.request_id
            log.error("the model failed on one text, twice, on its own (request %s)", name, exc_info=error)
            _settle_failure(item, BackendFailure("the model failed on this input, twice, on its own"))

    def _wanted(self, items: Sequence[Item]) -> list[Item]:
        """Without those whose caller has left or whose deadline has passed."""
        now = self._loop.time()
        return [item for item in items if _is_wanted(item, now)]

    async def _attempt(self, items: Sequence[Item], closed_by: ClosedBy) -> None:
        """Run the items together, once. Raises what the backend raised, and then none of them is answered."""
        batch = Batch(list(items), closed_by)
        dispatched_at = self._loop.time()
        for item in items:
            item.owner.is_dispatched = True
        try:
            output = await self._worker.run(TokenBatch.of([item.payload for item in items]))
            _check(output, len(items))
        except Exception:
            self._record(batch, dispatched_at, started_at=dispatched_at, ended_at=self._loop.time(), ok=False)
            raise
        self._failures_in_a_row = 0
        self._record(batch, dispatched_at, started_at=output.started_at, ended_at=output.ended_at, ok=True)
        self._scatter(items, output)

    def _scatter(self, items: Sequence[Item], output: Output) -> None:
        """Give each text its row, and each request its answer once it has all of them."""
        rows = np.asarray(output.rows, np.float32)
        finite = np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
        for item, row, is_finite in zip(items, rows, finite, strict=True):
            pending: _Pending = item.owner
            item.payload = None
            if not is_finite:
                _settle_failure(item, NonFiniteOutput("the model answered NaN or infinity for this input"))
            elif not pending.future.done():
                if pending.rows is None:
                    pending.rows = np.empty((len(pending.items), *row.shape), np.float32)
                pending.rows[item.row] = row
                pending.missing -= 1
                pending.engine_started_at = min(pending.engine_started_at, output.started_at)
                pending.engine_ended_at = max(pending.engine_ended_at, output.ended_at)
                if not pending.missing:
                    pending.future.set_result(pending.rows)

    def _record(self, batch: Batch, dispatched_at: float, *, started_at: float, ended_at: float, ok: bool) -> None:
        """What a batch took: for the predictions, the metrics and the traces."""
        compute_s = ended_at - started_at
        if ok:
            self._rate.observe(
                tokens=batch.tokens, cost_tokens=self._cost(batch), streams=self._worker.slots, compute_s=compute_s
            )
        padded_tokens = self._queue.limits.work_tokens(len(batch.items), batch.longest, batch.tokens)
        self._metrics.batch_finished(
            texts=len(batch.items),
            tokens=batch.tokens,
            padded_tokens=padded_tokens,
            queue_s=[started_at - item.enqueued_at for item in batch.items],
            compute_s=compute_s,
            closed_by=batch.closed_by.value,
            ok=ok,
            lengths=[item.length for item in batch.items],
        )
        if self._metrics.tracer is not None:
            self._metrics.tracer.batch(
                [item.owner.call.trace for item in batch.items],
                dispatched_at=dispatched_at,
                started_at=started_at,
                ended_at=ended_at,
                ok=ok,
                texts=len(batch.items),
                tokens=batch.tokens,
                padded_tokens=padded_tokens,
                closed_by=batch.closed_by.value,
            )

    # Health and end

    @property
    def failures_in_a_row(self) -> int:
        """Texts that failed alone since the last batch that succeeded."""
        return self._failures_in_a_row

    @property
    def trouble(self) -> str:
        """Why no batch can run now; empty if one can."""
        return self._worker.trouble

    def oldest_batch_s(self) -> float:
        """How long the longest-running batch has been in flight; 0 when none is."""
        return max((self._loop.time() - each.since for each in self._running.values()), default=0.0)

    def close(self) -> None:
        """End at once: whoever still waits, or comes later, is answered with Unavailable."""
        self._closed = True
        for handle in (self._pump_handle, self._window):
            if handle is not None:
                handle.cancel()
        for pending in self._pending:
            _fail(pending, _shutting_down())
        self._worker.close()


def _by_tokens(batch: _InFlight) -> int:
    return batch.tokens


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down; the request was not finished")


def _expire(pending: _Pending) -> None:
    where = "while the request ran" if pending.is_dispatched else "in the queue"
    _fail(pending, DeadlinePassed(f"the deadline passed {where}; nothing more is computed for it"))


def _is_wanted(item: Item, now: float) -> bool:
    pending: _Pending = item.owner
    if pending.future.done():
        return False
    if pending.call.deadline <= now:
        _fail(pending, DeadlinePassed("the deadline passed in the queue; nothing was computed for it"))
        return False
    return True


def _check(output: Output, expected: int) -> None:
    """A wrong count would hand answers to the wrong callers: treated like a batch that raised."""
    shape = np.shape(output.rows)
    if not shape or shape[0] != expected:
        raise RuntimeError(f"the backend returned shape {shape} for {expected} texts")


def _settle_failure(item: Item, error: ServiceError) -> None:
    item.payload = None
    _fail(item.owner, error)


def _fail(pending: _Pending, error: ServiceError) -> None:
    if not pending.future.done():
        pending.future.set_exception(error)
        # Its caller may have left in this very turn; an error that nobody reads is no event worth a log line.
        pending.future.exception()
