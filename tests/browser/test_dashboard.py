"""What the page shows, and what it does when the server stops, fails or says something hostile."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from playwright.async_api import Browser, expect

from ml_inference_server.metrics import live, live_routes
from tests.browser.page_kit import HOSTILE, Server, Watched


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(live, "TICK_S", 0.1)
    started = Server()
    await started.start()
    yield started
    await started.sidecar.stop()


async def opened(browser: Browser, server: Server, **context: Any) -> Watched:
    page = await browser.new_page(**context)
    watched = Watched(page)
    await page.goto(f"http://127.0.0.1:{server.port}/")
    return watched


@pytest.fixture
async def watched(browser: Browser, server: Server) -> AsyncIterator[Watched]:
    watched = await opened(browser, server)
    await expect(watched.page.locator("#status-text")).to_have_text("ready")
    yield watched
    assert watched.hosts == {"127.0.0.1"}


async def test_figures_agree_with_metrics(server: Server, watched: Watched) -> None:
    page = watched.page
    await expect(watched.field("requests_per_s")).to_have_text("0")
    await expect(watched.field("latency_ms.p50")).to_have_text("–")
    server.now_s += 10
    server.answer("Embed", times=1200, seconds=0.0123, texts=4)
    server.answer("Rerank", times=333, seconds=0.456, pairs=7)
    server.answer("Score", "RESOURCE_EXHAUSTED", times=5)
    server.batch()
    server.metrics.observe_loop_lag(0.0034)
    server.metrics.request_started("EmbedStream")
    await expect(watched.field("requests_per_s")).to_have_text("154")
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{server.port}/metrics") as response,
    ):
        told = await response.json()
    for name in (
        "requests_per_s", "answered_per_s", "texts_per_s", "pairs_per_s", "tokens_per_s", "errors_per_s",
        "latency_ms.avg", "latency_ms.p50", "latency_ms.p95", "latency_ms.p99", "batch.mean_size",
        "batch.mean_compute_ms",
        "queue.texts", "queue.tokens", "queue.batches_in_flight", "totals.errors", "truncated_texts",
    ):  # fmt: skip
        value: Any = told
        for key in name.split("."):
            value = value[key]
        shown = float((await watched.field(name).first.inner_text()).replace(",", ""))
        assert shown == pytest.approx(value, rel=0.006), name
    await expect(watched.field("batch.padding_share")).to_have_text("10.0")
    await expect(page.locator("#padding-note")).to_have_text("costs about 5 ms of each 50 ms batch")
    await expect(page.locator("#closed-by li")).to_have_text(["tokens100 %"])
    await expect(page.locator("#errors li")).to_have_text(["queue full5"])
    await expect(page.locator("#error-share")).to_have_text("0.3 % of the requests: queue full")
    await expect(page.locator("#in-flight")).to_have_text("1")
    await expect(page.locator("#in-flight-by li")).to_have_text(["EmbedStream1"])
    await expect(page.locator("#batch-texts .unseen")).to_have_text(["17–32 texts: 1 (100 %)"])
    await expect(page.locator("#text-tokens .unseen")).to_have_text(
        ["33–48 tokens: 20 (83 %)", "49–64 tokens: 4 (17 %)"]
    )
    stages = page.locator("#waterfall tr")
    await expect(stages.locator(".name")).to_have_text(["receive", "tokenise", "queue", "engine", "scatter", "reply"])
    shown_ms = [float(await row.locator("td").nth(1).inner_text()) for row in await stages.all()]
    assert sum(shown_ms) == pytest.approx(told["stages_ms"]["total"], rel=0.01)
    engine = await stages.nth(3).locator(".stage").bounding_box()
    track = await stages.nth(3).locator(".wide").bounding_box()
    assert engine is not None
    assert track is not None
    assert engine["width"] / track["width"] == pytest.approx(0.7, abs=0.06)
    await expect(page.locator("#waterfall-note")).to_contain_text("most of it, 70 %, in engine")
    await expect(page.locator("#hints li").first).to_contain_text("The queue is full: 5 requests were refused")
    shown_memory, unit = (await watched.field("rss_bytes").inner_text()).split()
    assert float(shown_memory) * {"MiB": 2**20, "GiB": 2**30}[unit] == pytest.approx(told["rss_bytes"], rel=0.02)
    assert await page.locator("#gpu").is_hidden()
    assert watched.complaints == []


async def test_what_runs_is_shown_beside_what_was_requested(watched: Watched) -> None:
    page = watched.page
    await expect(page.locator("h1")).to_have_text("some/model on cpu, float32")
    await expect(page.locator("#experiment")).to_have_text("· trial / batched")
    rows = page.locator("#requested tr")
    await expect(rows).to_have_text(
        ["Modelsome/modelsome/model", "Backendpytorchpytorch", "Deviceautocpu", "Precisionnot quantizedfloat32"]
    )
    await expect(page.locator("#requested tr.differs")).to_have_count(0)
    await expect(page.locator("#details")).to_contain_text("22,713,216")
    await expect(page.locator("#fallbacks")).to_be_hidden()
    assert watched.complaints == []


async def test_every_fallback_is_a_banner(browser: Browser, server: Server) -> None:
    server.info["fallbacks"] = ["mps is not here: ran on cpu", "fp16 is slow here: ran bf16"]
    server.info["requested"]["device"] = "mps"
    server.info["resolved"]["random_weights"] = True
    page = (await opened(browser, server)).page
    banners = page.locator("#fallbacks li")
    await expect(banners).to_have_count(3)
    await expect(banners.nth(0)).to_have_text("mps is not here: ran on cpu")
    await expect(banners.nth(1)).to_be_visible()
    await expect(banners.nth(2)).to_contain_text("random")
    await expect(page.locator("#requested tr.differs th")).to_have_text(["Device"])


async def test_a_hostile_name_stays_text(browser: Browser, server: Server) -> None:
    resolved = server.info["resolved"]
    for place in (server.info["requested"], resolved):
        place["model"] = HOSTILE
    server.info["title"] = server.info["experiment"] = resolved["device_name"] = HOSTILE
    server.info["fallbacks"] = [HOSTILE]
    server.info["settings"] = {HOSTILE: HOSTILE}
    resolved["versions"] = {HOSTILE: HOSTILE}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        progress = {"row": 1, "rows": 2, "done": 0.5, "eta_s": 9, "finished": False}
        await session.post("/api/v1/benchmark", json={"name": HOSTILE, "label": HOSTILE, **progress})
    watched = await opened(browser, server)
    await expect(watched.page.locator("h1")).to_have_text(HOSTILE)
    await expect(watched.page.locator("#fallbacks li")).to_have_text(HOSTILE)
    await expect(watched.page.locator("#requested tr").first).to_contain_text(HOSTILE)
    await expect(watched.page.locator("#benchmark-name")).to_have_text(f"Benchmark {HOSTILE}")
    assert await watched.page.locator("img").count() == 0
    assert await watched.page.locator("script:not([src])").count() == 0
    assert watched.complaints == []
    assert watched.hosts == {"127.0.0.1"}


async def test_loading_readiness_and_the_loaded_model_are_followed(browser: Browser, server: Server) -> None:
    server.ready = (False, "the model is loading")
    resolved, server.info["resolved"] = server.info["resolved"], None
    watched = await opened(browser, server)
    page = watched.page
    await expect(page.locator("#status-text")).to_have_text("not ready: the model is loading")
    await expect(page.locator("#requested tr").nth(2)).to_have_text("Deviceautoloading …")
    server.info["resolved"], server.ready = resolved, (True, "serving")
    await expect(page.locator("#status-text")).to_have_text("ready")
    await expect(page.locator("#requested tr").nth(2)).to_have_text("Deviceautocpu")
    assert watched.complaints == []


async def test_a_stopped_server_shows_as_stopped_and_recovers(server: Server, watched: Watched) -> None:
    page, banner = watched.page, watched.page.locator("#no-answer")
    await expect(banner).to_be_hidden()
    await expect(page.locator("#feed")).to_have_text("live")
    assert watched.complaints == []
    await server.sidecar.stop()
    await expect(page.locator("#status-text")).to_have_text("no answer")
    await expect(banner).to_contain_text("The server does not answer. The figures below are from ")
    server.info["title"] = "another model"
    await server.start()
    await expect(page.locator("#status-text")).to_have_text("ready")
    await expect(banner).to_be_hidden()
    await expect(page.locator("h1")).to_have_text("another model")
    await expect(page.locator("#feed")).to_have_text("live")
    assert all("net::ERR_" in complaint for complaint in watched.complaints), watched.complaints  # Chromium's own


async def test_without_a_stream_it_polls_until_there_is_one(
    browser: Browser, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_routes, "MAX_STREAMS", 0)
    page = await browser.new_page()
    await page.clock.install()
    await page.goto(f"http://127.0.0.1:{server.port}/")
    await expect(page.locator("#feed")).to_have_text("live, by polling")
    await expect(page.locator("#status-text")).to_have_text("ready")
    server.now_s += 10
    server.answer("Embed", times=50)
    await expect(page.locator('[data-field="requests_per_s"]')).to_have_text("5")
    monkeypatch.undo()
    await page.clock.fast_forward(11_000)
    await expect(page.locator("#feed")).to_have_text("live")


async def test_a_failing_server_is_told_from_a_silent_one(server: Server, watched: Watched) -> None:
    def fail() -> int:
        raise RuntimeError

    server.metrics.watch(queue_texts=fail, queue_tokens=int, batches_in_flight=int)
    await expect(watched.page.locator("#no-answer")).to_contain_text("answers with an error (HTTP 500)", timeout=10_000)


async def test_gpu_memory_appears_where_there_is_a_gpu(
    browser: Browser, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = {"kind": "cuda", "name": "Some GPU", "memory_bytes": 3 << 30, "reserved_bytes": 0, "total_bytes": 16 << 30}
    monkeypatch.setattr("ml_inference_server.metrics.system.gpu_figures", lambda _: gpu)
    server.now_s += 2
    page = (await opened(browser, server)).page
    await expect(page.locator("#gpu")).to_have_text("Some GPU: 3.00 GiB of 16.00 GiB")
    await expect(page.locator(".chart").last.locator(".legend")).to_contain_text("GPU3,072 MiB")


async def test_a_running_benchmark_is_shown_and_forgotten(server: Server, watched: Watched) -> None:
    page = watched.page
    await expect(page.locator("#benchmark")).to_be_hidden()
    progress = {"name": "minilm", "row": 3, "rows": 8, "label": "batch 4, 8 in flight", "done": 0.5, "eta_s": 75}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        await session.post("/api/v1/benchmark", json={**progress, "finished": False})
        await expect(page.locator("#benchmark-name")).to_have_text("Benchmark minilm")
        await expect(page.locator("#benchmark-row")).to_have_text("row 3 of 8: batch 4, 8 in flight · 50 % of the row")
        await expect(page.locator("#benchmark-eta")).to_have_text("about 1 min 15 s left")
        assert await page.locator("#benchmark-done").evaluate("bar => bar.value") == pytest.approx(2.5 / 8)
        await session.post("/api/v1/benchmark", json={**progress, "finished": True})
    await expect(page.locator("#benchmark")).to_be_hidden()


async def test_switched_off_recording_is_said(server: Server, watched: Watched) -> None:
    await expect(watched.page.locator("#not-recording")).to_be_hidden()
    server.metrics.enabled = False
    await expect(watched.page.locator("#not-recording")).to_have_text("Nothing is recorded: metrics.enabled is false.")


@pytest.mark.parametrize("width", [320, 390, 1280])
async def test_nothing_is_wider_than_the_screen(browser: Browser, server: Server, width: int) -> None:
    server.info["requested"]["model"] = server.info["resolved"]["model"] = "a/" + "very-long-name" * 12
    server.answer("Embed", times=40, seconds=1234.5)
    server.batch()
    page = (await opened(browser, server, viewport={"width": width, "height": 800})).page
    await expect(page.locator("#requested tr")).to_have_count(4)
    await expect(page.locator("#waterfall tr")).to_have_count(6)
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
