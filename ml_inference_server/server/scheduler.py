"""The asyncio side of the batching policy: which batch runs when, on which free slot.

Nothing here loops for ever or polls. `_pump` hands batches to free slots and is called when texts have come in, when a
batch ends and when a batching window closes; so there is no background task whose death would leave the callers
waiting. Whatever raises in it is a bug: the requests that it may have struck are answered with an error, and the next
ones start anew.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import BackendInfo, Encoded
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.admission import Reservation
from ml_inference_server.server.answer_cache import AnswerCache
from ml_inference_server.server.batch_runner import BatchRunner
from ml_inference_server.server.batching import COMPANY_WAIT_S, Batch, BatchQueue, Limits, Running
from ml_inference_server.server.call import Call
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.out_of_memory import BatchRoom
from ml_inference_server.server.pending import Pending, Subscriptions
from ml_inference_server.server.turns import Item
from ml_inference_server.server.workers import Worker
from ml_inference_server.utils.config import BatchingSettings
from ml_inference_server.utils.errors import ServiceError, Unavailable

log = logging.getLogger(__name__)

_BUG = "internal error in the batcher"
# So many turns of the event loop without a new text, about 1 us each, before a batch is chosen for a free slot.
_QUIET_TURNS = 8


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
        bulk_share=settings.bulk_share,
    )


class Computed(NamedTuple):
    """One row for each text, in order: (texts, dimension). The times are those of the same names in Stamps.

    shared: texts that were computed for another request in flight; cached: that came out of the cache. A request with
    nothing left to compute enters the engine when it is tokenised, and leaves it at once.
    """

    rows: NDArray[np.float32]
    tokenized_at: float
    engine_started_at: float
    engine_ended_at: float
    shared: int = 0
    cached: int = 0


class _InFlight(NamedTuple):
    batch: Batch
    since: float
    cost_tokens: int
    is_express: bool


class DynamicBatcher:
    """Computes requests of one or more texts and answers each exactly once: with its rows, or with one error.

    share_equal_texts: compute texts of different requests once if they are equal and in flight at the same time;
    without batching each request runs by itself all the same. cache: of finished rows; None for none. hang_timeout_s:
    the most that a batch may ever take; it is less once it is known how long they take.
    """

    def __init__(
        self,
        worker: Worker,
        limits: Limits,
        rate: EngineRate,
        metrics: Metrics,
        *,
        share_equal_texts: bool = True,
        cache: AnswerCache | None = None,
        hang_timeout_s: float = math.inf,
    ) -> None:
        self._worker = worker
        self._queue = BatchQueue(limits)
        self._rate = rate
        share = share_equal_texts and limits.enabled
        self._subscriptions = Subscriptions(share=share, cache=cache, metrics=metrics)
        self._room = BatchRoom(limits.max_batch_tokens)
        self._runner = BatchRunner(worker, limits, rate, metrics, self._subscriptions, hang_timeout_s, self._room)
        self._loop = asyncio.get_running_loop()
        self._pending: set[Pending] = set()
        self._running: dict[asyncio.Task[None], _InFlight] = {}
        self._pump_handle: asyncio.Handle | None = None
        self._quiet_turns = 0
        self._gathers_until = 0.0
        self._window: asyncio.TimerHandle | None = None
        self._closed = False
        metrics.watch(
            queue_texts=lambda: self._queue.texts,
            queue_tokens=lambda: self._queue.tokens,
            batches_in_flight=lambda: len(self._running),
            slots=worker.slots,
            pids=lambda: worker.pids,
            restarts=lambda: worker.restarts,
            cache_bytes=lambda: 0 if cache is None else cache.held_bytes,
            tasks=lambda: len(asyncio.all_tasks(self._loop)),
        )

    async def compute(self, texts: Sequence[Encoded], call: Call, reservation: Reservation) -> Computed:
        """The texts may travel in different batches; `reservation` shrinks as batches take them.

        It holds the texts that nobody else pays for: those of the cache, and those that another request waits for, are
        no part of it. Raises DeadlinePassed, BackendFailure, NonFiniteOutput, Unavailable. Leaving this call (a
        cancelled caller) takes the texts that have not started out of the queue, unless another request needs them.
        """
        if self._closed:
            raise _shutting_down()
        now = self._loop.time()
        count = len(texts)
        pending = Pending(call, reservation, self._loop.create_future(), now, texts=count, missing=count)
        to_queue = self._subscriptions.enter(pending, texts)
        if pending.rows is not None and not pending.missing:
            return Computed(pending.rows, now, now, now, cached=pending.cached)
        self._pending.add(pending)
        timer = self._loop.call_at(call.deadline, pending.expire)
        try:
            self._put_in_line(to_queue, reservation)
            rows = await pending.future
        finally:
            timer.cancel()
            self._pending.discard(pending)
            self._leave(pending)
        return Computed(
            rows, now, pending.engine_started_at, pending.engine_ended_at, shared=pending.shared, cached=pending.cached
        )

    def _put_in_line(self, items: Sequence[Item], reservation: Reservation) -> None:
        try:
            self._queue.add(items, reservation.caller, is_bulk=reservation.is_bulk)
            self._pump_soon()
        except Exception:
            self._start_anew()

    def _leave(self, pending: Pending) -> None:
        try:
            if unwanted := self._subscriptions.leave(pending):
                self._queue.remove(unwanted)
        except Exception:
            self._start_anew()

    def _pump_soon(self) -> None:
        """All texts that are coming in are there before the first batch is chosen: gRPC hands over one call at a time.

        An engine that is free at once would otherwise get one text after the other.
        """
        self._quiet_turns = 0
        if self._pump_handle is None and self._has_slot():  # where none is free, the end of a batch pumps
            self._gathers_until = self._loop.time() + COMPANY_WAIT_S
            self._pump_handle = self._loop.call_soon(self._gather)

    def _gather(self) -> None:
        """A turn of the event loop; several that brought no text say that none is on its way."""
        self._quiet_turns += 1
        goes_on = self._quiet_turns <= _QUIET_TURNS and self._loop.time() < self._gathers_until
        if goes_on:
            self._pump_handle = self._loop.call_soon(self._gather)
        else:
            self._pump()

    def _pump(self) -> None:
        try:
            for handle in (self._pump_handle, self._window):
                if handle is not None:
                    handle.cancel()
            self._pump_handle = self._window = None
            while self._queue.texts and self._has_slot() and self._hand_out():
                pass
        except Exception:
            self._start_anew()

    def _has_slot(self) -> bool:
        """One that is free; an express one is only for when bulk batches hold all others."""
        running = self._running.values()
        express_taken = sum([each.is_express for each in running])
        if len(running) - express_taken < self._worker.slots:
            return True
        return express_taken < self._worker.express_slots and all(each.batch.is_bulk for each in running)

    def _hand_out(self) -> bool:
        """Start the next batch; False where there is none now."""
        is_express = sum([not each.is_express for each in self._running.values()]) >= self._worker.slots
        chosen = self._queue.express_batch() if is_express else self._next_batch()
        if chosen is None:
            return False
        if isinstance(chosen, float):
            self._window = self._loop.call_at(chosen, self._pump)
            return False
        for item in chosen.items:
            item.owner.reservation.give_back(item.length)
        running = _InFlight(chosen, self._loop.time(), self._queue.limits.cost_tokens(chosen), is_express)
        task = self._loop.create_task(self._runner.run(chosen))
        self._running[task] = running
        task.add_done_callback(self._ended)
        return True

    def _next_batch(self) -> Batch | float | None:
        smallest = min(self._running.values(), key=_by_tokens, default=None)
        return self._queue.next_batch(self._loop.time(), smallest and self._expected(smallest))

    def _start_anew(self) -> None:
        """After a bug in the policy, which must not leave anybody waiting, nor a queue that is no longer true."""
        log.exception("the batching policy failed; every waiting request is answered with an error")
        self._runner.failures_in_a_row += 1
        for pending in self._pending:
            pending.fail(ServiceError(_BUG))
        self._subscriptions.abandon(self._pending)
        self._queue = BatchQueue(self._queue.limits)
        # Left as it was, whoever comes next would wait for a turn that is over.
        self._pump_handle = None

    def _expected(self, running: _InFlight) -> Running:
        return Running(running.batch.tokens, running.since + self._rate.s_per_cost_token * running.cost_tokens)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A batch has left its slot."""
        running = self._running.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a batch ended in a bug of the scheduler", exc_info=error)
            if running is not None:
                self._runner.fail(running.batch)
        if self._room.tokens != self._queue.limits.max_batch_tokens:
            self._queue.limits = replace(self._queue.limits, max_batch_tokens=self._room.tokens)
        self._pump()

    def change_limits(self, limits: Limits) -> None:
        """For batches from now on. `enabled` stays what it was."""
        self._room.change_most(limits.max_batch_tokens)
        self._runner.limits = limits
        self._queue.change_limits(replace(limits, max_batch_tokens=self._room.tokens))
        self._pump_soon()

    def look_after(self) -> None:
        """Go on where a bug has left texts waiting beside a free slot. For whoever looks now and then."""
        for task in [task for task in self._running if task.done()]:
            self._ended(task)
        if self._queue.texts and self._has_slot():
            self._pump()

    # Health and end

    @property
    def busy_share(self) -> float:
        """Of the slots, those that run a batch now; above 1 while an express slot runs one too."""
        return len(self._running) / self._worker.slots

    @property
    def failures_in_a_row(self) -> int:
        """Texts that failed alone since the last batch that succeeded."""
        return self._runner.failures_in_a_row

    @property
    def max_batch_tokens(self) -> int:
        """Padded tokens in one batch, at most."""
        return self._queue.limits.max_batch_tokens

    @property
    def trouble(self) -> str:
        """Why others should get the calls; empty if all is well."""
        return self._worker.trouble

    def close(self) -> None:
        """End at once: whoever still waits, or comes later, is answered with Unavailable."""
        self._closed = True
        for handle in (self._pump_handle, self._window):
            if handle is not None:
                handle.cancel()
        for pending in self._pending:
            pending.fail(_shutting_down())
        self._worker.close()


def _by_tokens(running: _InFlight) -> int:
    return running.batch.tokens


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down; the request was not finished")
