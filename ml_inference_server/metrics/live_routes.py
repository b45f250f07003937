"""The HTTP of the live page: the stream of figures, the last hour, and the progress that a benchmark announces."""

import asyncio
from collections.abc import Callable

from aiohttp import web

from ml_inference_server.door.exposure import is_loopback
from ml_inference_server.metrics.benchmark_progress import MAX_BODY_BYTES
from ml_inference_server.metrics.http_rules import json_error
from ml_inference_server.metrics.view import View

LIVE_PATH, STREAM_PATH, HISTORY_PATH = FIGURES_PATHS = ("/api/v1/live", "/api/v1/stream", "/api/v1/history")
BENCHMARK_PATH = "/api/v1/benchmark"
MAX_STREAMS = 32
WRITE_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 5.0
_NOT_STORED = {"Cache-Control": "no-store"}


class LiveRoutes:
    """Handlers round a `View`. is_allowed: whether who sent this request may still read what it asked for."""

    def __init__(self, view: View, is_allowed: Callable[[web.Request], bool]) -> None:
        self._view = view
        self._is_allowed = is_allowed
        self._streams = 0

    def add_to(self, router: web.UrlDispatcher) -> None:
        """The paths that docs/metrics.md lists under /api/v1."""
        router.add_get(LIVE_PATH, self._get_live)
        router.add_get(STREAM_PATH, self._get_stream, allow_head=False)
        router.add_get(HISTORY_PATH, self._get_history)
        router.add_post(BENCHMARK_PATH, self._post_benchmark)

    async def _get_live(self, _: web.Request) -> web.Response:
        return web.json_response(text=await self._view.message(), headers=_NOT_STORED)

    async def _get_history(self, _: web.Request) -> web.Response:
        return web.json_response(text=await self._view.history(), headers=_NOT_STORED)

    async def _get_stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events. A reader that does not read is cut off after WRITE_TIMEOUT_S; the page comes back."""
        if self._streams >= MAX_STREAMS:
            raise web.HTTPServiceUnavailable
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no", **_NOT_STORED}
        )
        self._streams += 1
        try:
            await response.prepare(request)
            await response.write(b"retry: 2000\n\n")
            async for message in self._view.listen():
                if not self._is_allowed(request):
                    break
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await response.write(f"data: {message}\n\n".encode())
        except (ConnectionResetError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._streams -= 1
        return response

    async def _post_benchmark(self, request: web.Request) -> web.Response:
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        if not peer or not is_loopback(peer[0]) or "Origin" in request.headers:
            raise web.HTTPForbidden
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                # One byte more than allowed: a body that is too long differs from one that just fits.
                body = await _read_at_most(request, MAX_BODY_BYTES + 1)
        except TimeoutError:
            raise web.HTTPRequestTimeout from None
        if len(body) > MAX_BODY_BYTES:
            raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, len(body))
        try:
            await self._view.announce(body)
        except ValueError as error:
            return json_error(400, f"not the progress of a benchmark: {error}"[:200])
        return web.Response(status=204, headers=_NOT_STORED)


async def _read_at_most(request: web.Request, limit: int) -> bytes:
    body = b""
    while len(body) < limit and (chunk := await request.content.read(limit - len(body))):
        body += chunk
    return body
