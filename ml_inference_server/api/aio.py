"""The client for programs with an event loop; the same as `Client`, awaited."""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from ml_inference_server.api.access import sent_metadata
from ml_inference_server.api.aio_stream import AsyncAnswerStream
from ml_inference_server.api.client import PARTS_IN_FLIGHT
from ml_inference_server.api.errors import ServerError, error_of_call
from ml_inference_server.api.operations import (
    CHANNEL_OPTIONS,
    Attempts,
    CallDetails,
    CutTexts,
    EmbedArguments,
    Operation,
    Overflow,
    Rank,
    RequestLimits,
    RetryBudget,
    ServerInfo,
    checked_count,
    checked_time_s,
    embed_operation,
    no_embeddings,
    rerank_operation,
    score_operation,
)
from ml_inference_server.api.stream_state import StreamAnswer, StreamOptions, StreamState
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc

Result = TypeVar("Result")


class AsyncClient:
    """`Client` for asyncio: the same arguments, results and errors. Belongs to the event loop that first uses it."""

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        timeout_s: float = 60.0,
        max_attempts: int = 5,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        api_key: str | None = None,
    ) -> None:
        self._target, self._credentials = target, credentials
        self._channel: grpc.aio.Channel | None = None
        self._timeout_s = checked_time_s("timeout_s", timeout_s)
        self._metadata = sent_metadata(metadata, api_key)
        self._max_attempts = checked_count("max_attempts", max_attempts)
        self._limits = RequestLimits()
        self._budget = RetryBudget()
        self._cut = CutTexts()

    async def embed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        input_type: str | None = None,
        truncate: bool = True,
        overflow: Overflow | None = None,
        dimensions: int | None = None,
        expect_space_id: str = "",
        timeout_s: float | None = None,
        on_reply: Callable[[CallDetails], None] | None = None,
    ) -> NDArray[np.float32]:
        """As `Client.embed`."""
        arguments = EmbedArguments(
            prompt_name=prompt_name,
            input_type=input_type,
            truncate=truncate,
            overflow=overflow,
            dimensions=dimensions,
            expect_space_id=expect_space_id,
        )
        operation = embed_operation(texts, arguments)
        if not operation.items:
            return no_embeddings(await self.info(timeout_s=timeout_s))
        return await self._run(operation, timeout_s, on_reply)

    async def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        truncate: bool = True,
        timeout_s: float | None = None,
        on_reply: Callable[[CallDetails], None] | None = None,
    ) -> NDArray[np.float32]:
        """As `Client.score`."""
        operation = score_operation(pairs, truncate)
        return await self._run(operation, timeout_s, on_reply) if operation.items else np.empty(0, np.float32)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int = 0,
        truncate: bool = True,
        timeout_s: float | None = None,
        on_reply: Callable[[CallDetails], None] | None = None,
    ) -> list[Rank]:
        """As `Client.rerank`."""
        operation = rerank_operation(query, documents, top_k, truncate)
        return await self._run(operation, timeout_s, on_reply) if operation.items else []

    async def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What runs there."""
        limit_s = self._timeout_s if timeout_s is None else checked_time_s("timeout_s", timeout_s)
        attempts = Attempts(time.monotonic() + limit_s, self._max_attempts, self._budget)
        return ServerInfo.of((await self._ask("GetServerInfo", pb.GetServerInfoRequest(), attempts))[0])

    def stream(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        prompt_name: str | None = None,
        input_type: str | None = None,
        truncate: bool = True,
        overflow: Overflow | None = None,
        dimensions: int | None = None,
        expect_space_id: str = "",
        max_in_flight: int = 32,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[StreamAnswer, None]:
        """As `Client.stream`; `items` may be asynchronous, and must be where waiting for the next one takes time.

        Whoever leaves the loop early closes the generator: `async with contextlib.aclosing(client.stream(...))`.
        """
        arguments = EmbedArguments(
            prompt_name=prompt_name,
            input_type=input_type,
            truncate=truncate,
            overflow=overflow,
            dimensions=dimensions,
            expect_space_id=expect_space_id,
        )
        options = StreamOptions(
            arguments,
            checked_count("max_in_flight", max_in_flight),
            self._max_attempts,
            self._timeout_s if timeout_s is None else checked_time_s("timeout_s", timeout_s),
        )
        return self._stream(items, options)

    async def _stream(
        self, items: Iterable[Any] | AsyncIterable[Any], options: StreamOptions
    ) -> AsyncGenerator[StreamAnswer, None]:
        def connect() -> Any:
            return self._stub.EmbedStream(metadata=self._metadata)

        async def limits() -> RequestLimits:
            return RequestLimits.of(await self.info())

        async with AsyncAnswerStream(items, StreamState(options), connect, limits) as answers:
            while (answer := await answers.next_answer()) is not None:
                yield answer

    async def close(self) -> None:
        """End all calls."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @functools.cached_property
    def _stub(self) -> Any:
        """gRPC binds a channel to the event loop that runs when it is made, so that is not before the first call."""
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self._target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(self._target, self._credentials, options=CHANNEL_OPTIONS)
        return rpc.InferenceServiceStub(self._channel)

    async def _run(
        self, operation: Operation[Result], timeout_s: float | None, on_reply: Callable[[CallDetails], None] | None
    ) -> Result:
        """As `Client._run`."""
        limit_s = self._timeout_s if timeout_s is None else checked_time_s("timeout_s", timeout_s)
        ends_at = time.monotonic() + limit_s
        parts = operation.parts(self._limits)
        try:
            return await self._run_parts(operation, parts, ends_at, on_reply)
        except ServerError as error:
            if not error.is_about_size:
                raise
            self._limits = RequestLimits.of(await self.info(timeout_s=max(0.0, ends_at - time.monotonic())))
            smaller = operation.parts(self._limits)
            if smaller == parts:
                raise
        return await self._run_parts(operation, smaller, ends_at, on_reply)

    async def _run_parts(
        self,
        operation: Operation[Result],
        parts: Sequence[range],
        ends_at: float,
        on_reply: Callable[[CallDetails], None] | None,
    ) -> Result:
        free = asyncio.Semaphore(PARTS_IN_FLIGHT)

        async def ask(places: range) -> tuple[Any, CallDetails]:
            async with free:
                attempts = Attempts(ends_at, self._max_attempts, self._budget)
                try:
                    reply, request_id = await self._ask(operation.method, operation.part(places), attempts)
                except ServerError as error:
                    error.moved_by(places.start)
                    raise
            return reply, operation.details(reply, places, request_id)

        waiting = [asyncio.ensure_future(ask(places)) for places in parts]
        try:
            answers = await asyncio.gather(*waiting)
        finally:
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for _, details in answers:
            self._cut.note(details)
            if on_reply is not None:
                on_reply(details)
        return operation.join([reply for reply, _ in answers], parts)

    async def _ask(self, method: str, request: Any, attempts: Attempts) -> tuple[Any, str]:
        while True:
            call = getattr(self._stub, method)(request, timeout=attempts.remaining_s, metadata=self._metadata)
            try:
                reply = await call
            except grpc.aio.AioRpcError as error:
                failure = error_of_call(error)
                pause_s = attempts.pause_s(failure)
                if pause_s is None:
                    raise failure from error
                await asyncio.sleep(pause_s)
            else:
                trailers = dict(await call.trailing_metadata() or ())
                return reply, str(trailers.get("request-id", ""))
