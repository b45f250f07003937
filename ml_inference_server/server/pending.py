"""Who waits for which text: equal texts of requests that are in flight at the same time are one Item, computed once.

Each request subscribes to the texts that it needs. An Item that waits is in the queue exactly as long as somebody
subscribes to it. Its tokens are held by the reservation of its owner, one of its subscribers, until a batch takes it.
"""

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import Encoded
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.admission import Reservation
from ml_inference_server.server.answer_cache import AnswerCache, TextKey, key_of
from ml_inference_server.server.call import Call
from ml_inference_server.server.turns import Item, Places, count_of
from ml_inference_server.utils.errors import DeadlinePassed, ServiceError


@dataclass(slots=True, eq=False)
class Pending:
    """A request whose texts wait or are being computed.

    texts: how many rows it needs; missing: how many of them it has not got. items: that it subscribed to.
    """

    call: Call
    reservation: Reservation
    future: asyncio.Future[NDArray[np.float32]]
    enqueued_at: float
    texts: int
    missing: int
    items: list[Item] = field(default_factory=list)
    rows: NDArray[np.float32] | None = None
    is_dispatched: bool = False
    engine_started_at: float = math.inf
    engine_ended_at: float = 0.0
    shared: int = 0
    cached: int = 0

    def put(self, places: Places, row: NDArray[np.float32]) -> None:
        """Copy the row to its places."""
        if self.rows is None:
            self.rows = np.empty((self.texts, *row.shape), np.float32)
        self.rows[places] = row
        self.missing -= count_of(places)

    def was_in_engine(self, started_at: float, ended_at: float) -> None:
        """From `started_at` to `ended_at`, for one of its texts. Who joined meanwhile was not there before."""
        began_at = started_at if started_at > self.enqueued_at else self.enqueued_at
        if began_at < self.engine_started_at:
            self.engine_started_at = began_at
        self.engine_ended_at = max(self.engine_ended_at, began_at, ended_at)

    def fail(self, error: ServiceError) -> None:
        """Answer with `error`, unless it is answered already."""
        if not self.future.done():
            self.future.set_exception(error)
            # Its caller may have left in this very turn; an error that nobody reads is no event worth a log line.
            self.future.exception()

    def expire(self) -> None:
        """Answer that the deadline has passed."""
        where = "while the request ran" if self.is_dispatched else "in the queue"
        self.fail(DeadlinePassed(f"the deadline passed {where}; nothing more is computed for it"))


class Subscriptions:
    """Every text that waits or is being computed, and who is to get its row.

    share: whether equal texts are one. cache: None for none.
    """

    def __init__(self, *, share: bool, cache: AnswerCache | None, metrics: Metrics) -> None:
        self._share = share
        self._cache = cache
        self._metrics = metrics
        self._in_flight: dict[TextKey | None, Item] = {}  # empty where equal texts are not shared

    def enter(self, pending: Pending, texts: Sequence[Encoded]) -> list[Item]:
        """Give `pending` what the cache has and subscribe it to the rest; returns what has to be put in line.

        Those are new texts, and texts that wait already and may have to move forward. The reservation of `pending`
        holds the new ones from now on.
        """
        cache = None if pending.call.fresh else self._cache
        has_key = self._share or self._cache is not None
        to_queue: list[Item] = []
        new_tokens = new_texts = 0
        for row, text in enumerate(texts):
            key = key_of(text) if has_key else None
            if cache is not None and key is not None and (found := cache.get(key)) is not None:
                pending.put(row, found)
                pending.cached += 1
                continue
            item = self._in_flight.get(key)
            if item is None:
                length = text.length
                item = Item(pending, length, pending.enqueued_at, text, key)
                if self._share:
                    self._in_flight[key] = item
                new_tokens += length
                new_texts += 1
                to_queue.append(item)
            elif pending in item.subscribers:  # equal texts of one request
                item.add_place(pending, row)
                continue
            elif item.waiting:
                to_queue.append(item)
            else:
                pending.is_dispatched = True
            item.subscribers[pending] = row
            pending.items.append(item)
        if cache is not None:
            self._metrics.cache_looked_up(hits=pending.cached, misses=len(texts) - pending.cached)
        pending.reservation.resize(new_tokens, new_texts)
        return to_queue

    def leave(self, pending: Pending) -> list[Item]:
        """End all that `pending` subscribed to; returns the texts that wait for nobody now."""
        items, pending.items = pending.items, []
        if not pending.missing:
            return []
        unwanted: list[Item] = []
        for item in items:
            del item.subscribers[pending]
            if not item.waiting:
                continue
            if item.owner is pending:
                pending.reservation.give_back(item.length)
                if item.subscribers:
                    item.owner = heir = next(iter(item.subscribers))
                    heir.reservation.take(item.length)
            if not item.subscribers:
                self._forget(item)
                unwanted.append(item)
        return unwanted

    def wanted(self, items: Sequence[Item]) -> list[Item]:
        """Without those whose subscribers have all left or are late; these are over."""
        now = asyncio.get_running_loop().time()
        kept = []
        for item in items:
            is_wanted = False
            for pending in item.subscribers:
                if pending.future.done():
                    continue
                if pending.call.deadline > now:
                    is_wanted = True
                else:
                    pending.expire()
            if is_wanted:
                kept.append(item)
            else:
                self._forget(item)
        return kept

    def answer(self, item: Item, row: NDArray[np.float32], started_at: float, ended_at: float) -> None:
        """Give a sound row to all who still wait for it."""
        shared = 0
        for pending, places in item.subscribers.items():
            if pending.future.done():
                continue
            if pending is not item.owner:
                pending.shared += count_of(places)
                shared += count_of(places)
            pending.was_in_engine(started_at, ended_at)
            pending.put(places, row)
            if not pending.missing:
                pending.future.set_result(pending.rows)
        if shared:
            self._metrics.texts_shared(shared)
        if self._cache is not None:
            self._cache.put(item.key, row)
        self._forget(item)

    def fail(self, item: Item, error: type[ServiceError], message: str) -> None:
        """Answer each who waits for it with an error of his own."""
        for pending in item.subscribers:
            pending.fail(error(message))
        self._forget(item)

    def abandon(self, pendings: Iterable[Pending]) -> None:
        """Take all their texts for lost, after a bug: nobody joins one of them any more."""
        for pending in pendings:
            for item in pending.items:
                item.waiting = False
        self._in_flight.clear()

    def _forget(self, item: Item) -> None:
        """It is over: who comes with an equal text gets a new one."""
        item.payload = None
        if self._in_flight.get(item.key) is item:
            del self._in_flight[item.key]
