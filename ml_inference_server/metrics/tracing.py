"""OpenTelemetry spans of where the time of requests and batches went, where an endpoint is set.

A request is a span with one child for each of its stages. A batch is a trace of its own, with the engine inside,
because it belongs to all of its requests alike: it links to them, and their engine spans link to it.
"""

import importlib.util
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_inference_server import __version__
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.installation import pip_install
from ml_inference_server.utils.stages import Stamps, spans

SERVICE_NAME = "ml-inference-server"
CLOSE_TIMEOUT_S = 2.0


@dataclass(slots=True)
class RequestTrace:
    """The span of a request, and the contexts of the batches that its texts travelled in."""

    span: Any
    batches: list[Any] = field(default_factory=list)

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self.span.get_span_context().trace_id:032x}"


class Tracer:
    """Sends spans by OTLP over HTTP to `endpoint` (http://host:4318) from a thread of its own.

    Sampling and headers follow the OTEL_* environment variables of the SDK. ConfigError if OpenTelemetry is missing or
    the endpoint is no URL.
    """

    def __init__(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"metrics.otlp_endpoint {endpoint!r} is no URL: for instance http://localhost:4318")
        for package in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
            if not _is_installed(package):
                raise ConfigError(f"metrics.otlp_endpoint needs OpenTelemetry: {pip_install('tracing')}, or unset it")
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        name = os.environ.get("OTEL_SERVICE_NAME") or SERVICE_NAME
        resource = Resource.create({"service.name": name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/').removesuffix('/v1/traces')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE_NAME, __version__)

    def start_request(self, method: str, request_id: str, traceparent: str, received_at: float) -> RequestTrace:
        """traceparent: of the caller, which makes this span a child of the caller's; or empty."""
        span = self._tracer.start_span(
            method,
            context=self._propagator.extract({"traceparent": traceparent}),
            kind=self._api.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.method": method, "request.id": request_id},
            start_time=_epoch_ns(received_at),
        )
        return RequestTrace(span)

    def end_request(
        self, request: RequestTrace, code: str, stamps: Stamps | None, ended_at: float, **attributes: int
    ) -> None:
        """stamps: None if the request was not answered."""
        span = request.span
        if span.is_recording():
            inside = self._api.set_span_in_context(span)
            for stage, begin, end in spans(stamps, ended_at) if stamps is not None else ():
                links = [self._api.Link(batch) for batch in request.batches] if stage == "engine" else []
                child = self._tracer.start_span(stage, context=inside, links=links, start_time=_epoch_ns(begin))
                child.end(_epoch_ns(end))
            span.set_attributes({"rpc.grpc.status": code, **attributes})
            if code != "OK":
                span.set_status(self._api.StatusCode.ERROR, code)
        span.end(_epoch_ns(ended_at))

    def batch(
        self,
        requests: Sequence[RequestTrace | None],
        *,
        dispatched_at: float,
        started_at: float,
        ended_at: float,
        ok: bool,
        **attributes: str | int,
    ) -> None:
        """One batch: dispatched, then run by the model from `started_at` to `ended_at`. requests: one for each text."""
        members = {id(request): request for request in requests if request is not None}
        links = [self._api.Link(request.span.get_span_context()) for request in members.values()]
        nothing_above = self._api.set_span_in_context(self._api.INVALID_SPAN)
        span = self._tracer.start_span(
            "batch", context=nothing_above, links=links, attributes=attributes, start_time=_epoch_ns(dispatched_at)
        )
        inside = self._api.set_span_in_context(span)
        self._tracer.start_span("engine", context=inside, start_time=_epoch_ns(started_at)).end(_epoch_ns(ended_at))
        if not ok:
            span.set_status(self._api.StatusCode.ERROR, "the model raised")
        span.end(_epoch_ns(ended_at))
        for request in members.values():
            request.batches.append(span.get_span_context())

    def close(self) -> None:
        """Send what is still here; gives up after CLOSE_TIMEOUT_S, when nobody listens at the endpoint for instance."""
        # The SDK's own timeout does not end a try to connect.
        sending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        sending.start()
        sending.join(CLOSE_TIMEOUT_S)


def _epoch_ns(monotonic_s: float) -> int:
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # one of its parents is missing
        return False
