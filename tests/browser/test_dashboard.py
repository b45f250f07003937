import copy
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from playwright.async_api import Browser, Locator, Page, expect

from ml_inference_server.metrics.http_server import Sidecar
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.utils.config import MetricsSettings

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(1)</script>'
INFO: dict[str, Any] = {
    "server_version": "0.1.0",
    "experiment": "trial",
    "variant": "batched",
    "requested": {"model": "some/model", "backend": "pytorch", "device": "auto", "quantization": "none"},
    "resolved": {
        "backend": "pytorch",
        "model": "some/model",
        "task": "embedding",
        "device": "cpu",
        "device_name": "Some CPU",
        "dtype": "float32",
        "quantized_layers": 0,
        "execution_provider": "PyTorch",
        "instruction_set": "AVX2",
        "threads": 1,
        "concurrency": 2,
        "max_tokens": 256,
        "dimension": 384,
        "weights_sha256": "0123456789abcdef" * 4,
        "weights_file": "model.safetensors",
        "source": "local folder",
        "parameters": 22_713_216,
        "random_weights": False,
        "versions": {"torch": "2.13.0"},
    },
    "fallbacks": [],
    "title": "some/model on cpu, float32",
    "settings": {"name": "trial"},
    "pid": 1,
    "instance_id": "abc",
}


class Server:
    """A sidecar whose clock, information and readiness the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.info = copy.deepcopy(INFO)
        self.ready = (True, "serving")
        self.metrics = Metrics(window_s=30, clock=lambda: self.now_s)
        self.port = 0

    async def start(self) -> None:
        """Listen; again on the same port after a stop."""
        self.sidecar = Sidecar(
            MetricsSettings(port=self.port),
            self.metrics,
            server_info=lambda: self.info,
            readiness=lambda: self.ready,
            liveness=lambda: (True, "ok"),
        )
        self.port = await self.sidecar.start()

    def answer(self, method: str, code: str = "OK", *, times: int = 1, seconds: float = 0.02, **answered: int) -> None:
        for _ in range(times):
            self.metrics.request_started(method)
            self.metrics.request_finished(method, code, seconds, **answered)

    def batch(self, texts: int = 24) -> None:
        self.metrics.batch_finished(
            texts=texts,
            tokens=900,
            padded_tokens=1000,
            queue_s=[0.004] * texts,
            compute_s=0.05,
            closed_by="tokens",
            ok=True,
        )


class Watched:
    """A page, what it asked for, and what it complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.hosts: set[str | None] = set()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))

    def field(self, name: str) -> Locator:
        return self.page.locator(f'[data-field="{name}"]')


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    started = Server()
    await started.start()
    yield started
    await started.sidecar.stop()


@pytest.fixture
async def watched(browser: Browser, server: Server) -> AsyncIterator[Watched]:
    page = await browser.new_page()
    watched = Watched(page)
    await page.goto(f"http://127.0.0.1:{server.port}/")
    await expect(page.locator("#status-text")).to_have_text("ready")
    yield watched
    assert watched.hosts == {"127.0.0.1"}


async def test_figures_move_and_agree_with_metrics(server: Server, watched: Watched) -> None:
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
        "requests_per_s", "texts_per_s", "pairs_per_s", "tokens_per_s", "errors_per_s", "latency_ms.avg",
        "latency_ms.p50", "latency_ms.p95", "latency_ms.p99", "batch.mean_size", "batch.mean_compute_ms",
        "batch.mean_queue_ms", "queue.texts", "queue.tokens", "queue.batches_in_flight", "totals.requests",
        "totals.pairs", "loop_lag_ms.p99",
    ):  # fmt: skip
        value: Any = told
        for key in name.split("."):
            value = value[key]
        shown = float((await watched.field(name).inner_text()).replace(",", ""))
        assert shown == pytest.approx(value, rel=0.006), name
    await expect(watched.field("batch.padding_share")).to_have_text("10.0")
    await expect(watched.page.locator("#closed-by")).to_have_text("closed by tokens 100\u00a0%")
    await expect(watched.page.locator("#error-codes")).to_have_text("since the start: 5 resource exhausted")
    await expect(watched.page.locator("#in-flight")).to_have_text("1")
    await expect(watched.page.locator("#in-flight-by")).to_have_text("EmbedStream 1")
    mebibytes = float((await watched.field("rss_bytes").inner_text()).replace(",", ""))
    unit = await watched.page.locator('[data-unit="rss_bytes"]').inner_text()
    assert mebibytes * {"MiB": 2**20, "GiB": 2**30}[unit] == pytest.approx(told["rss_bytes"], rel=0.02)
    assert await watched.page.locator("#gpu").is_hidden()
    assert "L" in (await watched.page.locator('[data-spark="requests_per_s"] .line').get_attribute("d") or "")
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
    page = await browser.new_page()
    await page.goto(f"http://127.0.0.1:{server.port}/")
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
    watched = Watched(await browser.new_page())
    await watched.page.goto(f"http://127.0.0.1:{server.port}/")
    await expect(watched.page.locator("h1")).to_have_text(HOSTILE)
    await expect(watched.page.locator("#fallbacks li")).to_have_text(HOSTILE)
    await expect(watched.page.locator("#requested tr").first).to_contain_text(HOSTILE)
    assert await watched.page.locator("img").count() == 0
    assert await watched.page.locator("script").count() == 1
    assert watched.complaints == []
    assert watched.hosts == {"127.0.0.1"}


