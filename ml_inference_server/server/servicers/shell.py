"""What every RPC has in common: decoding, request id, deadline, metrics, and the only way out with an error."""

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.status import grpc_code, status_text, trailing_metadata
from ml_inference_server.utils.errors import InvalidRequest, ServiceError

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Call:
    """Copied from the gRPC context at entry: the context must not be touched once the call has ended."""

    request_id: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Reply:
    """A message to send, and what it answered: texts embedded or pairs scored."""

    message: Message
    texts: int = 0
    pairs: int = 0


class _Malformed:
    """Stands for a request that could not be decoded, so that the shell can answer it."""


class Shell:
    """Wraps the methods of a servicer. `prefix` makes generated request ids unique among processes."""

    def __init__(self, metrics: Metrics, *, default_timeout_s: float, prefix: str) -> None:
        self._metrics = metrics
        self._default_timeout_s = default_timeout_s
        self._prefix = prefix
        self._ids = itertools.count(1)
        self.last_call_at = 0.0  # on the event loop's clock

    def unary(
        self, method: str, request: type[Message], run: Callable[[Any, Call], Awaitable[Reply]], *, counted: bool = True
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a unary RPC that `run` answers. Questions about the server are not `counted` as work."""

        async def handle(message: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Message:
            call = self._call(context)
            reply, error = await self.observe(method, call, lambda: run(_decoded(message), call), counted=counted)
            if reply is None:
                await _refuse(context, error or ServiceError("internal error"), call.request_id)
                raise AssertionError("abort always raises")
            context.set_trailing_metadata((("request-id", call.request_id),))
            return reply.message

        return grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request),
            response_serializer=lambda answer: answer.SerializeToString(),
        )

    def stream(
        self,
        request: type[Message],
        run: Callable[[AsyncIterator[Any], Callable[[Message], Awaitable[None]], Call], Awaitable[None]],
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a bidirectional RPC; `run` reads, writes, and counts its own messages with `observe`."""

        async def handle(messages: AsyncIterator[Any], context: "grpc.aio.ServicerContext[Any, Any]") -> None:
            call = self._call(context)

            async def decoded() -> AsyncIterator[Any]:
                async for message in messages:
                    yield _decoded(message)

            try:
                await run(decoded(), context.write, call)
            except ServiceError as error:
                await _refuse(context, error, call.request_id)

        return grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request),
            response_serializer=lambda answer: answer.SerializeToString(),
        )

    async def observe(
        self, method: str, call: Call, run: Callable[[], Awaitable[Reply]], *, counted: bool = True
    ) -> tuple[Reply | None, ServiceError | None]:
        """Run one request: its reply, or the error to answer with. Every outcome is counted."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        if counted:
            self._metrics.request_started(method)
        reply: Reply | None = None
        error: ServiceError | None = None
        code = grpc.StatusCode.OK
        try:
            reply = await run()
        except ServiceError as caught:
            error, code = caught, grpc_code(caught)
        except asyncio.CancelledError:
            late = loop.time() >= call.deadline
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except Exception:
            log.exception("request %s: unexpected error in %s", call.request_id, method)
            error = ServiceError(f"internal error (request_id={call.request_id})")
            code = grpc_code(error)
        finally:
            if counted:
                texts, pairs = (reply.texts, reply.pairs) if reply else (0, 0)
                self._metrics.request_finished(method, code.name, loop.time() - started_at, texts=texts, pairs=pairs)
        return reply, error

    def _call(self, context: "grpc.aio.ServicerContext[Any, Any]") -> Call:
        remaining_s = context.time_remaining()
        limit_s = self._default_timeout_s
        timeout_s = limit_s if remaining_s is None else min(remaining_s, limit_s)
        given = next((v for k, v in context.invocation_metadata() or () if k == "x-request-id"), None)
        if not isinstance(given, str) or not _REQUEST_ID.fullmatch(given):
            given = f"{self._prefix}-{next(self._ids)}"
        self.last_call_at = asyncio.get_running_loop().time()
        return Call(given, self.last_call_at + timeout_s)


def _deserializer(request: type[Message]) -> Callable[[bytes], Message | _Malformed]:
    def deserialize(raw: bytes) -> Message | _Malformed:
        try:
            return request.FromString(raw)
        except (DecodeError, UnicodeDecodeError):
            return _Malformed()

    return deserialize


def _decoded(message: Any) -> Any:
    if isinstance(message, _Malformed):
        text = "the request could not be decoded: not a valid message of this method, or text that is not UTF-8"
        raise InvalidRequest(text, reason="MALFORMED_REQUEST")
    return message


async def _refuse(context: "grpc.aio.ServicerContext[Any, Any]", error: ServiceError, request_id: str) -> None:
    """abort, and nothing else: only a reply without message and initial metadata is retried by stock clients."""
    await context.abort(grpc_code(error), status_text(error), trailing_metadata(error, request_id))
