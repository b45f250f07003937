"""The stream of the live page, its history, and the progress that a benchmark announces."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from ml_inference_server.door.exposure import is_loopback
from ml_inference_server.metrics import benchmark_progress, live, live_routes
from ml_inference_server.metrics.history import COLUMNS
from tests.integration.sidecar_kit import GUARD_S, Server

PROGRESS = {"name": "minilm", "row": 2, "rows": 9, "label": "batch 4, 8 in flight", "done": 0.25, "eta_s": 12.5}


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(live, "TICK_S", 0.01)
    started = await Server().start()
    yield started
    await started.sidecar.stop()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        yield session


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async with asyncio.timeout(GUARD_S):
        async for line in response.content:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


async def answers(client: aiohttp.ClientSession, path: str, status: int) -> None:
    """Ask until the answer has this status."""
    got = None
    async with asyncio.timeout(GUARD_S):
        while got != status:
            async with client.get(path) as response:
                got = response.status


async def test_the_stream_tells_each_tick_what_metrics_tells(server: Server, client: aiohttp.ClientSession) -> None:
    async with client.get("/api/v1/stream") as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
        stream = events(response)
        first = await anext(stream)
        assert first["figures"]["totals"]["pairs"] == 0
        server.metrics.request_started("Score")
        server.metrics.request_finished("Score", "OK", 0.02, pairs=7)
        async for message in stream:
            if message["figures"]["totals"]["pairs"]:
                break
    assert message["figures"]["totals"]["pairs"] == 7
    assert len(message["row"]) == len(COLUMNS)
    async with client.get("/metrics") as response:
        assert set(message["figures"]) == set(await response.json())
    async with client.get("/api/v1/live") as response:
        assert set(await response.json()) == set(message) == {"figures", "row", "coarse_row"}


async def test_the_history_holds_what_was_streamed(client: aiohttp.ClientSession) -> None:
    rows, coarse = [], []
    async with client.get("/api/v1/stream") as response:
        async for message in events(response):
            rows.append(message["row"])
            coarse += [message["coarse_row"]] if message["coarse_row"] else []
            if len(rows) == 25:
                break
    async with client.get("/api/v1/history") as response:
        history = await response.json()
    assert (history["schema_version"], history["columns"]) == (1, list(COLUMNS))
    assert all(row in history["fine"]["rows"] for row in rows)
    assert coarse
    assert all(row in history["coarse"]["rows"] for row in coarse)


async def test_a_stop_ends_the_streams_at_once() -> None:
    server = await Server().start()
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
        session.get("/api/v1/stream") as response,
        asyncio.timeout(GUARD_S),
    ):
        await anext(events(response))
        stopping = asyncio.create_task(server.sidecar.stop())
        await response.content.read()
        await stopping


async def test_streams_are_limited_and_freed(client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_routes, "MAX_STREAMS", 1)
    async with client.get("/api/v1/stream") as first:
        await anext(events(first))
        async with client.get("/api/v1/stream") as second:
            assert second.status == 503
    await answers(client, "/api/v1/stream", 200)  # the server sees the close when it writes


async def test_a_failing_figure_is_an_error_until_it_is_there_again(
    server: Server, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise RuntimeError("no figure")

    server.metrics.watch(queue_texts=fail, queue_tokens=int, batches_in_flight=int)
    await answers(client, "/api/v1/live", 500)
    server.metrics.watch(queue_texts=int, queue_tokens=int, batches_in_flight=int)
    await answers(client, "/api/v1/live", 200)
    assert caplog.text.count("the live figures could not be put together") == 1


async def announce(client: aiohttp.ClientSession, **changes: Any) -> tuple[int, str]:
    async with client.post("/api/v1/benchmark", json={**PROGRESS, "finished": False, **changes}) as response:
        return response.status, await response.text()


async def shown(client: aiohttp.ClientSession) -> Any:
    async with client.get("/metrics") as response:
        return (await response.json())["benchmark"]


async def test_a_benchmark_is_shown_until_it_has_finished(client: aiohttp.ClientSession) -> None:
    assert await shown(client) is None
    assert await announce(client) == (204, "")
    assert await shown(client) == PROGRESS
    assert await announce(client, done=1, eta_s=None) == (204, "")
    assert await shown(client) == {**PROGRESS, "done": 1.0, "eta_s": None}
    await announce(client, finished=True)
    assert await shown(client) is None


async def test_a_benchmark_that_falls_silent_is_forgotten(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    await announce(client)
    monkeypatch.setattr(benchmark_progress, "SILENCE_S", -1.0)
    assert await shown(client) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"row": 0}, "row: "),
        ({"row": 10}, "row 10 of 9"),
        ({"row": "2"}, "row: "),
        ({"row": 1.5}, "row: "),
        ({"done": 1.01}, "done: "),
        ({"done": float("nan")}, "done: "),
        ({"eta_s": -1}, "eta_s: "),
        ({"label": "x" * 201}, "label: "),
        ({"name": None}, "name: "),
        ({"finished": 1}, "finished: "),
        ({"more\r\nX: y": 1}, "not permitted"),
    ],
)
async def test_wrong_progress_is_refused_with_the_field(
    client: aiohttp.ClientSession, changes: dict[str, Any], says: str
) -> None:
    status, text = await announce(client, **changes)
    assert status == 400
    assert says in json.loads(text)["error"]["message"]
    assert await shown(client) is None


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"", {}, 400),
        (b"\xff", {}, 400),
        (json.dumps({**PROGRESS, "label": "x" * 4096}).encode(), {}, 413),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Origin": "http://evil.example"}, 403),
        (b"{}", {"Host": "evil.example"}, 421),
    ],
)
async def test_what_is_no_progress_is_refused(
    client: aiohttp.ClientSession, body: bytes, headers: dict[str, str], status: int
) -> None:
    async with client.post(
        "/api/v1/benchmark", data=body, headers={"Content-Type": "application/json"} | headers
    ) as response:
        assert response.status == status


async def test_a_body_without_an_end_is_cut_off(server: Server) -> None:
    head = b"POST /api/v1/benchmark HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    answer = await server.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + 3 * chunks)
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("peer", "is_one"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False),
     ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False)],
)  # fmt: skip
def test_only_this_machine_may_announce(peer: str, is_one: bool) -> None:
    assert is_loopback(peer) is is_one


async def test_only_configured_origins_may_read() -> None:
    server = await Server(cors_origins=["https://status.example"], hosts=["proxy.example"]).start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
            for origin, allowed in (
                ("https://status.example", "https://status.example"),
                ("https://evil.example", None),
            ):
                for path in ("/metrics", "/api/v1/history"):
                    headers = {"Origin": origin, "Host": "proxy.example"}
                    async with session.get(path, headers=headers) as response:
                        assert response.status == 200
                        assert response.headers.get("Access-Control-Allow-Origin") == allowed
    finally:
        await server.sidecar.stop()