async def test_loading_readiness_and_the_loaded_model_are_followed(browser: Browser, server: Server) -> None:
    server.ready = (False, "the model is loading")
    resolved, server.info["resolved"] = server.info["resolved"], None
    watched = Watched(await browser.new_page())
    page = watched.page
    await page.goto(f"http://127.0.0.1:{server.port}/")
    await expect(page.locator("#status-text")).to_have_text("not ready: the model is loading")
    await expect(page.locator("#requested tr").nth(2)).to_have_text("Deviceautoloading …")
    server.info["resolved"], server.ready = resolved, (True, "serving")
    await expect(page.locator("#status-text")).to_have_text("ready")
    await expect(page.locator("#requested tr").nth(2)).to_have_text("Deviceautocpu")
    assert watched.complaints == []


async def test_a_stopped_server_shows_as_stopped_and_recovers(server: Server, watched: Watched) -> None:
    page, banner = watched.page, watched.page.locator("#no-answer")
    await expect(banner).to_be_hidden()
    assert watched.complaints == []
    await server.sidecar.stop()
    await expect(page.locator("#status-text")).to_have_text("no answer")
    await expect(banner).to_contain_text("The server does not answer. The figures below are from ")
    server.info["title"] = "another model"
    await server.start()
    await expect(page.locator("#status-text")).to_have_text("ready")
    await expect(banner).to_be_hidden()
    await expect(page.locator("h1")).to_have_text("another model")
    assert all("net::ERR_" in complaint for complaint in watched.complaints), watched.complaints  # Chromium's own


async def test_a_failing_server_is_told_from_a_silent_one(server: Server, watched: Watched) -> None:
    def fail() -> int:
        raise RuntimeError

    server.metrics.watch(queue_texts=fail, queue_tokens=int, batches_in_flight=int)
    await expect(watched.page.locator("#no-answer")).to_contain_text("answers with an error (HTTP 500)")


async def test_gpu_memory_appears_where_there_is_a_gpu(
    browser: Browser, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = server.metrics.snapshot()
    gpu = {
        "kind": "cuda",
        "name": "Some GPU",
        "memory_bytes": 3 * 2**30,
        "reserved_bytes": 0,
        "total_bytes": 16 * 2**30,
    }
    monkeypatch.setattr(server.metrics, "snapshot", lambda: snapshot | {"gpu": gpu})
    page = await browser.new_page()
    await page.goto(f"http://127.0.0.1:{server.port}/")
    await expect(page.locator("#gpu")).to_be_visible()
    await expect(page.locator("#gpu .figure")).to_have_text("3.00 GiB")
    await expect(page.locator("#gpu-name")).to_have_text("Some GPU · of 16.00 GiB")


@pytest.mark.parametrize("width", [320, 390, 1280])
async def test_nothing_is_wider_than_the_screen(browser: Browser, server: Server, width: int) -> None:
    server.info["requested"]["model"] = server.info["resolved"]["model"] = "a/" + "very-long-name" * 12
    page = await browser.new_page(viewport={"width": width, "height": 800})
    await page.goto(f"http://127.0.0.1:{server.port}/")
    await expect(page.locator("#requested tr")).to_have_count(4)
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
