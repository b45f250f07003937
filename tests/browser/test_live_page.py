"""The page on a real server under real load: it moves, agrees, survives a reload, and anybody can use it."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import axe_playwright_python
import grpc
import pytest
from playwright.async_api import Browser, Page, expect

from ml_inference_server.proto import inference_pb2 as pb
from tests.browser.page_kit import Watched
from tests.conftest import FakeServer, fake_server

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")


class Loaded:
    """A real server, and a load that can be stopped."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.url = server.url
        self._stopping = False
        self._callers = [asyncio.create_task(self._call(number)) for number in range(4)]

    async def _call(self, number: int) -> None:
        texts = [" ".join(["word"] * length) for length in (3, 9 + number, 30)]
        while not self._stopping:
            await self.server.stub.Embed(pb.EmbedRequest(texts=texts))
            await self.server.stub.Rerank(pb.RerankRequest(query="a query", documents=texts))
            with pytest.raises(grpc.aio.AioRpcError):
                await self.server.stub.Score(pb.ScoreRequest())

    async def stop(self) -> None:
        """Every request that was sent has its answer."""
        self._stopping = True
        await asyncio.gather(*self._callers)

    async def metrics(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            return await response.json()  # type: ignore[no-any-return]


@pytest.fixture
async def loaded() -> AsyncIterator[Loaded]:
    async with fake_server(model={"name": "fake:base_ms=2,per_token_us=5"}) as server:
        load = Loaded(server)
        yield load
        await load.stop()


async def shown(page: Page, selector: str) -> float:
    return float((await page.locator(selector).first.inner_text()).replace(",", ""))


async def test_figures_move_agree_with_metrics_and_survive_a_reload(browser: Browser, loaded: Loaded) -> None:
    page = await browser.new_page()
    watched = Watched(page)
    await page.goto(loaded.url)
    errors = page.locator('[data-field="totals.errors"]')
    await expect(errors).not_to_have_text("–")
    for _ in range(2):
        await expect(errors).not_to_have_text(await errors.inner_text())
    line = page.locator(".chart").first.locator(".line.k0")
    await expect(line).to_have_attribute("d", re.compile("(L[^L]*){3,}"))
    await loaded.stop()
    told = await loaded.metrics()
    await expect(errors).to_have_text(f"{told['totals']['errors']:,}")
    assert told["totals"]["errors"] > 3
    # From here on these stand still: the window is far longer than the test.
    for name in ("avg", "p50", "p95", "p99"):
        assert await shown(page, f'[data-field="latency_ms.{name}"]') == pytest.approx(
            told["latency_ms"][name], rel=0.006
        )
    batch = told["batch"]
    assert await shown(page, '[data-field="batch.mean_size"]') == pytest.approx(batch["mean_size"], rel=0.006)
    assert await shown(page, '[data-field="batch.padding_share"]') == pytest.approx(
        100 * batch["padding_share"], abs=0.06
    )
    rows = await page.locator("#waterfall tr").all()
    shown_ms = [float(await row.locator("td").nth(1).inner_text()) for row in rows]
    stages = ("receive", "tokenize", "queue", "engine", "scatter", "reply")
    assert shown_ms == pytest.approx([told["stages_ms"][name] for name in stages], rel=0.05, abs=0.001)
    assert sum(shown_ms) == pytest.approx(told["latency_ms"]["avg"], rel=0.02)
    await expect(page.locator("#errors li")).to_have_text([f"empty request{told['totals']['errors']:,}"])
    points = (await line.get_attribute("d") or "").count("L")
    await page.reload()
    # As many points at least, at once: they come from the server.
    await expect(line).to_have_attribute("d", re.compile(f"(L[^L]*){{{points},}}"))
    assert watched.complaints == []
    assert watched.hosts == {"127.0.0.1"}


async def test_points_of_a_chart_are_read_by_keyboard_and_pointer(browser: Browser, loaded: Loaded) -> None:
    page = await browser.new_page()
    await page.goto(loaded.url)
    chart = page.locator(".chart").first
    frame = chart.locator(".frame")
    await frame.focus()
    await expect(chart.locator(".hair")).to_have_attribute("hidden", "")
    for _ in range(2):
        await page.keyboard.press("ArrowLeft")
    await expect(chart.locator(".hair")).not_to_have_attribute("hidden", "")
    label = await frame.get_attribute("aria-label") or ""
    assert label.startswith("Throughput, ")
    assert not label.startswith("Throughput, now")
    assert "answered" in label
    await page.keyboard.press("Tab")
    await expect(chart.locator(".hair")).to_have_attribute("hidden", "")
    await frame.hover()
    await expect(chart.locator(".hair")).not_to_have_attribute("hidden", "")


async def test_the_range_and_the_colours_are_switched_by_keyboard(browser: Browser, loaded: Loaded) -> None:
    page = await browser.new_page(color_scheme="light")
    await page.goto(loaded.url)
    background = "getComputedStyle(document.body).backgroundColor"
    light = await page.evaluate(background)
    theme, hour = page.locator("#theme"), page.locator('[data-range="coarse"]')
    await theme.focus()
    for expected in ("Light", "Dark"):
        await page.keyboard.press("Enter")
        await expect(theme).to_have_text(expected)
    dark = await page.evaluate(background)
    assert dark != light
    await page.reload()
    await expect(theme).to_have_text("Dark")
    assert await page.evaluate(background) == dark
    await hour.focus()
    await page.keyboard.press("Space")
    await expect(hour).to_have_attribute("aria-pressed", "true")
    await expect(page.locator('[data-range="fine"]')).to_have_attribute("aria-pressed", "false")


async def faults(page: Page) -> list[str]:
    """Everything that axe-core finds."""
    await page.evaluate(AXE.read_text(encoding="utf-8"))
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{fault['impact']} {fault['id']}: {node['html'][:120]}"
        for fault in found["violations"]
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
async def test_axe_finds_no_fault(browser: Browser, loaded: Loaded, scheme: Any, width: int) -> None:
    info = loaded.server.state.as_dict()
    progress = {"name": "minilm", "row": 3, "rows": 8, "label": "batch 4", "done": 0.5, "eta_s": 75, "finished": False}
    async with aiohttp.ClientSession(loaded.url) as session:
        await session.post("/api/v1/benchmark", json=progress)
    page = await browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    await page.route(
        "**/info", lambda route: route.fulfill(json={**info, "fallbacks": ["mps is not here: ran on cpu"]})
    )
    await page.goto(loaded.url)
    await expect(page.locator("#fallbacks li")).to_be_visible()
    await expect(page.locator("#benchmark")).to_be_visible()
    await expect(page.locator("#waterfall tr")).to_have_count(6)
    assert await faults(page) == []
    await page.evaluate("document.getElementById('no-answer').hidden = false")
    await page.evaluate("document.getElementById('hints').hidden = false")
    assert await faults(page) == []
