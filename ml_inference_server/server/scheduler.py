"""The asyncio shell round the batching policy: admission, dispatch, futures, drain.

Nothing here loops or polls. `_pump` hands batches to free slots and is called when a text arrives, when a batch ends
and when a batching window closes; so there is no background task whose death would leave the callers waiting.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import BackendInfo, Encoded, TokenBatch
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.metrics.tracing import CURRENT, RequestTrace
from ml_inference_server.server.batching import Batch, BatchQueue, ClosedBy, Item, Limits, Running
from ml_inference_server.server.workers import Output, Worker
from ml_inference_server.utils.config import BatchingSettings
from ml_inference_server.utils.errors import (
    BackendFailure,
    DeadlinePassed,
    InvalidRequest,
    NonFiniteOutput,
    Overloaded,
    ServiceError,
    Unavailable,
)

log = logging.getLogger(__name__)

_MIN_RETRY_MS, _MAX_RETRY_MS = 20, 5000
# A request is taken in only if the work in front of it should be done within this share of its time. Under overload all
# that is computed would else be answers that come a moment too late (docs/batching.md).
_TIME_FOR_THE_QUEUE = 0.8


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


@dataclass(slots=True, eq=False)
class Ticket:
    """One accepted request. Everything it holds in the queue is given back by `DynamicBatcher.release`."""

    reserved_tokens: int
    deadline: float
    future: asyncio.Future[NDArray[np.float32]]
    items: list[Item] = field(default_factory=list)
    rows: NDArray[np.float32] | None = None
    missing: int = 0
    enqueued_at: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    last_started_at: float = 0.0  # of the batch that ended_at belongs to
    released: bool = False
    request: RequestTrace | None = field(default_factory=CURRENT.get)


class _InFlight(NamedTuple):
    since: float
    tokens: int
    cost_tokens: int


class DynamicBatcher:
    """Takes requests of one or more texts and answers each exactly once: with its rows, or with one error."""

    def __init__(self, worker: Worker, limits: Limits, settings: BatchingSettings, metrics: Metrics) -> None:
        self._worker = worker
        self._queue = BatchQueue(limits)
        self._settings = settings
        self._metrics = metrics
        self._free_slots = worker.slots
        self._loop = asyncio.get_running_loop()
        self._tickets: set[Ticket] = set()
        self._running: dict[asyncio.Task[None], _InFlight] = {}
        self._reserved_tokens = 0
        self._pump_handle: asyncio.Handle | None = None
        self._window: asyncio.TimerHandle | None = None
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._tokens_per_s = 0.0
        self._s_per_cost = 0.0  # of a batch, whose cost is its work and the fixed overhead, in tokens
        self._failures_in_a_row = 0
        metrics.watch(
            queue_texts=lambda: self._queue.texts,
            queue_tokens=lambda: self._queue.tokens,
            batches_in_flight=lambda: len(self._running),
            slots=worker.slots,
            pids=lambda: worker.pids,
            restarts=lambda: worker.restarts,
        )

    # Admission

    def admit(self, tokens: int, deadline: float) -> Ticket:
        """Reserve room for a request of about `tokens` tokens, all or nothing, before any work is done for it.

        The caller must `release` the ticket, whatever happens. Raises Unavailable while draining, InvalidRequest if the
        request could never fit, Overloaded with a hint if it does not fit now or would wait for most of its time,
        DeadlinePassed if it is late already.
        """
        settings = self._settings
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        now = self._loop.time()
        if deadline <= now:
            raise DeadlinePassed("the deadline had passed before the request was admitted")
        if tokens > settings.max_queue_tokens:
            raise InvalidRequest(
                f"the request has about {tokens} tokens, the whole queue takes {settings.max_queue_tokens}: split it",
                reason="TOO_MANY_TEXTS",
            )
        if len(self._tickets) >= settings.max_queue_requests:
            raise self._full(f"{settings.max_queue_requests} requests")
        if self._reserved_tokens + tokens > settings.max_queue_tokens:
            raise self._full(f"{settings.max_queue_tokens} tokens")
        wait_s = self._reserved_tokens / self._tokens_per_s if self._tokens_per_s else 0.0
        if wait_s > _TIME_FOR_THE_QUEUE * (deadline - now):
            hint = _retry_hint_ms(wait_s - _TIME_FOR_THE_QUEUE * (deadline - now))
            raise Overloaded(
                f"the queue is too long for this deadline (the wait is about {wait_s:.1f} s, the request has "
                f"{deadline - now:.1f} s); retry in {hint} ms",
                reason="WAIT_TOO_LONG",
                retry_after_ms=hint,
            )
        ticket = Ticket(tokens, deadline, self._loop.create_future())
        self._reserved_tokens += tokens
        self._tickets.add(ticket)
        self._empty.clear()
        return ticket

    def _full(self, limit: str) -> Overloaded:
        """The hint is what a fifth of the queue takes at the measured rate."""
        excess = max(self._reserved_tokens - 0.8 * self._settings.max_queue_tokens, 0.2 * self._reserved_tokens)
        hint = _retry_hint_ms(excess / self._tokens_per_s if self._tokens_per_s else 1.0)
        return Overloaded(f"the queue is full ({limit}); retry in {hint} ms", retry_after_ms=hint)

    def release(self, ticket: Ticket) -> None:
        """Give back all that the ticket still holds; what of it has not started never will."""
        if ticket.released:
            return
        ticket.released = True
        self._queue.remove(ticket.items)
        self._reserved_tokens -= ticket.reserved_tokens
        ticket.reserved_tokens = 0
        if not ticket.future.done():
            ticket.future.cancel()
        self._tickets.discard(ticket)
        if not self._tickets:
            self._empty.set()

    # Work

    async def compute(self, ticket: Ticket, texts: Sequence[Encoded]) -> NDArray[np.float32]:
        """One row for each of `texts`, in order: (texts, dimension) float32.

        The texts may travel in different batches. Raises DeadlinePassed, BackendFailure, NonFiniteOutput, Unavailable.
        Leaving this call (a cancelled caller) takes the texts that have not started out of the queue.
        """
        now = self._loop.time()
        actual = sum(text.length for text in texts)
        self._reserved_tokens += actual - ticket.reserved_tokens
        ticket.reserved_tokens = actual
        ticket.enqueued_at, ticket.missing = now, len(texts)
        ticket.items = [Item(ticket, row, text.length, now, text) for row, text in enumerate(texts)]
        self._queue.add(ticket.items)
        self._pump_soon()
        timer = self._loop.call_at(ticket.deadline, _expire, ticket)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the caller has left
            raise Unavailable("the server is shutting down; the request was not finished") from None
        finally:
            timer.cancel()

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
                for ticket in list(self._tickets):
                    _fail(ticket, ServiceError("internal error in the batcher"))
                    for item in ticket.items:
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
        return Running(batch.tokens, batch.since + self._s_per_cost * batch.cost_tokens)

    def _slot_free(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._free_slots += 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a batch ended in a bug of the scheduler", exc_info=error)
        self._pump()

    async def _run(self, batch: Batch) -> None:
        try:
            await self._execute(batch.items, batch.closed_by)
        finally:
            # Whatever went wrong above, nobody is left without an answer.
            for item in batch.items:
                if not item.owner.future.done() and item.payload is not None:
                    _fail(item.owner, ServiceError("internal error in the batcher"))

    async def _execute(self, items: Sequence[Item], closed_by: ClosedBy, alone_before: bool = False) -> None:
        """Run the items whose callers still wait. A batch that raises is halved until only the guilty are left."""
        now = self._loop.time()
        items = [item for item in items if _is_wanted(item, now)]
        if not items:
            return
        for item in items:
            ticket: Ticket = item.owner
            ticket.started_at = ticket.started_at or now
            if closed_by is not ClosedBy.RETRY:
                ticket.reserved_tokens -= item.length
                self._reserved_tokens -= item.length
        try:
            output = await self._worker.run(TokenBatch.of([item.payload for item in items]))
            _check(output, len(items))
        except Exception as error:
            self._observe(items, closed_by, now, now, self._loop.time(), ok=False)
            if len(items) > 1:
                log.warning("a batch of %d texts failed (%s): halving it", len(items), type(error).__name__)
                middle = len(items) // 2
                await self._execute(items[:middle], ClosedBy.RETRY)
                await self._execute(items[middle:], ClosedBy.RETRY)
            elif not alone_before:
                await self._execute(items, ClosedBy.RETRY, alone_before=True)
            else:
                self._failures_in_a_row += 1
                request = items[0].owner.request
                name = request.request_id if request else "none"
                log.error("the model failed on one text, twice, on its own (request %s)", name, exc_info=error)
                _settle_failure(items[0], BackendFailure("the model failed on this input, twice, on its own"))
            return
        self._failures_in_a_row = 0
        self._observe(items, closed_by, now, output.started_at, output.ended_at, ok=True)
        self._scatter(items, output)

    def _scatter(self, items: Sequence[Item], output: Output) -> None:
        """Give each text its row, and each request its answer once it has all of them."""
        rows = np.asarray(output.rows, np.float32)
        finite = np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
        for item, row, is_finite in zip(items, rows, finite, strict=True):
            ticket: Ticket = item.owner
            item.payload = None
            if not is_finite:
                _settle_failure(item, NonFiniteOutput("the model answered NaN or infinity for this input"))
            elif not ticket.future.done():
                if ticket.rows is None:
                    ticket.rows = np.empty((len(ticket.items), *row.shape), np.float32)
                ticket.rows[item.row] = row
                ticket.missing -= 1
                ticket.last_started_at, ticket.ended_at = output.started_at, output.ended_at
                if not ticket.missing:
                    ticket.future.set_result(ticket.rows)

    def _observe(
        self,
        items: Sequence[Item],
        closed_by: ClosedBy,
        dispatched_at: float,
        started_at: float,
        ended_at: float,
        ok: bool,
    ) -> None:
        batch = Batch(list(items), closed_by)
        compute_s = ended_at - started_at
        if ok and compute_s > 0:
            rate = batch.tokens * self._worker.slots / compute_s
            self._tokens_per_s = rate if not self._tokens_per_s else 0.9 * self._tokens_per_s + 0.1 * rate
            each_s = compute_s / self._cost(batch)
            self._s_per_cost = each_s if not self._s_per_cost else 0.9 * self._s_per_cost + 0.1 * each_s
        padded_tokens = self._queue.limits.work_tokens(len(items), batch.longest, batch.tokens)
        self._metrics.batch_finished(
            texts=len(items),
            tokens=batch.tokens,
            padded_tokens=padded_tokens,
            queue_s=[started_at - item.enqueued_at for item in items],
            compute_s=compute_s,
            closed_by=closed_by.value,
            ok=ok,
            lengths=[item.length for item in items],
        )
        if self._metrics.tracer is not None:
            self._metrics.tracer.batch(
                [item.owner.request for item in items],
                dispatched_at=dispatched_at,
                started_at=started_at,
                ended_at=ended_at,
                ok=ok,
                texts=len(items),
                tokens=batch.tokens,
                padded_tokens=padded_tokens,
                closed_by=closed_by.value,
            )

    # Health and end

    @property
    def accepted_requests(self) -> int:
        return len(self._tickets)

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

    def refuse_new(self) -> None:
        """From now on `admit` raises Unavailable; what was accepted goes on."""
        self._draining = True

    async def drained(self, timeout_s: float) -> int:
        """Wait until all accepted requests are answered, at most `timeout_s`; returns how many are not."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return len(self._tickets)
        return 0

    def close(self) -> None:
        """End at once: whoever still waits is answered with Unavailable."""
        self.refuse_new()
        for handle in (self._pump_handle, self._window):
            if handle is not None:
                handle.cancel()
        for ticket in list(self._tickets):
            _fail(ticket, Unavailable("the server is shutting down; the request was not finished"))
        self._worker.close()


def _by_tokens(batch: _InFlight) -> int:
    return batch.tokens


def _retry_hint_ms(wait_s: float) -> int:
    wait_ms = 1000 * wait_s * random.uniform(0.75, 1.25)  # noqa: S311 - spreads retries, guards nothing
    return int(min(max(wait_ms, _MIN_RETRY_MS), _MAX_RETRY_MS))


def _expire(ticket: Ticket) -> None:
    where = "while the request ran" if ticket.started_at else "in the queue"
    _fail(ticket, DeadlinePassed(f"the deadline passed {where}; nothing more is computed for it"))


def _is_wanted(item: Item, now: float) -> bool:
    ticket: Ticket = item.owner
    if ticket.future.done():
        return False
    if ticket.deadline <= now:
        _fail(ticket, DeadlinePassed("the deadline passed in the queue; nothing was computed for it"))
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


def _fail(ticket: Ticket, error: ServiceError) -> None:
    if not ticket.future.done():
        ticket.future.set_exception(error)
        # Its caller may have left in this very turn; an error that nobody reads is no event worth a log line.
        ticket.future.exception()
