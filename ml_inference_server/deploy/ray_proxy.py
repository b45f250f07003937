"""What runs in Ray Serve's gRPC proxy: which methods there are, and how a call ends that Ray has an error for.

Ray's proxy replaces the handlers that are registered with it by its own, which hand a call to a replica. It knows no
deadline, answers what befalls a replica with INTERNAL and a stack trace, and sends an empty message with every error,
which forbids a client to repeat the call by its retry policy. So the handlers here stand round Ray's: they pass the
bytes of a request with its deadline, and end a call that failed by its status alone, with details and hints.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health

from ml_inference_server.server.rpc.method_handlers import refuse
from ml_inference_server.server.rpc.native import SERVICE
from ml_inference_server.utils.errors import (
    DeadlinePassed,
    ModelNotFound,
    Overloaded,
    ServiceError,
    Unavailable,
)

METHODS = ("Embed", "Score", "Rerank", "GetMetrics", "GetServerInfo")
CHECK = f"/{health.SERVICE_NAME}/Check"
PATHS = (*(f"/{SERVICE}/{name}" for name in METHODS), CHECK)
REFUSED = {
    f"/{SERVICE}/EmbedStream": "a stream would stay with one replica, whatever comes and goes: behind Ray Serve call "
    "Embed, several calls at a time",
    f"/{health.SERVICE_NAME}/Watch": "behind Ray Serve health is a replica's own, and replicas come and go: call Check",
}
RETRY_AFTER_MS = 1000
# Trailing metadata of every answer of a replica: its instance id, as GetServerInfo tells it.
REPLICA = "replica"


class Sent(NamedTuple):
    """A request on its way to a replica. timeout_s: what is left of the caller's deadline; None: he has none."""

    path: str
    body: bytes
    timeout_s: float | None


def add_inference_service(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`. servicer: Ray's stand-in, which is never asked."""
    for service in (SERVICE, health.SERVICE_NAME):
        server.add_generic_rpc_handlers((_Service(service),))


class _Service(grpc.GenericRpcHandler):
    """Ray puts its own handlers into `_method_handlers`, under the same paths."""

    def __init__(self, service: str) -> None:
        self._method_handlers: dict[str, Any] = {
            path: grpc.unary_unary_rpc_method_handler(_not_yet) for path in PATHS if path.startswith(f"/{service}/")
        }
        self._refused = {path: why for path, why in REFUSED.items() if path.startswith(f"/{service}/")}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        path = handler_call_details.method
        if (why := self._refused.get(path)) is not None:
            return _refusing(why)
        handler = self._method_handlers.get(path)
        return handler and grpc.unary_unary_rpc_method_handler(_ending_well(path, handler.unary_unary))


def _ending_well(
    path: str, routed: Callable[[Sent, Any], Awaitable[bytes]]
) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def handle(raw: bytes, context: Any) -> bytes:
        body = await routed(Sent(path, raw, context.time_remaining()), context)
        if code := _code(context):
            await _end(context, code)
        return body

    return handle


def _code(context: Any) -> grpc.StatusCode | None:
    """None: all is well."""
    code = context.code()
    if isinstance(code, int):  # as grpc.aio keeps it
        code = next((each for each in grpc.StatusCode if each.value[0] == code), grpc.StatusCode.UNKNOWN)
    return None if code in (None, grpc.StatusCode.OK) else code


async def _end(context: Any, code: grpc.StatusCode) -> None:
    """Raises: a replica's own error as it is, one of Ray's in the words of this server."""
    trailers = tuple(context.trailing_metadata() or ())
    if any(name == REPLICA for name, _ in trailers):
        await context.abort(code, context.details(), trailers)
    error = error_of_ray(code)
    if error is not None:
        request_id = next((str(value) for name, value in trailers if name == "request_id"), "")
        await refuse(context, error, request_id)
    await context.abort(code, "")


def error_of_ray(code: grpc.StatusCode) -> ServiceError | None:
    """What Ray's proxy means by a status that no replica has set; None: the caller has left."""
    wait = f"retry in {RETRY_AFTER_MS} ms"
    if code is grpc.StatusCode.CANCELLED:
        return None
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(f"Ray Serve's queue for this deployment is full; {wait}", retry_after_ms=RETRY_AFTER_MS)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlinePassed("no replica answered within request_timeout_s of Ray Serve's gRPC options")
    if code is grpc.StatusCode.NOT_FOUND:
        return ModelNotFound(
            "no application of that name runs here: it is starting, or where several run the metadata `application` "
            "has to name one",
            reason="APPLICATION_NOT_FOUND",
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"no replica of this deployment runs: its log says why; {wait}", reason="NO_REPLICA")
    # Ray's INTERNAL: the replica ended with the call, or its node did. An answer is a function of its request.
    return Unavailable(f"the replica that worked on the request is lost; {wait}", reason="REPLICA_LOST")


def _refusing(why: str) -> Any:
    """Of a call of any kind: on the wire all are streams."""

    async def end(_: AsyncIterator[bytes], context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)

    return grpc.stream_stream_rpc_method_handler(end)


async def _not_yet(request: bytes, context: Any) -> bytes:
    """Stands where Ray puts its own handler."""
    raise NotImplementedError("this service is for Ray Serve's gRPC proxy, which brings the handlers")
