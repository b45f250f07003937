"""A stream that outlives its connection: what was sent and not answered, and what is to be sent again."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.api.errors import ServerError, error_of_item
from ml_inference_server.api.operations import Pauses, checked_texts, embed_request, matrix
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
    key: Any
    request: pb.EmbedRequest
    tries: int = 0


class StreamState:
    """What of a stream is not answered yet. No thread and no channel; whoever drives it has the lock."""

    def __init__(self, prompt_name: str | None, truncate: bool, max_attempts: int) -> None:
        self._prompt_name, self._truncate, self._most = prompt_name, truncate, max_attempts
        self._items: dict[int, _Item] = {}
        self._unsent: dict[int, float] = {}  # id -> when it is due, on time.monotonic's clock
        self._ids = itertools.count(1)
        self._failures = 0
        self._pauses = Pauses()
        self.is_complete = False  # no further item will be added

    def add(self, key: Any, texts: Sequence[str]) -> None:
        number = next(self._ids)
        self._items[number] = _Item(
            key, embed_request(checked_texts("texts", texts), self._prompt_name, self._truncate)
        )
        self._unsent[number] = 0.0

    @property
    def in_hand(self) -> int:
        return len(self._items)

    @property
    def is_done(self) -> bool:
        return self.is_complete and not self._items

    def next_message(self) -> pb.EmbedStreamRequest | None:
        """What is to be sent now; None if nothing is due."""
        now = time.monotonic()
        for number, due_at in self._unsent.items():
            if due_at <= now:
                del self._unsent[number]
                self._items[number].tries += 1
                return pb.EmbedStreamRequest(id=number, request=self._items[number].request)
        return None

    @property
    def wait_s(self) -> float | None:
        """Until something is due again; None if nothing waits for its time."""
        return max(0.0, min(self._unsent.values()) - time.monotonic()) if self._unsent else None

    def answered(self, response: pb.EmbedStreamResponse) -> tuple[StreamAnswer | None, ServerError | None]:
        """(the item's answer, or None where it is sent again later or is not known; the item's error)."""
        item = self._items.get(response.id)
        if item is None:
            return None, None
        self._failures, self._pauses = 0, Pauses()
        if response.WhichOneof("outcome") == "error":
            error = error_of_item(response.error)
            if error.can_be_repeated and item.tries < self._most:
                self._unsent[response.id] = time.monotonic() + (error.retry_after_s or 0.0)
                return None, error
            del self._items[response.id]
            return StreamAnswer(item.key, None, error), error
        del self._items[response.id]
        reply = response.response
        return StreamAnswer(item.key, matrix(reply), truncated=reply.truncated), None

    def broke(self, error: ServerError) -> float:
        """The stream ended: what was not answered is to be sent again. How long to wait first; or raises."""
        self._failures += 1
        if not error.can_be_repeated or self._failures >= self._most:
            raise error
        self._unsent = dict.fromkeys(self._items, 0.0)
        for item in self._items.values():
            item.tries = min(item.tries, self._most - 1)
        return self._pauses.after(error)


def key_and_texts(number: int, item: Any) -> tuple[Any, Sequence[str]]:
    """A str or a list of str has its place in the stream for a key; a tuple (key, texts) brings one."""
    if isinstance(item, str):
        return number, [item]
    if isinstance(item, tuple) and len(item) == 2:
        key, texts = item
        return key, [texts] if isinstance(texts, str) else texts
    return number, item
