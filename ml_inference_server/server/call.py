"""Who is asking: made where a request enters the server, and handed down to all that works for it."""

from typing import NamedTuple

from ml_inference_server.metrics.tracing import RequestTrace


class Call(NamedTuple):
    """Times are on the event loop's clock. traceparent: as the caller sent it, or empty.

    expect_space_id: which space its vectors must be of, as a header said it; empty: any. trace: the request's own span,
    where traces are sent. fresh: the model must run; no answer out of the cache will do. caller: who asks, for turns
    and limits: the name of its key, or where there are no keys the address that its connection comes from, without its
    port; empty: the server itself. priority: as a header said it.
    """

    request_id: str
    received_at: float
    deadline: float
    traceparent: str = ""
    expect_space_id: str = ""
    trace: RequestTrace | None = None
    fresh: bool = False
    caller: str = ""
    priority: str = ""
