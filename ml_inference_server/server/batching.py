"""Which texts travel together: the batching policy. Pure: no clock, no asyncio, no sockets; `now` is an argument.

A batch is built round an *anchor*, the text whose turn it is, so that no text can be passed over for ever: each batch
serves the first in line. With length grouping the batch is filled with the anchor's neighbours in length. Among all
runs of neighbours that hold the anchor and fit the budgets it takes the one with the most real tokens per unit of cost,
where a batch costs its padded tokens plus a fixed overhead:

    rate = real tokens / (overhead + texts * longest)

so a text joins exactly if it makes the engine's work denser; there is no threshold to tune. An engine that runs without
padding takes any mix of lengths at the same cost for each token: its batches are filled with the next texts in line.
docs/batching.md holds the measurements behind this choice.

Company: while a small batch is running, a second stream is not opened for little work. What waits joins the next batch
instead, which ends sooner than two small ones that share the processor would; and never waits long for it.

Turns: first come, first served, in portions of at most a batch. A later portion of a request is tagged as if it had
arrived when another batch's worth of tokens had (after start-time fair queueing, Goyal et al. 1996). So a request of
one text does not wait for the end of one of a thousand, which does go on however many small ones come; and requests
that fit into a batch are not served all at the same time, each of them slowly.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from ml_inference_server.backends.base import packed_size

# A text waits at most so long for a running batch while another stream is free, and no longer than until that batch
# should have ended. Where small batches take less (AMX), it waits for their end; where they take longer, a core would
# idle meanwhile.
COMPANY_WAIT_S = 0.005


class ClosedBy(Enum):
    """Why a batch stopped growing."""

    FULL = "full"  # max_batch_size
    TOKENS = "tokens"  # max_batch_tokens
    TIMER = "timer"  # a worker was free, no limit was reached, and the first in line had waited timeout_ms
    IDLE = "idle"  # a worker was free, and nothing else that waited would have made the batch denser
    SINGLE = "single"  # batching is off
    RETRY = "retry"  # part of a batch that raised


Places = int | list[int]
"""Where in a request a row goes; several where texts of the request are equal."""


def count_of(places: Places) -> int:
    return 1 if isinstance(places, int) else len(places)


@dataclass(slots=True, eq=False)
class Item:
    """One text to compute. owner: the request that pays for it; the policy only asks whether two have the same.

    subscribers: all requests that are to get its row, each with the places where it goes; the first to come is first.
    """

    owner: Any
    length: int
    enqueued_at: float
    payload: Any = None
    key: Any = None
    subscribers: dict[Any, Places] = field(default_factory=dict)
    tag: float = 0.0
    seq: int = 0
    waiting: bool = False

    def add_place(self, subscriber: Any, place: int) -> None:
        places = self.subscribers[subscriber]
        if isinstance(places, int):
            self.subscribers[subscriber] = [places, place]
        else:
            places.append(place)


@dataclass(frozen=True, slots=True)
class Limits:
    """overhead_tokens: what starting one more batch costs, in tokens of work. padding_free: padding costs nothing."""

    max_batch_size: int
    max_batch_tokens: int
    timeout_s: float = 0.0
    enabled: bool = True
    length_grouping: bool = True
    overhead_tokens: int = 64
    padding_free: bool = False

    @property
    def worth_a_stream_tokens(self) -> int:
        """Open a second stream only once this many tokens wait: the start of a batch costs a fifth of that."""
        return 4 * self.overhead_tokens

    def work_tokens(self, texts: int, longest: int, tokens: int) -> int:
        """What the engine computes for a batch of `texts` texts with `tokens` tokens in all."""
        return packed_size(tokens) if self.padding_free else texts * longest

    def cost_tokens(self, batch: "Batch") -> int:
        """Its work, and what starting it costs."""
        return self.overhead_tokens + self.work_tokens(len(batch.items), batch.longest, batch.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    items: list[Item]
    closed_by: ClosedBy

    @property
    def tokens(self) -> int:
        return sum(item.length for item in self.items)

    @property
    def longest(self) -> int:
        return max(item.length for item in self.items)


class Running(NamedTuple):
    """A batch in flight. ends_at: when it should end, by the measured rate of earlier batches."""

    tokens: int
    ends_at: float


@dataclass(slots=True)
class BatchQueue:
    """The texts that wait, and the choice of the next batch. `texts` and `tokens` count what waits."""

    limits: Limits
    texts: int = 0
    tokens: int = 0
    _turns: list[tuple[float, int, Item]] = field(default_factory=list)
    _by_length: list[Item] = field(default_factory=list)
    _virtual_time: float = 0.0
    _seq: int = 0

    def add(self, items: Sequence[Item]) -> None:
        """Put the texts of one request in line, in their order.

        One that waits already, for another request, moves forward to the turn that it would get now, where that is an
        earlier one. So who shares a text never waits longer for it than he would alone.
        """
        limits, placed, ahead = self.limits, 0, 0
        for item in items:
            tag = 0.0  # without batching: equal tags, arrival order
            if limits.enabled:
                portion = max(ahead // limits.max_batch_tokens, placed // limits.max_batch_size)
                # One more, so that who comes next goes before a second portion.
                tag = self._virtual_time + portion * (limits.max_batch_tokens + 1)
            if item.waiting:
                if item.tag <= tag:
                    continue
                self.remove([item])
            self._seq += 1
            item.tag, item.seq, item.waiting = tag, self._seq, True
            heapq.heappush(self._turns, (tag, item.seq, item))
            bisect.insort(self._by_length, item, key=_length_key)
            self.texts += 1
            self.tokens += item.length
            placed, ahead = placed + 1, ahead + item.length
        self._virtual_time += min(ahead, limits.max_batch_tokens)

    def remove(self, items: Sequence[Item]) -> None:
        """Forget those of `items` that still wait (their caller has left, or their deadline has passed)."""
        for item in items:
            if item.waiting:
                item.waiting = False
                del self._by_length[self._position(item)]
                self.texts -= 1
                self.tokens -= item.length

    def next_batch(self, now: float, running: Running | None = None) -> Batch | float | None:
        """The next batch, removed from the queue; or the time at which to ask again; or None when nothing waits.

        running: the smallest of the batches in flight, if there are any; its end is another reason to ask again.
        """
        anchor = self._first()
        if anchor is None:
            return None
        if running is not None and self._should_wait_for(running.tokens):
            opens_at = min(anchor.enqueued_at + COMPANY_WAIT_S, running.ends_at)
            if now < opens_at:
                return opens_at
        batch = self._choose(anchor)
        if batch.closed_by is ClosedBy.IDLE and self.limits.timeout_s:
            closes_at = anchor.enqueued_at + self.limits.timeout_s
            if now < closes_at:
                return closes_at
            batch = Batch(batch.items, ClosedBy.TIMER)
        self._virtual_time = max(self._virtual_time, anchor.tag)
        self.remove(batch.items)
        return batch

    def _should_wait_for(self, running_tokens: int) -> bool:
        limits, worth = self.limits, self.limits.worth_a_stream_tokens
        can_grow = limits.enabled and self.texts < limits.max_batch_size
        return can_grow and self.tokens < worth and running_tokens < 2 * worth

    def _first(self) -> Item | None:
        while self._turns and not _is_current(self._turns[0]):
            heapq.heappop(self._turns)
        return self._turns[0][2] if self._turns else None

    def _choose(self, anchor: Item) -> Batch:
        limits = self.limits
        if not limits.enabled:
            return Batch(self._fit([item for item in self._in_turn() if item.owner is anchor.owner]), ClosedBy.SINGLE)
        grouped = limits.length_grouping and not limits.padding_free
        batch = Batch(self._dense_run(anchor) if grouped else self._fit(self._in_turn()), ClosedBy.IDLE)
        if len(batch.items) >= limits.max_batch_size:
            return Batch(batch.items, ClosedBy.FULL)
        # One more text like the longest of it, or the next in line where that is what would have come.
        more = limits.work_tokens(len(batch.items) + 1, batch.longest, batch.tokens + batch.longest)
        left_behind = limits.padding_free and self.texts > len(batch.items)
        full = more > limits.max_batch_tokens or left_behind
        return Batch(batch.items, ClosedBy.TOKENS if full else ClosedBy.IDLE)

    def _in_turn(self) -> list[Item]:
        """The first texts in line, at least max_batch_size of them where so many wait."""
        gone = len(self._turns) - self.texts
        first = heapq.nsmallest(self.limits.max_batch_size + gone, self._turns)
        return [turn[2] for turn in first if _is_current(turn)]

    def _fit(self, items: Sequence[Item]) -> list[Item]:
        """The longest prefix of `items` within both budgets, at least one."""
        longest = tokens = 0
        for count, item in enumerate(items):
            longest, tokens = max(longest, item.length), tokens + item.length
            work = self.limits.work_tokens(count + 1, longest, tokens)
            over = work > self.limits.max_batch_tokens or count == self.limits.max_batch_size
            if count and over:
                return list(items[:count])
        return list(items)

    def _dense_run(self, anchor: Item) -> list[Item]:
        """The run of neighbours in length with the highest rate (see the module's docstring)."""
        queue, limits = self._by_length, self.limits
        at = self._position(anchor)
        best = (0.0, at, at)
        anchor_to_high = 0
        for high in range(at, min(len(queue), at + limits.max_batch_size)):
            longest = queue[high].length
            room = min(limits.max_batch_size, max(1, limits.max_batch_tokens // longest))
            count = high - at + 1
            if count > room:
                break
            anchor_to_high += longest
            if count < room and high + 1 < len(queue) and queue[high + 1].length == longest:
                continue  # one more of the same length is always denser
            real, low = anchor_to_high, at
            while low and count < room:
                shorter = queue[low - 1].length
                # (real + shorter) / (cost + longest) > real / cost, without the divisions
                if shorter * (limits.overhead_tokens + count * longest) <= longest * real:
                    break
                real, low, count = real + shorter, low - 1, count + 1
            rate = real / (limits.overhead_tokens + count * longest)
            if rate > best[0]:
                best = (rate, low, high)
        return queue[best[1] : best[2] + 1]

    def _position(self, item: Item) -> int:
        return bisect.bisect_left(self._by_length, _length_key(item), key=_length_key)


def _is_current(turn: tuple[float, int, Item]) -> bool:
    """Not of a text that has left, or has moved to another turn."""
    _, seq, item = turn
    return item.waiting and item.seq == seq


def _length_key(item: Item) -> tuple[int, int]:
    return (item.length, item.seq)
