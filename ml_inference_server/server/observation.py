"""What is noted of each request, whatever its outcome: metrics, its span, a line in the log."""

import asyncio
import logging
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.call import Call
from ml_inference_server.server.status import status_of
from ml_inference_server.utils.errors import ServiceError
from ml_inference_server.utils.logging import log_event
from ml_inference_server.utils.stages import Stamps, spans

log = logging.getLogger(__name__)
M = TypeVar("M", covariant=True)


class Reply(NamedTuple, Generic[M]):
    """An answer to send, and what it answers: texts embedded or pairs scored, texts cut, and the stage timestamps.

    metadata: what gRPC sends before the answer.
    """

    message: M
    texts: int = 0
    pairs: int = 0
    truncated: int = 0
    stamps: Stamps | None = None
    metadata: tuple[tuple[str, str], ...] = ()


class Observation:
    """One request while it is answered, as a `with` block. Only a ServiceError or a cancellation leaves it.

    `call`: the request's own, with its span. Set `reply` once its answer is ready to be sent.
    """

    __slots__ = ("_metrics", "call", "method", "reply")

    def __init__(self, metrics: Metrics, method: str, call: Call) -> None:
        self._metrics = metrics
        self.method = method
        self.call = call
        self.reply: Reply[object] | None = None

    def __enter__(self) -> "Observation":
        self._metrics.request_started(self.method)
        if (tracer := self._metrics.tracer) is not None:
            call = self.call
            trace = tracer.start_request(self.method, call.request_id, call.traceparent, call.received_at)
            self.call = call._replace(trace=trace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended_at = asyncio.get_running_loop().time()
        if error is None:
            self._record("OK", "", ended_at)
        elif isinstance(error, asyncio.CancelledError):
            late = ended_at >= self.call.deadline
            code = "DEADLINE_EXCEEDED" if late else "CANCELLED"
            self._record(code, code, ended_at)
        else:
            answered_with = expected(error, self.method, self.call)
            self._record(status_of(answered_with).grpc, answered_with.reason, ended_at)
            if answered_with is not error:
                raise answered_with from error

    def _record(self, code: str, reason: str, ended_at: float) -> None:
        """Count the request that ended, end its span, and at DEBUG write its line. Its texts go nowhere."""
        call, reply = self.call, self.reply
        stamps = reply.stamps if reply is not None else None
        texts, pairs, truncated = (reply.texts, reply.pairs, reply.truncated) if reply is not None else (0, 0, 0)
        trace_id = call.trace.trace_id if call.trace is not None else ""
        self._metrics.request_finished(
            self.method,
            code,
            ended_at - call.received_at,
            texts=texts,
            pairs=pairs,
            truncated=truncated,
            stamps=stamps,
            reason=reason,
            request_id=call.request_id,
            trace_id=trace_id,
            caller=call.caller,
        )
        if call.trace is not None and self._metrics.tracer is not None:
            self._metrics.tracer.end_request(call.trace, code, stamps, ended_at, texts=texts, pairs=pairs)
        if log.isEnabledFor(logging.DEBUG):
            fields: dict[str, object] = {
                "request_id": call.request_id,
                "method": self.method,
                "code": code,
                "reason": reason,
                "duration_ms": round(1e3 * (ended_at - call.received_at), 3),
                "texts": texts,
                "pairs": pairs,
                "truncated": truncated,
            }
            for stage, begin, end in spans(stamps, ended_at) if stamps is not None else ():
                fields[f"{stage}_ms"] = round(1e3 * (end - begin), 3)
            if trace_id:
                fields["trace_id"] = trace_id
            log_event(log, logging.DEBUG, "request", fields)


def expected(error: BaseException, method: str, call: Call) -> ServiceError:
    """`error` where callers may see it; else it goes to the log, and they get one that says nothing of it."""
    if isinstance(error, ServiceError):
        return error
    log.error("request %s: unexpected error in %s", call.request_id, method, exc_info=error)
    return ServiceError(f"internal error (request_id={call.request_id})")
