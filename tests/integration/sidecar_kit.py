"""A real sidecar on a free port, with answers that the test decides."""

import asyncio
from typing import Any

from ml_inference_server.metrics.http_server import Sidecar
from ml_inference_server.metrics.live import Live
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.utils.config import MetricsSettings

GUARD_S = 10
DATA_PATHS = (
    "/metrics", "/metrics/prometheus", "/info", "/healthz", "/readyz", "/api/v1/live", "/api/v1/history",
)  # fmt: skip
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(1)</script>'


class Server:
    """A sidecar whose answers the test decides."""

    def __init__(self, **settings: Any) -> None:
        self.info: dict[str, Any] = {"title": HOSTILE}
        self.ready: tuple[bool, str] = (True, "serving")
        self.alive: tuple[bool, str] = (True, "the loop turns")
        self.is_draining = False
        self.metrics = Metrics(window_s=30, clock=lambda: 50.0)
        self.sidecar = Sidecar(
            MetricsSettings(**({"port": 0} | settings)),
            Live(
                self.metrics,
                lambda: self.info,
                lambda: self.ready,
                observe_lag=self.metrics.observe_loop_lag,
            ),
            server_info=lambda: self.info,
            liveness=lambda: self.alive,
            is_draining=lambda: self.is_draining,
        )
        self.port = 0

    async def start(self) -> "Server":
        self.port = await self.sidecar.start()
        return self

    async def raw(self, request: bytes) -> bytes:
        """Everything that comes back for these bytes until the server closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            async with asyncio.timeout(GUARD_S):
                return await reader.read()
        finally:
            writer.close()
