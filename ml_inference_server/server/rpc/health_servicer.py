"""grpc.health.v1: who asks gets the health now, who watches gets each change.

gRPC's own servicer for asyncio (grpcio-health-checking 1.81) tells a watcher nothing more once another one has left,
and holds a lock while it writes: a watcher that does not read would stop the health of all, and the stop of the server.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer:
    """The status of each service by its name; "" is the server. A service that was never set is not known."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()

    def set(self, statuses: dict[str, int]) -> None:
        """Of these services from now on; every watcher hears of it."""
        self._statuses |= statuses
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        """NOT_FOUND for a service that is not known, as the protocol has it."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name is known here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """Until the watcher leaves. One that reads slowly gets the newest status then, not all that were before."""
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await changed.wait()
