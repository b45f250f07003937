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

Turns: by priority, then by caller, then by request (turns.py has the last two). Texts of different priorities never
share a batch: a query would wait for all that travels with it. Interactive texts go first; while both wait, bulk ones
get their share of the work and whatever the others leave, so that nothing waits for ever. While bulk batches run on all
streams, one interactive batch may run beside them: processors are shared better by the operating system than by waiting
for the end of a long batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ml_inference_server.backends.base import packed_size
from ml_inference_server.server.turns import Item, Line, NextTurn

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


@dataclass(frozen=True, slots=True)
class Limits:
    """overhead_tokens: what starting one more batch costs, in tokens of work. padding_free: padding costs nothing.

    bulk_share: of the work, for bulk texts that wait while interactive ones do.
    """

    max_batch_size: int
    max_batch_tokens: int
    timeout_s: float = 0.0
    enabled: bool = True
    length_grouping: bool = True
    overhead_tokens: int = 64
    padding_free: bool = False
    bulk_share: float = 0.1

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


@dataclass(slots=True)
class Batch:
    """At least one text. tokens: of all; longest: of the longest."""

    items: list[Item]
    closed_by: ClosedBy
    is_bulk: bool = False
    tokens: int = field(init=False)
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = [item.length for item in self.items]
        self.tokens, self.longest = sum(lengths), max(lengths)


class Running(NamedTuple):
    """A batch in flight. ends_at: when it should end, by the measured rate of earlier batches."""

    tokens: int
    ends_at: float


class BatchQueue:
    """The texts that wait, and the choice of the next batch."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._interactive, self._bulk = (
            Line(
                is_bulk=is_bulk,
                portion_tokens=limits.max_batch_tokens,
                portion_texts=limits.max_batch_size,
                in_portions=limits.enabled,
            )
            for is_bulk in (False, True)
        )
        self._owed_tokens = 0.0  # of work, to bulk texts

    @property
    def texts(self) -> int:
        """How many wait."""
        return self._interactive.texts + self._bulk.texts

    @property
    def tokens(self) -> int:
        """Of the texts that wait."""
        return self._interactive.tokens + self._bulk.tokens

    def change_limits(self, limits: Limits) -> None:
        """For batches from now on; what waits keeps its turn. `limits.enabled` stays what it was."""
        self.limits = limits
        for line in (self._interactive, self._bulk):
            line.change_portions(limits.max_batch_tokens, limits.max_batch_size)

    def add(self, items: Sequence[Item], caller: str = "", *, is_bulk: bool = False) -> None:
        """Put the texts of one request in line, in their order.

        One that waits already, for another request, moves forward to the turn that it would get now, where that is an
        earlier one. So who shares a text never waits longer for it than he would alone.
        """
        if is_bulk:
            self._bulk.add([item for item in items if not item.waiting or item.is_bulk], caller)
            return
        if self._bulk.texts:
            self._bulk.remove([item for item in items if item.is_bulk])
        self._interactive.add(items, caller)

    def remove(self, items: Sequence[Item]) -> None:
        """Forget those of `items` that still wait (their caller has left, or their deadline has passed)."""
        for item in items:
            (self._bulk if item.is_bulk else self._interactive).remove([item])

    def next_batch(self, now: float, running: Running | None = None) -> Batch | float | None:
        """The next batch, removed from the queue; or the time at which to ask again; or None when nothing waits.

        running: the smallest of the batches in flight, if there are any; its end is another reason to ask again.
        """
        line, other = self._interactive, self._bulk
        if not line.texts or (other.texts and self._owed_tokens >= self._bulk_batch_tokens()):
            line, other = other, line
        turn = line.first()
        if turn is None:
            return None
        anchor = turn.item
        if running is not None and self._should_wait_for(running.tokens):
            opens_at = min(anchor.enqueued_at + COMPANY_WAIT_S, running.ends_at)
            if now < opens_at:
                return opens_at
        batch = self._choose(line, anchor)
        if batch.closed_by is ClosedBy.IDLE and self.limits.timeout_s and not other.texts:
            closes_at = anchor.enqueued_at + self.limits.timeout_s
            if now < closes_at:
                return closes_at
            batch.closed_by = ClosedBy.TIMER
        return self._take(line, turn, batch)

    def express_batch(self) -> Batch | None:
        """An interactive batch, to run beside bulk ones that hold every stream; None when no such text waits."""
        turn = self._interactive.first()
        return turn and self._take(self._interactive, turn, self._choose(self._interactive, turn.item))

    def _take(self, line: Line, turn: NextTurn, batch: Batch) -> Batch:
        line.remove(batch.items)
        line.took(turn, batch.items)
        if not self._bulk.texts:
            self._owed_tokens = 0.0
        else:
            cost = self.limits.cost_tokens(batch)
            self._owed_tokens += self.limits.bulk_share * cost
            if line.is_bulk:
                self._owed_tokens = max(0.0, self._owed_tokens - cost)
        return batch

    def _bulk_batch_tokens(self) -> int:
        """What the next one costs, at most."""
        return self.limits.overhead_tokens + min(self._bulk.tokens, self.limits.max_batch_tokens)

    def _should_wait_for(self, running_tokens: int) -> bool:
        limits, worth = self.limits, self.limits.worth_a_stream_tokens
        can_grow = limits.enabled and self.texts < limits.max_batch_size
        return can_grow and self.tokens < worth and running_tokens < 2 * worth

    def _choose(self, line: Line, anchor: Item) -> Batch:
        limits, most = self.limits, self.limits.max_batch_size
        if not limits.enabled:
            own = [item for item in line.in_turn(most) if item.owner is anchor.owner]
            return Batch(self._fit(own), ClosedBy.SINGLE, line.is_bulk)
        grouped = limits.length_grouping and not limits.padding_free
        items = self._dense_run(line, anchor) if grouped else self._fit(line.in_turn(most))
        batch = Batch(items, ClosedBy.IDLE, line.is_bulk)
        if len(items) >= most:
            batch.closed_by = ClosedBy.FULL
            return batch
        # One more text like the longest of it, or the next in line where that is what would have come.
        more = limits.work_tokens(len(items) + 1, batch.longest, batch.tokens + batch.longest)
        left_behind = limits.padding_free and line.texts > len(items)
        if more > limits.max_batch_tokens or left_behind:
            batch.closed_by = ClosedBy.TOKENS
        return batch

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

    def _dense_run(self, line: Line, anchor: Item) -> list[Item]:
        """The run of neighbours in length with the highest rate (see the module's docstring)."""
        queue, limits = line.by_length, self.limits
        at = line.position(anchor)
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
