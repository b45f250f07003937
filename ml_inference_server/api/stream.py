"""The threads of one `Client.stream`: one reads the items, one the answers, and gRPC's own writes the messages."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from ml_inference_server.api.errors import ServerError, UnavailableError, error_of_call
from ml_inference_server.api.operations import RequestLimits
from ml_inference_server.api.stream_state import StreamAnswer, StreamState, key_and_texts
from ml_inference_server.proto import inference_pb2 as pb


@dataclass(frozen=True)
class _Event:
    """What a connection brought: a response, or its end, with an error if there was one."""

    connection: Any
    response: pb.EmbedStreamResponse | None = None
    error: grpc.RpcError | None = None


class AnswerStream:
    """`connect` opens a connection that sends what it is given; `limits` asks the server for those of a request."""

    def __init__(
        self,
        items: Iterable[Any],
        state: StreamState,
        connect: Callable[[Iterator[pb.EmbedStreamRequest]], Any],
        limits: Callable[[], RequestLimits],
    ) -> None:
        self._items, self._state, self._connect, self._limits = items, state, connect, limits
        self._changed = threading.Condition()  # its lock is that of the state
        self._events: queue.SimpleQueue[_Event | None] = queue.SimpleQueue()  # None: look at the state
        self._connection: Any = None
        self._sender = 0  # counts connections: what was to send on an earlier one stops
        self._failure: BaseException | None = None
        self._is_closed = False

    def __enter__(self) -> "AnswerStream":
        threading.Thread(target=self._feed, name="client-items", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._connection is not None:
            self._connection.cancel()

    def next_answer(self) -> StreamAnswer | None:
        """None once everything is answered. Raises what reading the items raised after what came before it."""
        self._state.begin_to_wait()
        while True:
            with self._changed:
                self._changed.notify_all()
                if (refused := self._state.next_refused()) is not None:
                    return refused
                if self._state.is_done and self._connection is None:
                    break
                if self._connection is None and self._state.needs_connection:
                    self._open()
                patience_s = self._state.patience_s
            try:
                event = self._events.get(timeout=patience_s)
            except queue.Empty:
                if self._state.is_done:  # and the connection does not end by itself
                    break
                raise self._state.overdue() from None
            if event is None or event.connection is not self._connection:
                continue
            if event.response is None:
                self._ended(event.error)
                continue
            with self._changed:
                answer = self._state.answered(event.response)
                self._changed.notify_all()
            if answer is not None:
                return answer
        if self._failure is not None:
            raise self._failure
        return None

    def _open(self) -> None:
        self._sender += 1
        self._connection = self._connect(self._messages(self._sender))
        threading.Thread(target=self._read, args=(self._connection,), name="client-answers", daemon=True).start()

    def _ended(self, error: grpc.RpcError | None) -> None:
        """Return where the items in hand may go over another connection; wait first as long as it takes."""
        failure: ServerError = UnavailableError("the stream ended", code="UNAVAILABLE")
        if error is not None:
            failure = error_of_call(error)
        with self._changed:
            self._sender += 1
            self._connection = None
        if failure.is_about_size:
            message_bytes = self._limits().message_bytes
            with self._changed:
                if self._state.refuse_larger_than(message_bytes, failure):
                    failure = UnavailableError("the stream ended", code="UNAVAILABLE")
        with self._changed:
            try:
                pause_s = self._state.broke(failure)
            except ServerError:
                raise failure from error
        time.sleep(pause_s)

    def _feed(self) -> None:
        try:
            for number, item in enumerate(self._items):
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or self._state.has_room)
                    if self._is_closed:
                        return
                    self._state.add(*key_and_texts(number, item))
                    self._changed.notify_all()
                self._events.put(None)
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._state.is_complete = True
                self._changed.notify_all()
            self._events.put(None)

    def _read(self, connection: Any) -> None:
        try:
            for response in connection:
                self._events.put(_Event(connection, response))
        except grpc.RpcError as error:
            self._events.put(_Event(connection, error=error))
        else:
            self._events.put(_Event(connection))

    def _messages(self, sender: int) -> Iterator[pb.EmbedStreamRequest]:
        """What one connection sends; ends with it, or once everything is answered."""
        while True:
            with self._changed:
                while True:
                    if self._is_closed or self._sender != sender or self._state.is_done:
                        return
                    if (message := self._state.next_message()) is not None:
                        break
                    self._changed.wait(self._state.next_due_s)
            yield message
