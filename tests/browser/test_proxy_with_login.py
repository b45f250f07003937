"""The page behind a reverse proxy that asks for a name and a password."""

from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from playwright.async_api import Browser, expect

from ml_inference_server.metrics import live, live_routes
from tests.browser.page_kit import Server, Watched

NAME, PASSWORD = "anna", "a secret"


class Proxy:
    """Passes on what comes with the password, bit by bit as it comes; the rest is asked for it."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream = f"http://127.0.0.1:{upstream_port}"
        self.port = 0
        self.refused: list[str] = []
        self.passed: list[str] = []

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._session = aiohttp.ClientSession(auto_decompress=False)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != aiohttp.encode_basic_auth(NAME, PASSWORD):
            self.refused.append(request.path)
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="figures"'})
        self.passed.append(request.path)
        kept = {name: value for name, value in request.headers.items() if name in ("Host", "Accept", "Origin")}
        async with self._session.get(self._upstream + request.path, headers=kept) as reply:
            answer = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.headers["Content-Type"]})
            await answer.prepare(request)
            async for chunk in reply.content.iter_any():
                await answer.write(chunk)
        return answer


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    monkeypatch.setattr(live, "TICK_S", 0.1)
    server = Server()
    await server.start()
    started = Proxy(server.port)
    await started.start()
    yield started
    await started.stop()
    await server.sidecar.stop()


async def opened(browser: Browser, proxy: Proxy) -> Watched:
    context = await browser.new_context(http_credentials={"username": NAME, "password": PASSWORD})
    page = await context.new_page()
    watched = Watched(page)
    await page.goto(f"http://127.0.0.1:{proxy.port}/")
    return watched


async def test_the_page_is_live_behind_a_login(browser: Browser, proxy: Proxy) -> None:
    watched = await opened(browser, proxy)
    await expect(watched.page.locator("#status-text")).to_have_text("ready")
    await expect(watched.page.locator("#feed")).to_have_text("live")
    await expect(watched.page.locator("#no-answer")).to_be_hidden()
    assert {"/info", "/api/v1/history", "/api/v1/stream"} <= set(proxy.passed)
    assert set(proxy.refused) <= {"/"}, "the browser asked for the password once and sends it with everything"
    assert watched.hosts == {"127.0.0.1"}


async def test_polling_works_behind_a_login(browser: Browser, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_routes, "MAX_STREAMS", 0)
    watched = await opened(browser, proxy)
    await expect(watched.page.locator("#feed")).to_have_text("live, by polling")
    await expect(watched.page.locator("#status-text")).to_have_text("ready")
    assert "/api/v1/live" in proxy.passed
