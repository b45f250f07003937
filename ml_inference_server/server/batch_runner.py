"""One batch on its way through the engine: run, retried where it raised, and its rows given to their requests."""

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.admission import Reservation
from ml_inference_server.server.batching import Batch, ClosedBy, Item, Limits
from ml_inference_server.server.call import Call
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.workers import Output, Worker
from ml_inference_server.utils.errors import BackendFailure, DeadlinePassed, NonFiniteOutput, ServiceError

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Pending:
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

    def fail(self, error: ServiceError) -> None:
        """Answer with `error`, unless it is answered already."""
        if not self.future.done():
            self.future.set_exception(error)
            # Its caller may have left in this very turn; an error that nobody reads is no event worth a log line.
            self.future.exception()


class BatchRunner:
    """Whatever happens to a batch, each of its texts gets its row, or its request one error."""

    def __init__(self, worker: Worker, limits: Limits, rate: EngineRate, metrics: Metrics) -> None:
        self._worker = worker
        self._limits = limits
        self._rate = rate
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self.failures_in_a_row = 0  # texts that failed alone since the last batch that succeeded

    async def run(self, batch: Batch) -> None:
        """All of one batch that was taken out of the queue, with its retries."""
        try:
            for item in batch.items:
                item.owner.reservation.give_back(item.length)
            await self._answer(batch.items, batch.closed_by)
        finally:
            # Whatever went wrong above, nobody is left without an answer.
            for item in batch.items:
                if not item.owner.future.done() and item.payload is not None:
                    item.owner.fail(ServiceError("internal error in the batcher"))

    async def _answer(self, items: Sequence[Item], closed_by: ClosedBy) -> None:
        """Run those that are still wanted. A batch that raises is halved until only the guilty are left."""
        if not (wanted := self._wanted(items)):
            return
        try:
            output = await self._attempt(wanted, closed_by)
        except Exception as error:
            if len(wanted) > 1:
                log.warning("a batch of %d texts failed (%s): halving it", len(wanted), type(error).__name__)
        else:
            self._scatter(wanted, output)
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
            output = await self._attempt([item], ClosedBy.RETRY)
        except Exception as error:
            self.failures_in_a_row += 1
            name = item.owner.call.request_id
            log.error("the model failed on one text, twice, on its own (request %s)", name, exc_info=error)
            _settle_failure(item, BackendFailure("the model failed on this input, twice, on its own"))
        else:
            self._scatter([item], output)

    def _wanted(self, items: Sequence[Item]) -> list[Item]:
        """Without those whose caller has left or whose deadline has passed."""
        now = self._loop.time()
        return [item for item in items if _is_wanted(item, now)]

    async def _attempt(self, items: Sequence[Item], closed_by: ClosedBy) -> Output:
        """Run the items together, once. Raises what the backend raised, or RuntimeError for a wrong count of rows."""
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
        self.failures_in_a_row = 0
        self._record(batch, dispatched_at, started_at=output.started_at, ended_at=output.ended_at, ok=True)
        return output

    def _scatter(self, items: Sequence[Item], output: Output) -> None:
        """Give each text its row, and each request its answer once it has all of them."""
        rows = np.asarray(output.rows, np.float32)
        finite = np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
        for item, row, is_finite in zip(items, rows, finite, strict=True):
            pending: Pending = item.owner
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
                tokens=batch.tokens,
                cost_tokens=self._limits.cost_tokens(batch),
                streams=self._worker.slots,
                compute_s=compute_s,
            )
        padded_tokens = self._limits.work_tokens(len(batch.items), batch.longest, batch.tokens)
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


def _is_wanted(item: Item, now: float) -> bool:
    pending: Pending = item.owner
    if pending.future.done():
        return False
    if pending.call.deadline <= now:
        pending.fail(DeadlinePassed("the deadline passed in the queue; nothing was computed for it"))
        return False
    return True


def _check(output: Output, expected: int) -> None:
    """A wrong count would hand answers to the wrong callers: treated like a batch that raised."""
    shape = np.shape(output.rows)
    if not shape or shape[0] != expected:
        raise RuntimeError(f"the backend returned shape {shape} for {expected} texts")


def _settle_failure(item: Item, error: ServiceError) -> None:
    item.payload = None
    item.owner.fail(error)
