"""A receiver of OTLP over HTTP in the test's own process."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Receiver:
    """Every span that arrived, and the bytes that it came in."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Any] = []
        self.resource: dict[str, str] = {}
        self.raw = b""

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.raw += body
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = {one.key: one.value.string_value for one in of_resource.resource.attributes}
            for of_scope in of_resource.scope_spans:
                self.spans.extend(of_scope.spans)
        return web.Response(content_type="application/x-protobuf")

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def children(self, parent: Any) -> dict[str, Any]:
        of_parents: defaultdict[bytes, dict[str, Any]] = defaultdict(dict)
        for span in self.spans:
            of_parents[span.parent_span_id][span.name] = span
        return of_parents[parent.span_id]


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@asynccontextmanager
async def otlp_receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.receive)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()
