"""What the benchmark asks of a server's HTTP port, and tells it."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from ml_inference_server.benchmark.measure.progress import Progress
from ml_inference_server.benchmark.target.counters import ServerCounters, difference


@pytest.fixture
async def told() -> AsyncIterator[tuple[int, list[dict[str, Any]]]]:
    """(port, everything that is posted to it)."""
    bodies: list[dict[str, Any]] = []

    async def take(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post("/api/v1/benchmark", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield runner.addresses[0][1], bodies
    await runner.cleanup()


async def test_progress_is_told_once_a_second_at_most_and_once_at_the_end(
    told: tuple[int, list[dict[str, Any]]],
) -> None:
    port, bodies = told
    progress = Progress("trial", rows=2, total=2.0)
    async with ServerCounters("127.0.0.1", port) as sidecar:
        progress.sidecar = sidecar
        progress.begin("batch 1, concurrency 1", 1.0)
        for step in range(1000):
            progress.at(step / 1000)
        await progress.leave()
    progress.close()
    first, *_, last = bodies
    assert len(bodies) <= 3, "a thousand steps in a moment"
    assert first == {
        "name": "trial", "row": 1, "rows": 2, "label": "batch 1, concurrency 1", "done": 0.0, "eta_s": None,
        "finished": False,
    }  # fmt: skip
    assert (last["finished"], last["done"], last["eta_s"]) == (True, 1.0, None)


@pytest.mark.parametrize("port", [0, 9], ids=["not known", "nobody there"])
async def test_a_server_without_a_metrics_port_is_measured_all_the_same(port: int) -> None:
    async with ServerCounters("127.0.0.1", port) as sidecar:
        sidecar.announce({"name": "trial"})
        await sidecar.finish({"name": "trial"})
        assert await sidecar.counters() is None
    assert difference(None, {}) is None


async def test_a_foreign_answer_is_no_counter(told: tuple[int, list[dict[str, Any]]]) -> None:
    async with ServerCounters("127.0.0.1", told[0]) as sidecar:
        assert await sidecar.counters() is None, "404"
