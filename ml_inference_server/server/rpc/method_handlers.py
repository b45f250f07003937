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
from ml_inference_server.server.rpc.status import grpc_code, status_text, trailing_metadata
from ml_inference_server.utils.errors import InvalidRequest, ServiceError


class MethodHandlers:
    """Makes gRPC's handlers round the methods of a servicer."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def work(
        self, method: str, request: type[Message], run: Callable[[Any, Call], Awaitable[Reply[Message]]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a unary RPC that asks for work: `run` answers it, and it is counted."""

        async def observed(raw: bytes, call: Call) -> bytes:
            with self.observe(method, call) as request_:
                reply = await run(decoded(request, raw), request_.call)
                body = reply.message.SerializeToString()
                request_.reply = reply
            return body

        return self._unary(observed)

    def question(
        self, method: str, request: type[Message], run: Callable[[Any], Message]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a unary RPC that asks about the server: it is no work, and is not counted."""

        async def answered(raw: bytes, call: Call) -> bytes:
            try:
                return run(decoded(request, raw)).SerializeToString()
            except Exception as error:
                raise expected(error, method, call) from error

        return self._unary(answered)

    def _unary(self, run: Callable[[bytes, Call], Awaitable[bytes]]) -> "grpc.RpcMethodHandler[Any, Any]":
        """Bytes in, bytes out: decoding and encoding are part of what is observed."""

        async def handle(raw: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
            call = self._call(context)
            try:
                body = await run(raw, call)
            except ServiceError as error:
                await refuse(context, error, call.request_id)
            context.set_trailing_metadata((("request-id", call.request_id),))
            return body

        return grpc.unary_unary_rpc_method_handler(handle)

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

            async def each() -> AsyncIterator[Any]:
                async for raw in messages:
                    yield decoded(request, raw)

            async def write(message: Message) -> None:
                try:
                    await context.write(message)
                except grpc.aio.InternalError:  # the caller has left: gRPC's own cancellation comes a moment later
                    raise asyncio.CancelledError from None

            try:
                await run(each(), write, call)
            except ServiceError as error:
                await refuse(context, error, call.request_id)

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
        metadata = dict(context.invocation_metadata() or ())
        return self._calls.begin(
            request_id=metadata.get("x-request-id"),
            traceparent=metadata.get("traceparent"),
            expect_space_id=metadata.get("x-expect-space-id"),
            timeout_s=context.time_remaining(),
            limit_s=limit_s,
        )


def decoded(request: type[Message], raw: bytes) -> Any:
    """The message; InvalidRequest if `raw` is none."""
    try:
        return request.FromString(raw)
    except (DecodeError, UnicodeDecodeError):
        text = "the request could not be decoded: not a valid message of this method, or text that is not UTF-8"
        raise InvalidRequest(text, reason="MALFORMED_REQUEST") from None


async def refuse(context: "grpc.aio.ServicerContext[Any, Any]", error: ServiceError, request_id: str = "") -> NoReturn:
    """abort, and nothing else: only a reply without message and initial metadata is retried by stock clients."""
    await context.abort(grpc_code(error), status_text(error), trailing_metadata(error, request_id))
