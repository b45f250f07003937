"""Whose turn it is among the texts of one priority that wait: by caller first, then by request. Pure.

Among callers: start-time fair queueing (Goyal et al. 1996). Each caller has a virtual time, which grows with the tokens
that are computed for him; the one who is furthest behind goes next. Who comes back after a pause begins where the line
stands: nobody saves up turns, and nobody pays for what he got while no other wanted it. A portion of a request that has
begun is finished first: otherwise many callers who come at once would all be served at the same time, each of them
slowly.

Among the requests of one caller: first come, first served, in portions of at most a batch. A later portion is tagged as
if it had arrived when another batch's worth of the caller's tokens had. So a request of one text does not wait for the
end of one of a thousand, which does go on however many small ones come.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Places = int | list[int]
"""Where in a request a row goes; several where texts of the request are equal."""


def count_of(places: Places) -> int:
    return 1 if isinstance(places, int) else len(places)


@dataclass(slots=True, eq=False)
class Item:
    """One text to compute. owner: the request that pays for it; the policy only asks whether two have the same.

    subscribers: all requests that are to get its row, each with the places where it goes; the first to come is first.
    caller, tag: in whose line it stands, and where.
    """

    owner: Any
    length: int
    enqueued_at: float
    payload: Any = None
    key: Any = None
    subscribers: dict[Any, Places] = field(default_factory=dict)
    caller: str = ""
    is_bulk: bool = False
    tag: float = 0.0
    seq: int = 0
    waiting: bool = False

    def add_place(self, subscriber: Any, place: int) -> None:
        places = self.subscribers[subscriber]
        if isinstance(places, int):
            self.subscribers[subscriber] = [places, place]
        else:
            places.append(place)


@dataclass(slots=True, eq=False)
class _CallersLine:
    """One caller's texts. time: his virtual time. portion: the tag of the one that is his next.

    is_new: nothing was computed for him since he came. arrivals: the tag of what comes next.
    """

    time: float
    seq: int
    served: int = 0
    is_new: bool = True
    portion: float = 0.0
    arrivals: float = 0.0
    turns: list[tuple[float, int, Item]] = field(default_factory=list)


class NextTurn(NamedTuple):
    """The text whose turn it is, by `tag` the next in that caller's line."""

    item: Item
    tag: float
    line: _CallersLine


class Line:
    """portion_tokens, portion_texts: a batch at most. in_portions: False leaves requests whole."""

    def __init__(self, *, is_bulk: bool, portion_tokens: int, portion_texts: int, in_portions: bool) -> None:
        self.is_bulk = is_bulk
        self.by_length: list[Item] = []
        self.tokens = 0
        self._in_portions = in_portions
        self.change_portions(portion_tokens, portion_texts)
        self._callers: dict[str, _CallersLine] = {}
        self._paused: dict[str, float] = {}  # callers with nothing in line who are ahead of `_time`
        self._time = 0.0
        self._seq = 0

    @property
    def texts(self) -> int:
        return len(self.by_length)

    def change_portions(self, tokens: int, texts: int) -> None:
        """For requests from now on; those in line keep their turns."""
        self._portion_tokens, self._portion_texts = tokens, texts

    def add(self, items: Sequence[Item], caller: str) -> None:
        """Put the texts of one request in line, in their order.

        One that waits already, for another request, is served at whatever turn comes first. So who shares a text never
        waits longer for it than he would alone.
        """
        if not items:
            return
        line = self._callers.get(caller) or self._open(caller)
        portion_tokens, portion_texts = self._portion_tokens, self._portion_texts
        by_length, is_bulk = self.by_length, self.is_bulk
        first = tag = line.arrivals
        placed = ahead = 0
        for item in items:
            if self._in_portions and (ahead >= portion_tokens or placed >= portion_texts):
                # One more, so that who comes next goes before a second portion.
                tag = first + max(ahead // portion_tokens, placed // portion_texts) * (portion_tokens + 1)
            if item.waiting and item.caller == caller and item.tag <= tag:
                continue
            self._seq = seq = self._seq + 1
            heapq.heappush(line.turns, (tag, seq, item))
            if not item.waiting:
                item.waiting = True
                item.caller = caller
                item.is_bulk = is_bulk
                item.tag = tag
                item.seq = seq
                bisect.insort(by_length, item, key=length_key)
                self.tokens += item.length
            elif item.caller == caller:
                item.tag = tag
            placed, ahead = placed + 1, ahead + item.length
        line.arrivals += ahead if ahead < portion_tokens else portion_tokens

    def _open(self, caller: str) -> _CallersLine:
        if len(self._paused) > 2 * len(self._callers) + 16:
            self._paused = {name: time for name, time in self._paused.items() if time > self._time}
        self._seq += 1
        line = self._callers[caller] = _CallersLine(max(self._paused.pop(caller, 0.0), self._time), self._seq)
        return line

    def remove(self, items: Sequence[Item]) -> None:
        """Those of them that wait do so no more."""
        for item in items:
            if item.waiting:
                item.waiting = False
                del self.by_length[self.position(item)]
                self.tokens -= item.length

    def position(self, item: Item) -> int:
        """Its place in `by_length`."""
        return bisect.bisect_left(self.by_length, length_key(item), key=length_key)

    def first(self) -> NextTurn | None:
        """Whose turn it is."""
        lines = self._in_order()
        if not lines:
            return None
        tag, _, item = lines[0].turns[0]
        return NextTurn(item, tag, lines[0])

    def in_turn(self, most: int) -> list[Item]:
        """The first `most` texts in line."""
        found: dict[int, Item] = {}
        for line in self._in_order():
            passed = []
            while line.turns and len(found) < most:
                passed.append(heapq.heappop(line.turns))
                item = passed[-1][2]
                if self._holds(item):
                    found[id(item)] = item
            for turn in passed:
                heapq.heappush(line.turns, turn)
        return list(found.values())

    def took(self, turn: NextTurn, items: Sequence[Item]) -> None:
        """A batch has taken them at that turn; they are removed."""
        turn.line.arrivals = max(turn.line.arrivals, turn.tag)
        active, tokens = len(self._callers), 0
        if active == 1:
            tokens = sum([item.length for item in items])
            turn.line.served += tokens
        else:
            for item in items:
                tokens += item.length
                if (line := self._callers.get(item.caller)) is not None:
                    line.served += item.length
        lines = self._in_order()
        for line in lines:
            tag = line.turns[0][0]
            if line.served and tag != line.portion:
                line.time, line.served, line.portion, line.is_new = line.time + line.served, 0, tag, False
        # An ideal server would have given each of the `active` callers an equal part of it.
        self._time = max(self._time + tokens / active, min((line.time for line in lines), default=0.0))
        if not lines:
            self._time = max(self._time, *self._paused.values(), 0.0)
            self._paused.clear()

    def _in_order(self) -> list[_CallersLine]:
        """The lines with a text in them; the first one's turn it is."""
        for caller, line in list(self._callers.items()):
            while line.turns and not self._holds(line.turns[0][2]):
                heapq.heappop(line.turns)
            if not line.turns:
                del self._callers[caller]
                if line.time + line.served > self._time:
                    self._paused[caller] = line.time + line.served
        return sorted(self._callers.values(), key=_turn)

    def _holds(self, item: Item) -> bool:
        return item.waiting and item.is_bulk == self.is_bulk


def _turn(line: _CallersLine) -> tuple[float, bool, int]:
    """Who comes anew goes before one who was served already and is no further."""
    return line.time, not line.is_new, line.seq


def length_key(item: Item) -> tuple[int, int]:
    return (item.length, item.seq)
