"""A stream that outlives its connection: what was sent and not answered, and what is to be sent again."""

import itertools
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.api.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ServerError,
    error_of_item,
    malformed_answer,
)
from ml_inference_server.api.operations import EmbedArguments, Pauses, checked_texts, matrix, matrix_problem, utf8_bytes
from ml_inference_server.proto import inference_pb2 as pb


class StreamAnswer:
    """The answer to one item of `stream`: `key` is the item's own. `embeddings` raises `error` where there is one."""

    __slots__ = ("_embeddings", "error", "key", "truncated")

    def __init__(
        self, key: Any, embeddings: NDArray[np.float32] | None, error: ServerError | None = None, truncated: int = 0
    ) -> None:
        self.key = key
        self.error = error
        self.truncated = truncated
        self._embeddings = embeddings

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """(texts, dimension) float32."""
        if self._embeddings is None:
            assert self.error is not None  # noqa: S101 - one of the two is there
            raise self.error
        return self._embeddings


@dataclass(slots=True)
class _Item:
    """failures: how often a server refused it, or answered others and ended when this one was waiting longest."""

    key: Any
    request: pb.EmbedRequest
    failures: int = 0


@dataclass(frozen=True)
class StreamOptions:
    """As `Client.stream` names them."""

    arguments: EmbedArguments
    max_in_flight: int
    max_attempts: int
    timeout_s: float


class StreamState:
    """What of a stream is not answered yet. No thread and no channel; whoever drives it has the lock."""

    def __init__(self, options: StreamOptions) -> None:
        self._options = options
        self._items: dict[int, _Item] = {}
        self._unsent: dict[int, float] = {}  # id -> when it is due, on time.monotonic's clock
        self._sent: set[int] = set()  # on the connection that is open
        self._has_answered = False  # that connection
        self._refused: deque[StreamAnswer] = deque()
        self._ids = itertools.count(1)
        self._pauses = Pauses()
        self._waiting_since = 0.0
        self.is_complete = False  # no further item will be added

    @property
    def has_room(self) -> bool:
        return self.in_hand < self._options.max_in_flight

    @property
    def in_hand(self) -> int:
        """Items that were read and whose answers the caller does not have."""
        return len(self._items) + len(self._refused)

    @property
    def is_done(self) -> bool:
        return self.is_complete and not self.in_hand

    @property
    def needs_connection(self) -> bool:
        return bool(self._items)

    def add(self, key: Any, texts: Sequence[str]) -> None:
        texts = checked_texts("texts", texts)
        if not self._items:
            self.begin_to_wait()
        try:
            for i, text in enumerate(texts):
                utf8_bytes(f"texts[{i}]", text)
        except InvalidRequestError as error:
            self._refused.append(StreamAnswer(key, None, error))
            return
        number = next(self._ids)
        self._items[number] = _Item(key, self._options.arguments.request(texts))
        self._unsent[number] = 0.0

    def next_refused(self) -> StreamAnswer | None:
        """The answer to an item that will not be sent, or not again."""
        return self._refused.popleft() if self._refused else None

    def next_message(self) -> pb.EmbedStreamRequest | None:
        """What is to be sent now; None if nothing is due."""
        now = time.monotonic()
        for number, due_at in self._unsent.items():
            if due_at <= now:
                del self._unsent[number]
                self._sent.add(number)
                return pb.EmbedStreamRequest(id=number, request=self._items[number].request)
        return None

    @property
    def next_due_s(self) -> float | None:
        """Until something is due again; None if nothing waits for its time."""
        return max(0.0, min(self._unsent.values()) - time.monotonic()) if self._unsent else None

    def begin_to_wait(self) -> None:
        """The time for the next answer begins: what the caller does between two answers does not count."""
        self._waiting_since = time.monotonic()

    @property
    def patience_s(self) -> float | None:
        """How long the next answer may take; None while nothing was asked."""
        if not self._items and not self.is_complete:
            return None
        return max(0.0, self._waiting_since + self._options.timeout_s - time.monotonic())

    def overdue(self) -> DeadlineExceededError:
        problem = f"no answer came for {self._options.timeout_s:g} s to any of {len(self._items)} items"
        return DeadlineExceededError(problem, code="DEADLINE_EXCEEDED")

    def answered(self, response: pb.EmbedStreamResponse) -> StreamAnswer | None:
        """The item's answer; None where it is sent again later, or where nobody asked."""
        if response.id not in self._sent:
            return None
        self._sent.discard(response.id)
        self._has_answered, self._pauses = True, Pauses()
        self.begin_to_wait()
        item = self._items[response.id]
        if response.WhichOneof("outcome") == "error":
            error = error_of_item(response.error)
            item.failures += 1
            if item.failures < self._options.max_attempts and self._is_worth_waiting_for(error):
                wait_s = (error.retry_after_s or 0.0) * random.uniform(1, 1.2)  # noqa: S311 - no secret
                self._unsent[response.id] = time.monotonic() + wait_s
                return None
            del self._items[response.id]
            return StreamAnswer(item.key, None, error)
        del self._items[response.id]
        reply = response.response
        if problem := matrix_problem(reply, len(item.request.texts)):
            return StreamAnswer(item.key, None, malformed_answer(problem))
        return StreamAnswer(item.key, matrix(reply), truncated=reply.truncated)

    def _is_worth_waiting_for(self, error: ServerError) -> bool:
        """On a stream a server names a time for all that it may do later."""
        return error.can_be_repeated and 0 < (error.retry_after_s or 0.0) < self._options.timeout_s

    def broke(self, error: ServerError) -> float:
        """The connection ended: what was not answered is to be sent again. How long to wait first; or raises."""
        oldest = next((number for number in self._items if number in self._sent), None)
        self._unsent = {number: self._unsent.get(number, 0.0) for number in self._items}  # the oldest first
        self._sent, had_answered, self._has_answered = set(), self._has_answered, False
        if not self._items:  # it was idle; the next item opens another one
            return 0.0
        if self._options.max_attempts == 1 or not (error.is_lost_connection or error.can_be_repeated):
            raise error
        pause_s = self._pauses.after(error)
        if pause_s >= (self.patience_s or 0.0):
            raise error
        if oldest is not None and had_answered:  # servers that answer others and end before this one: because of it?
            self._items[oldest].failures += 1
            if self._items[oldest].failures >= self._options.max_attempts:
                self._refuse(oldest, error)
        return pause_s

    def refuse_larger_than(self, message_bytes: int, error: ServerError) -> bool:
        """Whether there are such items: a server ends the whole stream at a message above its limit."""
        large = [number for number, item in self._items.items() if item.request.ByteSize() + _ID_BYTES > message_bytes]
        for number in large:
            self._refuse(number, error)
        return bool(large)

    def _refuse(self, number: int, error: ServerError) -> None:
        self._refused.append(StreamAnswer(self._items.pop(number).key, None, error))
        self._unsent.pop(number, None)
        self._sent.discard(number)


# Round the request of a message: the id, two tags and a length.
_ID_BYTES = 20


def key_and_texts(number: int, item: Any) -> tuple[Any, Sequence[str]]:
    """A str or a list of str has its place in the stream for a key; a tuple (key, texts) brings one."""
    if isinstance(item, str):
        return number, [item]
    if isinstance(item, tuple) and len(item) == 2:
        key, texts = item
        return key, [texts] if isinstance(texts, str) else texts
    return number, item
