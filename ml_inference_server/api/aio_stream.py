"""The tasks of one `AsyncClient.stream`: one reads the items, and of each connection one writes and one reads."""

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from ml_inference_server.api.errors import ServerError, UnavailableError, error_of_call
from ml_inference_server.api.operations import RequestLimits
from ml_inference_server.api.stream_state import StreamAnswer, StreamState, key_and_texts
from ml_inference_server.proto import inference_pb2 as pb


@dataclass(frozen=True)
class _AsyncEvent:
    """What a connection brought: a response, or its end, with an error if there was one."""

    connection: Any
    response: pb.EmbedStreamResponse | None = None
    error: grpc.aio.AioRpcError | None = None


class AsyncAnswerStream:
    """As `AnswerStream`."""

    def __init__(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        state: StreamState,
        connect: Callable[[], Any],
        limits: Callable[[], Awaitable[RequestLimits]],
    ) -> None:
        self._items, self._state, self._connect, self._limits = items, state, connect, limits
        self._changed = asyncio.Event()
        self._events: asyncio.Queue[_AsyncEvent | None] = asyncio.Queue()  # None: look at the state
        self._connection: Any = None
        self._tasks: list[asyncio.Task[None]] = []  # of the connection
        self._failure: BaseException | None = None

    async def __aenter__(self) -> "AsyncAnswerStream":
        self._feeding = asyncio.create_task(self._feed())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._feeding.cancel()
        await self._close()
        await asyncio.gather(self._feeding, return_exceptions=True)

    async def next_answer(self) -> StreamAnswer | None:
        """As `AnswerStream.next_answer`."""
        self._state.begin_to_wait()
        while True:
            self._changed.set()
            if (refused := self._state.next_refused()) is not None:
                return refused
            if self._state.is_done and self._connection is None:
                break
            if self._connection is None and self._state.needs_connection:
                self._connection = self._connect()
                self._tasks = [asyncio.create_task(run(self._connection)) for run in (self._send, self._read)]
            try:
                # What is there already is never late.
                event = (
                    await asyncio.wait_for(self._events.get(), self._state.patience_s)
                    if self._events.empty()
                    else self._events.get_nowait()
                )
            except TimeoutError:
                if self._state.is_done:  # and the connection does not end by itself
                    break
                raise self._state.overdue() from None
            if event is None or event.connection is not self._connection:
                continue
            if event.response is None:
                await self._ended(event.error)
            elif (answer := self._state.answered(event.response)) is not None:
                self._changed.set()
                return answer
        if self._failure is not None:
            raise self._failure
        return None

    async def _close(self) -> None:
        if self._connection is not None:
            self._connection.cancel()
            self._connection = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ended(self, error: grpc.aio.AioRpcError | None) -> None:
        """As of `AnswerStream`."""
        failure: ServerError = UnavailableError("the stream ended", code="UNAVAILABLE")
        if error is not None:
            failure = error_of_call(error)
        await self._close()
        if failure.is_about_size and self._state.refuse_larger_than((await self._limits()).message_bytes, failure):
            failure = UnavailableError("the stream ended", code="UNAVAILABLE")
        try:
            pause_s = self._state.broke(failure)
        except ServerError:
            raise failure from error
        await asyncio.sleep(pause_s)

    async def _feed(self) -> None:
        number = 0
        try:
            async for item in _each(self._items):
                while not self._state.has_room:
                    await self._change(None)
                self._state.add(*key_and_texts(number, item))
                self._changed.set()
                self._events.put_nowait(None)
                number += 1
        except Exception as error:
            self._failure = error
        finally:
            self._state.is_complete = True
            self._changed.set()
            self._events.put_nowait(None)

    async def _send(self, connection: Any) -> None:
        """Write what is due until everything is answered, or the connection ends: `_read` says so."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while not self._state.is_done:
                if (message := self._state.next_message()) is not None:
                    await connection.write(message)
                else:
                    await self._change(self._state.next_due_s)
            await connection.done_writing()

    async def _read(self, connection: Any) -> None:
        try:
            async for response in connection:
                self._events.put_nowait(_AsyncEvent(connection, response))
        except grpc.aio.AioRpcError as error:
            self._events.put_nowait(_AsyncEvent(connection, error=error))
        else:
            self._events.put_nowait(_AsyncEvent(connection))

    async def _change(self, timeout_s: float | None) -> None:
        """Until the state changes; each who waits looks at it again, and before the next one waits."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
