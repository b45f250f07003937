"""What every RPC has in common: decoding, its call, and the only way out with an error."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message

from ml_inference_server.server.call import Call
from ml_inference_server.server.calls import Calls
from ml_inference_server.server.observation import Observation, Reply, expected
from ml_inference_server.server.rpc.status import OWN_WIRE, RpcDialect, status_text, trailing_metadata
from ml_inference_server.server.rpc.streams import answer_in_order, collect
from ml_inference_server.utils.errors import DeadlinePassed, InvalidRequest, ServiceError

Metadata = tuple[tuple[str, str], ...]
Work = Callable[[Any, Call], Awaitable[Reply[Message]]]


class MethodHandlers:
    """Makes gRPC's handlers round the methods of a servicer, which speaks `dialect`."""

    def __init__(self, calls: Calls, dialect: RpcDialect = OWN_WIRE) -> None:
        self._calls = calls
        self._dialect = dialect

    def work(
        self, method: str, request: type[Message], run: Callable[[Any, Call], Awaitable[Reply[Message]]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a unary RPC that asks for work: `run` answers it, and it is counted."""

        async def observed(raw: bytes, call: Call) -> tuple[bytes, Metadata]:
            with self.observe(method, call) as request_:
                reply = await run(decoded(request, raw), request_.call)
                body = reply.message.SerializeToString()
                request_.reply = reply
            return body, reply.metadata

        return self._unary(observed)

    def question(
        self, method: str, request: type[Message], run: Callable[[Any], Message | Awaitable[Message]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a unary RPC that asks about the server: it is no work, and is not counted."""

        async def answered(raw: bytes, call: Call) -> tuple[bytes, Metadata]:
            try:
                found = run(decoded(request, raw))
                return (found if isinstance(found, Message) else await found).SerializeToString(), ()
            except Exception as error:
                raise expected(error, method, call) from error

        return self._unary(answered)

    def _unary(
        self, run: Callable[[bytes, Call], Awaitable[tuple[bytes, Metadata]]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Bytes in, bytes out: decoding and encoding are part of what is observed."""
        return grpc.unary_unary_rpc_method_handler(self._answering(run))

    def _answering(
        self, run: Callable[[Any, Call], Awaitable[tuple[bytes, Metadata]]]
    ) -> Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[bytes]]:
        """One answer to whatever the client sends."""

        async def handle(given: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
            call = self._call(context)
            try:
                body, metadata = await run(given, call)
            except ServiceError as error:
                await self._refuse(context, error, call)
            if metadata:
                await context.send_initial_metadata(metadata)
            context.set_trailing_metadata((("request-id", call.request_id),))
            return body

        return handle

    def collected(
        self, method: str, request: type[Message], run: Work, *, max_messages: int, max_bytes: int
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of an RPC that takes a stream and answers once: `run` gets the list of its messages.

        It is a request of its own from when the last message is in; its caller may take the usual time to send them.
        """

        async def observed(messages: AsyncIterator[bytes], call: Call) -> tuple[bytes, Metadata]:
            refusal: ServiceError | None = None
            found: list[Any] = []
            try:
                async with asyncio.timeout_at(call.deadline):
                    found = await collect(_each(request, messages), max_messages=max_messages, max_bytes=max_bytes)
            except TimeoutError:
                refusal = DeadlinePassed("the deadline passed before the last message was in")
            except ServiceError as error:
                refusal = error
            with self.observe(method, self.of_message(call)) as request_:
                if refusal is not None:
                    raise refusal
                reply = await run(found, request_.call)
                body = reply.message.SerializeToString()
                request_.reply = reply
            return body, reply.metadata

        return grpc.stream_unary_rpc_method_handler(self._answering(observed))

    def ordered(
        self, method: str, request: type[Message], run: Work, draining: asyncio.Event
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a bidirectional RPC that gives `run`'s answer to each message, in order; each is counted."""

        async def answer(message: Any, stream: Call) -> Message:
            with self.observe(method, self.of_message(stream)) as request_:
                request_.reply = reply = await run(message, request_.call)
            return reply.message

        async def answered(
            messages: AsyncIterator[Any], write: Callable[[Message], Awaitable[None]], call: Call
        ) -> None:
            await answer_in_order(messages, lambda message: answer(message, call), write, draining)

        return self.stream(request, answered)

    def stream(
        self,
        request: type[Message],
        run: Callable[[AsyncIterator[Any], Callable[[Message], Awaitable[None]], Call], Awaitable[None]],
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a bidirectional RPC; `run` reads, writes, and counts its own messages with `observe`.

        Its call has the caller's deadline or none: a stream may stay open for days. Each message gets one of its own.
        """

        async def handle(messages: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[Any, Any]") -> None:
            call = self._call(context, math.inf)

            async def write(message: Message) -> None:
                try:
                    await context.write(message)
                except grpc.aio.InternalError:  # the caller has left: gRPC's own cancellation comes a moment later
                    raise asyncio.CancelledError from None

            try:
                await run(_each(request, messages), write, call)
            except ServiceError as error:
                await self._refuse(context, error, call)

        return grpc.stream_stream_rpc_method_handler(
            handle, response_serializer=lambda answer: answer.SerializeToString()
        )

    def of_message(self, stream: Call) -> Call:
        """A message that has just come in on a stream, as a request of its own."""
        return self._calls.of_message(stream)

    def observe(self, method: str, call: Call) -> Observation:
        """One request that is counted under `method`."""
        return self._calls.observe(method, call)

    def _call(self, context: "grpc.aio.ServicerContext[Any, Any]", limit_s: float | None = None) -> Call:
        """Copied at entry: the context must not be touched once the call has ended."""
        untyped: Any = context  # the stubs know no function that could be a callback
        untyped.add_done_callback(self._calls.opened())
        metadata = dict(context.invocation_metadata() or ())
        return self._calls.begin(
            request_id=metadata.get("x-request-id"),
            traceparent=metadata.get("traceparent"),
            expect_space_id=metadata.get("x-expect-space-id"),
            priority=metadata.get("x-priority"),
            peer=context.peer(),
            timeout_s=context.time_remaining(),
            limit_s=limit_s,
        )

    async def _refuse(self, context: "grpc.aio.ServicerContext[Any, Any]", error: ServiceError, call: Call) -> NoReturn:
        await refuse(context, error, call.request_id, self._dialect)


async def _each(request: type[Message], messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for raw in messages:
        yield decoded(request, raw)


def decoded(request: type[Message], raw: bytes) -> Any:
    """The message; InvalidRequest if `raw` is none."""
    try:
        return request.FromString(raw)
    except (DecodeError, UnicodeDecodeError):
        text = "the request could not be decoded: not a valid message of this method, or text that is not UTF-8"
        raise InvalidRequest(text, reason="MALFORMED_REQUEST") from None


async def refuse(
    context: "grpc.aio.ServicerContext[Any, Any]",
    error: ServiceError,
    request_id: str = "",
    dialect: RpcDialect = OWN_WIRE,
) -> NoReturn:
    """abort, and nothing else: only a reply without message and initial metadata is retried by stock clients."""
    trailers = trailing_metadata(error, request_id, dialect)
    await context.abort(dialect.code(error), status_text(error, dialect), trailers)
