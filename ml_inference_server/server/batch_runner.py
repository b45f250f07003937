"""One batch on its way through the engine: run, retried where it raised, and its rows given to their requests."""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ml_inference_server.backends.base import TokenBatch
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.batching import Batch, ClosedBy, Limits
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.out_of_memory import BatchRoom, may_have_run_out, ran_out_of_memory
from ml_inference_server.server.patience import hang_limit_s
from ml_inference_server.server.pending import Subscriptions
from ml_inference_server.server.turns import Item
from ml_inference_server.server.workers import Output, Worker
from ml_inference_server.utils.errors import BackendFailure, NonFiniteOutput, OutOfMemory, ServiceError

log = logging.getLogger(__name__)

# Requests that a log line names, of all that wait for one text.
_MOST_NAMED = 4


class BatchRunner:
    """Whatever happens to a batch, each who waits for one of its texts gets the row, or one error."""

    def __init__(
        self,
        worker: Worker,
        limits: Limits,
        rate: EngineRate,
        metrics: Metrics,
        subscriptions: Subscriptions,
        hang_timeout_s: float,
        room: BatchRoom,
    ) -> None:
        self._room = room
        self._worker = worker
        self._hang_timeout_s = hang_timeout_s
        self._subscriptions = subscriptions
        self.limits = limits
        self._rate = rate
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self.failures_in_a_row = 0  # texts that failed alone since the last batch that succeeded

    async def run(self, batch: Batch) -> None:
        """All of one batch that was taken out of the queue, with its retries."""
        try:
            await self._answer(batch)
        finally:
            self.fail(batch)

    def fail(self, batch: Batch) -> None:
        """Whatever went wrong with it, nobody is left without an answer."""
        for item in batch.items:
            if item.payload is not None:
                self._subscriptions.fail(item, ServiceError, "internal error in the batcher")

    async def _answer(self, batch: Batch) -> None:
        """Run those that are still wanted. A batch that raises is halved until only the guilty are left."""
        if not (wanted := self._subscriptions.wanted(batch.items)):
            return
        try:
            output = await self._attempt(batch if len(wanted) == len(batch.items) else replace(batch, items=wanted))
        except Exception as error:
            if len(wanted) > 1 and may_have_run_out(error):
                self._make_smaller(wanted, error)
            elif len(wanted) > 1:
                log.warning("a batch of %d texts failed (%s): halving it", len(wanted), type(error).__name__)
        else:
            self._scatter(wanted, output)
            return
        retry = replace(batch, closed_by=ClosedBy.RETRY)
        if len(wanted) == 1:
            await self._try_once_more(replace(retry, items=wanted))
            return
        middle = len(wanted) // 2
        await self._answer(replace(retry, items=wanted[:middle]))
        await self._answer(replace(retry, items=wanted[middle:]))

    def _make_smaller(self, items: Sequence[Item], error: Exception) -> None:
        """This batch, as any that raises; and those after it."""
        lengths = [item.length for item in items]
        tokens = self.limits.work_tokens(len(items), max(lengths), sum(lengths))
        self._room.ran_out(tokens)
        log.warning(
            "out of memory (%r) in a batch of %d texts, %d padded tokens: halving it; for now batches have at most %d "
            "(lower batching.max_batch_tokens, or model.streams)",
            error,
            len(items),
            tokens,
            self._room.tokens,
        )

    async def _try_once_more(self, alone: Batch) -> None:
        """A text that failed on its own gets a second try, as the cause may lie outside of it."""
        (item,) = alone.items
        if not self._subscriptions.wanted([item]):
            return
        try:
            output = await self._attempt(alone)
        except Exception as error:
            self.failures_in_a_row += 1
            names = [pending.call.request_id for pending in itertools.islice(item.subscribers, _MOST_NAMED)]
            said = ", ".join(names) or "whose caller has left"
            log.error("the model failed on one text, twice, on its own (request %s)", said, exc_info=error)
            if ran_out_of_memory(error):
                message = "the model ran out of memory on this input, on its own: shorten it, or lower model.max_tokens"
                self._subscriptions.fail(item, OutOfMemory, message)
            else:
                message = "the model failed on this input, twice, on its own"
                self._subscriptions.fail(item, BackendFailure, message)
        else:
            self._scatter([item], output)

    async def _attempt(self, batch: Batch) -> Output:
        """Run its texts together, once. Raises what the backend raised, or RuntimeError for a wrong count of rows."""
        dispatched_at = self._loop.time()
        for item in batch.items:
            for pending in item.subscribers:
                pending.is_dispatched = True
        expected_s = self._rate.s_per_cost_token * self.limits.cost_tokens(batch)
        limit_s = hang_limit_s(expected_s, self._rate.batches, self._hang_timeout_s)
        try:
            tokens = TokenBatch.of([item.payload for item in batch.items])
            output = await self._worker.run(tokens, limit_s, is_bulk=batch.is_bulk)
            _check(output, len(batch.items))
        except Exception:
            self._record(batch, dispatched_at, started_at=dispatched_at, ended_at=self._loop.time(), ok=False)
            raise
        self.failures_in_a_row = 0
        self._room.succeeded()
        self._record(batch, dispatched_at, started_at=output.started_at, ended_at=output.ended_at, ok=True)
        return output

    def _scatter(self, items: Sequence[Item], output: Output) -> None:
        """Give each text's row to those who wait for it."""
        rows = np.asarray(output.rows, np.float32)
        are_finite = np.isfinite(rows).all()
        for item, row in zip(items, rows, strict=True):
            if are_finite or np.isfinite(row).all():
                self._subscriptions.answer(item, row, output.started_at, output.ended_at)
            else:
                message = "the model answered NaN or infinity for this input"
                self._subscriptions.fail(item, NonFiniteOutput, message)

    def _record(self, batch: Batch, dispatched_at: float, *, started_at: float, ended_at: float, ok: bool) -> None:
        """What a batch took: for the predictions, the metrics and the traces."""
        compute_s = ended_at - started_at
        if ok:
            self._rate.observe(
                tokens=batch.tokens,
                cost_tokens=self.limits.cost_tokens(batch),
                streams=self._worker.slots,
                compute_s=compute_s,
                held_s=self._loop.time() - dispatched_at,
            )
        lengths = [item.length for item in batch.items]
        padded_tokens = self.limits.work_tokens(len(lengths), batch.longest, batch.tokens)
        self._metrics.batch_finished(
            texts=len(lengths),
            tokens=batch.tokens,
            padded_tokens=padded_tokens,
            queue_s=_waits_s(batch.items, started_at),
            compute_s=compute_s,
            closed_by=batch.closed_by.value,
            ok=ok,
            lengths=lengths,
        )
        if self._metrics.tracer is not None:
            self._metrics.tracer.batch(
                [pending.call.trace for item in batch.items for pending in item.subscribers],
                dispatched_at=dispatched_at,
                started_at=started_at,
                ended_at=ended_at,
                ok=ok,
                texts=len(batch.items),
                tokens=batch.tokens,
                padded_tokens=padded_tokens,
                closed_by=batch.closed_by.value,
            )


def _waits_s(items: Sequence[Item], started_at: float) -> list[float]:
    """Of each who waits for one of the texts: his own wait, none if he came while it was being computed."""
    since = [pending.enqueued_at for item in items for pending in item.subscribers]
    return [started_at - at if at < started_at else 0.0 for at in since]


def _check(output: Output, expected: int) -> None:
    """A wrong count would hand answers to the wrong callers: treated like a batch that raised."""
    shape = np.shape(output.rows)
    if not shape or shape[0] != expected:
        raise RuntimeError(f"the backend returned shape {shape} for {expected} texts")
