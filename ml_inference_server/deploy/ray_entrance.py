"""Where the calls of Ray Serve's proxy enter a replica: the handlers of the server's own wire, without a port."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc

from ml_inference_server.deploy.ray_proxy import PATHS, REPLICA, Sent
from ml_inference_server.door.rights import ANY_KEY, OPEN
from ml_inference_server.metrics.view import View
from ml_inference_server.server.entrance import Foyer
from ml_inference_server.server.rpc.doorkeeper import NEEDS
from ml_inference_server.server.rpc.grpc_server import RpcHealth
from ml_inference_server.server.rpc.library import health_handlers
from ml_inference_server.server.rpc.method_handlers import MethodHandlers, refuse
from ml_inference_server.server.rpc.native import NativeServicer
from ml_inference_server.utils.errors import InvalidRequest, ServiceError

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(slots=True)
class CallEnd:
    """How a call ended. code: None where it went well."""

    body: bytes = b""
    code: grpc.StatusCode | None = None
    details: str = ""
    trailers: list[tuple[str, str | bytes]] = field(default_factory=list)


class _Aborted(Exception):
    """Leaves a handler that has refused its call."""


class _Context:
    """What our handlers ask of gRPC's context. A replica has no connection: what they send is kept in `outcome`."""

    def __init__(self, metadata: Metadata, peer: str, timeout_s: float | None) -> None:
        self._metadata, self._peer, self._timeout_s = metadata, peer, timeout_s
        self._callbacks: list[Callable[[Any], None]] = []
        self.outcome = CallEnd()

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> float | None:
        """As it was on arrival, when the handlers ask."""
        return self._timeout_s

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def set_trailing_metadata(self, trailers: Metadata) -> None:
        self.outcome.trailers = list(trailers)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        self.outcome = CallEnd(code=code, details=details, trailers=list(trailing_metadata))
        raise _Aborted

    def done(self) -> None:
        for callback in self._callbacks:
            callback(self)


class RayEntrance(RpcHealth):
    """The port is that of Ray's proxy; a replica has none."""

    port = 0

    def __init__(self, foyer: Foyer, view: View) -> None:
        native = NativeServicer(foyer.state, view, MethodHandlers(foyer.calls))
        super().__init__([native])
        self._door = foyer.door
        self._instance_id = foyer.state.instance_id
        self._most_bytes = foyer.state.settings.server.max_message_bytes
        services = [*native.handlers(), health_handlers(self.health)]
        self._handlers = {path: _handler(services, path) for path in PATHS}

    async def answer(self, sent: Sent, metadata: Metadata, peer: str) -> CallEnd:
        """Whatever befalls the call but a cancellation."""
        context: Any = _Context(metadata, peer, sent.timeout_s)
        try:
            if (refusal := self._refusal(sent, metadata)) is not None:
                await refuse(context, refusal)
            context.outcome.body = await self._handlers[sent.path](sent.body, context)
        except _Aborted:
            pass
        finally:
            context.done()
        outcome: CallEnd = context.outcome
        outcome.trailers.append((REPLICA, self._instance_id))
        return outcome

    def _refusal(self, sent: Sent, metadata: Metadata) -> ServiceError | None:
        needs = NEEDS.get(sent.path, ANY_KEY)
        try:
            if self._door is not None and needs != OPEN:
                self._door.check([value for name, value in metadata if name == "authorization"], needs)
        except ServiceError as error:
            return error
        if len(sent.body) > self._most_bytes:
            return InvalidRequest(
                f"the request has {len(sent.body)} bytes, the limit is {self._most_bytes} (server.max_message_bytes): "
                f"split it",
                reason="TOO_MANY_TEXTS",
            )
        return None


@dataclass(frozen=True, slots=True)
class _Details:
    """Of a call, as gRPC looks its handler up."""

    method: str
    invocation_metadata: tuple[()] = ()


def _handler(services: Sequence[grpc.GenericRpcHandler], path: str) -> Callable[[bytes, Any], Any]:
    details: Any = _Details(path)
    found: Any = next(handler for service in services if (handler := service.service(details)) is not None)
    encoded = found.response_serializer

    async def run(raw: bytes, context: Any) -> bytes:
        answer = await found.unary_unary(raw, context)
        return answer if encoded is None else encoded(answer)  # type: ignore[no-any-return]

    return run


@contextlib.asynccontextmanager
async def open_ray_entrance(foyer: Foyer, view: View) -> AsyncIterator[RayEntrance]:
    """When it is left Ray has let the last call end; the state says so to streams of the sidecar."""
    try:
        yield RayEntrance(foyer, view)
    finally:
        foyer.state.draining.set()
