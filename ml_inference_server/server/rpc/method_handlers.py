"""What every RPC has in common: decoding, request id, deadline, metrics, and the only way out with an error."""

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message

from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.metrics.table import STAGES
from ml_inference_server.metrics.tracing import CURRENT, RequestTrace, trace_id
from ml_inference_server.server.rpc.status import grpc_code, status_text, trailing_metadata
from ml_inference_server.server.service import Timing
from ml_inference_server.utils.errors import InvalidRequest, ServiceError
from ml_inference_server.utils.logging import log_event

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Call:
    """Copied from the gRPC context at entry: the context must not be touched once the call has ended."""

    request_id: str
    deadline: float
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A message to send, and what it answered: texts embedded or pairs scored, texts cut, and when it passed where."""

    message: Message
    texts: int = 0
    pairs: int = 0
    truncated: int = 0
    timing: Timing | None = None


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

        async def handle(raw: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
            call = self._call(context)
            body = b""

            async def answer() -> Reply:
                nonlocal body
                reply = await run(decoded(request, raw), call)
                body = reply.message.SerializeToString()
                return reply

            reply, error = await self.observe(method, call, answer, counted=counted)
            if reply is None:
                await refuse(context, error or ServiceError("internal error"), call.request_id)
            context.set_trailing_metadata((("request-id", call.request_id),))
            return body

        # Bytes in, bytes out: decoding and encoding are part of what is observed.
        return grpc.unary_unary_rpc_method_handler(handle)

    def stream(
        self,
        request: type[Message],
        run: Callable[[AsyncIterator[Any], Callable[[Message], Awaitable[None]], Call], Awaitable[None]],
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a bidirectional RPC; `run` reads, writes, and counts its own messages with `observe`."""

        async def handle(messages: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[Any, Any]") -> None:
            call = self._call(context)

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

    async def observe(
        self, method: str, call: Call, run: Callable[[], Awaitable[Reply]], *, counted: bool = True
    ) -> tuple[Reply | None, ServiceError | None]:
        """Run one request: its reply, or the error to answer with. Every outcome is counted."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        trace = RequestTrace(call.request_id)
        CURRENT.set(trace)
        if counted:
            self._metrics.request_started(method)
            if (tracer := self._metrics.tracer) is not None:
                caller = {"traceparent": call.traceparent}
                trace.span = tracer.start_request(method, call.request_id, caller, started_at)
        reply: Reply | None = None
        error: ServiceError | None = None
        code, reason = grpc.StatusCode.OK, ""
        try:
            reply = await run()
        except ServiceError as caught:
            error, code, reason = caught, grpc_code(caught), caught.reason
        except asyncio.CancelledError:
            late = loop.time() >= call.deadline
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            reason = code.name
            raise
        except Exception:
            log.exception("request %s: unexpected error in %s", call.request_id, method)
            error = ServiceError(f"internal error (request_id={call.request_id})")
            code, reason = grpc_code(error), error.reason
        finally:
            if counted:
                self._record(method, trace, code.name, reason, reply, started_at, loop.time())
        return reply, error

    def _record(
        self,
        method: str,
        trace: RequestTrace,
        code: str,
        reason: str,
        reply: Reply | None,
        started_at: float,
        ended_at: float,
    ) -> None:
        """Count one request that ended, end its span, and at DEBUG write its line. Its texts go nowhere."""
        timing = reply.timing if reply is not None else None
        stamps: tuple[float, ...] = ()
        if timing is not None:
            stamps = (
                started_at,
                timing.admitted_at,
                timing.enqueued_at,
                timing.last_started_at,
                timing.computed_at,
                timing.gathered_at,
                ended_at,
            )
        texts, pairs, truncated = (reply.texts, reply.pairs, reply.truncated) if reply is not None else (0, 0, 0)
        traced = trace_id(trace.span) if trace.span is not None else ""
        self._metrics.request_finished(
            method,
            code,
            ended_at - started_at,
            texts=texts,
            pairs=pairs,
            truncated=truncated,
            stamps=stamps,
            reason=reason,
            request_id=trace.request_id,
            trace_id=traced,
        )
        if trace.span is not None and self._metrics.tracer is not None:
            self._metrics.tracer.end_request(trace, code, stamps[:-1], ended_at, texts=texts, pairs=pairs)
        if log.isEnabledFor(logging.DEBUG):
            fields: dict[str, object] = {
                "request_id": trace.request_id,
                "method": method,
                "code": code,
                "reason": reason,
                "duration_ms": round(1e3 * (ended_at - started_at), 3),
                "texts": texts,
                "pairs": pairs,
                "truncated": truncated,
            }
            for stage, begin, end in zip(STAGES, stamps, stamps[1:], strict=False):
                fields[f"{stage}_ms"] = round(1e3 * (end - begin), 3)
            if traced:
                fields["trace_id"] = traced
            log_event(log, logging.DEBUG, "request", fields)

    def _call(self, context: "grpc.aio.ServicerContext[Any, Any]") -> Call:
        remaining_s = context.time_remaining()
        limit_s = self._default_timeout_s
        timeout_s = limit_s if remaining_s is None else min(remaining_s, limit_s)
        metadata = dict(context.invocation_metadata() or ())
        given, parent = metadata.get("x-request-id"), metadata.get("traceparent")
        if not isinstance(given, str) or not _REQUEST_ID.fullmatch(given):
            given = f"{self._prefix}-{next(self._ids)}"
        self.last_call_at = asyncio.get_running_loop().time()
        return Call(given, self.last_call_at + timeout_s, parent if isinstance(parent, str) else "")


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
    raise AssertionError("abort always raises")
